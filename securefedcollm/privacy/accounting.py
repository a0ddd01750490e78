"""ε from events: what an accountant (:mod:`.accountants`) claims, and the noise that it takes.

Everything is add/remove ("zero-out") adjacency. An accountant refuses every event that it does not
understand: there is no approximation by the nearest known mechanism, and no GDP accountant (it is
an asymptotic formula, wrong for mixed rounds).

Slack. An event that is within total variation η of the mechanism analysed is (ε, δ) private if the
mechanism is (ε, δ - (1 + e^ε) η) private; :func:`epsilon` solves for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Literal, get_args

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accountants import (
    COARSE,
    FINE,
    INTEGER_ORDERS,
    SEARCH_ORDERS,
    pld_epsilon,
    prv_epsilons,
    rdp_epsilon,
    zcdp,
    zcdp_epsilon,
)
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

Accountant = Literal["pld", "rdp", "zcdp", "prv"]

TIGHT_SHARE: Final = 7 / 8
"""Share of δ that the ledger's tight filter gets; the rest pays for adaptive choices."""

_ORDINARY_DELTA: Final = 1e-6
"""A δ that studies usually choose. If it would do, a refusal is the fault of a smaller δ."""


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
    second), then on the fine one. Every answer is an upper bound; only its tightness varies. Where
    PLD is the claim, all three are of the same continuous mechanisms, so RDP is never the smaller:
    what a filter admits by it, it admits by PLD too.
    """
    merged = merge(events)

    def rough(at: float) -> float:
        return rdp_epsilon(_continuous(merged), at, INTEGER_ORDERS)

    def coarse(at: float) -> float:
        return pld_epsilon(merged, at, COARSE)

    bound = with_slack(rough, merged, delta)
    if hopeless(bound, enough):
        return bound
    if bound > enough and claim_name(merged) == "pld":
        if not _within_reach(merged, delta):  # adversary: as in `claim`
            return bound
        bound = with_slack(coarse, merged, delta)
        runs = sum(times(event) for event in merged)
        if bound > enough + 4.0 * runs * COARSE**2:  # the fine grid cannot gain that much
            return bound
    return bound if bound <= enough else claim(merged, delta).epsilon


_MOST_EPSILON: Final = 1000.0
"""One release's grid has 20,000 cells for each ε."""
MOST_WORK: Final = 5e4
"""Limit on ε·√releases, by which an accountant's grid grows: about a gigabyte. At ε = 8 that is 39
million releases."""


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
    # An upper bound on the answer says how much of δ the slack can need at most. Rounded noise is
    # charged with a little less noise than it has: the bound is that of what is charged.
    above = rdp_epsilon(_continuous(events), 0.5 * delta, SEARCH_ORDERS)
    share = _price(slack, above) / delta
    if share <= 0.5:
        return ideal(delta * (1.0 - share))
    found = ideal(0.5 * delta)
    return found if _price(slack, found) <= 0.5 * delta else math.inf


def _continuous(events: Events) -> Events:
    """Rounded noise as the continuous mechanism that it is charged as; the rest as it is."""
    return merge([continuous(event) or event for event in events])


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
    """The ε that this project claims, for parameters fixed in advance.

    PLD where it applies to all events, else zCDP, else RDP. With shares of noise near the coarsest,
    RDP of a rounded sum can be a few percent below PLD. It is not taken: one accountant for one
    kind of event.

    Adversary: whoever made up events of which PLD would take gigabytes. RDP says as well that such
    an ε promises nothing.
    """
    merged = merge(events)
    name = claim_name(merged)
    if name == "pld" and not _within_reach(merged, delta):
        name = "rdp"
    return Claim(epsilon(merged, delta, name), delta, name)


def _within_reach(events: Events, delta: float) -> bool:
    """Whether PLD of ``events`` takes no more than a gigabyte, and their ε is worth that."""
    rough = rdp_epsilon(_continuous(events), 0.5 * delta, SEARCH_ORDERS) if events else 0.0
    work = rough * math.sqrt(sum(map(times, events)))
    return rough <= _MOST_EPSILON and work <= MOST_WORK


@lru_cache(maxsize=512)
def ideal_epsilon(events: Events, delta: float, accountant: Accountant) -> float:
    """ε of the mathematical mechanisms, before slack; ``events`` as :func:`merge` returns them."""
    match accountant:
        case "pld":
            return pld_epsilon(events, delta, FINE)
        case "rdp":
            return rdp_epsilon(events, delta, None)
        case "zcdp":
            return zcdp_epsilon(math.fsum(zcdp(event) for event in events), delta)
        case "prv":
            return prv_epsilons(events, delta)[2]


def prv_bounds(events: Sequence[Event], delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of ε from prv-accountant: the independent second opinion.

    Slack is not booked here; it is below the width of the bounds for every event of this project.
    """
    return prv_epsilons(merge(events), delta)


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
        return rdp_epsilon(merge(at(z)), delta, SEARCH_ORDERS)

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
        return with_slack(lambda share: pld_epsilon(merged, share, COARSE), merged, delta)

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
    if all(continuous(event) is not None for event in events):
        return "pld"
    return "zcdp" if all(rate(event) == 1.0 for event in events) else "rdp"
