"""How much has been spent when the next release is chosen after seeing the last ones.

Ordinary composition theorems fix every mechanism's parameters beforehand. A ledger cannot: a later
study is designed by people who saw the earlier one's results. What holds then is a *privacy
filter*: a rule that refuses the release after which the total could pass (ε, δ). Not every
accountant makes a valid filter. Used here, the first that applies:

1. One mechanism, repeated. Whatever decides when to stop, the releases are a prefix of the longest
   sequence that fits, whose length is fixed in advance: any accountant is valid.
2. Unsampled Gaussians of any noise. Their sum of 1/z² is a filter (Smith and Thakurta 2022;
   Koskela, Tobaben and Honkela 2023) and PLD is exact for it.
3. No sampling. The sum of ρ is a zCDP filter (Feldman and Zrnic 2021; Whitehouse, Ramdas, Rogers
   and Wu 2023).
4. Anything else: Rényi filters at three orders fixed by the budget before the first release, each
   at δ/3. Whichever order the sequence ends on, its own filter held (Feldman and Zrnic 2021), and
   the three failure probabilities add up to δ. This costs some ε over the non-adaptive bound:
   keep the mechanism of a run constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from securefedcollm.privacy.accounting import (
    Claim,
    claim,
    claim_name,
    epsilon,
    quick_epsilon,
    rdp_at_orders,
    with_slack,
)
from securefedcollm.privacy.events import Event, Events, Gaussian, merge

_SPREAD: Final = (0.75, 1.0, 1.4)


def filter_epsilon(events: Sequence[Event], delta: float, budget: float) -> Claim:
    """Upper bound on ε at ``delta`` that holds for parameters chosen as the sequence went.

    ``budget``: the ε agreed before the first release; it fixes the orders of filter 4.
    """
    merged = merge(events)
    if len(merged) <= 1 or all(isinstance(event, Gaussian) for event in merged):
        return claim(merged, delta)
    if _unsampled(merged):
        return Claim(epsilon(merged, delta, "zcdp"), delta, "zcdp-filter")
    return Claim(_renyi_filter(merged, delta, filter_orders(budget, delta)), delta, "rdp-filter")


def filter_within(events: Sequence[Event], delta: float, limit: float, agreed: float) -> float:
    """As :func:`filter_epsilon`, but no tighter than needed to see that it is within ``limit``.

    ``agreed``: the ε agreed before the first release (``budget`` of :func:`filter_epsilon`).
    """
    merged = merge(events)
    if len(merged) <= 1 or all(isinstance(event, Gaussian) for event in merged):
        return quick_epsilon(merged, delta, limit)
    return filter_epsilon(merged, delta, agreed).epsilon


def _unsampled(events: Events) -> bool:
    return claim_name(events) != "rdp" and all(getattr(event, "q", 1.0) == 1.0 for event in events)


def filter_orders(budget: float, delta: float) -> tuple[int, ...]:
    """Three integer Rényi orders around the best one of a Gaussian that just meets the budget."""
    log_delta = math.log(1.0 / delta)
    root_rho = math.sqrt(log_delta + budget) - math.sqrt(log_delta)  # ε = ρ + 2√(ρ log 1/δ)
    best = 1.0 + math.sqrt(log_delta) / root_rho
    return tuple(sorted({max(2, round(best * factor)) for factor in _SPREAD}))


def _renyi_filter(events: Events, delta: float, orders: tuple[int, ...]) -> float:
    spent = rdp_at_orders(events, orders)

    def ideal(at: float) -> float:
        share = at / len(orders)
        bounds = (
            # Canonne, Kamath and Steinke 2020, Proposition 12
            rdp + math.log1p(-1.0 / order) - math.log(share * order) / (order - 1)
            for order, rdp in zip(orders, spent, strict=True)
        )
        return max(0.0, min(bounds))

    return with_slack(ideal, events, delta)
