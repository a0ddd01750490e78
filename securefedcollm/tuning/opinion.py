"""A third opinion on ε, where torch is loaded anyway: opacus' own accountant.

The claim is dp-accounting's (:mod:`securefedcollm.privacy.accounting`), the second opinion is
prv-accountant's. This one shares no code with either. It is never the claim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from securefedcollm.privacy.events import Event, continuous, merge, rate, times


def opacus_epsilon(events: Sequence[Event], delta: float) -> float | None:
    """ε at ``delta`` by opacus' PRV accountant; None if it has no analysis for one of ``events``.

    It adds its error of 0.01 to the estimate, and books no residuals of samplers.
    """
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    for event in merge(events):
        ideal = continuous(event)
        if ideal is None:
            return None
        accountant.history.append((ideal.noise_multiplier, rate(ideal), times(ideal)))
    with np.errstate(divide="ignore"):  # it takes log(0) even where it then uses the other branch
        return float(accountant.get_epsilon(delta=delta))
