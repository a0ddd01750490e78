"""The server's side of one attempt at one round of pairwise-mask secure aggregation.

It relays, adds uploads into one accumulator as they arrive, and opens the sum. This code is the
honest server; the silos' safety does not rest on it (:mod:`~.silo`). What it does guard is the
result: the adversary here is up to c malicious silos and whoever sits on the network. A sum is
opened only if every rebuilt secret matches what its owner published, and every wrong frame or share
is laid at one silo's door. What it cannot see is a vector within bounds that is not honest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import numpy as np

from securefedcollm.aggregation import keys, masks, packing, shamir
from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.messages import (
    BOX_BYTES,
    Advertise,
    Agreement,
    Ask,
    Deal,
    Delivery,
    Opening,
    Parcel,
    Refusal,
    Roll,
    Signed,
    Survey,
    Unmask,
    decode,
)
from securefedcollm.aggregation.roles import RoundResult, Transcript
from securefedcollm.aggregation.steps import TRANSITIONS, Step
from securefedcollm.aggregation.upload import MAGIC, split
from securefedcollm.errors import (
    CryptoError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import AgreementKey, equal, verify

_PROBE = AgreementKey(b"\1" * 32)
"""Any private key shows whether a public key has small order; this one protects nothing."""

T = TypeVar("T")


class CoordinatorRound:
    """Makes the requests, takes the replies, opens the sum.

    Drive it as ``while True: send requests(), receive() or lost() each, if not advance(): break``.

    Args:
        header: the server's view of the round; silos with another view take themselves out.
        roster: the silos of the signed study.
        threads: for removing masks and checking uploads.

    Raises:
        LocalProtocolError: the header is for another roster.
    """

    def __init__(self, *, header: RoundHeader, roster: Roster, threads: int = 1) -> None:
        check_roster(header, roster)
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._roster = roster
        self._threads = threads
        self._step = Step.ADVERTISE
        self._excluded: dict[str, str] = {}
        self._asked: tuple[int, ...] = tuple(range(1, len(roster) + 1))
        self._replied: set[int] = set()
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
        self._result: RoundResult | None = None

    @property
    def step(self) -> Step:
        """The step whose replies are being collected."""
        return self._step

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far."""
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=tuple(self._roster.name(index) for index in self._survivors),
            dropouts=tuple(self._roster.name(index) for index in self._dropouts),
            agreements=self._signatures(),
        )

    @property
    def excluded(self) -> dict[str, str]:
        """Name -> reason for every silo that has stopped taking part so far."""
        return dict(self._excluded)

    @property
    def result(self) -> RoundResult:
        """The sum, once :meth:`advance` has returned False.

        Raises:
            LocalProtocolError: not yet, or the attempt failed.
        """
        if self._result is None:
            raise LocalProtocolError(
                f"there is no result at step {self._step.value}",
                hint="call advance() until it returns False",
            )
        return self._result

    def __repr__(self) -> str:
        return f"CoordinatorRound(step={self._step.value}, excluded={self._excluded})"

    def requests(self) -> dict[str, bytes]:
        """One frame for every silo that takes part in this step and has not replied yet."""
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
            case Step.UNMASK:
                agreements = tuple(self._agreements[i] for i in sorted(self._agreements))
                opening = Opening(self._survivors, self._dropouts, agreements)
                frame = _same(opening.encode())
            case _:
                self._over()
        return {self._roster.name(index): frame(index) for index in self._waiting()}

    def _delivery(self, holder: int) -> bytes:
        position = tuple(self._roll).index(holder)
        return Delivery(
            statements=tuple(deal.statement for deal in self._deals.values()),
            parcels=tuple(
                deal.parcels[position] for dealer, deal in self._deals.items() if dealer != holder
            ),
        ).encode()

    def receive(self, silo: str, frame: bytes) -> None:
        """Take the reply of ``silo`` in this step.

        A silo that is out, was not asked or has replied already changes nothing: nobody can replace
        a reply or bring a dropped vector back by sending again.

        Raises:
            RemoteProtocolError: the reply does not fit; the silo is out (see ``excluded``).
        """
        index = self._roster.index(silo)
        if self._step not in TRANSITIONS:
            self._over()
        if index in self._replied or index not in self._waiting():
            raise RemoteProtocolError(
                f"sent a second or a late frame in step {self._step.value}",
                peer=silo,
                hint="ignored; nothing to do",
            )
        try:
            match self._step:
                case Step.ADVERTISE:
                    self._on_advertise(index, decode(Advertise, frame, silo))
                case Step.SHARE:
                    self._on_deal(index, decode(Deal, frame, silo))
                case Step.UPLOAD:
                    self._on_upload(index, frame)
                case Step.AGREE:
                    self._on_agreement(index, decode(Agreement, frame, silo))
                case _:
                    self._on_unmask(index, decode(Unmask, frame, silo))
        except RemoteProtocolError as error:
            self._excluded.setdefault(silo, error.message)
            raise
        self._replied.add(index)

    def lost(self, silo: str, reason: str) -> None:
        """Take note that ``silo`` will not reply: it is out. What it sent before stands."""
        self._roster.index(silo)
        self._excluded.setdefault(silo, reason)

    def advance(self) -> bool:
        """Close this step; whoever has not replied is out. True while there is a next step.

        Raises:
            ProtocolError: too few silos are left, or one (``RemoteProtocolError.peer``) made the
                sum impossible to open. The attempt has failed; nothing was learnt.
            LocalProtocolError: the attempt is over already.
        """
        if self._step not in TRANSITIONS:
            self._over()
        for index in self._waiting():
            self._excluded[self._roster.name(index)] = f"no reply in step {self._step.value}"
        try:
            self._close()
        except BaseException:
            self._step = Step.FAILED
            self._forget()
            raise
        self._step = TRANSITIONS[self._step].following
        self._replied.clear()
        return self._step is not Step.DONE

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
                self._asked = tuple(sorted(self._agreements))
            case _:
                self._enough(len(self._unmasks), self._parameters.threshold)
                self._open()

    def _forget(self) -> None:
        self._deals.clear()
        self._unmasks.clear()
        self._sum = np.zeros(0, dtype="<u8")

    def _waiting(self) -> tuple[int, ...]:
        return tuple(
            index
            for index in self._asked
            if index not in self._replied and self._roster.name(index) not in self._excluded
        )

    def _enough(self, count: int, needed: int) -> None:
        if count < needed:
            raise ProtocolError(
                f"only {count} silos completed step {self._step.value}; {needed} are needed"
                f"{self._reasons()}",
                hint="nothing was opened; "
                + (
                    "try again with exactly these survivors, or go on with the next round"
                    if self._step is Step.UNMASK
                    else "bring the lost silos back and start another attempt"
                ),
            )

    def _reasons(self) -> str:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self._excluded.items()))
        return f" ({reasons})" if reasons else ""

    def _over(self) -> NoReturn:
        raise LocalProtocolError(
            f"this attempt is over ({self._step.value})", hint="start a new CoordinatorRound"
        )

    def _staying(self, replied: dict[int, T]) -> dict[int, T]:
        """Replies of silos that are still in, by index."""
        return {
            index: replied[index]
            for index in sorted(replied)
            if self._roster.name(index) not in self._excluded
        }

    # R0 ---------------------------------------------------------------------------------------

    def _on_advertise(self, index: int, advertise: Advertise) -> None:
        self._check_signed(index, advertise)
        pair = {advertise.mask_public, advertise.share_public}
        # Adversary: a silo with a key of small order, or with another silo's key, in whatever
        # spelling; its peers would refuse the whole roll, so it is taken off here.
        if len(pair) < 2 or pair & self._publics:
            self._blame(index, "advertised a key that is in use already")
        try:
            for public in pair:
                _PROBE.agree(public)
        except CryptoError:
            self._blame(index, "advertised a public key that is misspelled or of small order")
        self._publics |= pair
        self._advertisements[index] = advertise

    def _close_advertise(self) -> None:
        self._roll = self._staying(self._advertisements)
        self._enough(len(self._roll), self._parameters.quorum)
        self._roll_digest = keys.roll_digest(self._header_digest, tuple(self._roll.values()))
        self._asked = tuple(self._roll)

    # R1 ---------------------------------------------------------------------------------------

    def _on_deal(self, index: int, deal: Deal) -> None:
        statement = deal.statement
        self._check_signed(index, statement)
        digests = tuple(keys.parcel_digest(parcel) for parcel in deal.parcels)
        expected = [(index, holder, 0 if holder == index else BOX_BYTES) for holder in self._roll]
        found = [(parcel.dealer, parcel.holder, len(parcel.box)) for parcel in deal.parcels]
        if statement.roll != self._roll_digest or statement.parcels != digests or found != expected:
            self._blame(index, "sent a dealing that does not fit the roll or its own statement")
        self._deals[index] = deal

    def _close_share(self) -> None:
        self._deals = self._staying(self._deals)
        self._enough(len(self._deals), self._parameters.quorum)
        self._delivery_digest = keys.delivery_digest(
            self._roll_digest, [deal.statement for deal in self._deals.values()]
        )
        self._asked = tuple(self._deals)
        self._sum = np.zeros(self._parameters.words, dtype="<u8")

    # R2 ---------------------------------------------------------------------------------------

    def _on_upload(self, index: int, frame: bytes) -> None:
        silo = self._roster.name(index)
        if not frame.startswith(MAGIC):
            self._on_refusal(index, decode(Refusal, frame, silo))
            return
        upload, words = split(frame, self._parameters, silo, self._threads)
        self._check_signed(index, upload)
        if upload.delivery != self._delivery_digest:
            self._blame(index, "masked its vector for another delivery")
        np.add(self._sum, words, out=self._sum)
        self._uploaded.add(index)

    def _on_refusal(self, index: int, refusal: Refusal) -> None:
        # Either may be lying: the accused dealt a bad share, or this silo invents it. It has not
        # uploaded, so the sum goes on without it; both names are there for the operators.
        self._check_signed(index, refusal)
        if refusal.delivery != self._delivery_digest or refusal.accused not in self._deals:
            self._blame(index, "refused another delivery")
        accused = self._roster.name(refusal.accused)
        self._excluded[self._roster.name(index)] = f"refused: {accused} dealt it a bad share"

    def _close_upload(self) -> None:
        self._survivors = tuple(sorted(self._uploaded))
        self._dropouts = tuple(index for index in self._deals if index not in self._uploaded)
        self._enough(len(self._survivors), self._parameters.quorum)
        self._lists_digest = keys.lists_digest(
            self._delivery_digest, self._survivors, self._dropouts
        )
        self._asked = self._survivors

    # R3, R4 -----------------------------------------------------------------------------------

    def _on_agreement(self, index: int, agreement: Agreement) -> None:
        self._check_signed(index, agreement)
        if agreement.lists != self._lists_digest:
            self._blame(index, "agreed to other lists")
        self._agreements[index] = agreement

    def _on_unmask(self, index: int, unmask: Unmask) -> None:
        self._check_signed(index, unmask)
        if unmask.lists != self._lists_digest or len(unmask.shares) != len(self._deals):
            self._blame(index, "opened other lists")
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
                self._blame(index, f"sent a wrong share of {self._roster.name(dealer)}'s secret")
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
        total = packing.unpack(self._sum, self._parameters, len(self._survivors))
        self._result = RoundResult(
            sum=total,
            survivors=tuple(self._roster.name(index) for index in self._survivors),
            dropouts=tuple(self._roster.name(index) for index in self._dropouts),
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
        """Survivors' seeds and dropouts' mask keys, each checked against what its owner published.

        Adversary: a dealer whose shares lie on no polynomial of the agreed degree, or on that of
        another secret. Every share here matches the dealer's own commitment, so a wrong secret is
        the dealer's doing.
        """
        responders = sorted(self._unmasks)[: self._parameters.threshold]
        lagrange = shamir.weights(responders)
        seeds: dict[int, bytes] = {}
        mask_keys: dict[int, AgreementKey] = {}
        for position, (dealer, deal) in enumerate(self._deals.items()):
            try:
                secret = shamir.rebuild(
                    [self._unmasks[index].shares[position] for index in responders], lagrange
                )
            except CryptoError:
                self._blame(dealer, "dealt shares of no secret; the sum cannot be opened")
            if dealer in self._uploaded:
                seeds[dealer] = secret
                published = deal.statement.seed_commitment
                found = keys.seed_commitment(self._header_digest, dealer, secret)
            else:
                mask_keys[dealer] = AgreementKey(secret)
                published = self._roll[dealer].mask_public
                found = mask_keys[dealer].public
            if not equal(found, published):
                self._blame(dealer, "dealt shares of another secret; the sum cannot be opened")
        return seeds, mask_keys

    # Checks used by several steps -------------------------------------------------------------

    def _check_signed(self, index: int, message: Signed) -> None:
        # Adversary: a silo or the network that speaks for another silo, or replays a frame of
        # another round, run, study or attempt.
        if message.index != index or message.header != self._header_digest:
            self._blame(index, "sent a frame of another silo, round, study or global model")
        try:
            verify(self._roster.key(index), message.CONTEXT, message.signed(), message.signature)
        except CryptoError:
            self._blame(index, "sent a frame with a bad signature")

    def _blame(self, index: int, what: str) -> NoReturn:
        name = self._roster.name(index)
        self._excluded.setdefault(name, what)
        raise RemoteProtocolError(
            what, peer=name, hint="the silo's operator should compare study, model and version"
        ) from None


def _same(frame: bytes) -> Callable[[int], bytes]:
    return lambda index: frame
