"""ε from events: three accountants for the claim and an independent second opinion.

| name   | library        | understands                         | is                          |
| ------ | -------------- | ----------------------------------- | --------------------------- |
| `pld`  | dp-accounting  | Gaussian, Poisson-sampled Gaussian  | tight upper bound           |
| `rdp`  | dp-accounting  | every event                         | upper bound                 |
| `zcdp` | dp-accounting  | every event without sampling        | upper bound                 |
| `prv`  | prv-accountant | as `pld`                            | upper bound, second opinion |

Everything is add/remove ("zero-out") adjacency. An accountant refuses every event that it does not
understand: there is no approximation by the nearest known mechanism, and no GDP accountant (it is
an asymptotic formula, wrong for mixed rounds).

Discrete noise. A sum of integers with a discrete Gaussian satisfies the zCDP of the continuous one
(Canonne, Kamath and Steinke 2020, Theorem 14). With Poisson sampling it is charged in RDP at
integer orders only: for integer α the moments E_Q[(P/Q)^l], l <= α, of a lattice Gaussian shifted
by an integer vector equal those of the continuous Gaussian (the shift l·Δ is again an integer
vector, so the normaliser cancels), hence so does E_Q[((1-q) + q P/Q)^α]; the other direction is
dominated by the reflection x -> Δ - x, which maps the lattice to itself (Mironov, Talwar and Zhang
2019, Theorem 5).

Slack. An event that is within total variation η of the mechanism analysed is (ε, δ) private if the
mechanism is (ε, δ - (1 + e^ε) η) private; :func:`epsilon` solves for that.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Final, Literal, get_args

import msgspec
import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    Events,
    Gaussian,
    PoissonGaussian,
    merge,
    rate,
    times,
)

Accountant = Literal["pld", "rdp", "zcdp", "prv"]

_INTEGER_ORDERS: Final = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)
# Fewer orders give a looser bound, sooner: to price residuals with, and to search with.
_SEARCH_ORDERS: Final = (2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 48, 64, 128, 256, 1024)
TIGHT_SHARE: Final = 7 / 8
"""Share of δ that the ledger's tight filter gets; the rest pays for adaptive choices."""

_ORDINARY_DELTA: Final = 1e-6
"""A δ that studies usually choose. If it would do, a refusal is the fault of a smaller δ."""

_FINE: Final = 1e-4
_COARSE: Final = 1e-3
_PRV_EPS_ERROR: Final = 0.01


class Claim(msgspec.Struct, frozen=True):
    """(ε, δ), and the accountant that computed it."""

    epsilon: float
    delta: float
    accountant: str


def epsilon(events: Sequence[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Upper bound on ε at ``delta`` of the composition of ``events``.

    The parameters of the events must not depend on the outcome of earlier ones; to keep a sequence
    within a budget whose parameters are chosen as it goes is the business of :mod:`.filters`.

    Returns:
        ε >= 0; ``inf`` if the slack of the events alone exceeds ``delta``.

    Raises:
        ConfigError: ``delta`` outside (0, 1), an unknown accountant, or an event that this
            accountant has no analysis for.
    """
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"δ lies in (0, 1), not {delta}", where="delta")
    if accountant not in get_args(Accountant):
        raise ConfigError(
            f"there is no accountant {accountant!r}",
            where="accountant",
            hint=f"choose one of {', '.join(get_args(Accountant))}",
        )
    merged = merge(events)

    def ideal(at: float) -> float:
        return ideal_epsilon(merged, at, accountant)

    return with_slack(ideal, merged, delta)


def quick_epsilon(events: Sequence[Event], delta: float, enough: float) -> float:
    """An upper bound on ε that stops refining as soon as it is at most ``enough``.

    RDP at integer orders (milliseconds), then :func:`claim` on a coarse PLD grid (a tenth of a
    second), then on the fine one. Every answer is an upper bound; only its tightness varies.
    """
    merged = merge(events)

    def rough(at: float) -> float:
        return _rdp_epsilon(merged, at, _INTEGER_ORDERS)

    def coarse(at: float) -> float:
        return _pld(merged, at, _COARSE)

    bound = with_slack(rough, merged, delta)
    if hopeless(bound, enough):
        return bound
    if bound > enough and claim_name(merged) == "pld":
        bound = with_slack(coarse, merged, delta)
        runs = sum(times(event) for event in merged)
        if bound > enough + 4.0 * runs * _COARSE**2:  # the fine grid cannot gain that much
            return bound
    return bound if bound <= enough else claim(merged, delta).epsilon


def hopeless(bound: float, limit: float) -> bool:
    """Whether no accountant brings ε below ``limit`` where RDP says ``bound``.

    The tight ones gain a third at most; and for an ε of thousands PLD would take gigabytes.
    """
    return limit > 0.0 and bound > 3.0 * limit + 30.0


def with_slack(ideal: Callable[[float], float], events: Events, delta: float) -> float:
    """ε of the code that ran, from ``ideal(δ')``: ε at δ' of the mechanism it approximates."""
    if not events:
        return 0.0
    slack = math.fsum(event.slack for event in events)
    # An upper bound on the answer says how much of δ the slack can need at most.
    above = _rdp_epsilon(events, 0.5 * delta, _SEARCH_ORDERS)
    share = _price(slack, above) / delta
    if share <= 0.5:
        return ideal(delta * (1.0 - share))
    found = ideal(0.5 * delta)
    return found if _price(slack, found) <= 0.5 * delta else math.inf


def _price(slack: float, eps: float) -> float:
    """The δ that a total variation of ``slack`` costs at ε."""
    return slack * (1.0 + math.exp(eps)) if eps < 700.0 else math.inf


def refuse_unpayable(target: float, delta: float, slack: float) -> None:
    """Refuse a δ that :func:`calibrate_events` refuses whatever the sampling rate.

    Args:
        delta: the share of δ that ε has to be kept at.
        slack: of all events together.

    Raises:
        ConfigError: the residuals cost half of ``delta`` even at ε = 0.
    """
    if _price(slack, 0.0) > 0.5 * delta:
        raise unpayable(target, delta, slack)


def unpayable(target: float, delta: float, slack: float) -> ConfigError:
    """Says whose fault it is that ``slack`` costs all of δ: δ's, where an ordinary one would do."""
    what = f"at ε = {target:g} the samplers' residuals would take all of δ"
    least = 2.0 * _price(slack, target)
    if least <= _ORDINARY_DELTA:
        hint = f"raise δ above {least:.0e}: no number of records needs the given δ"
        return ConfigError(what, where="privacy.delta", hint=hint)
    # RDP, by which the price is estimated, says half as much again as ε where ε is that large.
    within = math.floor(math.log(max(delta, _ORDINARY_DELTA) / (2.0 * slack)) * 2 / 3)
    return ConfigError(
        what,
        where="privacy.epsilon",
        hint=f"lower ε, here to {within}; such a large ε promises nothing anyway",
    )


def delta_of_slack(events: Sequence[Event], eps: float) -> float:
    """The part of δ that goes to implementation residuals (sampler, batch cap, sum) at ε."""
    return _price(math.fsum(event.slack for event in merge(events)), eps)


def claim(events: Sequence[Event], delta: float) -> Claim:
    """The tightest ε that an accountant of this project claims.

    PLD where it applies, else the smaller of zCDP and RDP. For parameters fixed in advance.
    """
    merged = merge(events)
    if not any(isinstance(event, DiscreteGaussian) for event in merged):
        return Claim(epsilon(merged, delta, "pld"), delta, "pld")
    if all(not isinstance(event, PoissonGaussian) and rate(event) == 1.0 for event in merged):
        return Claim(epsilon(merged, delta, "zcdp"), delta, "zcdp")
    return Claim(epsilon(merged, delta, "rdp"), delta, "rdp")


@lru_cache(maxsize=512)
def ideal_epsilon(events: Events, delta: float, accountant: Accountant) -> float:
    """ε of the mathematical mechanisms, before slack; ``events`` as :func:`merge` returns them."""
    match accountant:
        case "pld":
            return _pld(events, delta, _FINE)
        case "rdp":
            return _rdp_epsilon(events, delta, None)
        case "zcdp":
            return zcdp_epsilon(math.fsum(zcdp(event) for event in events), delta)
        case "prv":
            return _prv(events, delta)[2]


def prv_bounds(events: Sequence[Event], delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of ε from prv-accountant: the independent second opinion.

    Slack is not booked here; it is below the width of the bounds for every event of this project.
    """
    return _prv(merge(events), delta)


def calibrate(
    target: float, delta: float, q: float, steps: int, *, accountant: Accountant = "pld"
) -> float:
    """Smallest noise multiplier (4 decimals, rounded up) that the ledger admits for DP-SGD.

    Args:
        target: ε, above 0.
        delta: δ in (0, 1). An eighth of it pays for the ledger's freedom to admit other mechanisms
            later (see :mod:`.filters`), which costs well below 1 % more noise.
        q: Poisson sampling rate; 1 for no sampling.
        steps: optimiser steps in all rounds together.

    Returns:
        z such that ``epsilon([PoissonGaussian(q, z, steps)], TIGHT_SHARE * delta) <= target``.

    Raises:
        ConfigError: no noise multiplier up to 10^5 reaches the target.
    """

    def at(z: float) -> Events:
        return (Gaussian(z, steps) if q == 1.0 else PoissonGaussian(q, z, steps),)

    return calibrate_events(at, target, TIGHT_SHARE * delta, accountant=accountant)


def calibrate_events(
    at: Callable[[float], Sequence[Event]],
    target: float,
    delta: float,
    *,
    accountant: Accountant | None = None,
) -> float:
    """Smallest z (4 decimals, rounded up) with ε of ``at(z)`` at ``delta`` within ``target``.

    Args:
        at: maps a noise multiplier to events; ε decreases in it.
        accountant: None for the one that :func:`claim` uses.
    """
    if not target > 0.0:
        raise ConfigError(f"ε must be above 0, not {target}", where="epsilon")
    chosen: Accountant = accountant or claim_name(at(1.0))

    def bound(z: float) -> float:
        return _rdp_epsilon(merge(at(z)), delta, _SEARCH_ORDERS)

    low, high = 0.01, 1.0
    while bound(high) > target:
        low, high = high, high * 2.0
        if high > 1e5:
            raise ConfigError(
                f"no noise reaches ε = {target:g} at δ = {delta:g}",
                where="privacy.epsilon",
                hint="raise ε, use fewer steps or a smaller batch",
            )
    while high - low > 1e-2 * high:  # near enough for the secant to start from
        middle = 0.5 * (low + high)
        low, high = (low, middle) if bound(middle) <= target else (middle, high)
    slack = math.fsum(event.slack for event in merge(at(high)))
    return _polish(_searchable(at, target, delta, chosen), high, target, delta, slack)


def _searchable(
    at: Callable[[float], Sequence[Event]], target: float, delta: float, chosen: Accountant
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """(estimate, bound): ε of ``at(z)`` by something quick, and by what the answer must satisfy."""

    def exact(z: float) -> float:
        return epsilon(at(z), delta, chosen)

    def estimate(z: float) -> float:
        return prv_bounds(at(z), delta)[1]

    def coarse(z: float) -> float:
        merged = merge(at(z))
        return with_slack(lambda share: _pld(merged, share, _COARSE), merged, delta)

    if chosen != "pld":
        return exact, exact
    # The coarse PLD is an upper bound too, and for few steps and an ε of 1 or more as good.
    good = target >= 1.0 and sum(times(event) for event in at(1.0)) <= 500
    return (coarse, coarse) if good else (estimate, exact)


def _polish(
    functions: tuple[Callable[[float], float], Callable[[float], float]],
    start: float,
    target: float,
    delta: float,
    slack: float,
) -> float:
    """From the RDP answer (an upper bound on z) down to the tight one; ``slack``: of its events.

    Secant on log ε against log z, inside a bracket: where ε is large the price of the slack makes
    it infinite from some z down, and the next guess is the middle of the bracket.
    """
    estimate, bound = functions

    def excess(z: float) -> float:
        return math.log(max(estimate(z), 1e-9) / target)

    z, error = start, excess(start)
    if math.isinf(error):
        raise unpayable(target, delta, slack)
    low, high = 0.0, math.inf
    finite: list[tuple[float, float]] = []
    for _ in range(40):
        low, high = (z, high) if error > 0.0 else (low, z)
        if abs(error) < 1e-6 or high - low < 1e-5:
            break
        if math.isfinite(error):
            finite.append((z, error))
        guess = _secant(finite) if math.isfinite(error) else math.nan
        middle = 0.5 * (low + high) if math.isfinite(high) else 2.0 * low
        z = guess if low < guess < high else middle
        error = excess(z)
    return _rounded_up(bound, z if abs(error) < 1e-6 else high, target)


def _secant(points: list[tuple[float, float]]) -> float:
    """Where the line through the last two (z, log ε - log target) is 0; nan if nowhere."""
    z1, e1 = points[-1]
    if len(points) == 1:  # ε falls about as 1/z
        return z1 * math.exp(max(min(e1, 1.0), -1.0))
    z0, e0 = points[-2]
    if e0 == e1 or z0 == z1:
        return math.nan
    slope = (e1 - e0) / (math.log(z1) - math.log(z0))
    return z1 * math.exp(max(min(-e1 / slope, 1.0), -1.0))


def _rounded_up(bound: Callable[[float], float], z: float, target: float) -> float:
    """Four decimals of ``z``, or the next ones above with which ``bound`` is within ``target``."""
    last = math.ceil(z * 1e4 - 1e-3)
    if bound(last / 1e4) <= target:
        return last / 1e4
    step = 1
    while bound((last + step) / 1e4) > target:
        last, step = last + step, 2 * step
    first = last + step  # within; `last` is not
    while first - last > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if bound(middle / 1e4) <= target else (first, middle)
    return first / 1e4


def claim_name(events: Sequence[Event]) -> Accountant:
    """Which accountant :func:`claim` uses for events of these kinds."""
    if not any(isinstance(event, DiscreteGaussian) for event in events):
        return "pld"
    return "zcdp" if all(rate(event) == 1.0 for event in events) else "rdp"


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
def _rdp_epsilon(events: Events, delta: float, orders: tuple[float, ...] | None) -> float:
    from dp_accounting.rdp import compute_epsilon
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    if any(isinstance(event, DiscreteGaussian) and event.q < 1.0 for event in events):
        orders = _INTEGER_ORDERS
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


def _pld(events: Events, delta: float, interval: float) -> float:
    return float(_pld_accountant(events, interval).get_epsilon(delta))


@lru_cache(maxsize=64)
def _pld_accountant(events: Events, interval: float) -> Any:
    """The composed distribution; asking it for ε at another δ costs nothing."""
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    for event in events:
        if isinstance(event, DiscreteGaussian):
            raise _refusal("pld", event)
        accountant.compose(_dp_event(rate(event), event.noise_multiplier), times(event))
    return accountant


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


def _prv(events: Events, delta: float) -> tuple[float, float, float]:
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import (
        GaussianMechanism,
        PoissonSubsampledGaussianMechanism,
    )

    _whole_means()
    variables = []
    for event in events:
        if isinstance(event, DiscreteGaussian):
            raise _refusal("prv", event)
        q, z = rate(event), event.noise_multiplier
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
