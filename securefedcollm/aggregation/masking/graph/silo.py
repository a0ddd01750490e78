"""A silo's side of one attempt at one round of masking on a random graph.

Bell et al., CCS 2020, against an active server; ``docs/protocol.md`` has the argument and ADR 25
the choices. The adversary is that of :mod:`~.masking.silo`: the server and up to c silos, fixed
before the attempt. Below, i is this silo, out(i) the silos that it drew, in(i) those that drew it.

What is new against the complete graph is that no silo sees more than its neighbourhood, although
one list of survivors must hold for all. Two things make up for it. A silo challenges the server to
show a few of the signatures over the list that the server has committed to. And it opens a seed
only of a silo that masked its upload for the same delivery. What both graphs have in common is in
:mod:`~.masking.masked_silo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from msgspec import structs

from securefedcollm.aggregation.checks import check_signature, refuse
from securefedcollm.aggregation.masking import keys
from securefedcollm.aggregation.masking.graph import bounds, choice
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Dealt,
    Draw,
    Letter,
    Letters,
    Members,
    Neighbours,
    Peer,
    Post,
    Proof,
    Shares,
    Survivors,
    Tally,
    advertised,
    commitments_digest,
)
from securefedcollm.aggregation.masking.masked_silo import MaskedSilo, MaskSecrets
from securefedcollm.aggregation.masking.messages import Advertise, Agreement
from securefedcollm.aggregation.masking.parcels import DealerFaultError, Parcels
from securefedcollm.aggregation.masking.upload import Upload, UploadBuffer
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode, sign
from securefedcollm.aggregation.roles import SERVER, Transcript
from securefedcollm.aggregation.steps import SchemeName, Step
from securefedcollm.primitives import KEY_BYTES, equal


@dataclass(repr=False)
class GraphSecrets(MaskSecrets):
    """As there. ``draw``: the 32 bytes from which out(i) follows; secret until the roll is fixed.

    ``held`` is of the dealers in in(i).
    """

    draw: bytes = b""

    def forget(self) -> None:
        super().forget()
        self.draw = b""


class GraphSiloRound(MaskedSilo[GraphSecrets]):
    """Answers the server's seven requests, in order, once each. Not thread-safe.

    Args:
        header: as there; its suite names k and t.
        random: read for the mask secret, share secret, seed and draw (32 bytes each), then for the
            two dealings, then for the challenge (32 bytes).

    The other arguments are those of :class:`~.masking.silo.SiloRound`.

    Raises:
        LocalProtocolError: header, roster, identity, graph and vector do not belong together, or
            the graph does not keep the bounds (:func:`~.graph.bounds.check_graph`).
    """

    SCHEME: ClassVar[SchemeName] = "masking-graph"

    @property
    def transcript(self) -> Transcript:
        seen = super().transcript
        if not self._signers:
            return seen
        return structs.replace(seen, tally=self._tally.root + self._tally.signers)

    def _check_suite(self) -> None:
        self._graph = choice.graph_of(self._header)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Adversary: the author of a study, or a server that has the ear of one, who chooses k and
        t such that colluders surround a silo, or the survivors fall apart."""
        bounds.check_graph(self._parameters, self._graph)

    def _fresh(self, buffer: UploadBuffer) -> GraphSecrets:
        # Public transcript, filled step by step.
        self._members: tuple[int, ...] = ()
        self._drawn: tuple[int, ...] = ()
        self._drawn_by: tuple[int, ...] = ()
        self._peers: dict[int, Advertise] = {}
        self._tally: Tally
        self._signers: tuple[int, ...] = ()
        self._challenged: list[int] = []
        mask_secret, share_secret, seed, draw = (self._random(KEY_BYTES) for _ in range(4))
        return GraphSecrets(buffer, mask_secret, share_secret, seed, draw=draw)

    def _answer(self, frame: bytes, secrets: GraphSecrets) -> bytes:
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

    # G1 ---------------------------------------------------------------------------------------

    def _on_members(self, sent: Members, secrets: GraphSecrets) -> bytes:
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

    def _on_neighbours(self, sent: Neighbours, secrets: GraphSecrets) -> bytes:
        # Adversary: a server that puts silos of its choice in the place of those drawn.
        if tuple(peer.index for peer in sent.peers) != self._drawn:
            refuse("sent other neighbours than this silo drew", "report the server")
        self._know(sent.peers)
        return self._deal(secrets)

    def _know(self, peers: Sequence[Peer]) -> None:
        """Take the keys of these silos, who signed them for this attempt."""
        entries = advertised(peers, self._header_digest)
        self._check_signatures(entries, "keys")
        for entry in entries:
            known = self._peers.setdefault(entry.index, entry)
            if (known.mask_public, known.share_public) != (entry.mask_public, entry.share_public):
                refuse(
                    f"relayed two sets of {self._roster.name(entry.index)}'s keys", "report both"
                )
        self._check_keys([self._own_keys, *self._peers.values()])

    def _deal(self, secrets: GraphSecrets) -> bytes:
        shares = self._shared(secrets, self._drawn, self._graph.shares)
        own = self._parcels(secrets, self._peers)
        made = [own.make(holder, *both) for holder, both in zip(self._drawn, shares, strict=True)]
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
                dealt=tuple(
                    Dealt(one.box, one.seed_share_commitment, one.key_share_commitment)
                    for one in made
                ),
            ),
        ).encode()

    # G3 ---------------------------------------------------------------------------------------

    def _on_post(self, post: Post, secrets: GraphSecrets) -> bytes:
        self._dealers = self._read_set(post.dealers, self._members, "list of dealers")
        self._delivery_digest = choice.delivery_digest(self._roll_digest, post.dealers)
        self._check_kept(self._dealers)
        self._drawn_by = tuple(sender.index for sender in post.senders)
        self._check_senders()
        self._know(post.senders)
        if len(post.letters) != len(self._drawn_by):
            refuse("did not relay one letter of each sender", "start a new attempt")
        parcels = self._parcels(secrets, self._peers)
        for dealer, letter in zip(self._drawn_by, post.letters, strict=True):
            secrets.held[dealer] = self._read_letter(dealer, letter, parcels)
        self._record_vector()
        dealt = {*self._dealers}
        peers = {i: key for i, key in self._peers.items() if i in dealt}
        # Adversary: a server that restores silos and shows each a second time who drew it, with one
        # letter less. D would be the same, and the difference of two uploads is the mask of a pair:
        # enough of them uncover a vector. Here D does not fix the peers, as on the complete graph.
        masked = choice.masked_digest(
            self._delivery_digest, {i: key.mask_public for i, key in peers.items()}
        )
        self._record(b"masked:" + self._header.attempt_scope, masked)
        return self._upload(secrets, peers)

    def _check_senders(self) -> None:
        senders, others = self._drawn_by, {*self._dealers} - {self._index}
        if list(senders) != sorted({*senders}) or not {*senders} <= others:
            refuse("relayed letters of silos that have not dealt", "report the server")
        # Adversary: silos that make up their draws, and a server that directs them all at one silo,
        # which would have to agree on keys with thousands.
        most = bounds.most_senders(self._parameters, self._graph)
        if len(senders) > most:
            refuse(
                f"relayed letters of {len(senders)} silos; no more than {most} draw one silo, even "
                "if all colluders do",
                "report the server",
            )

    def _read_letter(self, dealer: int, letter: Letter, parcels: Parcels) -> tuple[bytes, bytes]:
        """The two shares in a letter.

        Adversary: a relay that alters boxes, or brings those of another roll or holder; their key
        is of this roll, dealer and holder. And a dealer whose shares are not those that it has
        committed to. This silo cannot tell which of the two it was; an honest server can.
        """
        shares = parcels.unbox(dealer, letter.box)
        if not equal(commitments_digest(*parcels.commitments(dealer, *shares)), letter.commitments):
            raise DealerFaultError(dealer)
        return shares

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
        gone = tuple(sorted({*self._dealers} - {*survivors}))
        self._lists, self._lists_digest = (survivors, gone), digest
        return self._agreement()

    # G5 ---------------------------------------------------------------------------------------

    def _on_tally(self, tally: Tally) -> bytes:
        signers = choice.read_set(tally.signers, self._parameters.silos)
        if signers is None or not {*signers} <= {*self._lists[0]}:
            refuse("counts agreements of silos that do not survive", "report the server")
        self._check_many(len(signers))
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

    def _check_many(self, signers: int) -> None:
        """Adversary: a server that has two lists, neither of which T silos have signed."""
        threshold = self._parameters.threshold
        if signers < threshold:
            refuse(
                f"counts {signers} agreements; {threshold} are needed",
                "too few silos agree; go on with the next round",
            )

    # G6 ---------------------------------------------------------------------------------------

    def _on_proof(self, proof: Proof, secrets: GraphSecrets) -> bytes:
        self._check_signed_by_many(proof)
        self._check_uploads(proof)
        return sign(
            Shares(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                lists=self._lists_digest,
                shares=self._opened(secrets, self._drawn_by),
            ),
            self._signing_key,
        ).encode()

    def _check_signed_by_many(self, proof: Proof) -> None:
        """T silos have signed these survivors, but for a chance that the study bounds.

        Adversary: a server that shows different silos different lists.
        """
        if len(proof.signatures) != len(self._challenged):
            refuse("shows another number of agreements than it was asked for", "report the server")
        shown = dict(zip(self._challenged, proof.signatures, strict=True))
        if choice.root_of(shown, len(self._signers), proof.nodes) != self._tally.root:
            refuse("shows an agreement that it had not counted", "report the server")
        agreements = [
            Agreement(
                header=self._header_digest,
                index=self._signers[place],
                signature=signature,
                lists=self._lists_digest,
            )
            for place, signature in shown.items()
        ]
        self._check_signatures(agreements, "agreement")

    def _check_uploads(self, proof: Proof) -> None:
        """Those whose seed is opened masked their vector for this delivery.

        Adversary: a server that shows a silo other dealers than the rest, so that the masks in its
        upload are not those whose keys the survivors keep.
        """
        survivors = {*self._lists[0]}
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
