"""The public parameters of private retrieval, and all sizes that follow from them.

Both exchanges of a question are one encrypted matrix-vector product (:mod:`~.product`): the silo
has an integer matrix T, the asker an encrypted vector m, and the asker learns T·m.

======== ============================== ========================= ==============================
exchange T [rows, columns]              m                         the asker learns
======== ============================== ========================= ==============================
scores   quantised index [documents, d] the question's embedding  one score for each document
blocks   digits of passages             k one-hot vectors         the digits of k chosen blocks
         [digits, documents]
======== ============================== ========================= ==============================

Every size is a function of :class:`Terms` alone, so that two questions look alike to a silo.

**Ring.** Z_q[X] / (X^4096 + 1) with the 60-bit prime of aggregation's ``precise`` ring. Up to 109
bits have 128-bit security at this degree (HomomorphicEncryption.org table); SEAL checks it. A
plaintext is kept in *coefficients*: products and sums of integers are exact there, as in BFV, up to
noise that is bounded below. CKKS slots would hold half as many values, and approximately.
"""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec

from securefedcollm.aggregation.ckks.parameters import (
    DEGREE,
    ERROR_GREATEST,
    ERROR_VARIANCE,
    FLOOD_TAIL,
    PRIMES,
    CkksRing,
)
from securefedcollm.errors import ConfigError
from securefedcollm.primitives import KEY_BYTES, sha256

Digest = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]

PRIME: Final = PRIMES["precise"]
POLYNOMIAL_BYTES: Final = DEGREE * 60 // 8
"""Of one polynomial of a question, on the wire."""

MASK_BITS: Final = 12
"""The silo's secret u has uniform coefficients in [−2^12, 2^12)."""
LEAST_HIDDEN: Final = 2048
"""Coefficients' worth of u that stay unknown to an asker whose key row is malformed
(:meth:`Product.hidden`). An answer shows at most 24 bits of each residue. For 128-bit security,
ring-LWE with a 27-bit modulus needs 1024 coefficients, and with a 54-bit one 2048."""

ENTRY_SCALE: Final = 2**12
"""A unit-norm embedding is stored times this, rounded: an error of 7e-5 in a score (one SD)."""
QUERY_SCALE: Final = 2**46
"""The question's embedding is encrypted times this, so a score of 1 is 2^58, q / 4."""
SCORE_FLOOD_BITS: Final = 45
SCORE_BITS: Final = 20
SCORE_ERROR: Final = 1.6e-4
"""Standard deviation of a score's error, where 1 is a perfect match."""

DIGIT_BITS: Final = 12
DIGIT_SCALE: Final = 2**48
BLOCK_FLOOD_BITS: Final = 43
BLOCK_BITS: Final = 24

MOST_TOKENS: Final = 512
"""Of a text that is embedded, with special tokens. A longer one is cut."""
MOST_DOCUMENTS: Final = 2**20
MOST_DIMENSION: Final = 4096
MOST_BLOCK_BYTES: Final = 12_288
MOST_FETCHED: Final = 14
"""One ciphertext of SEAL holds the k rows of a selection and what they have in common."""


class Product(msgspec.Struct, frozen=True):
    """One encrypted matrix-vector product: how matrix and vectors are laid out in polynomials.

    Args:
        rows, columns: of the silo's matrix T.
        vectors: k, vectors that are multiplied in one exchange.
        width: columns of T in one polynomial; it then holds N / width rows.
        entry: greatest absolute value of an entry of T.
        energy: greatest sum of the squared entries in one row of T.
        answer_bits: log2 p; the silo rounds its answer from residues modulo q to ones modulo p.
        flood_bits: log2 of the flooding noise's standard deviation, modulo q.
    """

    rows: int
    columns: int
    vectors: int
    width: int
    entry: int
    energy: int
    answer_bits: int
    flood_bits: int

    @property
    def ring(self) -> CkksRing:
        """The ring, with this product's flooding noise."""
        return CkksRing("precise", 1, 1, 1, self.flood_bits, 1)

    @property
    def groups(self) -> int:
        """Polynomials of one vector; there is one more, the silo's key row."""
        return -(-self.columns // self.width)

    @property
    def kept(self) -> int:
        """Rows of T in one polynomial."""
        return DEGREE // self.width

    @property
    def sent(self) -> int:
        """Coefficients of each first polynomial that are sent: those that hold a row of T."""
        return min(self.kept, self.rows)

    @property
    def parts(self) -> int:
        """Ciphertexts of an answer, each with one second polynomial for all vectors."""
        return -(-self.rows // self.kept)

    @property
    def query_bytes(self) -> int:
        return self.vectors * (self.groups + 1) * POLYNOMIAL_BYTES

    @property
    def answer_values(self) -> int:
        """Residues modulo p in an answer, rounded up to an even number."""
        count = self.parts * (DEGREE + self.vectors * self.sent)
        return count + count % 2

    @property
    def answer_bytes(self) -> int:
        return self.answer_values * self.answer_bits // 8

    @property
    def capacity(self) -> float:
        """Bits that one sent coefficient tells at most, whatever the asker encrypted.

        It is an unknown residue modulo q plus Gaussian noise of deviation σ, a channel with at
        most log2 q − log2(σ·√(2πe)) bits.
        """
        noise = 2.0**self.flood_bits * math.sqrt(2 * math.pi * math.e)
        return math.log2(PRIME / noise)

    @property
    def hidden(self) -> float:
        """Coefficients' worth of the silo's u that an answer cannot tell, whatever the key row."""
        told = self.vectors * self.sent * self.capacity
        return DEGREE - told / (MASK_BITS + 1)

    @property
    def advantage(self) -> float:
        """Bound on the total-variation distance by which the decryption of an honestly encrypted
        question tells more than T·m: Pinsker's inequality on what flooding hides, Σ T·e + u·e and
        e1·s. For one exchange; second polynomials are then hidden by ring-LWE with fresh u."""
        width = self.width
        energy = min(self.energy * self.kept, self.entry**2 * self.groups * width * self.kept)
        mask = DEGREE * (4**MASK_BITS / 3 + 2 / 3)
        noise = math.sqrt(ERROR_VARIANCE * (energy + mask))
        count = self.vectors * self.rows
        return min(1.0, math.sqrt(count / 4) * noise / 2.0**self.flood_bits)

    @property
    def greatest_error(self) -> float:
        """Largest error of T·m in residues modulo p, except with probability below 2^−100 for each.

        Every term but one is at its extreme: Σ T·e, u·e and e·s, the flooding's tail, the rounding
        of the first polynomial. The rounding of the second is a sum of N bounded, independent
        terms times −1, 0 or 1: beyond 400 with probability 2·exp(−2·400² / N) (Hoeffding).
        """
        size = self.entry * self.groups * self.width * self.kept
        noise = ERROR_GREATEST * (size + (DEGREE << MASK_BITS) + DEGREE)
        noise += FLOOD_TAIL << self.flood_bits
        return noise * 2.0**self.answer_bits / PRIME + 400 + 1


def _fit(rows: int, columns: int, vectors: int, rest: tuple[int, int, int, int]) -> Product:
    """The layout with the fewest bytes up and down, of those with enough of u hidden.

    An answer's bytes count four times. Each of its parts also costs the silo a few milliseconds of
    CPU, in which a line of 100 Mbit/s carries three times as many bytes.
    """
    widths = [1 << bits for bits in range(DEGREE.bit_length())]
    found = [Product(rows, columns, vectors, width, *rest) for width in widths]
    return min(
        (product for product in found if product.hidden >= LEAST_HIDDEN),
        key=lambda product: product.query_bytes + 4 * product.answer_bytes,
    )


class Terms(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What asker and silos agreed on. It fixes all that a silo sees of a question but its bits.

    Args:
        documents: of each silo, padded to this number: the same for all.
        dimension: d, of embeddings after the public reduction.
        block_bytes: of one passage with its id, padded to this length; a multiple of 3.
        fetched: k, blocks that are fetched with every question from every silo.
        space: 32 bytes that stand for what makes embeddings: encoder and reduction.

    Raises:
        ConfigError: a number is out of range.
    """

    documents: int
    dimension: int
    block_bytes: int = 768
    fetched: int = 10
    space: Digest = bytes(KEY_BYTES)

    def __post_init__(self) -> None:
        limits = {
            "documents": (1, MOST_DOCUMENTS),
            "dimension": (1, MOST_DIMENSION),
            "block_bytes": (48, MOST_BLOCK_BYTES),
            "fetched": (1, MOST_FETCHED),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(
                    f"must be {least} to {most}", where=f"retrieval.{name}", hint="change the study"
                )
        if self.block_bytes % 3:
            raise ConfigError(
                "must be a multiple of 3",
                where="retrieval.block_bytes",
                hint=f"write {self.block_bytes + 3 - self.block_bytes % 3}",
            )

    @property
    def digits(self) -> int:
        """12-bit digits of one block."""
        return self.block_bytes * 8 // DIGIT_BITS

    @property
    def scoring(self) -> Product:
        """Scores of all documents."""
        energy = math.ceil((ENTRY_SCALE + math.sqrt(self.dimension) / 2) ** 2)
        rest = ENTRY_SCALE, energy, SCORE_BITS, SCORE_FLOOD_BITS
        return _fit(self.documents, self.dimension, 1, rest)

    @property
    def telling(self) -> int:
        """Questions of a hostile asker that tell every embedding on a shelf, as exactly as d honest
        questions do; members that collude pool theirs.

        A coordinate of a unit vector has a deviation of 1/√d, and a score an error of
        :data:`SCORE_ERROR`: that takes log2 of the ratio, in bits. An answer tells at most
        ``scoring.capacity`` bits of each document. Fewer questions tell every embedding more
        coarsely.
        """
        bits = math.log2(1 / (math.sqrt(self.dimension) * SCORE_ERROR))
        return math.ceil(self.dimension * min(1.0, bits / self.scoring.capacity))

    @property
    def fetching(self) -> Product:
        """Digits of k blocks."""
        entry = 1 << (DIGIT_BITS - 1)
        rest = entry, entry**2 * self.documents, BLOCK_BITS, BLOCK_FLOOD_BITS
        return _fit(self.digits, self.documents, self.fetched, rest)

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for these terms."""
        return sha256(b"securefedcollm/v1/retrieval-terms\0", msgspec.msgpack.encode(self))


def space_digest(model: str, layer: int | None, reduction: bytes) -> bytes:
    """What ``Terms.space`` is in a study: 32 bytes that stand for the function text → embedding.

    Args:
        model: the encoder's digest, 64 hexadecimal digits.
        layer: whose output is averaged over the text's tokens; None: the last.
        reduction: :attr:`.reduction.Reduction.digest`.
    """
    pooled = f"mean/{MOST_TOKENS}/{'last' if layer is None else layer}/{model}"
    return sha256(b"securefedcollm/v1/retrieval-space\0", pooled.encode(), b"\0", reduction)
