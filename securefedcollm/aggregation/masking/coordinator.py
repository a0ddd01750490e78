"""The server's side of one attempt at one round of pairwise-mask secure aggregation.

It relays, adds uploads into one accumulator as they arrive, and opens the sum. This code is the
honest server; the silos' safety does not rest on it (:mod:`~.masking.silo`). It guards the result:
the adversary here is up to c malicious silos and attackers on the network. It opens a sum only if
every rebuilt secret matches the value that its owner published, and it names the silo of every
wrong frame or share. It cannot detect a dishonest vector within bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from securefedcollm.aggregation.attendance import AttendedRound
from securefedcollm.aggregation.checks import check_suite
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.messages import (
    BOX_BYTES,
    Advertise,
    Agreement,
    Deal,
    Delivery,
    Opening,
    Parcel,
    Refusal,
    Roll,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.masking.upload import MAGIC, split
from securefedcollm.aggregation.messages import Ask, decode, lists_digest
from securefedcollm.aggregation.roles import RoundResult, Transcript
from securefedcollm.aggregation.steps import TRANSITIONS, Step
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import AgreementKey, equal

_PROBE = AgreementKey(b"\1" * 32)
"""Any private key shows whether a public key has small order; this one protects nothing."""


def probe(public: bytes) -> bool:
    """Whether a silo can agree on keys with this public key."""
    try:
        _PROBE.agree(public)
    except CryptoError:
        return False
    return True


class CoordinatorRound(AttendedRound):
    """Makes the requests, takes the replies, opens the sum.

    Args:
        header: the server's view of the round; silos with another view take themselves out.
        roster: the silos of the signed study.
        threads: for removing masks and checking uploads.
        narrow: give the sum as int32 where that holds it.

    Raises:
        LocalProtocolError: the header is for another roster, or names other algorithms.
    """

    def __init__(
        self, *, header: RoundHeader, roster: Roster, threads: int = 1, narrow: bool = False
    ) -> None:
        super().__init__(header, roster, TRANSITIONS)
        check_suite(header)
        self._threads = threads
        self._narrow = narrow
        self._advertisements: dict[int, Advertise] = {}
        self._publics: set[bytes] = set()
        self._roll: dict[int, Advertise] = {}
        self._roll_digest = b""
        self._deals: dict[int, Deal] = {}
        self._delivery_digest = b""
        self._sum = np.zeros(0, dtype="<u8")
        self._uploaded: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._dropouts: tuple[int, ...] = ()
        self._lists_digest = b""
        self._agreements: dict[int, Agreement] = {}
        self._unmasks: dict[int, Unmask] = {}

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far."""
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=self._names(self._survivors),
            dropouts=self._names(self._dropouts),
            agreements=self._signatures(),
        )

    def requests(self) -> dict[str, bytes]:
        """One frame for every silo that takes part in this step and has not replied yet."""
        self._check_running()
        frame: Callable[[int], bytes]
        match self._step:
            case Step.ADVERTISE:
                frame = _same(Ask(self._header).encode())
            case Step.SHARE:
                frame = _same(Roll(tuple(self._roll.values())).encode())
            case Step.UPLOAD:
                frame = self._delivery
            case Step.AGREE:
                frame = _same(Survey(self._survivors, self._dropouts).encode())
            case _:
                agreements = tuple(self._agreements[i] for i in sorted(self._agreements))
                opening = Opening(self._survivors, self._dropouts, agreements)
                frame = _same(opening.encode())
        return {name: frame(self._roster.index(name)) for name in self._waiting()}

    def _delivery(self, holder: int) -> bytes:
        position = tuple(self._roll).index(holder)
        return Delivery(
            statements=tuple(deal.statement for deal in self._deals.values()),
            parcels=tuple(
                deal.parcels[position] for dealer, deal in self._deals.items() if dealer != holder
            ),
        ).encode()

    def _take(self, name: str, frame: bytes | memoryview) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._on_advertise(name, decode(Advertise, frame, name))
            case Step.SHARE:
                self._on_deal(name, decode(Deal, frame, name))
            case Step.UPLOAD:
                self._on_upload(name, frame)
            case Step.AGREE:
                self._on_agreement(name, decode(Agreement, frame, name))
            case _:
                self._on_unmask(name, decode(Unmask, frame, name))

    def _close(self) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._close_advertise()
            case Step.SHARE:
                self._close_share()
            case Step.UPLOAD:
                self._close_upload()
            case Step.AGREE:
                self._enough(len(self._agreements), self._parameters.threshold)
                self._ask(sorted(self._agreements))
            case _:
                self._enough(len(self._unmasks), self._parameters.threshold)
                self._open()

    def _forget(self) -> None:
        self._deals.clear()
        self._unmasks.clear()
        self._sum = np.zeros(0, dtype="<u8")

    # R0 ---------------------------------------------------------------------------------------

    def _on_advertise(self, name: str, advertise: Advertise) -> None:
        index = self._check_signed(name, advertise)
        pair = {advertise.mask_public, advertise.share_public}
        # Adversary: a silo with a key of small order, or with another silo's key, in whatever
        # spelling; its peers would refuse the whole roll, so it is taken off here.
        if len(pair) < 2 or pair & self._publics:
            self._blame(name, "advertised a key that is in use already")
        if not all(map(probe, pair)):
            self._blame(name, "advertised a public key that is misspelled or of small order")
        self._publics |= pair
        self._advertisements[index] = advertise

    def _close_advertise(self) -> None:
        self._roll = self._quorum(self._advertisements)
        self._roll_digest = keys.roll_digest(self._header_digest, tuple(self._roll.values()))

    # R1 ---------------------------------------------------------------------------------------

    def _on_deal(self, name: str, deal: Deal) -> None:
        statement = deal.statement
        index = self._check_signed(name, statement)
        digests = tuple(keys.parcel_digest(parcel) for parcel in deal.parcels)
        expected = [(index, holder, 0 if holder == index else BOX_BYTES) for holder in self._roll]
        found = [(parcel.dealer, parcel.holder, len(parcel.box)) for parcel in deal.parcels]
        if statement.roll != self._roll_digest or statement.parcels != digests or found != expected:
            self._blame(name, "sent a dealing that does not fit the roll or its own statement")
        self._deals[index] = deal

    def _close_share(self) -> None:
        self._deals = self._quorum(self._deals)
        self._delivery_digest = keys.delivery_digest(
            self._roll_digest, [deal.statement for deal in self._deals.values()]
        )
        self._sum = np.zeros(self._parameters.words, dtype="<u8")

    # R2 ---------------------------------------------------------------------------------------

    def _on_upload(self, name: str, frame: bytes | memoryview) -> None:
        if frame[: len(MAGIC)] != MAGIC:
            self._on_refusal(name, decode(Refusal, frame, name))
            return
        upload, words = split(frame, self._parameters, name, self._threads)
        index = self._check_signed(name, upload)
        if upload.delivery != self._delivery_digest:
            self._blame(name, "masked its vector for another delivery")
        np.add(self._sum, words, out=self._sum)
        self._uploaded.add(index)

    def _on_refusal(self, name: str, refusal: Refusal) -> None:
        # Either may be lying: the accused dealt a bad share, or this silo invents it. It has not
        # uploaded, so the sum goes on without it; both names are there for the operators.
        self._check_signed(name, refusal)
        if refusal.delivery != self._delivery_digest or refusal.accused not in self._deals:
            self._blame(name, "refused another delivery")
        accused = self._roster.name(refusal.accused)
        self._excluded[name] = f"refused: {accused} dealt it a bad share"

    def _close_upload(self) -> None:
        self._survivors = tuple(sorted(self._uploaded))
        self._dropouts = tuple(index for index in self._deals if index not in self._uploaded)
        self._enough(len(self._survivors), self._parameters.quorum)
        self._lists_digest = lists_digest(self._delivery_digest, self._survivors, self._dropouts)
        self._ask(self._survivors)

    # R3, R4 -----------------------------------------------------------------------------------

    def _on_agreement(self, name: str, agreement: Agreement) -> None:
        index = self._check_signed(name, agreement)
        if agreement.lists != self._lists_digest:
            self._blame(name, "agreed to other lists")
        self._agreements[index] = agreement

    def _on_unmask(self, name: str, unmask: Unmask) -> None:
        index = self._check_signed(name, unmask)
        if unmask.lists != self._lists_digest or len(unmask.shares) != len(self._deals):
            self._blame(name, "opened other lists")
        position = tuple(self._roll).index(index)
        for (dealer, deal), share in zip(self._deals.items(), unmask.shares, strict=True):
            # Adversary: a silo that sends an altered share, or another silo's. The dealer has
            # committed to the share of every holder, so a wrong share names its sender.
            parcel = deal.parcels[position]
            kind, committed = self._expected(dealer, parcel)
            share_commitment = keys.share_commitment(
                self._header_digest, dealer, index, kind, share
            )
            if not equal(share_commitment, committed):
                self._blame(name, f"sent a wrong share of {self._roster.name(dealer)}'s secret")
        self._unmasks[index] = unmask

    def _expected(self, dealer: int, parcel: Parcel) -> tuple[keys.Kind, bytes]:
        if dealer in self._uploaded:
            return "seed", parcel.seed_share_commitment
        return "key", parcel.key_share_commitment

    def _open(self) -> None:
        seeds, mask_keys = self._rebuild()
        header, delivery = self._header_digest, self._delivery_digest
        add: list[bytes] = []
        subtract = [
            keys.self_mask_key(seed, header, delivery, index) for index, seed in seeds.items()
        ]
        for dropout, mask_key in mask_keys.items():
            for survivor in self._survivors:
                public = self._roll[survivor].mask_public
                key = keys.pair_mask_key(mask_key, public, header, delivery, dropout, survivor)
                # The lower index added the mask: undo the survivor's half.
                (subtract if survivor < dropout else add).append(key)
        masks.apply(self._sum, add=add, subtract=subtract, threads=self._threads)
        count = len(self._survivors)
        total = packing.unpack(self._sum, self._parameters, count, narrow=self._narrow)
        self._result = RoundResult(
            sum=total,
            survivors=self._names(self._survivors),
            dropouts=self._names(self._dropouts),
            excluded=dict(self._excluded),
            header_digest=header,
            transcript=self._lists_digest,
            agreements=self._signatures(),
        )
        self._forget()

    def _signatures(self) -> dict[str, bytes]:
        return {
            self._roster.name(index): self._agreements[index].signature
            for index in sorted(self._agreements)
        }

    def _rebuild(self) -> tuple[dict[int, bytes], dict[int, AgreementKey]]:
        """Survivors' seeds and dropouts' mask keys, checked against their owners' values.

        Adversary: a dealer whose shares lie on no polynomial of the agreed degree, or on that of
        another secret. Every share here matches the dealer's own commitment, so a wrong secret is
        the dealer's fault.
        """
        responders = sorted(self._unmasks)[: self._parameters.threshold]
        lagrange = shamir.weights(responders)
        seeds: dict[int, bytes] = {}
        mask_keys: dict[int, AgreementKey] = {}
        for position, (dealer, deal) in enumerate(self._deals.items()):
            name = self._roster.name(dealer)
            try:
                secret = shamir.rebuild(
                    [self._unmasks[index].shares[position] for index in responders], lagrange
                )
            except CryptoError:
                self._blame(name, "dealt shares of no secret; the sum cannot be opened")
            if dealer in self._uploaded:
                seeds[dealer] = secret
                published = deal.statement.seed_commitment
                found = keys.seed_commitment(self._header_digest, dealer, secret)
            else:
                mask_keys[dealer] = AgreementKey(secret)
                published = self._roll[dealer].mask_public
                found = mask_keys[dealer].public
            if not equal(found, published):
                self._blame(name, "dealt shares of another secret; the sum cannot be opened")
        return seeds, mask_keys


def _same(frame: bytes) -> Callable[[int], bytes]:
    return lambda index: frame
