"""What the server does alike on the complete graph and on a random one.

It keeps advertisements, adds uploads up, notes agreements, checks shares and rebuilt secrets, and
opens the sum. The server is honest here; the adversary is up to c silos (:mod:`~.coordinator`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from securefedcollm.aggregation.attendance import AttendedRound
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.messages import Advertise, Agreement, Refusal
from securefedcollm.aggregation.masking.upload import MAGIC, Upload, split
from securefedcollm.aggregation.messages import decode
from securefedcollm.aggregation.roles import RoundResult, Transcript
from securefedcollm.aggregation.steps import Step, Transition
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


class MaskedRound(AttendedRound):
    """Base of both coordinators; :class:`~.masking.coordinator.CoordinatorRound` has the arguments.

    Args:
        transitions: the steps.
    """

    def __init__(
        self,
        header: RoundHeader,
        roster: Roster,
        transitions: Mapping[Step, Transition],
        *,
        threads: int,
        narrow: bool,
    ) -> None:
        super().__init__(header, roster, transitions)
        self._threads = threads
        self._narrow = narrow
        self._advertisements: dict[int, Advertise] = {}
        self._publics: set[bytes] = set()
        self._roll_digest = b""
        self._delivery_digest = b""
        self._sum = np.zeros(0, dtype="<u8")
        self._uploads: dict[int, Upload] = {}
        self._survivors: tuple[int, ...] = ()
        self._dropouts: tuple[int, ...] = ()
        self._lists_digest = b""
        self._agreements: dict[int, Agreement] = {}

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

    def _signatures(self) -> dict[str, bytes]:
        return {
            self._roster.name(index): self._agreements[index].signature
            for index in sorted(self._agreements)
        }

    def _on_advertise(self, name: str, advertise: Advertise) -> None:
        index = self._check_signed(name, advertise)
        pair = {advertise.mask_public, advertise.share_public}
        # Adversary: a silo with a key of small order, or with another silo's key, in whatever
        # spelling; its peers would refuse all that they are sent with it, so it is taken off here.
        if len(pair) < 2 or pair & self._publics:
            self._blame(name, "advertised a key that is in use already")
        if not all(map(probe, pair)):
            self._blame(name, "advertised a public key that is misspelled or of small order")
        self._publics |= pair
        self._advertisements[index] = advertise

    @abstractmethod
    def _dealers(self) -> Sequence[int]:
        """The silos that have dealt shares, ascending."""

    def _on_upload(self, name: str, frame: bytes | memoryview) -> None:
        if frame[: len(MAGIC)] != MAGIC:
            self._on_refusal(name, decode(Refusal, frame, name))
            return
        upload, words = split(frame, self._parameters, name, self._threads)
        index = self._check_signed(name, upload)
        if upload.delivery != self._delivery_digest:
            self._blame(name, "masked its vector for another delivery")
        np.add(self._sum, words, out=self._sum)
        self._uploads[index] = upload

    def _on_refusal(self, name: str, refusal: Refusal) -> None:
        # Either may be lying: the accused dealt a bad share, or this silo invents it. It has not
        # uploaded, so the sum goes on without it; both names are there for the operators.
        self._check_signed(name, refusal)
        if refusal.delivery != self._delivery_digest or refusal.accused not in self._dealers():
            self._blame(name, "refused another delivery")
        accused = self._roster.name(refusal.accused)
        self._excluded[name] = f"refused: {accused} dealt it a bad share"

    def _split_dealers(self) -> None:
        """The uploads are in: survivors are a quorum, and all other dealers dropouts."""
        self._survivors = tuple(sorted(self._uploads))
        self._dropouts = tuple(index for index in self._dealers() if index not in self._uploads)
        self._enough(len(self._survivors), self._parameters.quorum)

    def _on_agreement(self, name: str, agreement: Agreement) -> None:
        index = self._check_signed(name, agreement)
        if agreement.lists != self._lists_digest:
            self._blame(name, "agreed to other lists")
        self._agreements[index] = agreement

    # Opening ------------------------------------------------------------------------------------

    def _check_share(self, dealer: int, holder: int, share: bytes, seed: bytes, key: bytes) -> None:
        """Adversary: a silo that sends an altered share, or another silo's.

        Args:
            seed: the dealer's commitment to this holder's share of its seed, 32 bytes.
            key: the one to the share of its mask secret.
        """
        kind: keys.Kind = "seed" if dealer in self._uploads else "key"
        found = keys.share_commitment(self._header_digest, dealer, holder, kind, share)
        if not equal(found, seed if kind == "seed" else key):
            self._blame(
                self._roster.name(holder),
                f"sent a wrong share of {self._roster.name(dealer)}'s secret",
            )

    def _secret(
        self, dealer: int, shares: Sequence[bytes], lagrange: Sequence[int], committed: bytes
    ) -> bytes:
        """A survivor's seed or a dropout's mask secret, checked against what its owner published.

        Adversary: a dealer whose shares lie on no polynomial of the agreed degree, or on that of
        another secret. Every share here matches the dealer's own commitment, so a wrong secret is
        the dealer's fault.

        Args:
            shares: of t holders; ``lagrange``: their weights.
            committed: the dealer's commitment to its seed.
        """
        name = self._roster.name(dealer)
        try:
            secret = shamir.rebuild(shares, lagrange)
        except CryptoError:
            self._blame(name, "dealt shares of no secret; the sum cannot be opened")
        if dealer in self._uploads:
            published = committed
            found = keys.seed_commitment(self._header_digest, dealer, secret)
        else:
            published = self._advertisements[dealer].mask_public
            found = AgreementKey(secret).public
        if not equal(found, published):
            self._blame(name, "dealt shares of another secret; the sum cannot be opened")
        return secret

    @abstractmethod
    def _near(self, dropout: int) -> Sequence[int]:
        """The survivors that masked with ``dropout``, ascending."""

    def _unmask(self, secrets: Mapping[int, bytes]) -> None:
        """Take the masks off the sum.

        Args:
            secrets: of each survivor its seed, of each dropout its mask secret, 32 bytes.
        """
        header, delivery = self._header_digest, self._delivery_digest
        add: list[bytes] = []
        subtract = [
            keys.self_mask_key(secrets[index], header, delivery, index) for index in self._survivors
        ]
        for dropout in self._dropouts:
            own = AgreementKey(secrets[dropout])
            for survivor in self._near(dropout):
                public = self._advertisements[survivor].mask_public
                key = keys.pair_mask_key(own, public, header, delivery, dropout, survivor)
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
