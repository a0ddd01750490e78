"""The frames of a CKKS round whose key one authority holds.

Same rules as :mod:`~.messages`; :class:`~.ckks.messages.Sealed` and ``SealedRoll`` are those of the
threshold scheme. The authority signs its statements with its identity, which the study names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation.ckks.messages import Sealed
from securefedcollm.aggregation.header import Digest, RoundHeader
from securefedcollm.aggregation.messages import (
    FEW,
    Digests,
    Indices,
    Message,
    Signable,
    Signature,
    Signed,
    index_bytes,
)
from securefedcollm.primitives import sha256

_PREFIX: Final = b"securefedcollm/v1/ckks-authority-"


class KeyStatement(Signable, frozen=True, tag="authority-key"):
    """Authority → server → silo, A0: the keys of this attempt.

    ``keys``: SHA-256 of each silo's own keys, by index, absent silos included.
    """

    CONTEXT: ClassVar[bytes] = _PREFIX + b"key"

    header: Digest
    signature: Signature
    keys: Digests

    def signed(self) -> bytes:
        return key_statement(self.header, keys_digest(self.keys))


class AuthorityKeys(Message, frozen=True, tag="authority-keys"):
    """Authority → server, A0: for every silo b = e − a·s for its keys, one after another."""

    statement: KeyStatement
    parts: Annotated[tuple[bytes, ...], FEW]


class KeyOffer(Message, frozen=True, tag="key-offer"):
    """Server → silo, A1: encrypt under your keys. ``header`` is compared with the silo's own."""

    header: RoundHeader
    statement: KeyStatement
    part: bytes


class Consent(Signed, frozen=True, tag="consent"):
    """Silo, A2: my ciphertext leaves now, for a sum of ciphertexts of this transcript alone."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"consent"

    transcript: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.transcript


class CipherDelivery(Message, frozen=True, tag="cipher-delivery"):
    """Silo → server, A2: the ciphertext, a first polynomial per chunk, a second one per group.

    ``first`` and ``second`` carry no signature: they must hash to the root that their owner signed.
    """

    consent: Consent
    first: bytes
    second: bytes

    def __repr__(self) -> str:
        return f"CipherDelivery({len(self.first)} + {len(self.second)} bytes)"


class CipherPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The part of one ciphertext that the authority adds up; it holds nothing of the message.

    Args:
        first: digest of its first polynomials.
        second: its second polynomials, one a group.
    """

    first: Digest
    second: bytes


class OpenRequest(Message, frozen=True, tag="open-request"):
    """Server → authority, A3: decrypt the sum of the ciphertexts of those who consent.

    ``parts``: one for each consent, in the same order.
    """

    sealed: Annotated[tuple[Sealed, ...], FEW]
    consents: Annotated[tuple[Consent, ...], FEW]
    parts: Annotated[tuple[CipherPart, ...], FEW]


class Statement(Signable, frozen=True, tag="authority-statement"):
    """Authority → everybody: this, and nothing else, is what I opened in this round.

    ``share``: SHA-256 of the partial decryption.
    """

    CONTEXT: ClassVar[bytes] = _PREFIX + b"statement"

    header: Digest
    signature: Signature
    transcript: Digest
    survivors: Indices
    share: Digest

    def signed(self) -> bytes:
        return self.header + self.transcript + self.share + index_bytes(*self.survivors)


class Opened(Message, frozen=True, tag="authority-opened"):
    """Authority → server, A3: Σ c1·s + flooding noise, one polynomial a chunk."""

    statement: Statement
    share: bytes

    def __repr__(self) -> str:
        return f"Opened(survivors={self.statement.survivors}, share=<redacted>)"


class Notice(Message, frozen=True, tag="opening-notice"):
    """Server → silo, A4: the authority's statement of what it opened."""

    LIMIT: ClassVar[int] = 1024

    statement: Statement


class Noted(Signed, frozen=True, tag="noted"):
    """Silo → server, A4: I have seen that statement."""

    CONTEXT: ClassVar[bytes] = _PREFIX + b"noted"

    statement: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.statement


def keys_digest(keys: Sequence[bytes]) -> bytes:
    """Of all silos' keys, by their digests."""
    return sha256(_PREFIX, b"keys\0", *keys)


def key_statement(header: bytes, keys: bytes) -> bytes:
    """The authority's signed statement about its keys; ``keys``: :func:`keys_digest`."""
    return header + keys


def key_id(authority: bytes, statement: bytes, signature: bytes) -> bytes:
    """The keys of an attempt, by :func:`key_statement`, and whose they are.

    ``authority``: its Ed25519 public key.
    """
    return sha256(_PREFIX, b"id\0", authority, sha256(statement, signature))


def statement_digest(statement: Statement) -> bytes:
    """A silo's note on the authority's statement."""
    return sha256(_PREFIX, b"statement-digest\0", statement.signed(), statement.signature)
