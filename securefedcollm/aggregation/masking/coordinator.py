"""The server's side of one attempt at one round of pairwise-mask secure aggregation.

It relays, adds uploads into one accumulator as they arrive, and opens the sum. This code is the
honest server; the silos' safety does not rest on it (:mod:`~.masking.silo`). It guards the result:
the adversary here is up to c malicious silos and attackers on the network. It opens a sum only if
every rebuilt secret matches the value that its owner published, and it names the silo of every
wrong frame or share. It cannot detect a dishonest vector within bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from securefedcollm.aggregation.checks import check_suite
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, shamir
from securefedcollm.aggregation.masking.masked_coordinator import MaskedRound
from securefedcollm.aggregation.masking.messages import (
    BOX_BYTES,
    Advertise,
    Agreement,
    Deal,
    Delivery,
    Opening,
    Roll,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.messages import Ask, decode, lists_digest
from securefedcollm.aggregation.steps import TRANSITIONS, Step


class CoordinatorRound(MaskedRound):
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
        super().__init__(header, roster, TRANSITIONS, threads=threads, narrow=narrow)
        check_suite(header)
        self._roll: dict[int, Advertise] = {}
        self._deals: dict[int, Deal] = {}
        self._unmasks: dict[int, Unmask] = {}

    def _dealers(self) -> Sequence[int]:
        return tuple(self._deals)

    def _near(self, dropout: int) -> Sequence[int]:
        return self._survivors

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

    def _close_upload(self) -> None:
        self._split_dealers()
        self._lists_digest = lists_digest(self._delivery_digest, self._survivors, self._dropouts)
        self._ask(self._survivors)

    # R3, R4 -----------------------------------------------------------------------------------

    def _on_unmask(self, name: str, unmask: Unmask) -> None:
        index = self._check_signed(name, unmask)
        if unmask.lists != self._lists_digest or len(unmask.shares) != len(self._deals):
            self._blame(name, "opened other lists")
        position = tuple(self._roll).index(index)
        for (dealer, deal), share in zip(self._deals.items(), unmask.shares, strict=True):
            # The dealer has committed to the share of every holder: a wrong one names its sender.
            parcel = deal.parcels[position]
            committed = parcel.seed_share_commitment, parcel.key_share_commitment
            self._check_share(dealer, index, share, *committed)
        self._unmasks[index] = unmask

    def _open(self) -> None:
        responders = sorted(self._unmasks)[: self._parameters.threshold]
        lagrange = shamir.weights(responders)
        secrets = {}
        for position, (dealer, deal) in enumerate(self._deals.items()):
            shares = [self._unmasks[index].shares[position] for index in responders]
            committed = deal.statement.seed_commitment
            secrets[dealer] = self._secret(dealer, shares, lagrange, committed)
        self._unmask(secrets)


def _same(frame: bytes) -> Callable[[int], bytes]:
    return lambda index: frame
