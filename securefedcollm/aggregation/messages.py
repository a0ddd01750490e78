"""The common base of all schemes' frames: a frozen, typed struct each, in one canonical encoding.

msgpack arrays whose first element is the tag; decoding checks types, lengths and that the frame
re-encodes to itself byte for byte. So one message has one spelling and carries no unread bytes.

Every message of a silo begins with header digest, index and signature; ``signed()`` gives the bytes
that the signature covers, under the message's ``CONTEXT``. The adversary is the relay: it sees and
may alter, drop, repeat or invent every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, TypeVar

import msgspec

from securefedcollm.aggregation.header import MAX_COHORT, MAX_SILOS, Digest, RoundHeader
from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.primitives import SIGNATURE_BYTES, SigningKey, sha256

UNSIGNED: Final = bytes(SIGNATURE_BYTES)

Index = Annotated[int, msgspec.Meta(ge=1, le=MAX_COHORT)]
Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
FEW: Final = msgspec.Meta(max_length=MAX_SILOS)
"""A list with at most one entry of each silo."""
Indices = Annotated[tuple[Index, ...], FEW]
Digests = Annotated[tuple[Digest, ...], FEW]


def index_bytes(*indices: int) -> bytes:
    """Silo indices as 2 big-endian bytes each."""
    return b"".join(index.to_bytes(2, "big") for index in indices)


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every frame."""

    LIMIT: ClassVar[int] = 512
    """Largest frame in bytes, checked before decoding so that a peer cannot make us allocate."""

    def encode(self) -> bytes:
        """The canonical frame."""
        return msgspec.msgpack.encode(self)


class Signable(Message, frozen=True):
    """Base of messages with a field ``signature``."""

    CONTEXT: ClassVar[bytes] = b""

    def signed(self) -> bytes:
        """The bytes under the signature."""
        raise NotImplementedError


class Signed(Signable, frozen=True):
    """Base of all messages of a silo."""

    header: Digest
    index: Index
    signature: Signature

    def signed(self) -> bytes:
        """The bytes under the signature."""
        return self.header + index_bytes(self.index)


class Ask(Message, frozen=True, tag="ask"):
    """Server → silo, R0: let us begin. ``header`` is compared with the silo's own, never used."""

    header: RoundHeader


M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=Signable)


def sign(message: S, key: SigningKey) -> S:
    """``message`` with its signature filled in."""
    return msgspec.structs.replace(message, signature=key.sign(message.CONTEXT, message.signed()))


def decode(kind: type[M], frame: bytes | memoryview, peer: str, limit: int = 0) -> M:
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


def lists_digest(delivery: bytes, survivors: Sequence[int], dropouts: Sequence[int]) -> bytes:
    """The vectors that are in the sum: survivors sign this under masking, in R3."""
    return sha256(
        b"securefedcollm/v1/lists\0",
        delivery,
        index_bytes(len(survivors), len(dropouts)),
        index_bytes(*survivors, *dropouts),
    )
