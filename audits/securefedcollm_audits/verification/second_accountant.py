"""A second opinion on ε, by other means than those of the ledger behind the claim.

* Gaussian noise, sampled or not: ``prv-accountant`` (Gopi, Lee and Wutschitz 2021), an independent
  implementation that brackets ε from both sides.
* Discrete Gaussian noise that is charged as rounded noise: the same program. Above, it takes the
  continuous mechanism that the sum is a function of; below, continuous noise of the same size,
  which the discrete noise follows to far more digits than are compared.
* Discrete Gaussian noise that is not, in bundles of older versions. In a sum: two closed formulas,
  written here. Below, the exact (ε, δ) curve of continuous Gaussians (Balle and Wang 2018,
  Theorem 8); above, zCDP in its simplest conversion (Bun and Steinke 2016, Proposition 1.3).
* Discrete Gaussian noise over a Poisson sample: below, ``prv-accountant`` on the continuous
  counterpart; above, the Rényi bound of integer order (Mironov, Talwar and Zhang 2019), which holds
  for discrete noise too, written out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from securefedcollm.privacy.accounting import prv_bounds
from securefedcollm.privacy.events import (
    Event,
    Events,
    Gaussian,
    PoissonGaussian,
    continuous,
    merge,
    rate,
    times,
)
from securefedcollm_audits.verification.charged import check_work


class Bracket(NamedTuple):
    """ε lies between ``low`` and ``high``, says ``method``."""

    low: float
    high: float
    method: str


def bracket(events: Sequence[Event], delta: float) -> Bracket:
    """ε at ``delta`` of the composition of ``events``.

    Raises:
        EvidenceError: more than can be computed.
    """
    return _bracket(merge(events), delta)


@lru_cache(maxsize=256)
def _bracket(events: Events, delta: float) -> Bracket:
    if not events:
        return Bracket(0.0, 0.0, "nothing was released")
    check_work(events, delta, _renyi(events, delta))
    # The continuous mechanism of a rounded sum has a little less noise: it is for above only.
    same_size = [_as_continuous(event) for event in events]
    if all(continuous(event) is not None for event in events):
        low, high = prv_bounds(same_size, delta)[0], prv_bounds(events, delta)[2]
        return Bracket(low, high, "prv-accountant")
    if any(rate(event) < 1.0 for event in events):
        low, _, _ = prv_bounds(same_size, delta)
        return Bracket(low, _renyi(events, delta), "prv-accountant and closed form")
    squares = math.fsum(times(event) / event.noise_multiplier**2 for event in events)
    return Bracket(_gaussian(squares, delta), _concentrated(0.5 * squares, delta), "closed form")


def _as_continuous(event: Event) -> Event:
    """The event with continuous noise of the same size."""
    if rate(event) == 1.0:
        return Gaussian(event.noise_multiplier, times(event))
    return PoissonGaussian(rate(event), event.noise_multiplier, times(event))


def _renyi(events: Events, delta: float) -> float:
    """ε by Rényi divergence of orders 2 to 256 (conversion: Canonne, Kamath and Steinke 2020)."""
    found: list[float] = []
    for order in (*range(2, 65), 96, 128, 192, 256):
        spent = math.fsum(
            times(event) * _sampled(rate(event), event.noise_multiplier, order) for event in events
        )
        gained = math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1)
        found.append(spent + gained)
    return max(0.0, min(found))


def _sampled(q: float, z: float, order: int) -> float:
    """Rényi divergence of integer ``order`` of one Gaussian release over a Poisson sample.

    log Σ_k C(α, k) (1 − q)^(α − k) q^k exp(k (k − 1) / 2z²) / (α − 1), in logarithms.
    """
    if q == 1.0:
        return order / (2.0 * z * z)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-q)
        + k * math.log(q)
        + k * (k - 1) / (2.0 * z * z)
        for k in range(order + 1)
    ]
    top = max(terms)
    return (top + math.log(math.fsum(math.exp(term - top) for term in terms))) / (order - 1)


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


def _concentrated(rho: float, delta: float) -> float:
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))
