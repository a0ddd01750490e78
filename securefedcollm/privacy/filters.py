"""The spent budget when the next release is chosen after seeing the last ones.

Ordinary composition theorems fix every mechanism's parameters beforehand. A ledger cannot, because
people who saw one study's results design the next. A *privacy filter* remains valid: a rule, fixed
before the first release, that refuses the release after which the total could exceed (ε, δ). Two
filters run side by side, and a release is admitted if either admits it. An outcome then ends within
the one or within the other, so their failure probabilities add: the first gets 7/8 of δ, the second
1/8.

**The tight filter** follows from the mechanism that was reserved first.

* A sampled mechanism: releases no worse than that one, all charged as that one. However the end is
  decided, they are a prefix of the longest admitted run of one fixed mechanism, so any accountant
  is valid, PLD too. This is no adaptive filter, but a fixed plan that may end early: dominating
  pairs compose adaptively (Zhu, Dong and Wang 2022), and a gentler release, or none, is dominated.
  A sum that settles with more noise than it reserved is no cheaper here.
* Unsampled Gaussian noise, DP-SGD at rate 1 and rounded sums included: Gaussians of any scale.
  Their sum of 1/z² is a filter (Smith and Thakurta 2022; Koskela, Tobaben and Honkela 2023), and
  PLD is exact for it.
* Unsampled discrete noise that is not charged as rounded: unsampled releases of any scale. Their
  sum of ρ is a filter (Feldman and Zrnic 2021; Whitehouse, Ramdas, Rogers and Wu 2023).

**The general filter** takes anything: Rényi filters (Feldman and Zrnic 2021) at three orders fixed
by the first mechanism and the agreed ε, each at a third of this filter's δ. Only here do sampled
sums that settle with more noise than they reserved cost less: no theorem that we know lets PLD do
that while the noise of a sum, its survivors, is chosen by somebody who has seen earlier sums.

A filter promises the agreed ε. The ε spent on the way there is an odometer's reading, which
promises less: see :func:`filter_epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from securefedcollm.privacy.accountants import rdp_at_orders
from securefedcollm.privacy.accounting import (
    TIGHT_SHARE,
    Claim,
    claim,
    epsilon,
    quick_epsilon,
    with_slack,
)
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    Event,
    Events,
    continuous,
    merge,
    rate,
    repeat,
    times,
)

_SPREAD: Final = (0.75, 1.0, 1.4)
_CANDIDATES: Final = (*range(2, 33), 40, 48, 64, 96, 128, 192, 256)


class Terms(NamedTuple):
    """The facts before the first release, which fix the filters."""

    first: Event
    """The mechanism reserved first."""
    epsilon: float
    """The ε agreed then."""


def filter_epsilon(events: Sequence[Event], delta: float, terms: Terms) -> Claim:
    """The ε that the events have spent at ``delta``: an odometer reading.

    It bounds ε if nobody chose a parameter, or the end of the sequence, by what earlier releases
    showed. In any case the agreed ``terms.epsilon`` is a bound, as long as :func:`filter_within`
    admitted every release.
    """
    merged = merge(events)
    found = [Claim(_general(merged, delta, terms), delta, "rdp-filter")]
    charged = _charged_tightly(merged, terms.first)
    if charged is not None:
        tight = _tight_claim(charged, TIGHT_SHARE * delta, terms.first)
        found.append(Claim(tight.epsilon, delta, tight.accountant))
    return min(found, key=lambda one: one.epsilon)


def filter_bound(events: Sequence[Event], delta: float, terms: Terms) -> float:
    """An upper bound on :func:`filter_epsilon` in milliseconds, mostly within a third of it."""
    merged = merge(events)
    general = _general(merged, delta, terms)
    charged = _charged_tightly(merged, terms.first)
    if charged is None:
        return general
    if _takes_zcdp(terms.first):
        return min(general, _tight_claim(charged, TIGHT_SHARE * delta, terms.first).epsilon)
    return min(general, quick_epsilon(charged, TIGHT_SHARE * delta, math.inf))


def filter_within(events: Sequence[Event], delta: float, limit: float, terms: Terms) -> float:
    """As :func:`filter_epsilon`, but no tighter than needed to see that it is within ``limit``.

    Admitting what stays within a ``limit`` that was agreed beforehand is the privacy filter.
    """
    merged = merge(events)
    general = _general(merged, delta, terms)
    charged = _charged_tightly(merged, terms.first)
    if general <= limit or charged is None:
        return general
    if _takes_zcdp(terms.first):
        return min(general, _tight_claim(charged, TIGHT_SHARE * delta, terms.first).epsilon)
    return min(general, quick_epsilon(charged, TIGHT_SHARE * delta, limit))


def _charged_tightly(events: Events, first: Event) -> Events | None:
    """The tight filter's charge for ``events``; None if it does not admit one of them."""
    if not events:
        return ()
    if rate(first) < 1.0:
        total = sum(times(event) for event in events)
        worst = repeat(first, total)
        return (worst,) if dominates([worst], events) else None
    if _takes_zcdp(first):
        return events if all(rate(event) == 1.0 for event in events) else None
    return events if all(_unsampled_gaussian(event) for event in events) else None


def _takes_zcdp(first: Event) -> bool:
    """Whether the tight filter sums ρ: for unsampled discrete noise, unless it is rounded noise."""
    return rate(first) == 1.0 and continuous(first) is None


def _unsampled_gaussian(event: Event) -> bool:
    """DP-SGD at a sampling rate of 1 is the plain Gaussian mechanism; a rounded sum is a function
    of one."""
    return rate(event) == 1.0 and continuous(event) is not None


def _tight_claim(charged: Events, delta: float, first: Event) -> Claim:
    if _takes_zcdp(first):
        return Claim(epsilon(charged, delta, "zcdp"), delta, "zcdp")
    return claim(charged, delta)


def _general(events: Events, delta: float, terms: Terms) -> float:
    orders = filter_orders(repeat(terms.first, 1), terms.epsilon, delta)
    spent = rdp_at_orders(events, orders)

    def ideal(at: float) -> float:
        to_epsilon = _conversion(at / len(orders))
        bounds = (to_epsilon(*pair) for pair in zip(orders, spent, strict=True))
        return max(0.0, min(bounds))

    return with_slack(ideal, events, (1.0 - TIGHT_SHARE) * delta)


@lru_cache(maxsize=256)
def filter_orders(mechanism: Event, budget: float, delta: float) -> tuple[int, ...]:
    """Three integer Rényi orders around the one that admits most repetitions of ``mechanism``."""
    once = rdp_at_orders((mechanism,), _CANDIDATES)
    to_epsilon = _conversion((1.0 - TIGHT_SHARE) * delta / len(_SPREAD))
    admitted = [
        (budget - to_epsilon(order, 0.0)) / max(rdp, 1e-300)
        for order, rdp in zip(_CANDIDATES, once, strict=True)
    ]
    best = _CANDIDATES[max(range(len(admitted)), key=admitted.__getitem__)]
    return tuple(sorted({max(2, round(best * factor)) for factor in _SPREAD}))


def _conversion(delta: float) -> Callable[[int, float], float]:
    """(order, RDP) -> ε at ``delta`` (Canonne, Kamath and Steinke 2020, Proposition 12)."""

    def to_epsilon(order: int, rdp: float) -> float:
        return rdp + math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1)

    return to_epsilon
