"""CKKS ring parameters, derived from the number of silos and the bound of their values, and proved
to fit before anything is encrypted.

A ciphertext chunk holds N = 4096 integers as the coefficients of one polynomial modulo (X^N + 1, q)
for one prime q; there is no multiplication, so no second prime and no key switching. A value v is
stored as v·Δ. For a sum of n vectors, encrypted under a key that h holders made together (all n
silos, or one authority), the decrypted coefficient is Δ·Σv + e with

    e = Σᵢ (uᵢ·E + e0ᵢ + e1ᵢ·S) + Σⱼ fⱼ,    E = Σ key errors, S = Σ secrets,

where u and the secrets are ternary, the errors are centred binomials (variance 10.5, at most 21, as
in SEAL) and fⱼ is holder j's flooding noise. That gives the error law :attr:`CkksRing.rms` and,
with the greatest value of every term in place of its variance, the proof in :func:`derive`.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

import msgspec

from securefedcollm.errors import ConfigError

CkksSet = Literal["precise", "compact"]

CKKS_SUITES: Final[dict[CkksSet, str]] = {
    "precise": "securefedcollm-ckks-precise-v1",
    "compact": "securefedcollm-ckks-compact-v1",
}
"""Threshold CKKS; suite, number of silos and bound fix the ring (:func:`derive`)."""

AUTHORITY_SUITES: Final[dict[CkksSet, str]] = {
    "precise": "securefedcollm-ckks-authority-precise-v1",
    "compact": "securefedcollm-ckks-authority-compact-v1",
}
"""The same under the key of one authority."""

DEGREE: Final = 4096
PRIMES: Final[dict[CkksSet, int]] = {"precise": 1152921504606830593, "compact": 1099511480321}
"""The greatest primes below 2^60 and 2^40 that are 1 mod 2N. The HomomorphicEncryption.org table
allows 109 bits at N = 4096 for 128-bit security with ternary secrets; both are far below."""

ERROR_VARIANCE: Final = 10.5
ERROR_GREATEST: Final = 21
"""A centred binomial: the difference of the bit counts of two 21-bit words."""

FLOOD_TAIL: Final = 9
"""Flooding noise is never beyond 9 standard deviations: its sampler has 53-bit uniforms, so
|f| <= σ·√(2·53·ln 2) = 8.58·σ before rounding."""

LEAST_FLOOD_BITS: Final = 20
MOST_FLOOD_BITS: Final = 40
"""Above, a float64 sampler could no longer tell neighbouring integers apart."""


MOST_OPENINGS: Final = 3
"""How often a participant helps to open one sum. Every opening shows the same sum with other noise,
and :meth:`CkksRing.advantage` counts all of them. An honest server that crashes or loses a silo
while a sum is opened has as many attempts in a row."""

MOST_KEYS: Final = 64
"""Keeps frames of key parts below 260 MB with 128 silos."""


class Shape(NamedTuple):
    """Polynomials of one vector. Chunk j is encrypted under key j mod ``keys``; the ``keys`` chunks
    of a group share their second polynomials, of which there is one for each committee."""

    chunks: int
    keys: int
    groups: int
    committees: int
    """c + 1 where all silos make the keys: one of them has no colluder in it. 1 for an authority"""

    @property
    def seconds(self) -> int:
        """Second polynomials of a ciphertext."""
        return self.groups * self.committees


class CkksRing(msgspec.Struct, frozen=True):
    """One parameter set, fitted to a number of silos and a bound.

    Args:
        name: ``precise`` (q of 60 bits: the sum is exact) or ``compact`` (40 bits: it is not).
        silos: n, greatest number of vectors in a sum.
        bound: every value v of a vector satisfies abs(v) <= bound.
        scale_bits: log2 Δ.
        flood_bits: log2 of the flooding noise's standard deviation, per holder and coefficient.
        holders: h, parties whose secrets add up to the key: ``silos``, or 1 for an authority.
    """

    name: CkksSet
    silos: int
    bound: int
    scale_bits: int
    flood_bits: int
    holders: int

    @property
    def prime(self) -> int:
        """q."""
        return PRIMES[self.name]

    @property
    def value_bytes(self) -> float:
        """Bytes of one residue on the wire, 7.5 or 5. A value takes one, and its part of a second
        that ``shape(...).keys`` chunks share; decrypting it takes one."""
        return self.prime.bit_length() / 8

    def shape(self, values: int, colluders: int) -> Shape:
        """How many polynomials a vector of ``values`` integers takes."""
        chunks = -(-values // DEGREE)
        # A silo sends and gets silos·keys polynomials of keys, sends `seconds` second polynomials,
        # and gets silos·groups of its own committee. With an authority it gets `keys` and sends
        # `groups`, both of which are relayed once. This is the minimum.
        best = math.sqrt(chunks)
        if self.holders > 1:
            best *= math.sqrt((self.silos + colluders + 1) / (2 * self.silos))
        keys = max(1, min(round(best), MOST_KEYS, chunks))
        return Shape(chunks, keys, -(-chunks // keys), colluders + 1 if self.holders > 1 else 1)

    @property
    def noise_rms(self) -> float:
        """Standard deviation of the decrypted encryption noise of n vectors, in coefficients."""
        return math.sqrt(ERROR_VARIANCE * self.silos * (4 * DEGREE / 3 * self.holders + 1))

    @property
    def rms(self) -> float:
        """Predicted rms error of the decrypted sum of n vectors before rounding, in units of v."""
        flood = self.holders * 4.0**self.flood_bits
        return math.sqrt(self.noise_rms**2 + flood) / 2.0**self.scale_bits

    @property
    def greatest_error(self) -> float:
        """The largest error with honest silos, in units of v; below 1/2 the sum is exact."""
        noise = _greatest_noise(self.silos, self.holders, self.flood_bits)
        return noise / 2.0**self.scale_bits

    @property
    def exact(self) -> bool:
        """Whether rounding the decrypted sum gives the sum itself, with certainty."""
        return self.greatest_error < 0.5

    def leak(self, values: int) -> float:
        """Bound on the total-variation distance by which the partial decryptions of one vector
        differ from ones that are independent of the encryption noise.

        Pinsker's inequality on Gaussian shifts: √(KL/2), KL = D·N·(noise / σ)² / 2 for the
        D = ⌈values / N⌉ decryptions that are ever made under one key. 1 says nothing.
        """
        chunks = -(-values // DEGREE)
        ratio = self.noise_rms / 2.0**self.flood_bits
        return min(1.0, math.sqrt(chunks * DEGREE / 4) * ratio)

    def advantage(self, values: int, sums: int) -> float:
        """Bound on a distinguisher's advantage from all openings of all ``sums`` of a run: keys and
        noise of each are fresh, so the distances of :meth:`leak` add up. 1 says nothing."""
        return min(1.0, sums * MOST_OPENINGS * self.leak(values))


def _greatest_noise(silos: int, holders: int, flood_bits: int) -> int:
    """n·(2·N·21·h + 21) and h times the flooding's tail: every coefficient at its extreme at
    once."""
    encryption = silos * (2 * DEGREE * ERROR_GREATEST * holders + ERROR_GREATEST)
    return encryption + (holders * FLOOD_TAIL << flood_bits)


def derive(name: CkksSet, *, silos: int, bound: int, holders: int | None = None) -> CkksRing:
    """The greatest scale that cannot wrap, and the most flooding noise that keeps sums exact.

    SEAL wraps silently: a sum that reaches q / 2 comes back with another sign. So for n = ``silos``

        n·bound·Δ + greatest encryption noise + greatest flooding noise < q / 2

    is required with every term at its extreme; no probability is involved. ``holders``: by default
    all silos, who then have no key but the joint one. ``compact`` has no room
    for exact sums: there the flooding has its least width, and the error law says what it costs.

    Raises:
        ConfigError: no scale or no flooding noise of at least 2^20 fits.
    """
    half, holders = PRIMES[name] // 2, holders or silos
    room = half - _greatest_noise(silos, holders, LEAST_FLOOD_BITS)
    scale_bits = (room // (silos * bound)).bit_length() - 1
    flood_bits = LEAST_FLOOD_BITS

    def fits(flood_bits: int) -> bool:
        noise = _greatest_noise(silos, holders, flood_bits)
        return (silos * bound << scale_bits) + noise < half and 2 * noise < 1 << scale_bits

    while (
        name == "precise"
        and scale_bits > 0
        and flood_bits < MOST_FLOOD_BITS
        and fits(flood_bits + 1)
    ):
        flood_bits += 1
    ring = CkksRing(name, silos, bound, scale_bits, flood_bits, holders)
    if scale_bits < 1 or (name == "precise" and not ring.exact):
        raise ConfigError(
            f"the {name} ring cannot hold a sum of {silos} values bounded by {bound}",
            where="aggregation.value_bits",
            hint="lower it, or choose scheme: masking"
            + (", or ckks: precise" if name == "compact" else ""),
        )
    assert (silos * bound << scale_bits) + _greatest_noise(silos, holders, flood_bits) < half
    return ring
