"""A silo's side of one attempt at one round of masking on a random graph.

Bell et al., CCS 2020, against an active server; ``docs/protocol.md`` has the argument and ADR 25
the choices. The adversary is that of :mod:`~.masking.silo`: the server and up to c silos, fixed
before the attempt. Below, i is this silo, out(i) the silos that it drew, in(i) those that drew it.

What is new against the complete graph is that no silo sees more than its neighbourhood, although
one list of survivors must hold for all. Two things make up for it. A silo challenges the server to
show a few of the signatures over the list that the server has committed to. And it opens a seed
only of a silo that masked its upload for the same delivery.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from securefedcollm.aggregation.answering import AnsweringSilo
from securefedcollm.aggregation.checks import (
    check_announced,
    check_signature,
    refuse,
)
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Dealer,
    Draw,
    Letter,
    Letters,
    Members,
    Neighbours,
    Post,
    Proof,
    Shares,
    Survivors,
    Tally,
)
from securefedcollm.aggregation.masking.messages import Advertise, Agreement, Refusal
from securefedcollm.aggregation.masking.parcels import DealerFaultError, Parcels, refuse_key
from securefedcollm.aggregation.masking.upload import Upload, UploadBuffer, words_digest
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode, sign
from securefedcollm.aggregation.roles import SERVER, Journal, Transcript
from securefedcollm.aggregation.steps import SILO_STEPS, Step
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import (
    KEY_BYTES,
    AgreementKey,
    RandomSource,
    SigningKey,
    verify,
    well_spelled,
)


@dataclass(repr=False)
class _Secrets:
    """The secrets that must not outlive the attempt."""

    buffer: UploadBuffer
    mask_secret: bytes
    share_secret: bytes
    seed: bytes
    draw: bytes
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Dealer in in(i) -> (seed share, mask-key share) that this silo holds."""

    def close(self) -> None:
        self.mask_secret = self.share_secret = self.seed = self.draw = b""
        self.held.clear()
        self.buffer.words[:] = 0  # the vector, until it is masked and has left


class GraphSiloRound(AnsweringSilo[_Secrets]):
    """Answers the server's seven requests, in order, once each. Not thread-safe.

    Args:
        header: as there; its suite names k and t.
        random: read for the mask secret, share secret, seed and draw (32 bytes each), then for the
            two dealings, then for the challenge (32 bytes).

    The other arguments are those of :class:`~.masking.silo.SiloRound`.

    Raises:
        LocalProtocolError: header, roster, identity, graph and vector do not belong together.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        name: str,
        signing_key: SigningKey,
        vector: packing.Bounded,
        vector_id: bytes,
        journal: Journal,
        random: RandomSource = os.urandom,
        threads: int = 1,
    ) -> None:
        super().__init__(
            header=header,
            roster=roster,
            name=name,
            signing_key=signing_key,
            vector_id=vector_id,
            journal=journal,
            steps=SILO_STEPS["masking-graph"],
        )
        self._graph = choice.graph_of(header)
        self._random = random
        self._threads = threads
        buffer = UploadBuffer(header.parameters)
        packing.pack(vector, header.parameters, buffer.words, threads)
        mask_secret, share_secret, seed, draw = (random(KEY_BYTES) for _ in range(4))
        self._hold(_Secrets(buffer, mask_secret, share_secret, seed, draw))
        # Public transcript, filled step by step.
        self._own_keys: Advertise
        self._members: tuple[int, ...] = ()
        self._roll_digest = b""
        self._drawn: tuple[int, ...] = ()
        self._peers: dict[int, Advertise | Dealer] = {}
        self._dealers: tuple[int, ...] = ()
        self._delivery_digest = b""
        self._drawn_by: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._lists_digest = b""
        self._tally: Tally
        self._signers: tuple[int, ...] = ()
        self._challenged: list[int] = []

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far."""
        gone = sorted({*self._dealers} - {*self._survivors}) if self._survivors else []
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=tuple(map(self._roster.name, self._survivors)),
            dropouts=tuple(map(self._roster.name, gone)),
        )

    def handle(self, frame: bytes) -> bytes:
        """As :meth:`~.masking.silo.SiloRound.handle`."""
        try:
            return super().handle(frame)
        except DealerFaultError as fault:
            return sign(
                Refusal(
                    header=self._header_digest,
                    index=self._index,
                    signature=UNSIGNED,
                    delivery=self._delivery_digest,
                    accused=fault.dealer,
                ),
                self._signing_key,
            ).encode()

    def _answer(self, frame: bytes, secrets: _Secrets) -> bytes:
        answers: dict[Step, Callable[[], bytes]] = {
            Step.ADVERTISE: lambda: self._on_ask(decode(Ask, frame, SERVER), secrets),
            Step.DRAW: lambda: self._on_members(decode(Members, frame, SERVER), secrets),
            Step.SHARE: lambda: self._on_neighbours(decode(Neighbours, frame, SERVER), secrets),
            Step.UPLOAD: lambda: self._on_post(decode(Post, frame, SERVER), secrets),
            Step.AGREE: lambda: self._on_survivors(decode(Survivors, frame, SERVER)),
            Step.CHALLENGE: lambda: self._on_tally(decode(Tally, frame, SERVER)),
            Step.UNMASK: lambda: self._on_proof(decode(Proof, frame, SERVER), secrets),
        }
        return answers[self._step]()

    def _read_set(self, packed: bytes, allowed: Sequence[int], what: str) -> tuple[int, ...]:
        """A set of silos among the ``allowed``: a quorum that includes this silo."""
        members = choice.read_set(packed, self._parameters.silos)
        if members is None:
            refuse(f"sent a {what} that is no set of silos", "report the server")
        self._check_members(members, allowed, what)
        return members

    # G0 ---------------------------------------------------------------------------------------

    def _on_ask(self, ask: Ask, secrets: _Secrets) -> bytes:
        check_announced(self._header, ask.header)
        # Adversary: a server that has two sets of keys signed for one attempt.
        self._own_keys = self._say(
            b"keys:",
            Advertise(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                mask_public=AgreementKey(secrets.mask_secret).public,
                share_public=AgreementKey(secrets.share_secret).public,
            ),
        )
        return self._own_keys.encode()

    # G1 ---------------------------------------------------------------------------------------

    def _on_members(self, sent: Members, secrets: _Secrets) -> bytes:
        everyone = range(1, self._parameters.silos + 1)
        self._members = self._read_set(sent.members, everyone, "roll")
        self._roll_digest = choice.roll_digest(self._header_digest, sent.members)
        # Adversary: a server that chooses the roll by what silos draw. The draw leaves after the
        # roll is fixed, and the journal has it drawn from for one roll only.
        draw = self._say(
            b"draw:",
            Draw(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                roll=self._roll_digest,
                secret=secrets.draw,
            ),
        )
        self._drawn = choice.neighbours_of(
            secrets.draw, self._roll_digest, self._members, self._index, self._graph.neighbours
        )
        return draw.encode()

    # G2 ---------------------------------------------------------------------------------------

    def _on_neighbours(self, sent: Neighbours, secrets: _Secrets) -> bytes:
        entries = sent.advertisements
        # Adversary: a server that puts silos of its choice in the place of those drawn.
        if tuple(entry.index for entry in entries) != self._drawn:
            refuse("sent other neighbours than this silo drew", "report the server")
        self._check_signatures(entries, "keys")
        self._peers = {entry.index: entry for entry in entries}
        self._check_keys()
        return self._deal(secrets)

    def _check_keys(self) -> None:
        """Adversary: a silo that repeats another's key without knowing its secret."""
        everyone = [self._own_keys, *self._peers.values()]
        publics = {key for peer in everyone for key in (peer.mask_public, peer.share_public)}
        if len(publics) != 2 * len(everyone) or not all(map(well_spelled, publics)):
            refuse(
                "relayed one key twice or in a second spelling",
                "report the server and the neighbours",
            )

    def _deal(self, secrets: _Secrets) -> bytes:
        holders, threshold = self._drawn, self._graph.shares
        seed_shares = shamir.deal(secrets.seed, threshold, holders, self._random)
        key_shares = shamir.deal(secrets.mask_secret, threshold, holders, self._random)
        parcels = self._parcels(secrets)
        own = Dealer(self._index, self._own_keys.mask_public, self._own_keys.share_public)
        letters = []
        for holder, seed_share, key_share in zip(holders, seed_shares, key_shares, strict=True):
            parcel = parcels.make(holder, seed_share, key_share)
            said = own.letter(self._header_digest, self._roll_digest, parcel)
            letters.append(Letter(parcel, self._signing_key.sign(Letter.CONTEXT, said)))
        # Adversary: a server that has one set of secrets shared out twice.
        return self._say(
            b"deal:",
            Letters(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                roll=self._roll_digest,
                seed_commitment=keys.seed_commitment(
                    self._header_digest, self._index, secrets.seed
                ),
                letters=tuple(letters),
            ),
        ).encode()

    def _parcels(self, secrets: _Secrets) -> Parcels:
        return Parcels(
            header=self._header_digest,
            roster=self._roster,
            roll=self._peers,
            roll_digest=self._roll_digest,
            index=self._index,
            secret=secrets.share_secret,
        )

    # G3 ---------------------------------------------------------------------------------------

    def _on_post(self, post: Post, secrets: _Secrets) -> bytes:
        self._dealers = self._read_set(post.dealers, self._members, "list of dealers")
        self._delivery_digest = choice.delivery_digest(self._roll_digest, post.dealers)
        self._check_kept(self._dealers)
        senders = tuple(sender.index for sender in post.senders)
        others = {*self._dealers} - {self._index}
        if list(senders) != sorted({*senders}) or not {*senders} <= others:
            refuse("relayed letters of silos that have not dealt", "report the server")
        if len(post.letters) != len(senders):
            refuse("did not relay one letter of each sender", "start a new attempt")
        for sender, letter in zip(post.senders, post.letters, strict=True):
            self._read_letter(sender, letter)
        self._check_keys()
        self._drawn_by = senders
        parcels = self._parcels(secrets)
        for letter in post.letters:
            secrets.held[letter.parcel.dealer] = parcels.open(letter.parcel)
        self._record_vector()
        return self._upload(secrets)

    def _read_letter(self, sender: Dealer, letter: Letter) -> None:
        """Adversary: a relay that alters letters or keys. What the dealer signed and made badly
        shows only when the box is opened."""
        index, parcel = sender.index, letter.parcel
        said = sender.letter(self._header_digest, self._roll_digest, parcel)
        what = f"{self._roster.name(index)}'s letter"
        try:
            verify(self._roster.key(index), Letter.CONTEXT, said, letter.signature)
        except CryptoError:
            refuse(f"relayed {what} with a bad signature", "report the server")
        if (parcel.dealer, parcel.holder) != (index, self._index):
            refuse(f"relayed {what} to another silo", "report the server")
        known = self._peers.setdefault(index, sender)
        if (known.mask_public, known.share_public) != (sender.mask_public, sender.share_public):
            refuse(f"relayed two sets of {self._roster.name(index)}'s keys", "report both")

    def _check_kept(self, alive: Sequence[int]) -> None:
        """This silo keeps t of its neighbours among the ``alive``.

        Adversary: a server that calls the neighbours of one silo lost, so that their masks open and
        its vector stands alone.
        """
        left = len({*self._drawn} & {*alive})
        if left < self._graph.shares:
            refuse(
                f"leaves this silo {left} of its {self._graph.neighbours} neighbours; "
                f"{self._graph.shares} are needed",
                "wait until more silos are online",
            )

    def _upload(self, secrets: _Secrets) -> bytes:
        # Adversary: as before, to have one vector masked twice, among different peers.
        self._record(b"upload:" + self._header.attempt_scope, self._delivery_digest)
        words = secrets.buffer.words
        add, subtract = self._mask_keys(secrets)
        masks.apply(words, add=add, subtract=subtract, threads=self._threads)
        upload = sign(
            Upload(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                delivery=self._delivery_digest,
                words=words_digest(words, self._threads),
            ),
            self._signing_key,
        )
        del words
        frame = secrets.buffer.finish(upload)
        # From here on this silo only hands out shares; its own secrets are no longer needed.
        secrets.mask_secret = secrets.share_secret = secrets.seed = secrets.draw = b""
        return frame

    def _mask_keys(self, secrets: _Secrets) -> tuple[list[bytes], list[bytes]]:
        header, delivery = self._header_digest, self._delivery_digest
        mask_key = AgreementKey(secrets.mask_secret)
        add = [keys.self_mask_key(secrets.seed, header, delivery, self._index)]
        subtract: list[bytes] = []
        dealt = {*self._dealers}
        for peer in sorted(dealt & {*self._peers}):
            try:
                key = keys.pair_mask_key(
                    mask_key, self._peers[peer].mask_public, header, delivery, self._index, peer
                )
            except CryptoError as error:
                refuse_key(self._roster.name(peer), error)
            (add if self._index < peer else subtract).append(key)
        return add, subtract

    # G4 ---------------------------------------------------------------------------------------

    def _on_survivors(self, sent: Survivors) -> bytes:
        survivors = self._read_set(sent.survivors, self._dealers, "survivors list")
        self._check_kept(survivors)
        digest = choice.survivors_digest(self._delivery_digest, sent.survivors)
        # Adversary: a server that has two lists signed in one attempt; or, in two attempts, opens
        # sums that differ in a few silos. Unlike on the complete graph the shares of two openings
        # need not have a holder in common, but T signatures of each have. And the same survivors in
        # a second attempt are no way out: a few of them could be left out of one sum alone.
        self._record(b"agree:" + self._header.attempt_scope, digest)
        self._record(b"open:" + self._header.round_scope, digest)
        self._survivors, self._lists_digest = survivors, digest
        agreement = Agreement(
            header=self._header_digest, index=self._index, signature=UNSIGNED, lists=digest
        )
        return sign(agreement, self._signing_key).encode()

    # G5 ---------------------------------------------------------------------------------------

    def _on_tally(self, tally: Tally) -> bytes:
        signers = choice.read_set(tally.signers, self._parameters.silos)
        if signers is None or not {*signers} <= {*self._survivors}:
            refuse("counts agreements of silos that do not survive", "report the server")
        threshold = self._parameters.threshold
        if len(signers) < threshold:
            refuse(
                f"counts {len(signers)} agreements; {threshold} are needed",
                "too few silos agree; go on with the next round",
            )
        self._tally = tally
        secret = self._random(KEY_BYTES)
        digest = choice.tally_digest(self._lists_digest, tally.signers, tally.root)
        count = choice.samples(self._parameters, self._graph, len(signers))
        places = choice.challenged(secret, digest, len(signers), count)
        self._challenged = places
        self._signers = signers
        # Adversary: a server that has this silo challenge it again and again, until the signatures
        # asked for happen to be there. One tally and one challenge an attempt.
        return self._say(
            b"tally:",
            Challenge(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                tally=digest,
                secret=secret,
            ),
        ).encode()

    # G6 ---------------------------------------------------------------------------------------

    def _on_proof(self, proof: Proof, secrets: _Secrets) -> bytes:
        self._check_signed_by_many(proof)
        self._check_uploads(proof)
        survivors = {*self._survivors}
        shares = tuple(
            secrets.held[dealer][0 if dealer in survivors else 1] for dealer in self._drawn_by
        )
        return sign(
            Shares(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                lists=self._lists_digest,
                shares=shares,
            ),
            self._signing_key,
        ).encode()

    def _check_signed_by_many(self, proof: Proof) -> None:
        """T silos have signed these survivors, but for a chance that the study bounds.

        Adversary: a server that shows different silos different lists.
        """
        if len(proof.shown) != len(self._challenged):
            refuse("shows another number of agreements than it was asked for", "report the server")
        for place, shown in zip(self._challenged, proof.shown, strict=True):
            index = self._signers[place]
            root = choice.root_from(shown.signature, place, len(self._signers), shown.path)
            if root != self._tally.root:
                refuse("shows an agreement that it had not counted", "report the server")
            agreement = Agreement(
                header=self._header_digest,
                index=index,
                signature=shown.signature,
                lists=self._lists_digest,
            )
            self._check_signatures([agreement], "agreement")

    def _check_uploads(self, proof: Proof) -> None:
        """Those whose seed is opened masked their vector for this delivery.

        Adversary: a server that shows a silo other dealers than the rest, so that the masks in its
        upload are not those whose keys the survivors keep.
        """
        survivors = {*self._survivors}
        kept = [dealer for dealer in self._drawn_by if dealer in survivors]
        if len(proof.uploads) != len(kept):
            refuse("does not show the upload of every survivor", "report the server")
        for dealer, shown in zip(kept, proof.uploads, strict=True):
            upload = Upload(
                header=self._header_digest,
                index=dealer,
                signature=shown.signature,
                delivery=self._delivery_digest,
                words=shown.words,
            )
            name = self._roster.name(dealer)
            check_signature(upload, shown.signature, self._roster.key(dealer), f"{name}'s upload")
