"""The frames of a round on a graph that those on the complete graph lack.

Advertise, Agreement, Refusal and the upload are those of :mod:`~.masking.messages`. Sets of silos
are bit sets (:func:`~.graph.choice.pack_set`), so that they stay small with thousands of silos.
What occurs once a neighbour (:class:`Record`) has no tag and repeats nothing that both ends know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation.header import MAX_COHORT, Digest
from securefedcollm.aggregation.masking.messages import BOX_BYTES, Advertise, Share
from securefedcollm.aggregation.messages import Index, Message, Signature, Signed, index_bytes
from securefedcollm.primitives import sha256

Set = Annotated[bytes, msgspec.Meta(max_length=MAX_COHORT // 8)]
Box = Annotated[bytes, msgspec.Meta(min_length=BOX_BYTES, max_length=BOX_BYTES)]
MANY: Final = msgspec.Meta(max_length=MAX_COHORT)
_MOST: Final = 4 * 1024 * 1024


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of the parts of messages."""


class Members(Message, frozen=True, tag="members"):
    """Server → silo, G1: everyone on the roll."""

    LIMIT: ClassVar[int] = 2048

    members: Set


class Draw(Signed, frozen=True, tag="draw"):
    """Silo → server, G1: the random bytes from which its neighbours follow."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/draw"

    roll: Digest
    secret: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.roll + self.secret


class Peer(Record, frozen=True):
    """A silo's advertisement, without the header that all have in common."""

    index: Index
    mask_public: Digest
    share_public: Digest
    signature: Signature

    @classmethod
    def of(cls, entry: Advertise) -> Peer:
        """``entry`` in short."""
        return cls(entry.index, entry.mask_public, entry.share_public, entry.signature)

    def advertise(self, header: bytes) -> Advertise:
        """The advertisement under the signature; ``header``: 32-byte digest."""
        return Advertise(
            header=header,
            index=self.index,
            signature=self.signature,
            mask_public=self.mask_public,
            share_public=self.share_public,
        )


class Neighbours(Message, frozen=True, tag="neighbours"):
    """Server → silo, G2: the keys of the silos that it drew, by ascending index."""

    LIMIT: ClassVar[int] = _MOST

    peers: Annotated[tuple[Peer, ...], MANY]


class Dealt(Record, frozen=True):
    """A dealer's sealed shares for one of those that it drew, and commitments to the two."""

    box: Box
    seed_share_commitment: Digest
    key_share_commitment: Digest

    @property
    def digest(self) -> bytes:
        """What the holder checks its shares against, 32 bytes."""
        return commitments_digest(self.seed_share_commitment, self.key_share_commitment)


def commitments_digest(seed_share_commitment: bytes, key_share_commitment: bytes) -> bytes:
    """32 bytes that stand for the commitments to both shares of one holder."""
    return sha256(b"securefedcollm/v2/parcel\0", seed_share_commitment, key_share_commitment)


class Letters(Signed, frozen=True, tag="letters"):
    """Silo → server, G2: one parcel for each silo that it drew, by ascending index."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/letters"
    LIMIT: ClassVar[int] = _MOST

    roll: Digest
    seed_commitment: Digest
    dealt: Annotated[tuple[Dealt, ...], MANY]

    def signed(self) -> bytes:
        head = Signed.signed(self) + self.roll + self.seed_commitment
        return head + index_bytes(len(self.dealt)) + sha256(msgspec.msgpack.encode(self.dealt))


class Letter(Record, frozen=True):
    """A dealer's box for one holder, and the digest of its commitments to what is in it.

    No signature covers it. The box is authentic by its key, which only dealer and holder have.
    """

    box: Box
    commitments: Digest


class Post(Message, frozen=True, tag="post"):
    """Server → silo, G3: everyone who has dealt, and the letters to this silo by dealer."""

    LIMIT: ClassVar[int] = _MOST

    dealers: Set
    senders: Annotated[tuple[Peer, ...], MANY]
    letters: Annotated[tuple[Letter, ...], MANY]


class Survivors(Message, frozen=True, tag="survivors"):
    """Server → silo, G4: the silos whose vectors are in the sum; the other dealers are lost."""

    LIMIT: ClassVar[int] = 2048

    survivors: Set


class Tally(Message, frozen=True, tag="tally"):
    """Server → silo, G5: who has agreed, and the root of the tree over their signatures."""

    LIMIT: ClassVar[int] = 2048

    signers: Set
    root: Digest


class Challenge(Signed, frozen=True, tag="challenge"):
    """Silo → server, G5: the random bytes that say which signatures it wants to see."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/challenge"

    tally: Digest
    secret: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.tally + self.secret


class Uploaded(Record, frozen=True):
    """A survivor's signature over its upload: the delivery that it masked for is this one."""

    words: Digest
    signature: Signature


class Proof(Message, frozen=True, tag="proof"):
    """Server → silo, G6: the signatures asked for, and the uploads of those whose seed it opens.

    Args:
        signatures: over the survivors, by ascending place in the tally.
        nodes: of the tree, that lead with them to its root (:func:`~.graph.choice.root_of`).
        uploads: by ascending index.
    """

    LIMIT: ClassVar[int] = _MOST

    signatures: Annotated[tuple[Signature, ...], MANY]
    nodes: Annotated[tuple[Digest, ...], MANY]
    uploads: Annotated[tuple[Uploaded, ...], MANY]


class Shares(Signed, frozen=True, tag="shares"):
    """Silo → server, G6: one share for each dealer that drew this silo, by ascending index.

    The seed share of a survivor, the mask-key share of a dropout.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/shares"
    LIMIT: ClassVar[int] = _MOST

    lists: Digest
    shares: Annotated[tuple[Share, ...], MANY]

    def signed(self) -> bytes:
        return Signed.signed(self) + self.lists + b"".join(self.shares)

    def __repr__(self) -> str:
        return f"Shares(index={self.index}, shares=<redacted>)"


def advertised(peers: Iterable[Peer], header: bytes) -> list[Advertise]:
    """The advertisements of ``peers`` in full."""
    return [peer.advertise(header) for peer in peers]
