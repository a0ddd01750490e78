"""The frames of a round: one frozen, typed struct per message, in one canonical encoding.

msgpack arrays whose first element is the tag; decoding checks types, lengths and that the frame
re-encodes to itself byte for byte, so one message has one spelling and nothing rides along unread.
The vector upload is the exception (:mod:`~.upload`): gigabytes are neither re-encoded nor copied.

Every message of a silo begins with header digest, index and signature; ``signed()`` gives the bytes
that the signature covers, under the message's ``CONTEXT``. The adversary is the relay: it sees and
may alter, drop, repeat or invent every frame.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, TypeVar

import msgspec

from securefedcollm.aggregation.header import MAX_SILOS, Digest, RoundHeader
from securefedcollm.aggregation.shamir import SHARE_BYTES
from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.primitives import AEAD_OVERHEAD, SIGNATURE_BYTES, SigningKey

BOX_BYTES: Final = 2 * SHARE_BYTES + AEAD_OVERHEAD
"""A sealed pair of shares: seed share ‖ mask-key share ‖ tag."""

UNSIGNED: Final = bytes(SIGNATURE_BYTES)

Index = Annotated[int, msgspec.Meta(ge=1, le=MAX_SILOS)]
Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Share = Annotated[bytes, msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Box = Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES)]
_FEW: Final = msgspec.Meta(max_length=MAX_SILOS)
Indices = Annotated[tuple[Index, ...], _FEW]
Digests = Annotated[tuple[Digest, ...], _FEW]


def index_bytes(*indices: int) -> bytes:
    """Silo indices as 2 big-endian bytes each."""
    return b"".join(index.to_bytes(2, "big") for index in indices)


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every frame."""

    LIMIT: ClassVar[int] = 512
    """Greatest frame, bytes; checked before decoding so that a peer cannot make us allocate."""

    def encode(self) -> bytes:
        """The canonical frame."""
        return msgspec.msgpack.encode(self)


class Signable(Message, frozen=True):
    """Base of what has a field ``signature``."""

    CONTEXT: ClassVar[bytes] = b""

    def signed(self) -> bytes:
        """The bytes under the signature."""
        raise NotImplementedError


class Signed(Signable, frozen=True):
    """Base of everything a silo says."""

    header: Digest
    index: Index
    signature: Signature

    def signed(self) -> bytes:
        """The bytes under the signature."""
        return self.header + index_bytes(self.index)


class Ask(Message, frozen=True, tag="ask"):
    """Server → silo, R0: let us begin. ``header`` is compared with the silo's own, never used."""

    header: RoundHeader


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

    advertisements: Annotated[tuple[Advertise, ...], _FEW]


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
    """What a dealer signs about its dealing: everyone on the roll gets the same one.

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
    parcels: Annotated[tuple[Parcel, ...], _FEW]


class Delivery(Message, frozen=True, tag="delivery"):
    """Server → silo, R2: every dealer's statement, and the other dealers' parcels for this silo."""

    LIMIT: ClassVar[int] = 1024 * 1024

    statements: Annotated[tuple[Statement, ...], _FEW]
    parcels: Annotated[tuple[Parcel, ...], _FEW]


class Refusal(Signed, frozen=True, tag="refusal"):
    """Silo → server, R2 instead of an upload: ``accused`` dealt shares that do not check."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/refusal"

    delivery: Digest
    accused: Index

    def signed(self) -> bytes:
        return Signed.signed(self) + self.delivery + index_bytes(self.accused)


class Survey(Message, frozen=True, tag="survey"):
    """Server → silo, R3: whose vectors are in the sum, and who was lost after dealing."""

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
    agreements: Annotated[tuple[Agreement, ...], _FEW]


class Unmask(Signed, frozen=True, tag="unmask"):
    """Silo → server, R4: one share per dealer, by ascending dealer index.

    The seed share of a survivor, the mask-key share of a dropout; which one follows from the lists.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/unmask"
    LIMIT: ClassVar[int] = 8 * 1024

    lists: Digest
    shares: Annotated[tuple[Share, ...], _FEW]

    def signed(self) -> bytes:
        return Signed.signed(self) + self.lists + b"".join(self.shares)

    def __repr__(self) -> str:
        return f"Unmask(index={self.index}, shares=<redacted>)"


M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=Signable)


def sign(message: S, key: SigningKey) -> S:
    """``message`` with its signature filled in."""
    return msgspec.structs.replace(message, signature=key.sign(message.CONTEXT, message.signed()))


def decode(kind: type[M], frame: bytes, peer: str, limit: int = 0) -> M:
    """Decode one frame of the expected ``kind``, of at most ``limit`` (default: its LIMIT) bytes.

    Raises:
        RemoteProtocolError: too long, not of this kind, not canonical.
    """
    name = kind.__name__.lower()
    hint = "both sides must run the same version; otherwise report this peer"
    limit = limit or kind.LIMIT
    if len(frame) > limit:
        message = f"the {name} frame has {len(frame)} bytes, more than {limit}"
        raise RemoteProtocolError(message, peer=peer, hint=hint)
    try:
        decoded = msgspec.msgpack.decode(frame, type=kind)
    except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(
            f"not a well-formed {name} frame", peer=peer, hint=hint
        ) from error
    if decoded.encode() != frame:
        raise RemoteProtocolError(f"the {name} frame is not canonical", peer=peer, hint=hint)
    return decoded
