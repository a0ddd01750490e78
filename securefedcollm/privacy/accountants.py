"""The accountants, each behind one function: three for the claim and an independent second opinion.

| name   | library        | understands                         | is                          |
| ------ | -------------- | ----------------------------------- | --------------------------- |
| `pld`  | dp-accounting  | (rounded) Gaussian, sampled or not  | tight upper bound           |
| `rdp`  | dp-accounting  | every event                         | upper bound                 |
| `zcdp` | dp-accounting  | every event without sampling        | upper bound                 |
| `prv`  | prv-accountant | as `pld`                            | upper bound, second opinion |

What an accountant does not understand it refuses: there is no approximation by the nearest known
mechanism.

Discrete noise. A rounded Gaussian is charged as the continuous mechanism that it is a function of,
up to its slack (:class:`~.events.RoundedGaussian`): every accountant of that applies. The rest is
about the :class:`~.events.DiscreteGaussian` of older ledgers, and about RDP and zCDP of both kinds,
which look at the discrete noise itself.

A sum of integers with a discrete Gaussian satisfies the zCDP of the continuous one (Canonne, Kamath
and Steinke 2020, Theorem 14). With Poisson sampling it is charged in RDP at integer orders only:
for integer α the moments E_Q[(P/Q)^l], l <= α, of a lattice Gaussian shifted by an integer vector
equal those of the continuous Gaussian (the shift l·Δ is again an integer vector, so the normaliser
cancels), hence so does E_Q[((1-q) + q P/Q)^α]; the other direction is dominated by the reflection
x -> Δ - x, which maps the lattice to itself (Mironov, Talwar and Zhang 2019, Theorem 5).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Final

import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    Events,
    PoissonGaussian,
    continuous,
    rate,
    times,
)

INTEGER_ORDERS: Final = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)
SEARCH_ORDERS: Final = (2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 48, 64, 128, 256, 1024)
"""Fewer orders give a looser bound, sooner: to price residuals with, and to search with."""
FINE: Final = 1e-4
"""Width of a cell of PLD's grid: what is claimed."""
COARSE: Final = 1e-3
"""An upper bound too, sooner."""
_PRV_EPS_ERROR: Final = 0.01


# --- zCDP ---------------------------------------------------------------------------------------


def zcdp(event: Event) -> float:
    """ρ of one event.

    Raises:
        ConfigError: a Poisson-sampled event, whose amplification zCDP cannot express.
    """
    if rate(event) != 1.0:
        raise _refusal("zcdp", event)
    if isinstance(event, PoissonGaussian):
        return event.steps / (2.0 * event.noise_multiplier**2)
    return event.count / (2.0 * event.noise_multiplier**2)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """ε at ``delta`` of ρ-zCDP (dp-accounting: Canonne, Kamath and Steinke 2020, Prop. 12)."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(dp_accounting.ZCDpEvent(rho))
    return float(accountant.get_epsilon(delta))


# --- RDP ----------------------------------------------------------------------------------------


def rdp_at_orders(events: Events, orders: tuple[float, ...]) -> list[float]:
    """Rényi divergence bound of the composition at each of the ``orders``."""
    totals = [0.0] * len(orders)
    for event in events:
        one = _rdp_once(rate(event), event.noise_multiplier, orders)
        totals = [total + times(event) * rdp for total, rdp in zip(totals, one, strict=True)]
    return totals


@lru_cache(maxsize=4096)
def _rdp_once(q: float, z: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(orders))
    with _quiet_absl():
        accountant.compose(_dp_event(q, z))
    return tuple(float(rdp) for rdp in accountant.rdp)


@lru_cache(maxsize=2048)
def rdp_epsilon(events: Events, delta: float, orders: tuple[float, ...] | None) -> float:
    """ε at ``delta``. ``orders``: None for the library's; integers alone where a sum is sampled."""
    from dp_accounting.rdp import compute_epsilon
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    if any(isinstance(event, DiscreteGaussian) and event.q < 1.0 for event in events):
        orders = INTEGER_ORDERS
    orders = orders or tuple(DEFAULT_RDP_ORDERS)
    with _quiet_absl():
        return float(compute_epsilon(orders, rdp_at_orders(events, orders), delta)[0])


def _dp_event(q: float, z: float) -> Any:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(z)
    return gaussian if q == 1.0 else dp_accounting.PoissonSampledDpEvent(q, gaussian)


@contextmanager
def _quiet_absl() -> Iterator[None]:
    # dp-accounting logs every low order that it leaves out of the minimum; leaving out is sound.
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- PLD and PRV --------------------------------------------------------------------------------


def pld_epsilon(events: Events, delta: float, interval: float) -> float:
    """ε at ``delta`` of (rounded) continuous noise, by a grid of cells of width ``interval``.

    Raises:
        ConfigError: a :class:`DiscreteGaussian`, which is not charged as rounded noise.
    """
    return float(_pld(events, interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _pld(events: Events, interval: float) -> Any:
    """The composed distribution; asking it for ε at another δ costs nothing."""
    from dp_accounting.pld.privacy_loss_distribution import identity

    composed = identity(value_discretization_interval=interval)
    for event in events:
        ideal = continuous(event)
        if ideal is None:
            raise _refusal("pld", event)
        q, z, count = rate(ideal), ideal.noise_multiplier, times(ideal)
        # Unsampled, Gaussians compose to one; sampled, they compose from one: that takes the time.
        one = _pld_once(1.0, z / math.sqrt(count), interval) if q == 1.0 else None
        composed = composed.compose(one or _pld_once(q, z, interval).self_compose(count))
    return composed


@lru_cache(maxsize=32)
def _pld_once(q: float, z: float, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(z, value_discretization_interval=interval, sampling_prob=q)


@cache
def _whole_means() -> None:
    """Have prv-accountant work out means from enough pieces.

    Its integral of a distribution function starts with one piece up to −0.1. At a sampling rate of
    0.11 to 0.125, with little noise, all that happens lies at that piece's right end, in a
    thousandth of it. The quadrature misses it; the library notices, and gives no ε at all.
    """
    from prv_accountant import accountant
    from prv_accountant.privacy_random_variables import PrivacyRandomVariableTruncated
    from scipy.integrate import quad

    class Truncated(PrivacyRandomVariableTruncated):  # type: ignore[misc]
        def mean(self) -> float:
            low, high = float(self.t_min), float(self.t_max)
            steps = np.geomspace(1e-5, max(-low, high), 64)
            inner = [t for t in (*-steps[::-1], *steps) if low < t < high]
            points = [low, *inner, high]
            pieces = itertools.pairwise(points)
            below = math.fsum(quad(self.cdf, left, right, limit=500)[0] for left, right in pieces)
            return float(high * self.cdf(high) - low * self.cdf(low) - below)

    accountant.PrivacyRandomVariableTruncated = Truncated


def prv_epsilons(events: Events, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of ε at ``delta``.

    Raises:
        ConfigError: a :class:`DiscreteGaussian`, which is not charged as rounded noise.
    """
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import (
        GaussianMechanism,
        PoissonSubsampledGaussianMechanism,
    )

    _whole_means()
    variables = []
    for event in events:
        ideal = continuous(event)
        if ideal is None:
            raise _refusal("prv", event)
        q, z = rate(ideal), ideal.noise_multiplier
        variables.append(
            GaussianMechanism(z)
            if q == 1.0
            else PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=z)
        )
    counts = [times(event) for event in events]
    accountant = PRVAccountant(
        variables,
        eps_error=_PRV_EPS_ERROR,
        delta_error=delta / 1000.0,
        max_self_compositions=counts,
    )
    lower, estimate, upper = accountant.compute_epsilon(delta, counts)
    return float(lower), float(estimate), float(upper)


def _refusal(accountant: str, event: Event) -> ConfigError:
    return ConfigError(
        f"the {accountant} accountant has no analysis for a {type(event).__name__} event"
        + (" with sampling" if rate(event) < 1.0 else ""),
        where="accountant",
        hint="use rdp, which bounds every event of this project",
    )
