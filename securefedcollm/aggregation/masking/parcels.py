"""A silo's parcels: the shares that it seals for the others, and those that they sealed for it.

The relay can neither read a box nor alter it unnoticed. The remaining adversary is a dealer that
seals something other than it committed to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, Protocol

from securefedcollm.aggregation.header import Roster
from securefedcollm.aggregation.masking import keys
from securefedcollm.aggregation.masking.messages import Parcel
from securefedcollm.aggregation.masking.shamir import SHARE_BYTES
from securefedcollm.aggregation.roles import SERVER
from securefedcollm.errors import CryptoError, RemoteProtocolError
from securefedcollm.primitives import AgreementKey, equal, seal, unseal


class Peer(Protocol):
    """What a parcel needs to know of the silo at the other end."""

    @property
    def index(self) -> int: ...

    @property
    def share_public(self) -> bytes: ...


class DealerFaultError(Exception):
    """A dealer signed a parcel that does not check; carries the dealer's index."""

    def __init__(self, dealer: int) -> None:
        super().__init__(dealer)
        self.dealer = dealer


def refuse_key(name: str, error: CryptoError) -> NoReturn:
    """Adversary: a key of small order fixes the shared secret to a value that everyone knows."""
    raise RemoteProtocolError(
        f"relayed an unusable public key of {name}",
        peer=SERVER,
        hint="an honest server drops such a silo; report both",
    ) from error


class Parcels:
    """Makes and opens the parcels of one silo in one attempt.

    Args:
        header: digest, 32 bytes.
        roster: the silos of the study.
        roll: index -> advertised keys of everybody who takes part.
        roll_digest: 32 bytes.
        index: this silo.
        secret: this silo's key for boxes, 32 bytes.
    """

    def __init__(
        self,
        *,
        header: bytes,
        roster: Roster,
        roll: Mapping[int, Peer],
        roll_digest: bytes,
        index: int,
        secret: bytes,
    ) -> None:
        self._header = header
        self._roster = roster
        self._roll = roll
        self._roll_digest = roll_digest
        self._index = index
        self._key = AgreementKey(secret)

    def __repr__(self) -> str:
        return "Parcels(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Parcels hold a secret: they are neither copied nor pickled")

    def make(self, holder: int, seed_share: bytes, key_share: bytes) -> Parcel:
        """This silo's two shares for ``holder``, 33 bytes each; its own stay out of the box.

        Raises:
            RemoteProtocolError: the holder's public key is unusable.
        """
        header, dealer = self._header, self._index
        box = b""
        if holder != dealer:
            key = self._box_key(dealer, holder)
            associated = keys.box_associated(header, self._roll_digest, dealer, holder)
            box = seal(key, keys.ZERO_NONCE, seed_share + key_share, associated)
        return Parcel(
            dealer=dealer,
            holder=holder,
            box=box,
            seed_share_commitment=keys.share_commitment(header, dealer, holder, "seed", seed_share),
            key_share_commitment=keys.share_commitment(header, dealer, holder, "key", key_share),
        )

    def open(self, parcel: Parcel) -> tuple[bytes, bytes]:
        """The two shares in a parcel that its dealer has signed: seed share, mask-key share.

        Adversary: a dealer that hands out boxes that do not open or shares other than committed, so
        that honest holders would later look like the liars. Found here, it is the dealer's fault.

        Raises:
            DealerFaultError: the parcel does not check.
            RemoteProtocolError: the dealer's public key is unusable.
        """
        shares = self.unbox(parcel.dealer, parcel.box)
        committed = parcel.seed_share_commitment, parcel.key_share_commitment
        found = self.commitments(parcel.dealer, *shares)
        if parcel.holder != self._index or not equal(b"".join(found), b"".join(committed)):
            raise DealerFaultError(parcel.dealer)
        return shares

    def unbox(self, dealer: int, box: bytes) -> tuple[bytes, bytes]:
        """The two shares in a box from ``dealer`` to this silo, for this roll.

        Raises:
            DealerFaultError: it is no box from that dealer, to this silo, for this roll.
            RemoteProtocolError: the dealer's public key is unusable.
        """
        header, holder = self._header, self._index
        key = self._box_key(dealer, holder)
        associated = keys.box_associated(header, self._roll_digest, dealer, holder)
        try:
            shares = unseal(key, keys.ZERO_NONCE, box, associated)
        except CryptoError as error:
            raise DealerFaultError(dealer) from error
        return shares[:SHARE_BYTES], shares[SHARE_BYTES:]

    def commitments(self, dealer: int, seed_share: bytes, key_share: bytes) -> tuple[bytes, bytes]:
        """What ``dealer`` commits to when it deals these shares to this silo, 32 bytes each."""
        header, holder = self._header, self._index
        return (
            keys.share_commitment(header, dealer, holder, "seed", seed_share),
            keys.share_commitment(header, dealer, holder, "key", key_share),
        )

    def _box_key(self, dealer: int, holder: int) -> bytes:
        peer = self._roll[holder if dealer == self._index else dealer]
        header, roll = self._header, self._roll_digest
        try:
            return keys.box_key(self._key, peer.share_public, header, roll, dealer, holder)
        except CryptoError as error:
            refuse_key(self._roster.name(peer.index), error)
