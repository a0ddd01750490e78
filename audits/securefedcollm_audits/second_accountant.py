"""A second opinion on ε, by other means than those of the ledger that made the claim.

* Gaussian noise, sampled or not: ``prv-accountant`` (Gopi, Lee and Wutschitz 2021), an independent
  implementation that brackets ε from both sides.
* Discrete Gaussian noise in a sum: no independent library analyses it. Two closed formulas, written
  here: below, the exact (ε, δ) curve of continuous Gaussians (Balle and Wang 2018, Theorem 8),
  which the discrete ones follow to far more digits than are compared; above, zCDP in its simplest
  conversion (Bun and Steinke 2016, Proposition 1.3).
* The same with Poisson sampling (joint DP-SGD): below, ``prv-accountant`` for continuous noise;
  above, the Rényi divergence at integer orders in closed form (Mironov, Talwar and Zhang 2019,
  section 3.3), which takes nothing of the noise but its divergence, in the simplest conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from securefedcollm.privacy.accounting import prv_bounds
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    Events,
    PoissonGaussian,
    merge,
    rate,
    times,
)


class Bracket(NamedTuple):
    """ε lies between ``low`` and ``high``, says ``method``."""

    low: float
    high: float
    method: str


def bracket(events: Sequence[Event], delta: float) -> Bracket:
    """ε at ``delta`` of the composition of ``events``.

    Unsampled and sampled noise in one sum of releases are taken together as sampled.
    """
    return _bracket(merge(events), delta)


@lru_cache(maxsize=256)
def _bracket(events: Events, delta: float) -> Bracket:
    if not events:
        return Bracket(0.0, 0.0, "nothing was released")
    if not any(isinstance(event, DiscreteGaussian) for event in events):
        low, _, high = prv_bounds(events, delta)
        return Bracket(low, high, "prv-accountant")
    if any(rate(event) < 1.0 for event in events):
        continuous = [_continuous(event) for event in events]
        low, _, _ = prv_bounds(continuous, delta)
        return Bracket(low, _renyi(events, delta), "prv-accountant and closed form")
    squares = math.fsum(times(event) / event.noise_multiplier**2 for event in events)
    return Bracket(_gaussian(squares, delta), _concentrated(0.5 * squares, delta), "closed form")


def _gaussian(squares: float, delta: float) -> float:
    """ε at δ of Gaussians with Σ1/z² = ``squares``, by bisection on Balle and Wang's δ(ε)."""
    mu = math.sqrt(squares)
    low, high = 0.0, 1.0
    while _gaussian_delta(mu, high) > delta:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _gaussian_delta(mu, middle) > delta else (low, middle)
    return low


def _gaussian_delta(mu: float, eps: float) -> float:
    first, second = _tail(eps / mu - 0.5 * mu), _tail(eps / mu + 0.5 * mu)
    return first - (math.exp(eps + math.log(second)) if second > 0.0 else 0.0)


def _tail(x: float) -> float:
    """P(N(0, 1) > x)."""
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def _continuous(event: Event) -> Event:
    return PoissonGaussian(rate(event), event.noise_multiplier, times(event))


def _renyi(events: Events, delta: float) -> float:
    """The smallest ε over integer orders a: RDP + log(1/δ)/(a - 1)."""
    return min(
        math.fsum(times(event) * _sampled_rdp(event, a) for event in events)
        + math.log(1.0 / delta) / (a - 1)
        for a in range(2, 129)
    )


def _sampled_rdp(event: Event, order: int) -> float:
    """log Σₖ C(a, k) (1 - q)^(a-k) q^k exp(k(k - 1) / 2z²) / (a - 1)."""
    q, z = rate(event), event.noise_multiplier
    logs = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (0.0 if k == order else (order - k) * math.log1p(-q))
        + k * math.log(q)
        + k * (k - 1) / (2.0 * z * z)
        for k in range(order + 1)
        if q < 1.0 or k == order
    ]
    top = max(logs)
    return (top + math.log(math.fsum(math.exp(x - top) for x in logs))) / (order - 1)


def _concentrated(rho: float, delta: float) -> float:
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))
