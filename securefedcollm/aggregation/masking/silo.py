"""A silo's side of one attempt at one round of pairwise-mask secure aggregation.

Bonawitz et al., CCS 2017, the variant against an active server, hardened. The adversary is the
server together with up to c silos. It relays every frame, so it may alter, drop, repeat, delay or
invent any of them, show different silos different things, crash this process and start it again. It
must learn nothing about this silo's vector beyond the sum over at least ``min_silos`` silos of one
agreed survivor set. Every check below names its adversary.

Why one answer per silo is enough: with 2t > n + c, any two sets of t responders have an honest silo
in common. An honest silo gives one answer per step of an attempt, so t signatures exist for one
pair of lists at most; and in all attempts at a round together it uploads one vector and opens one
survivor set. Both kinds of share for one peer, two survivor sets in one attempt, and two attempts
whose sums differ by one silo's vector would each need two quorums without a common honest silo, or
an honest silo that uploads two vectors. The rules hold even if a process is cloned or restored from
a snapshot, as long as all copies share one :class:`~.roles.Journal`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from securefedcollm.aggregation.answering import AnsweringSilo
from securefedcollm.aggregation.checks import (
    check_announced,
    check_own,
    check_signatures,
    check_suite,
    refuse,
)
from securefedcollm.aggregation.header import Roster, RoundHeader, names_digest
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.messages import (
    Advertise,
    Agreement,
    Deal,
    Delivery,
    Opening,
    Refusal,
    Roll,
    Statement,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.masking.parcels import DealerFaultError, Parcels, refuse_key
from securefedcollm.aggregation.masking.upload import Upload, UploadBuffer, words_digest
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode, lists_digest, sign
from securefedcollm.aggregation.roles import SERVER, Journal, Transcript
from securefedcollm.aggregation.steps import SILO_STEPS, Step
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import (
    KEY_BYTES,
    AgreementKey,
    RandomSource,
    SigningKey,
    equal,
    well_spelled,
)


@dataclass(repr=False)
class _Secrets:
    """The secrets that must not outlive the attempt."""

    buffer: UploadBuffer
    mask_secret: bytes
    share_secret: bytes
    seed: bytes
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Dealer -> (seed share, mask-key share) that this silo holds."""

    def close(self) -> None:
        self.mask_secret = self.share_secret = self.seed = b""
        self.held.clear()
        self.buffer.words[:] = 0  # the vector, until it is masked and has left


def check_agreements(
    agreements: Sequence[Agreement],
    lists: tuple[tuple[int, ...], tuple[int, ...]],
    digest: bytes,
    header: RoundHeader,
    roster: Roster,
) -> None:
    """A threshold of survivors has signed the very lists that this silo did.

    Adversary: a server that shows different silos different lists. t signatures of distinct
    survivors on exactly these lists exist for one pair of lists only (2t > n + c).

    Args:
        lists: survivors and dropouts; ``digest`` is theirs.

    Raises:
        RemoteProtocolError: too few agreed, or one of them to other lists.
    """
    signers = [agreement.index for agreement in agreements]
    survivors, threshold = lists[0], header.parameters.threshold
    if signers != sorted(set(signers)) or not set(signers) <= set(survivors):
        refuse("sent agreements that are not by distinct survivors", "report the server")
    if len(signers) < threshold:
        refuse(
            f"sent {len(signers)} agreements; {threshold} are needed",
            "too few silos agree; go on with the next round",
        )
    check_signatures(agreements, "agreement", header.digest, roster)
    for agreement in agreements:
        if agreement.lists != digest:
            name = roster.name(agreement.index)
            refuse(f"showed {name} other lists than this silo", "report the server")


class SiloRound(AnsweringSilo[_Secrets]):
    """Answers the server's five requests, in order, once each. Not thread-safe.

    Args:
        header: this silo's own view of the round, never the server's.
        roster: the silos of the signed study.
        name: this silo.
        signing_key: its Ed25519 identity.
        vector: int32 or int64 [d] with abs(q) <= bound; packed at once, not kept.
        vector_id: 32 bytes that stand for ``vector``. A caller that gives the same id in two
            attempts at a round promises that the vectors are equal, noise included.
        journal: durable, shared by every process that may act for this silo.
        random: source of the round's secrets; recorded bytes only in test vectors. Read for the
            mask secret, share secret and seed (32 bytes each), then for the two dealings.
        threads: for packing and masking.

    Raises:
        LocalProtocolError: header, roster, identity and vector do not belong together, or the
            header names other algorithms.
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
            steps=SILO_STEPS["masking"],
        )
        check_suite(header)
        self._random = random
        self._threads = threads
        buffer = UploadBuffer(header.parameters)
        packing.pack(vector, header.parameters, buffer.words, threads)
        self._hold(_Secrets(buffer, random(KEY_BYTES), random(KEY_BYTES), random(KEY_BYTES)))
        # Public transcript, filled step by step.
        self._own_keys: Advertise
        self._roll: dict[int, Advertise]
        self._roll_digest: bytes
        self._own_statement: Statement
        self._dealers: tuple[int, ...]
        self._delivery_digest = b""
        self._lists: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._lists_digest = b""

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far."""
        survivors, dropouts = self._lists
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=tuple(self._roster.name(index) for index in survivors),
            dropouts=tuple(self._roster.name(index) for index in dropouts),
        )

    def handle(self, frame: bytes) -> bytes:
        """As :meth:`.AnsweringSide.handle`.

        A :class:`~.masking.messages.Refusal` in reply to the delivery is an answer too: it names a
        dealer, and this side has then failed.
        """
        try:
            return super().handle(frame)
        except DealerFaultError as fault:
            return self._refusal(fault.dealer)

    def _answer(self, frame: bytes, secrets: _Secrets) -> bytes:
        match self._step:
            case Step.ADVERTISE:
                return self._on_ask(decode(Ask, frame, SERVER), secrets)
            case Step.SHARE:
                return self._on_roll(decode(Roll, frame, SERVER), secrets)
            case Step.UPLOAD:
                return self._on_delivery(decode(Delivery, frame, SERVER), secrets)
            case Step.AGREE:
                return self._on_survey(decode(Survey, frame, SERVER))
            case _:
                return self._on_opening(decode(Opening, frame, SERVER), secrets)

    # R0 ---------------------------------------------------------------------------------------

    def _on_ask(self, ask: Ask, secrets: _Secrets) -> bytes:
        check_announced(self._header, ask.header)
        # Adversary: a server that crashes this process and has it begin again, to get two sets of
        # keys signed for one attempt and show them to different silos.
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

    # R1 ---------------------------------------------------------------------------------------

    def _on_roll(self, roll: Roll, secrets: _Secrets) -> bytes:
        entries = roll.advertisements
        everyone = range(1, len(self._roster) + 1)
        self._check_members([entry.index for entry in entries], everyone, "roll list")
        self._check_signatures(entries, "keys")
        # Adversary: a silo that repeats another's key without knowing its secret.
        publics = {key for entry in entries for key in (entry.mask_public, entry.share_public)}
        if len(publics) != 2 * len(entries) or not all(map(well_spelled, publics)):
            refuse(
                "relayed a roll in which one key appears twice or in a second spelling",
                "report the silos on it",
            )
        self._roll = {entry.index: entry for entry in entries}
        check_own(self._own_keys, self._roll[self._index], "keys")
        self._roll_digest = keys.roll_digest(self._header_digest, entries)
        return self._deal(secrets)

    def _deal(self, secrets: _Secrets) -> bytes:
        holders = tuple(self._roll)
        threshold = self._parameters.threshold
        seed_shares = shamir.deal(secrets.seed, threshold, holders, self._random)
        key_shares = shamir.deal(secrets.mask_secret, threshold, holders, self._random)
        own = self._parcels(secrets)
        parcels = tuple(
            own.make(holder, seed_share, key_share)
            for holder, seed_share, key_share in zip(holders, seed_shares, key_shares, strict=True)
        )
        mine = holders.index(self._index)
        secrets.held[self._index] = seed_shares[mine], key_shares[mine]
        # Adversary: a server that forks this process and shows its halves different rolls, so that
        # one set of secrets is shared out twice.
        self._own_statement = self._say(
            b"deal:",
            Statement(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                roll=self._roll_digest,
                seed_commitment=keys.seed_commitment(
                    self._header_digest, self._index, secrets.seed
                ),
                parcels=tuple(keys.parcel_digest(parcel) for parcel in parcels),
            ),
        )
        return Deal(self._own_statement, parcels).encode()

    def _parcels(self, secrets: _Secrets) -> Parcels:
        return Parcels(
            header=self._header_digest,
            roster=self._roster,
            roll=self._roll,
            roll_digest=self._roll_digest,
            index=self._index,
            secret=secrets.share_secret,
        )

    # R2 ---------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery, secrets: _Secrets) -> bytes:
        statements = delivery.statements
        self._dealers = tuple(statement.index for statement in statements)
        self._check_members(self._dealers, self._roll, "delivery list")
        self._check_signatures(statements, "dealing")
        for statement in statements:
            # Adversary: a server that showed the dealer another roll (other peers, other keys).
            if statement.roll != self._roll_digest or len(statement.parcels) != len(self._roll):
                refuse(
                    f"showed {self._roster.name(statement.index)} another roll than this silo",
                    "start a new attempt; if it happens again, report the server",
                )
        own = statements[self._dealers.index(self._index)]
        check_own(self._own_statement, own, "a dealing")
        self._delivery_digest = keys.delivery_digest(self._roll_digest, statements)
        self._open_parcels(delivery, secrets)
        self._record_vector()
        return self._upload(secrets)

    def _open_parcels(self, delivery: Delivery, secrets: _Secrets) -> None:
        others = tuple(dealer for dealer in self._dealers if dealer != self._index)
        if tuple(parcel.dealer for parcel in delivery.parcels) != others:
            refuse("did not relay one parcel from each dealer", "start a new attempt")
        statements = {statement.index: statement for statement in delivery.statements}
        position = tuple(self._roll).index(self._index)
        own = self._parcels(secrets)
        for parcel in delivery.parcels:
            # Adversary: a relay that swaps or alters parcels. The dealer signed their digests.
            signed_digest = statements[parcel.dealer].parcels[position]
            if not equal(keys.parcel_digest(parcel), signed_digest):
                refuse(
                    f"altered the parcel from {self._roster.name(parcel.dealer)}",
                    "start a new attempt; if it happens again, report the server",
                )
            secrets.held[parcel.dealer] = own.open(parcel)

    def _refusal(self, dealer: int) -> bytes:
        return sign(
            Refusal(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                delivery=self._delivery_digest,
                accused=dealer,
            ),
            self._signing_key,
        ).encode()

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
        secrets.mask_secret = secrets.share_secret = secrets.seed = b""
        return frame

    def _mask_keys(self, secrets: _Secrets) -> tuple[list[bytes], list[bytes]]:
        header, delivery = self._header_digest, self._delivery_digest
        mask_key = AgreementKey(secrets.mask_secret)
        add = [keys.self_mask_key(secrets.seed, header, delivery, self._index)]
        subtract: list[bytes] = []
        for peer in self._dealers:
            if peer == self._index:
                continue
            try:
                key = keys.pair_mask_key(
                    mask_key, self._roll[peer].mask_public, header, delivery, self._index, peer
                )
            except CryptoError as error:
                refuse_key(self._roster.name(peer), error)
            (add if self._index < peer else subtract).append(key)
        return add, subtract

    # R3 ---------------------------------------------------------------------------------------

    def _on_survey(self, survey: Survey) -> bytes:
        lists = survey.survivors, survey.dropouts
        self._check_lists(*lists)
        digest = lists_digest(self._delivery_digest, *lists)
        # Adversary: a server that restores this process from a snapshot to have it sign two pairs
        # of lists in one attempt.
        self._record(b"agree:" + self._header.attempt_scope, digest)
        self._lists, self._lists_digest = lists, digest
        agreement = Agreement(
            header=self._header_digest, index=self._index, signature=UNSIGNED, lists=digest
        )
        return sign(agreement, self._signing_key).encode()

    def _check_lists(self, survivors: tuple[int, ...], dropouts: tuple[int, ...]) -> None:
        # Adversary: a server that lists one silo as both, leaves one out, or opens a sum of too
        # few. A silo that is itself called a dropout has its mask key opened and must say no more.
        self._check_members(survivors, self._dealers, "survivors list")
        merged = sorted(survivors + dropouts)
        if tuple(merged) != self._dealers or list(dropouts) != sorted(dropouts):
            refuse(
                "sent survivors and dropouts that do not split the dealers in two",
                "start a new attempt; if it happens again, report the server",
            )

    # R4 ---------------------------------------------------------------------------------------

    def _on_opening(self, opening: Opening, secrets: _Secrets) -> bytes:
        # Adversary: a server that asks for other shares than were agreed to, e.g. both kinds of
        # one peer's. The lists are those this silo signed, or there is no answer.
        if (opening.survivors, opening.dropouts) != self._lists:
            refuse("asks to open other lists than this silo agreed to", "report the server")
        check_agreements(
            opening.agreements, self._lists, self._lists_digest, self._header, self._roster
        )
        # Adversary: a crash, restart or snapshot between two requests with other lists, and another
        # attempt at the same round, whose sum would differ from this one's by a few silos. Written
        # down before the shares leave: one survivor set per round, for good. The same set in a
        # further attempt gives the same sum, since every honest silo uploads one vector per round;
        # so a server that crashed before it had stored the sum may have it opened again.
        names = map(self._roster.name, opening.survivors)
        self._record(b"open:" + self._header.round_scope, names_digest(names))
        survivors = frozenset(opening.survivors)
        shares = tuple(
            secrets.held[dealer][0 if dealer in survivors else 1] for dealer in self._dealers
        )
        unmask = Unmask(
            header=self._header_digest,
            index=self._index,
            signature=UNSIGNED,
            lists=self._lists_digest,
            shares=shares,
        )
        return sign(unmask, self._signing_key).encode()
