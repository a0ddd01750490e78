"""The gain of a colluder that uploads a constant instead of a CKKS ciphertext's c1.

The opened sum then holds constant · secret in addition to the others' vectors: the low bits of
every coefficient give away the secret that the upload was multiplied with. It opens every
ciphertext under the same key. No party can see from a c1 that it is a constant plus noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.messages import CipherUpload
from securefedcollm.aggregation.ckks.parameters import DEGREE, CkksRing, Shape
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm_audits.protocol.cohort import Vector

_LIMB = 15
"""Bits that an FFT in float64 multiplies exactly with a small polynomial."""


def upload(ring: CkksRing, shape: Shape, bits: int) -> CipherUpload:
    """c0 = 0, and in every group c1 = 2^bits for one committee and 0 for the others, in turn: a
    constant polynomial, which is constant transformed, too."""
    first = np.zeros((shape.chunks, DEGREE), dtype=np.uint64)
    second = np.zeros((shape.groups, shape.committees, DEGREE), dtype=np.uint64)
    for group in range(shape.groups):
        second[group, group % shape.committees] = 1 << bits
    packed = polynomials.pack(second.reshape(-1, DEGREE), ring)
    return CipherUpload(polynomials.pack(first, ring), packed)


def read(ring: CkksRing, opened: Residues, bits: int) -> npt.NDArray[np.float64]:
    """What was added below Δ to the chunks [chunks, N] (transformed) of a sum, in units of 2^bits:
    all but a multiple of Δ."""
    with Seal(ring) as seal:
        signed = polynomials.centred(seal.coefficients(opened), ring)
    half = 1 << (ring.scale_bits - 1)
    return (((signed + half) & (2 * half - 1)) - half) / 2.0**bits


def read_secrets(ring: CkksRing, shape: Shape, opened: Residues, bits: int) -> Vector:
    """The secrets [committees, keys, N] out of an opened sum with such an upload."""
    low = read(ring, opened, bits)
    groups = np.arange(shape.chunks) // shape.keys % shape.committees
    keys = np.arange(shape.chunks) % shape.keys
    found = [
        [low[(groups == group) & (keys == key)].mean(axis=0) for key in range(shape.keys)]
        for group in range(shape.committees)
    ]
    return np.rint(np.array(found)).astype(np.int64)


def open_with(ring: CkksRing, shape: Shape, secrets: Vector, first: bytes, second: bytes) -> Vector:
    """What a ciphertext decrypts to under secrets [committees, keys, N], int64 [chunks · N]."""
    c1 = polynomials.unpack(second, ring, shape.seconds).reshape(-1, shape.committees, DEGREE)
    terms = [
        [(c1[chunk // shape.keys, k], secrets[k, chunk % shape.keys]) for k in range(len(secrets))]
        for chunk in range(shape.chunks)
    ]
    return decode(ring, polynomials.unpack(first, ring, shape.chunks), terms)


def decode(ring: CkksRing, first: Residues, terms: list[list[tuple[Residues, Vector]]]) -> Vector:
    """Rounded first polynomial + Σ polynomial · small one, chunk by chunk; int64 [chunks · N].

    first: [chunks, N]; terms: of each chunk, transformed polynomials [N] and small coefficients.
    """
    rounded = np.empty(first.shape, dtype=np.int64)
    with Seal(ring) as seal:
        c0 = seal.coefficients(first)
        for chunk, products in enumerate(terms):
            phase = [int(value) for value in c0[chunk]]
            for polynomial, small in products:
                (known,) = seal.coefficients(polynomial[np.newaxis])
                added = _times(known, small, ring.prime)
                phase = [(a + b) % ring.prime for a, b in zip(phase, added, strict=True)]
            signed = [value - ring.prime * (value > ring.prime // 2) for value in phase]
            rounded[chunk] = [(v + (1 << (ring.scale_bits - 1))) >> ring.scale_bits for v in signed]
    return rounded.reshape(-1)


def _times(polynomial: Residues, small: Vector, prime: int) -> list[int]:
    """Product modulo X^N + 1 and q, exactly: 15 bits of the first at a time."""
    total = [0] * DEGREE
    spectrum = np.fft.rfft(small.astype(float), 2 * DEGREE)
    for shift in range(0, 60, _LIMB):
        limb = (polynomial >> np.uint64(shift)) & np.uint64((1 << _LIMB) - 1)
        long = np.rint(np.fft.irfft(np.fft.rfft(limb.astype(float), 2 * DEGREE) * spectrum))
        part = (long[:DEGREE] - long[DEGREE:]).astype(np.int64)
        total = [(t + (int(p) << shift)) % prime for t, p in zip(total, part, strict=True)]
    return total
