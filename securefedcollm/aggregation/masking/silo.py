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

from collections.abc import Sequence
from typing import ClassVar

from securefedcollm.aggregation.checks import check_own, check_signatures, check_suite, refuse
from securefedcollm.aggregation.header import Roster, RoundHeader, names_digest
from securefedcollm.aggregation.masking import keys
from securefedcollm.aggregation.masking.masked_silo import MaskedSilo, MaskSecrets
from securefedcollm.aggregation.masking.messages import (
    Advertise,
    Agreement,
    Deal,
    Delivery,
    Opening,
    Roll,
    Statement,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.masking.upload import UploadBuffer
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode, lists_digest, sign
from securefedcollm.aggregation.roles import SERVER
from securefedcollm.aggregation.steps import SchemeName, Step
from securefedcollm.primitives import KEY_BYTES, equal


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


class SiloRound(MaskedSilo[MaskSecrets]):
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

    SCHEME: ClassVar[SchemeName] = "masking"

    def _check_suite(self) -> None:
        check_suite(self._header)

    def _fresh(self, buffer: UploadBuffer) -> MaskSecrets:
        self._roll: dict[int, Advertise]
        self._own_statement: Statement
        mask_secret, share_secret, seed = (self._random(KEY_BYTES) for _ in range(3))
        return MaskSecrets(buffer, mask_secret, share_secret, seed)

    def _answer(self, frame: bytes, secrets: MaskSecrets) -> bytes:
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

    # R1 ---------------------------------------------------------------------------------------

    def _on_roll(self, roll: Roll, secrets: MaskSecrets) -> bytes:
        entries = roll.advertisements
        everyone = range(1, len(self._roster) + 1)
        self._check_members([entry.index for entry in entries], everyone, "roll list")
        self._check_signatures(entries, "keys")
        self._check_keys(entries)
        self._roll = {entry.index: entry for entry in entries}
        check_own(self._own_keys, self._roll[self._index], "keys")
        self._roll_digest = keys.roll_digest(self._header_digest, entries)
        return self._deal(secrets)

    def _deal(self, secrets: MaskSecrets) -> bytes:
        holders = tuple(self._roll)
        shares = self._shared(secrets, holders, self._parameters.threshold)
        own = self._parcels(secrets, self._roll)
        parcels = tuple(
            own.make(holder, *both) for holder, both in zip(holders, shares, strict=True)
        )
        secrets.held[self._index] = shares[holders.index(self._index)]
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

    # R2 ---------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery, secrets: MaskSecrets) -> bytes:
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
        peers = {i: self._roll[i] for i in self._dealers if i != self._index}
        return self._upload(secrets, peers)

    def _open_parcels(self, delivery: Delivery, secrets: MaskSecrets) -> None:
        others = tuple(dealer for dealer in self._dealers if dealer != self._index)
        if tuple(parcel.dealer for parcel in delivery.parcels) != others:
            refuse("did not relay one parcel from each dealer", "start a new attempt")
        statements = {statement.index: statement for statement in delivery.statements}
        position = tuple(self._roll).index(self._index)
        own = self._parcels(secrets, self._roll)
        for parcel in delivery.parcels:
            # Adversary: a relay that swaps or alters parcels. The dealer signed their digests.
            signed_digest = statements[parcel.dealer].parcels[position]
            if not equal(keys.parcel_digest(parcel), signed_digest):
                refuse(
                    f"altered the parcel from {self._roster.name(parcel.dealer)}",
                    "start a new attempt; if it happens again, report the server",
                )
            secrets.held[parcel.dealer] = own.open(parcel)

    # R3 ---------------------------------------------------------------------------------------

    def _on_survey(self, survey: Survey) -> bytes:
        lists = survey.survivors, survey.dropouts
        self._check_lists(*lists)
        digest = lists_digest(self._delivery_digest, *lists)
        # Adversary: a server that restores this process from a snapshot to have it sign two pairs
        # of lists in one attempt.
        self._record(b"agree:" + self._header.attempt_scope, digest)
        self._lists, self._lists_digest = lists, digest
        return self._agreement()

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

    def _on_opening(self, opening: Opening, secrets: MaskSecrets) -> bytes:
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
        unmask = Unmask(
            header=self._header_digest,
            index=self._index,
            signature=UNSIGNED,
            lists=self._lists_digest,
            shares=self._opened(secrets, self._dealers),
        )
        return sign(unmask, self._signing_key).encode()
