"""What a colluder gains by uploading a constant in the place of a CKKS ciphertext's c1.

The opened sum then holds constant · secret beside the others' vectors: the low bits of every
coefficient give away the secret that the upload was multiplied with. Whoever has it opens every
ciphertext under the same key. No party can see from a c1 that it is a constant plus noise.
"""

from __future__ import annotations

import numpy as np

from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks_messages import CipherUpload
from securefedcollm.aggregation.ckks_ring import Residues
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.study.ring import DEGREE, CkksRing, Shape
from securefedcollm_audits.cohort import Vector

_LIMB = 15
"""Bits that an FFT in float64 multiplies exactly with a small polynomial."""


def upload(ring: CkksRing, shape: Shape, bits: int) -> CipherUpload:
    """c0 = 0 and c1 = 2^bits, a constant polynomial, which is constant transformed, too."""
    first = np.zeros((shape.chunks, DEGREE), dtype=np.uint64)
    second = np.full((shape.groups, DEGREE), 1 << bits, dtype=np.uint64)
    return CipherUpload(ckks_ring.pack(first, ring), ckks_ring.pack(second, ring))


def read_secrets(ring: CkksRing, shape: Shape, opened: Residues, bits: int) -> Vector:
    """The secrets [keys, N] out of an opened sum [chunks, N] (transformed) with such an upload."""
    with Seal(ring) as seal:
        signed = ckks_ring.centred(seal.coefficients(opened), ring)
    half = 1 << (ring.scale_bits - 1)
    low = ((signed + half) & (2 * half - 1)) - half  # without the sum, which is a multiple of Δ
    of_key = [low[key :: shape.keys].mean(axis=0) for key in range(shape.keys)]
    return np.rint(np.array(of_key) / 2.0**bits).astype(np.int64)


def open_with(ring: CkksRing, shape: Shape, secrets: Vector, first: bytes, second: bytes) -> Vector:
    """What a ciphertext decrypts to under these secrets, int64 [chunks · N]."""
    with Seal(ring) as seal:
        c0 = ckks_ring.centred(seal.coefficients(ckks_ring.unpack(first, ring, shape.chunks)), ring)
        c1 = seal.coefficients(ckks_ring.unpack(second, ring, shape.groups))
    rounded = np.empty(c0.shape, dtype=np.int64)
    for chunk in range(shape.chunks):
        product = _times(c1[chunk // shape.keys], secrets[chunk % shape.keys], ring.prime)
        phase = [(int(a) + b) % ring.prime for a, b in zip(c0[chunk], product, strict=True)]
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
