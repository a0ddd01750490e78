"""The frames of a masked round; the rules of encoding are those of :mod:`~.messages`.

The vector upload is the exception (:mod:`~.masking.upload`): gigabytes are neither re-encoded nor
copied.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation.header import Digest
from securefedcollm.aggregation.masking.shamir import SHARE_BYTES
from securefedcollm.aggregation.messages import (
    FEW,
    Digests,
    Index,
    Indices,
    Message,
    Signed,
    index_bytes,
)
from securefedcollm.primitives import AEAD_OVERHEAD

BOX_BYTES: Final = 2 * SHARE_BYTES + AEAD_OVERHEAD
"""A sealed pair of shares: seed share ‖ mask-key share ‖ tag."""

Share = Annotated[bytes, msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Box = Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES)]


class Advertise(Signed, frozen=True, tag="advertise"):
    """Silo → server, R0: fresh X25519 public keys, one for masks and one for share boxes."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/advertise"

    mask_public: Digest
    share_public: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.mask_public + self.share_public


class Roll(Message, frozen=True, tag="roll"):
    """Server → silo, R1: the advertisements of everyone who takes part, by ascending index."""

    LIMIT: ClassVar[int] = 32 * 1024

    advertisements: Annotated[tuple[Advertise, ...], FEW]


class Parcel(Message, frozen=True, tag="parcel"):
    """One dealer's sealed shares for one holder, and commitments to the two shares.

    The dealer's parcel for itself has an empty box.
    """

    dealer: Index
    holder: Index
    box: Box
    seed_share_commitment: Digest
    key_share_commitment: Digest


class Statement(Signed, frozen=True, tag="statement"):
    """A dealer's signed statement about its dealing; everyone on the roll gets the same one.

    ``parcels`` holds the digest of the parcel for each silo on the roll, in order, so a holder can
    tell a parcel that the relay altered from one that the dealer made badly.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/statement"

    roll: Digest
    seed_commitment: Digest
    parcels: Digests

    def signed(self) -> bytes:
        head = Signed.signed(self) + self.roll + self.seed_commitment
        return head + index_bytes(len(self.parcels)) + b"".join(self.parcels)


class Deal(Message, frozen=True, tag="deal"):
    """Silo → server, R1: the dealing, one parcel for each silo on the roll (by index)."""

    LIMIT: ClassVar[int] = 64 * 1024

    statement: Statement
    parcels: Annotated[tuple[Parcel, ...], FEW]


class Delivery(Message, frozen=True, tag="delivery"):
    """Server → silo, R2: every dealer's statement, and the other dealers' parcels for this silo."""

    LIMIT: ClassVar[int] = 1024 * 1024

    statements: Annotated[tuple[Statement, ...], FEW]
    parcels: Annotated[tuple[Parcel, ...], FEW]


class Refusal(Signed, frozen=True, tag="refusal"):
    """Silo → server, R2 instead of an upload: ``accused`` dealt shares that do not check."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/refusal"

    delivery: Digest
    accused: Index

    def signed(self) -> bytes:
        return Signed.signed(self) + self.delivery + index_bytes(self.accused)


class Survey(Message, frozen=True, tag="survey"):
    """Server → silo, R3: the silos whose vectors are in the sum, and those lost after dealing."""

    LIMIT: ClassVar[int] = 1024

    survivors: Indices
    dropouts: Indices


class Agreement(Signed, frozen=True, tag="agreement"):
    """Silo → server, R3: signature over the digest of the two lists this silo was shown."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/agreement"

    lists: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.lists


class Opening(Message, frozen=True, tag="opening"):
    """Server → silo, R4: the lists once more, with at least threshold signatures over them."""

    LIMIT: ClassVar[int] = 32 * 1024

    survivors: Indices
    dropouts: Indices
    agreements: Annotated[tuple[Agreement, ...], FEW]


class Unmask(Signed, frozen=True, tag="unmask"):
    """Silo → server, R4: one share per dealer, by ascending dealer index.

    The seed share of a survivor, the mask-key share of a dropout; which one follows from the lists.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/unmask"
    LIMIT: ClassVar[int] = 8 * 1024

    lists: Digest
    shares: Annotated[tuple[Share, ...], FEW]

    def signed(self) -> bytes:
        return Signed.signed(self) + self.lists + b"".join(self.shares)

    def __repr__(self) -> str:
        return f"Unmask(index={self.index}, shares=<redacted>)"
