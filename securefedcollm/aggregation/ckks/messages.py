"""The frames of a CKKS round, and the digests that bind them.

Same rules as :mod:`~.messages`. Frames that hold polynomials have a limit that follows from the
round's parameters (:func:`frame_limit`) instead of their class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation.ckks.parameters import (
    AUTHORITY_SUITES,
    CKKS_SUITES,
    CkksRing,
    Shape,
    derive,
)
from securefedcollm.aggregation.ckks.polynomials import polynomial_bytes
from securefedcollm.aggregation.header import Digest, RingParameters, RoundHeader
from securefedcollm.aggregation.messages import FEW, Digests, Message, Signed, index_bytes
from securefedcollm.errors import ConfigError
from securefedcollm.primitives import sha256

_PREFIX: Final = b"securefedcollm/v1/ckks-"
_SLACK: Final = 64 * 1024
"""Room for everything in a frame except polynomials, digests and signatures of MAX_SILOS silos."""


def ring_of(header: RoundHeader) -> CkksRing:
    """The ring that a header's suite and parameters fix.

    Raises:
        ConfigError: the suite is not CKKS, or no such ring holds the sum.
    """
    silos, bound = header.parameters.silos, header.parameters.bound
    for holders, suites in ((silos, CKKS_SUITES), (1, AUTHORITY_SUITES)):
        for name, suite in suites.items():
            if suite == header.suite:
                return derive(name, silos=silos, bound=bound, holders=holders)
    raise ConfigError(f"{header.suite!r} is not a CKKS suite", where="aggregation.scheme")


def shape_of(header: RoundHeader) -> Shape:
    """The numbers of polynomials that a header's parameters fix."""
    parameters = header.parameters
    return ring_of(header).shape(parameters.values, parameters.colluders)


class KeyCommitment(Signed, frozen=True, tag="key-commitment"):
    """Silo → server, K0: SHA-256 of the key parts that will follow."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"key-commitment"

    commitment: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.commitment


class KeyCommitments(Message, frozen=True, tag="key-commitments"):
    """Server → silo, K1: the commitments of everyone who takes part, by ascending index."""

    LIMIT: ClassVar[int] = 32 * 1024

    entries: Annotated[tuple[KeyCommitment, ...], FEW]


class KeyPart(Signed, frozen=True, tag="key-part"):
    """Silo → server, K1: its parts of the keys of every silo.

    ``commitments``: the digest of the list it was shown. ``digests``: SHA-256 of each part, by
    index. ``parts``: b = e − a·s for every key of one silo, one after another, by index; where it
    is relayed to a silo, that silo's alone.
    """

    CONTEXT: ClassVar[bytes] = _PREFIX + b"key-part"

    commitments: Digest
    digests: Digests
    parts: Annotated[tuple[bytes, ...], FEW]

    def signed(self) -> bytes:
        return Signed.signed(self) + self.commitments + sha256(*self.digests)

    def __repr__(self) -> str:
        return f"KeyPart(index={self.index}, {len(self.parts)} parts)"


class KeyParts(Message, frozen=True, tag="key-parts"):
    """Server → silo, K2: the members from here on, and their parts of the receiver's keys."""

    entries: Annotated[tuple[KeyPart, ...], FEW]


class Sealed(Signed, frozen=True, tag="sealed"):
    """Silo → server, K2: the digest of a ciphertext that nobody else has seen yet."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"sealed"

    key: Digest
    root: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.key + self.root


class SealedRoll(Message, frozen=True, tag="sealed-roll"):
    """Server → silo, K3: every member's commitment to its ciphertext."""

    LIMIT: ClassVar[int] = 64 * 1024

    entries: Annotated[tuple[Sealed, ...], FEW]


class CipherUpload(Message, frozen=True, tag="cipher-upload"):
    """Silo → server, K3: the ciphertext, a first polynomial per chunk, a second one per group and
    committee.

    No signature: it must hash to the root that its owner signed.
    """

    first: bytes
    second: bytes

    def __repr__(self) -> str:
        return f"CipherUpload({len(self.first)} + {len(self.second)} bytes)"


class PieceList(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A member's committed digests, and the polynomials for the receiver's secrets.

    Args:
        first: digest of all its first polynomials.
        seconds: concatenated 32-byte digests of its second polynomials.
        pieces: the second polynomials of the receiver's committee, one a group.
    """

    first: Digest
    seconds: bytes
    pieces: bytes


class Pieces(Message, frozen=True, tag="pieces"):
    """Server → silo, K4: one list per member, by ascending index."""

    lists: Annotated[tuple[PieceList, ...], FEW]


class Verdict(Signed, frozen=True, tag="verdict"):
    """Silo → server, K4: it was given the committed ciphertexts of this transcript, and agrees to
    open their sum."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"verdict"

    transcript: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.transcript


class Verdicts(Message, frozen=True, tag="verdicts"):
    """Server → silo, K5: every member's verdict."""

    LIMIT: ClassVar[int] = 64 * 1024

    verdicts: Annotated[tuple[Verdict, ...], FEW]


class Partial(Signed, frozen=True, tag="partial"):
    """Silo → server, K5: Σ c1·s + flooding noise, one polynomial a chunk."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"partial"

    transcript: Digest
    share: bytes

    def signed(self) -> bytes:
        return Signed.signed(self) + self.transcript + sha256(self.share)

    def __repr__(self) -> str:
        return f"Partial(index={self.index}, share=<redacted>)"


def frame_limit(parameters: RingParameters, ring: CkksRing, polynomials: int) -> int:
    """Largest frame with this number of polynomials and, for each silo, a digest of each of its
    second polynomials and of its key parts for each silo."""
    shape = ring.shape(parameters.values, parameters.colluders)
    digests = parameters.silos * 40 * (shape.seconds + parameters.silos)
    return polynomials * polynomial_bytes(ring) + digests + _SLACK


def committee(index: int, members: Sequence[int], count: int) -> int:
    """The committee, of ``count``, in which a member's secrets are: every ``count``-th one's.

    With count = c + 1 and a quorum of at least c + 2, none is empty and one has no colluder in it.
    """
    return members.index(index) % count


def of_committee(at: int, shape: Shape) -> range:
    """A committee's second polynomials, of all :attr:`Shape.seconds`: one in every group."""
    return range(at, shape.seconds, shape.committees)


# Digests, each fixing everything before it ------------------------------------------------------


def key_commitment(header: bytes, index: int, digests: Sequence[bytes]) -> bytes:
    """K0, of the digests of key parts. Hiding: a key part is pseudorandom."""
    return sha256(_PREFIX, b"key-commitment\0", header, index_bytes(index), *digests)


def commitments_digest(header: bytes, entries: Sequence[KeyCommitment]) -> bytes:
    """After K0: the silos that may take part, and their key parts."""
    return sha256(_PREFIX, b"commitments\0", header, *_said(entries))


def key_id(commitments: bytes, entries: Sequence[KeyPart]) -> bytes:
    """After K1: the joint keys of all, and the members whose shares it takes to decrypt."""
    return sha256(_PREFIX, b"key\0", commitments, *_said(entries))


def cipher_root(key: bytes, index: int, first: bytes, seconds: bytes) -> bytes:
    """A silo's commitment in K2: digest of the first polynomials, digests of the second."""
    return sha256(_PREFIX, b"cipher\0", key, index_bytes(index), first, seconds)


def transcript(key: bytes, entries: Sequence[Sealed]) -> bytes:
    """After K2: the ciphertexts that make up the sum. Members sign this in K4."""
    return sha256(_PREFIX, b"transcript\0", key, *_said(entries))


def polynomial_digests(data: bytes, size: int) -> bytes:
    """Concatenated SHA-256 of each polynomial of ``size`` bytes."""
    view = memoryview(data)
    return b"".join(sha256(view[at : at + size]) for at in range(0, len(data), size))


def _said(entries: Sequence[Signed]) -> list[bytes]:
    return [sha256(entry.signed(), entry.signature) for entry in entries]
