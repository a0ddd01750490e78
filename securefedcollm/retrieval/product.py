"""An encrypted matrix-vector product: the one computation of private retrieval.

The asker has integer vectors m_1 … m_k, the silo an integer matrix T. The asker learns T·m_f.
Plaintext-ciphertext products and additions only: no rotation, relinearisation or Galois keys.

**Layout.** For a width w, polynomial g of a vector has its w entries of group g at X^0, X^−1, …,
X^−(w−1), and polynomial (l, g) of T has N/w rows of T, each at w neighbouring powers. Coefficient
i·w of Σ_g T[l, g]·m[g] is then row l·N/w + i of T·m. Width 1 is column packing: one ciphertext a
coordinate. Greater widths trade bytes of the answer for bytes of the question, and leave less room
in an answer for what a hostile asker may look for (:mod:`~.terms` chooses).

**Question.** Fresh ternary secrets s_f for every exchange. The polynomials a_g are the hash of a
seed, so that 32 bytes stand for them; all k vectors share them (multi-secret ring-LWE). The rows
c0[f, g] = −a_g·s_f + e + m_f[g] are sent, and a last one that encrypts zero: the *key row*.

**Answer.** With a fresh secret u and error e1 for every part l, and flooding noise n,

    c1[l]    = round(p/q · (Σ_g T[l, g]·a_g + a_last·u + e1))
    c0[l, f] = round(p/q · (Σ_g T[l, g]·c0[f, g] + c0[f, last]·u + n))      kept coefficients only

Adversary of the silo: an asker that looks at more than T·m. Without u, c1 is d·N known linear
equations in T. Without n, the error of the decrypted c0 is Σ T·e for known e: facts about rows
that were not chosen. An asker that sends arbitrary residues instead of ciphertexts can choose which
linear function of T it is told. It cannot choose how much: every kept coefficient has the noise n
(:attr:`~.terms.Product.capacity`), and c1 is pseudorandom under ring-LWE with secret u as long as
enough of u is unknown. A malformed key row tells part of u in c0, so u has wide coefficients, and
:attr:`~.terms.Product.hidden` bounds what is told.

Adversary of the asker: a silo that looks for m. It sees samples of ring-LWE under keys of one
exchange only.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.polynomials import ROWS, Residues
from securefedcollm.aggregation.ckks.seal import Factor, Seal
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import Keystream, RandomSource
from securefedcollm.retrieval.terms import MASK_BITS, PRIME, Product

Integers = npt.NDArray[np.int64]

_COLUMNS: Final = 256
"""Kept coefficients that are decrypted at a time: 8 MiB of a key's rotations."""


class Protection(NamedTuple):
    """How an answer hides all but T·m. Other values than the defaults are for tests of attacks."""

    mask_bits: int = MASK_BITS
    flooded: bool = True


def common(product: Product, seed: bytes) -> Residues:
    """The polynomials a_g that 32 bytes stand for, [groups + 1, N], transformed."""
    root = b"securefedcollm/v1/retrieval-common\0" + seed
    rows = [
        polynomials.hash_to_ring(root + index.to_bytes(4, "big"), product.ring)
        for index in range(product.groups + 1)
    ]
    return np.concatenate(rows)


class Encrypted:
    """The asker's vectors of one exchange, under keys that are used for nothing else.

    Args:
        vectors: int64 [k, columns], times their scale, absolute values below q / 2.
        seed: 32 public bytes, fresh.
        random: of secrets and errors.
    """

    def __init__(
        self, product: Product, vectors: Integers, seed: bytes, random: RandomSource = os.urandom
    ) -> None:
        self._product, ring = product, product.ring
        shape = product.vectors, product.groups + 1, DEGREE
        padded = np.zeros((product.vectors, product.groups, product.width), dtype=np.int64)
        padded.reshape(product.vectors, -1)[:, : product.columns] = vectors
        message = np.zeros(shape, dtype=np.int64)
        message[:, :-1, 0] = padded[:, :, 0]
        message[:, :-1, DEGREE + 1 - product.width :] = -padded[:, :, :0:-1]  # X^−t is −X^(N−t)
        self._secrets = polynomials.ternary(product.vectors, ring, random)
        self.rows = bytearray()
        """What is sent: [k, groups + 1] packed polynomials."""
        zero = np.zeros_like(self._secrets)
        with Seal(ring) as seal:
            minus = seal.transformed(polynomials.subtract(zero, self._secrets, ring))
            loaded = seal.load(common(product, seed))
            for factor, values in zip(seal.factors(minus), message, strict=True):
                noise = polynomials.errors(len(values), ring, random)
                noise = polynomials.add(noise, polynomials.residues_of(values, ring), ring)
                made = seal.products([(factor, loaded)], noise)
                self.rows += polynomials.pack(made, ring)

    def __repr__(self) -> str:
        return "Encrypted(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets are neither copied nor pickled")

    def decrypt(self, answer: bytes) -> Integers:
        """T·m_f times scale · p/q, in (−p/2, p/2], int64 [k, rows].

        Adversary: the silo. Every answer of the right length decrypts to something.

        Raises:
            CryptoError: not exactly as long as an answer.
        """
        product = self._product
        seconds, firsts = _unpack(answer, product)
        # |c1| <= p/2 = 2^23, |s| <= 1, N = 2^12: sums of products below 2^35 are exact in float64.
        half = 1 << (product.answer_bits - 1)
        centred = _centre(seconds, half).astype(np.float64)
        secrets = polynomials.centred(self._secrets, product.ring).astype(np.float64)
        powers = np.arange(DEGREE)[:, None]
        out = np.empty((product.vectors, product.parts, product.kept), dtype=np.int64)
        out[:, :, product.sent :] = 0
        for secret, target, first in zip(secrets, out, firsts.swapaxes(0, 1), strict=True):
            wrapped = np.concatenate([-secret, secret])
            for start in range(0, product.sent, _COLUMNS):
                kept = np.arange(start, min(start + _COLUMNS, product.sent)) * product.width
                rotations = wrapped[DEGREE + kept[None, :] - powers]
                at = slice(start, start + len(kept))
                total = first[:, at] + (centred @ rotations).astype(np.int64)
                target[:, at] = _centre(total & (2 * half - 1), half)
        return out.reshape(product.vectors, -1)[:, : product.rows]


class Prepared:
    """The silo's matrix, transformed once and in SEAL's keeping. Not thread-safe.

    Args:
        matrix: integers [rows, columns], absolute values at most ``product.entry``. Takes 32 KiB
            of memory for each 4096 entries.
        protection: how answers hide all but the product.
    """

    def __init__(
        self,
        product: Product,
        matrix: npt.NDArray[np.int16],
        protection: Protection = Protection(),  # noqa: B008 - immutable
    ) -> None:
        self._product, self._protection = product, protection
        self._seal = Seal(product.ring)
        self._factors: list[list[tuple[int, Factor]]] = []  # by part: group and polynomial
        groups, width, kept = product.groups, product.width, product.kept
        for part in range(product.parts):
            rows = matrix[part * kept : (part + 1) * kept]
            padded = np.zeros((kept, groups * width), dtype=np.int64)
            padded[: len(rows), : rows.shape[1]] = rows
            laid = padded.reshape(kept, groups, width).swapaxes(0, 1).reshape(groups, DEGREE)
            # SEAL refuses to multiply with zero. Only padding is: an embedding has unit norm.
            used = np.flatnonzero(laid.any(axis=1)).tolist()
            residues = polynomials.residues_of(laid[used], product.ring)
            factors = self._seal.factors(self._seal.transformed(residues))
            self._factors.append(list(zip(used, factors, strict=True)))

    def __repr__(self) -> str:
        return f"Prepared({self._product.rows} × {self._product.columns})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a prepared matrix is neither copied nor pickled")

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()

    def read(self, rows: bytes) -> Residues:
        """The asker's polynomials [k, groups + 1, N].

        Adversary: the asker. Lengths and ranges are checked; any residues are a question.

        Raises:
            CryptoError: not exactly so many bytes, or a residue that is not below q.
        """
        product = self._product
        shape = product.vectors, product.groups + 1, DEGREE
        return polynomials.unpack(rows, product.ring, shape[0] * shape[1]).reshape(shape)

    def answer(self, rows: Residues, seed: bytes, random: RandomSource = os.urandom) -> bytes:
        """The encrypted products.

        Args:
            rows: the asker's, from :meth:`read`.
            seed: the asker's, of the common polynomials.
            random: of u, e1 and flooding noise.
        """
        product, seal = self._product, self._seal
        *loaded, key = [
            seal.load(np.concatenate([a[None], rows[:, group]]))
            for group, a in enumerate(common(product, seed))
        ]
        seconds = np.empty((product.parts, DEGREE), dtype=np.uint64)
        firsts = np.empty((product.parts, product.vectors, product.sent), dtype=np.uint64)
        step = product.width
        for start in range(0, product.parts, ROWS):
            parts = range(start, min(start + ROWS, product.parts))
            masks = seal.factors(seal.transformed(self._masks(len(parts), random)))
            errors = seal.transformed(polynomials.errors(len(parts), product.ring, random))
            for part, mask, error in zip(parts, masks, errors, strict=True):
                noise = np.zeros((1 + product.vectors, DEGREE), dtype=np.uint64)
                noise[0] = error
                terms = [(factor, loaded[group]) for group, factor in self._factors[part]]
                terms.append((mask, key))
                made = seal.combinations(terms, noise)
                seconds[part] = made[0]
                firsts[part] = made[1:, ::step][:, : product.sent]
        if self._protection.flooded:
            drawn = polynomials.flooding(-(-firsts.size // DEGREE), product.ring, random)
            noise = drawn.reshape(-1)[: firsts.size].reshape(firsts.shape)
            firsts = polynomials.add(firsts, noise, product.ring)
        return _pack(seconds, firsts, product)

    def _masks(self, count: int, random: RandomSource) -> Residues:
        """Secrets u, [count, N]: uniform in [−2^12, 2^12)."""
        bits = self._protection.mask_bits
        words = Keystream(random(32)).words(count * DEGREE) & np.uint64((2 << bits) - 1)
        drawn = words.astype(np.int64) - (1 << bits)
        return polynomials.residues_of(drawn, self._product.ring).reshape(count, DEGREE)


def _centre(residues: Integers, half: int) -> Integers:
    """Residues modulo 2·``half`` in (−half, half]."""
    return residues - 2 * half * (residues > half)


def _pack(seconds: Residues, firsts: Residues, product: Product) -> bytes:
    """Round residues modulo q to ones modulo p, and write them in pairs of whole bytes."""
    bits = product.answer_bits
    both = np.zeros(product.answer_values, dtype=np.uint64)
    at = 0
    for residues in (seconds, firsts):
        # float64 has 53 bits: the scaled residue is off by 2^(bits − 53) before it is rounded.
        scaled = np.rint(residues.reshape(-1).astype(np.float64) * (2.0**bits / PRIME))
        both[at : at + scaled.size] = scaled.astype(np.uint64) & np.uint64(2**bits - 1)
        at += scaled.size
    words = both[0::2] | both[1::2] << np.uint64(bits)
    size = bits // 4  # bytes of a pair
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :size].tobytes()


def _unpack(answer: bytes, product: Product) -> tuple[Integers, Integers]:
    """Second polynomials [parts, N] and kept first coefficients [parts, k, sent], modulo p."""
    bits = product.answer_bits
    if len(answer) != product.answer_bytes:
        raise CryptoError(f"{len(answer)} bytes are not an answer of {product.answer_bytes}")
    size = bits // 4
    words = np.zeros((product.answer_values // 2, 8), dtype=np.uint8)
    words[:, :size] = np.frombuffer(answer, dtype=np.uint8).reshape(-1, size)
    pairs = words.view("<u8").astype(np.int64)
    values = np.concatenate([pairs & ((1 << bits) - 1), pairs >> bits], axis=1).reshape(-1)
    count = product.parts * DEGREE
    firsts = values[count : count + product.parts * product.vectors * product.sent]
    return (
        values[:count].reshape(product.parts, DEGREE),
        firsts.reshape(product.parts, product.vectors, product.sent),
    )
