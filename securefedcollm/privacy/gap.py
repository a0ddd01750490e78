"""The ε that a planned study is charged, beside the ε that it costs if all goes as hoped.

Adversary: the server and c silos, as the study says. The charge holds against one who chooses the
survivors of every sum by what earlier sums showed. The other figure does not: it takes every
silo's share to be in every sum.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from securefedcollm.privacy.accounting import TIGHT_SHARE, quick_epsilon
from securefedcollm.privacy.events import DiscreteGaussian, Event


class Gap(NamedTuple):
    """ε of one plan under two assumptions, both upper bounds."""

    charged: float
    """At worst: the fewest silos in every sum, with the ledger's reserve of δ."""
    hoped: float
    """With all silos in every sum and all of δ, if nobody chose anything by what was released."""


def gap_of(planned: Event, silos: int, delta: float, target: float) -> Gap:
    """The two figures of a whole study's releases.

    Args:
        planned: at worst, as reserved.
        silos: n; shares that a sum has if nobody is lost.
        target: the study's ε.
    """
    hoped = planned
    if isinstance(planned, DiscreteGaussian) and planned.shares > 1:
        hoped = msgspec.structs.replace(planned, shares=silos)
    charged = quick_epsilon((planned,), TIGHT_SHARE * delta, target)
    return Gap(charged, min(charged, quick_epsilon((hoped,), delta, 0.0)))
