"""The frames of a round on a graph that those on the complete graph lack.

Advertise, Agreement, Refusal and the upload are those of :mod:`~.masking.messages`. Sets of silos
are bit sets (:func:`~.graph.choice.pack_set`), so that they stay small with thousands of silos.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation.header import MAX_COHORT, Digest
from securefedcollm.aggregation.masking.messages import Advertise, Parcel, Share
from securefedcollm.aggregation.messages import Index, Message, Signature, Signed, index_bytes
from securefedcollm.primitives import sha256

Set = Annotated[bytes, msgspec.Meta(max_length=MAX_COHORT // 8)]
MANY: Final = msgspec.Meta(max_length=MAX_COHORT)
_MOST: Final = 4 * 1024 * 1024


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


class Neighbours(Message, frozen=True, tag="neighbours"):
    """Server → silo, G2: the advertisements of the silos that it drew, by ascending index."""

    LIMIT: ClassVar[int] = _MOST

    advertisements: Annotated[tuple[Advertise, ...], MANY]


class Letter(Message, frozen=True, tag="letter"):
    """A parcel for one neighbour, and its dealer's signature.

    The signature also covers what both ends know: header, roll, and the dealer's keys.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/letter"

    parcel: Parcel
    signature: Signature


class Dealer(Message, frozen=True, tag="dealer"):
    """What all letters of a dealer have in common."""

    index: Index
    mask_public: Digest
    share_public: Digest

    def letter(self, header: bytes, roll: bytes, parcel: Parcel) -> bytes:
        """The bytes under a letter's signature."""
        own = index_bytes(self.index) + self.mask_public + self.share_public
        return header + roll + own + sha256(b"securefedcollm/v2/parcel\0", parcel.encode())


class Letters(Signed, frozen=True, tag="letters"):
    """Silo → server, G2: one letter for each silo that it drew, by ascending index."""

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v2/letters"
    LIMIT: ClassVar[int] = _MOST

    roll: Digest
    seed_commitment: Digest
    letters: Annotated[tuple[Letter, ...], MANY]

    def signed(self) -> bytes:
        head = Signed.signed(self) + self.roll + self.seed_commitment
        return head + index_bytes(len(self.letters)) + b"".join(x.signature for x in self.letters)


class Post(Message, frozen=True, tag="post"):
    """Server → silo, G3: everyone who has dealt, and the letters to this silo by dealer."""

    LIMIT: ClassVar[int] = _MOST

    dealers: Set
    senders: Annotated[tuple[Dealer, ...], MANY]
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


class Shown(Message, frozen=True, tag="shown"):
    """A signature over the survivors, and the path from it to the tally's root."""

    signature: Signature
    path: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=16)]


class Uploaded(Message, frozen=True, tag="uploaded"):
    """A survivor's signature over its upload: the delivery that it masked for is this one."""

    words: Digest
    signature: Signature


class Proof(Message, frozen=True, tag="proof"):
    """Server → silo, G6: the signatures asked for, and the uploads of those whose seed it opens."""

    LIMIT: ClassVar[int] = _MOST

    shown: Annotated[tuple[Shown, ...], MANY]
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
