"""Arithmetic on CKKS polynomials as arrays of residues, and their one spelling as bytes.

A polynomial is a row of N = 4096 residues modulo q, uint64. SEAL's own format never crosses the
wire: its loader is not made for hostile bytes (``b""`` loads as an empty vector, a flipped bit goes
unnoticed). Code here checks the exact length and that residues are below q. The bytes are then a
polynomial, whatever it decrypts to.

Bytes of a polynomial. For q < 2^60: sixteen planes of N/16 residues; fifteen lie in the low 60 bits
of N·15/16 little-endian 64-bit words, and the sixteenth in their top four bits, a nibble in each
word, lowest first: 7.5 bytes a residue. For q < 2^40: N little-endian low halves of 32 bits, then N
high bytes: 5 bytes a residue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.ckks.parameters import DEGREE, ERROR_GREATEST, FLOOD_TAIL, CkksRing
from securefedcollm.errors import CryptoError, LocalProtocolError, ProtocolError
from securefedcollm.primitives import Keystream, RandomSource, sha256

Residues = npt.NDArray[np.uint64]
"""uint64 [polynomials, N], every entry below q."""

ROWS: Final = 15
"""Polynomials worked on at a time: half a MiB of residues, which stays in a core's cache, and what
SEAL takes in one ciphertext beside the filling."""

_PLANE: Final = DEGREE // 16
_WORD21: Final = np.uint64(2**ERROR_GREATEST - 1)
_LOW60: Final = np.uint64(2**60 - 1)


def polynomial_bytes(ring: CkksRing) -> int:
    """Bytes of one polynomial: 30720 or 20480."""
    return DEGREE * ring.prime.bit_length() // 8


def add(a: Residues, b: Residues, ring: CkksRing) -> Residues:
    """a + b mod q, as a new array."""
    total = a + b
    np.minimum(total, total - np.uint64(ring.prime), out=total)  # unsigned: below zero wraps high
    return total


def accumulate(total: Residues, data: bytes, ring: CkksRing) -> None:
    """Add the packed polynomials of ``data`` to ``total``, in place.

    Raises:
        CryptoError: as :func:`unpack`; ``total`` is as it was then.
    """
    size = polynomial_bytes(ring)
    _check_length(data, ring, len(total))
    view = memoryview(data)

    def blocks(end: int) -> Iterator[tuple[Residues, Residues]]:
        for start in range(0, end, ROWS):
            block = total[start : start + ROWS]
            packed = view[start * size : (start + len(block)) * size]
            yield block, unpack(packed, ring, len(block))

    added = 0
    try:
        for block, term in blocks(len(total)):
            block += term
            np.minimum(block, block - np.uint64(ring.prime), out=block)
            added += len(block)
    except CryptoError:
        for block, term in blocks(added):
            block[:] = subtract(block, term, ring)
        raise


def subtract(a: Residues, b: Residues, ring: CkksRing) -> Residues:
    """a − b mod q, as a new array."""
    return add(a, np.uint64(ring.prime) - b, ring)


def pack(residues: Residues, ring: CkksRing) -> bytes:
    """The bytes of polynomials, one after another."""
    rows = len(residues)
    if ring.prime.bit_length() == 60:
        planes = residues.reshape(rows, 16, _PLANE)
        words = planes[:, :15].copy()
        last = planes[:, 15]
        for plane in range(15):
            nibble = (last >> np.uint64(4 * plane)) << np.uint64(60)
            words[:, plane] |= nibble
        return words.astype("<u8", copy=False).tobytes()
    out = np.empty((rows, 5 * DEGREE), dtype=np.uint8)
    out[:, : 4 * DEGREE] = residues.astype("<u4").view(np.uint8)
    out[:, 4 * DEGREE :] = (residues >> np.uint64(32)).astype(np.uint8)
    return out.tobytes()


def unpack(data: bytes | memoryview, ring: CkksRing, rows: int) -> Residues:
    """Read ``rows`` polynomials.

    Adversary: the author of ``data``.

    Raises:
        CryptoError: not exactly that many bytes, or a residue that is not below q.
    """
    _check_length(data, ring, rows)
    if ring.prime.bit_length() == 60:
        words = np.frombuffer(data, dtype="<u8").reshape(rows, 15, _PLANE)
        residues = np.empty((rows, 16, _PLANE), dtype=np.uint64)
        np.bitwise_and(words, _LOW60, out=residues[:, :15])
        last = residues[:, 15]
        last[:] = 0
        for plane in range(15):
            last |= (words[:, plane] >> np.uint64(60)) << np.uint64(4 * plane)
        result = residues.reshape(rows, DEGREE)
    else:
        raw = np.frombuffer(data, dtype=np.uint8).reshape(rows, 5 * DEGREE)
        result = np.ascontiguousarray(raw[:, : 4 * DEGREE]).view("<u4").astype(np.uint64)
        result |= raw[:, 4 * DEGREE :].astype(np.uint64) << np.uint64(32)
    if rows and int(result.max()) >= ring.prime:
        raise CryptoError("a residue is not below the modulus")
    return result


def _check_length(data: bytes | memoryview, ring: CkksRing, rows: int) -> None:
    if len(data) != rows * polynomial_bytes(ring):
        raise CryptoError(
            f"{len(data)} bytes are not {rows} polynomials of {polynomial_bytes(ring)}"
        )


def check_length(vector: npt.NDArray[np.int64], values: int) -> None:
    """Refuse a vector that is not as long as the round's.

    Raises:
        LocalProtocolError: its shape is not [``values``].
    """
    if vector.shape != (values,):
        raise LocalProtocolError(
            f"a vector of shape {vector.shape}, not ({values},)",
            hint="quantise to the study's bound and length first",
        )


def check_vector(vector: npt.NDArray[np.int64], ring: CkksRing) -> None:
    """Refuse a vector that must not be encrypted.

    Raises:
        LocalProtocolError: wrong type, or a value out of bounds: the caller's clipping failed, and
            a wrapped sum would be silently wrong.
    """
    if vector.dtype != np.int64 or vector.ndim != 1:
        raise LocalProtocolError(
            f"the vector is {vector.dtype} {vector.shape}, not int64 [d]",
            hint="quantise to the study's bound and length first",
        )
    if len(vector) and not (-ring.bound <= vector.min() and vector.max() <= ring.bound):
        raise LocalProtocolError(
            f"a value exceeds the bound {ring.bound}",
            hint="quantise to the study's bound and length first",
        )


def encode(vector: npt.NDArray[np.int64], ring: CkksRing) -> Residues:
    """Integers within the bound → coefficients v·Δ mod q, zero-padded to whole polynomials."""
    out = np.zeros((-(-len(vector) // DEGREE), DEGREE), dtype=np.uint64)
    out.reshape(-1)[: len(vector)] = residues_of(vector << ring.scale_bits, ring)
    return out


def residues_of(integers: npt.NDArray[np.int64], ring: CkksRing) -> npt.NDArray[np.uint64]:
    """Integers in (−q, q) modulo q: q is added where the sign bit is set."""
    return (integers + ((integers >> 63) & ring.prime)).view(np.uint64)


def centred(residues: Residues, ring: CkksRing) -> npt.NDArray[np.int64]:
    """Residues as integers in (−q/2, q/2)."""
    signed = residues.astype(np.int64)
    signed -= ring.prime * (signed > ring.prime // 2)
    return signed


def decode(residues: Residues, ring: CkksRing, values: int, count: int) -> npt.NDArray[np.int64]:
    """Coefficients of the decrypted sum of ``count`` vectors → int64 [values], rounded.

    Raises:
        ProtocolError: a coefficient that ``count`` honest vectors cannot make: some silo encrypted
            other values, used another key, or sent a wrong share. A wrong key or share makes
            coefficients uniform, so each escapes this check with probability 2·count·bound·Δ / q;
            the zero padding and the other coefficients catch the rest.
    """
    rounded = np.empty(residues.shape, dtype=np.int64)
    for start in range(0, len(residues), ROWS):
        block = centred(residues[start : start + ROWS], ring)
        block += 1 << (ring.scale_bits - 1)
        np.right_shift(block, ring.scale_bits, out=rounded[start : start + ROWS])
    total, padding = rounded.reshape(-1)[:values], rounded.reshape(-1)[values:]
    slack = 0 if ring.exact else int(ring.greatest_error) + 1
    if _beyond(total, count * ring.bound + slack) or _beyond(padding, slack):
        raise ProtocolError(
            "the opened sum is out of bounds: a silo encrypted values outside the agreed range, or "
            "its share is wrong",
            hint="encryption hides which silo it was; nothing was released",
        )
    return total


def _beyond(integers: npt.NDArray[np.int64], limit: int) -> bool:
    return bool(len(integers)) and not (-limit <= integers.min() and integers.max() <= limit)


def hash_to_ring(seed: bytes, ring: CkksRing) -> Residues:
    """A polynomial [1, N] that everybody derives from ``seed`` and nobody can choose.

    The AES-256-CTR keystream of SHA-256(seed), cut to the bits of q; values not below q are
    rejected, so the rest are uniform.
    """
    stream = Keystream(sha256(b"securefedcollm/v1/ckks-common\0", seed))
    mask = np.uint64((1 << ring.prime.bit_length()) - 1)
    found = np.empty(0, dtype=np.uint64)
    while len(found) < DEGREE:
        drawn = stream.words(DEGREE) & mask
        found = np.concatenate([found, drawn[drawn < ring.prime]])
    return found[:DEGREE].reshape(1, DEGREE)


def ternary(rows: int, ring: CkksRing, random: RandomSource) -> Residues:
    """Secrets and encryption randomness mod q, [rows, N]: −1, 0 and 1, uniform, from ``random``."""
    stream, count = Keystream(random(32)), rows * DEGREE
    found = np.empty(0, dtype=np.uint8)
    while len(found) < count:
        drawn = stream.words(count // 8 + DEGREE // 64).view(np.uint8)
        found = np.concatenate([found, drawn[drawn < 255]])  # 255 values are a multiple of three
    signs = (found[:count] % 3).astype(np.int64) - 1
    return residues_of(signs, ring).reshape(rows, DEGREE)


def errors(rows: int, ring: CkksRing, random: RandomSource) -> Residues:
    """Encryption errors mod q, [rows, N]: differences of the bit counts of two 21-bit words from
    ``random``. SEAL's own distribution."""
    words = Keystream(random(32)).words(rows * DEGREE)
    low = np.bitwise_count(words & _WORD21).astype(np.int64)
    high = np.bitwise_count((words >> np.uint64(21)) & _WORD21).astype(np.int64)
    return residues_of(low - high, ring).reshape(rows, DEGREE)


def flooding(rows: int, ring: CkksRing, random: RandomSource) -> Residues:
    """Noise coefficients mod q: rounded Gaussians of deviation 2^flood_bits, from ``random``.

    Box–Muller on 53-bit uniforms in (0, 1]: |f| <= √(2·53·ln 2)·σ by construction, as the proof in
    :mod:`~.ckks.parameters` needs. It smudges; no differential-privacy claim rests on it.
    """
    count = rows * DEGREE
    words = Keystream(random(32)).words(count) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 1.0) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[: count // 2]))
    angle = 2.0 * np.pi * uniform[count // 2 :]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    noise = np.rint(normal * 2.0**ring.flood_bits).astype(np.int64)
    assert np.abs(noise).max(initial=0) <= FLOOD_TAIL << ring.flood_bits
    return residues_of(noise, ring).reshape(rows, DEGREE)
