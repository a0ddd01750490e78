"""The frames of one question to one silo, and what binds them.

Encoded, bounded and compared as the frames of aggregation are
(:mod:`securefedcollm.aggregation.messages`). The adversary is whoever carries them: it sees and may
alter, drop, repeat or invent every frame. Each frame is signed by its author over the header and
everything before, so a frame of another question, silo, study, run or index space never passes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, NamedTuple

import msgspec

from securefedcollm.aggregation.messages import Signable, Signature
from securefedcollm.primitives import KEY_BYTES, sha256
from securefedcollm.retrieval.terms import Digest, Terms

_PREFIX: Final = b"securefedcollm/v1/retrieval-"
NUMBER_BYTES: Final = 16
Number = Annotated[bytes, msgspec.Meta(min_length=NUMBER_BYTES, max_length=NUMBER_BYTES)]
_SLACK: Final = 256
"""Room for everything in a frame but polynomials."""


class Header(msgspec.Struct, frozen=True):
    """Who asks whom under which terms. Both sides make it from the signed study.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes, as the logs of both sides begin with it. Adversary: whoever
            copies a frame of another run into this run's evidence, to say that its author hides it.
        asker, silo: their Ed25519 public keys, 32 bytes each.
    """

    study: Digest
    run: Number
    asker: Digest
    silo: Digest
    terms: Terms

    @property
    def digest(self) -> bytes:
        """32 bytes, in every signature."""
        return header_digest(self.study, self.run, self.asker, self.silo, self.terms.digest)


def header_digest(study: bytes, run: bytes, asker: bytes, silo: bytes, terms: bytes) -> bytes:
    """:attr:`Header.digest`, for a reader of evidence who has only the digest of the terms."""
    return sha256(_PREFIX, b"header\0", study, run, asker, silo, terms)


class Encryption(Signable, frozen=True):
    """What an asker sends: polynomials under a key of its own.

    ``before``: the header's digest, or that of the frame that this one follows. ``seed``: stands
    for the common polynomials. ``rows``: [k, groups + 1] packed polynomials.
    """

    before: Digest
    signature: Signature
    number: Number
    seed: Digest
    rows: bytes

    def signed(self) -> bytes:
        return self.before + self.number + self.seed + sha256(self.rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.rows)} bytes)"


class Question(Encryption, frozen=True, tag="question"):
    """Asker → silo: the embedding of its question."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"question"


class Selection(Encryption, frozen=True, tag="selection"):
    """Asker → silo: k one-hot vectors over the documents."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"selection"


class Answer(Signable, frozen=True):
    """What a silo sends. ``before``: the digest of the frame that it answers."""

    before: Digest
    signature: Signature
    content: bytes

    def signed(self) -> bytes:
        return self.before + sha256(self.content)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.content)} bytes)"


class Scores(Answer, frozen=True, tag="scores"):
    """Silo → asker: an encrypted score of every document."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"scores"


class Blocks(Answer, frozen=True, tag="blocks"):
    """Silo → asker: the k encrypted blocks."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"blocks"


class Receipt(NamedTuple):
    """A frame without its polynomials. It proves who wrote the frame, and after which other one.

    Args:
        signed: what the signature covers; its first 32 bytes are the frame's ``before``.
    """

    signed: bytes
    signature: bytes

    @property
    def before(self) -> bytes:
        """The transcript that the frame follows."""
        return self.signed[:KEY_BYTES]


def receipt(message: Encryption | Answer) -> Receipt:
    """The receipt of a frame."""
    return Receipt(message.signed(), message.signature)


def transcript(header: bytes, kind: type[Signable], signed: bytes) -> bytes:
    """32 bytes that stand for a frame, with what its signature covers, and everything before it."""
    return sha256(_PREFIX, b"frame\0", header, kind.CONTEXT, b"\0", signed)


def digest(header: Header, message: Signable) -> bytes:
    """32 bytes that stand for a signed message and everything before it."""
    return transcript(header.digest, type(message), message.signed())


def limit(content: int) -> int:
    """Largest frame with so many bytes of polynomials."""
    return content + _SLACK


assert _SLACK > 3 * KEY_BYTES + NUMBER_BYTES + 64
