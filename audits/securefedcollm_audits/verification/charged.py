"""The privacy events of a bundle, held within what any run releases before they are computed on.

Adversary: the maker of the bundle. An accountant's memory and time grow with the size of the
events; a made-up event must not hang or kill the auditor's machine. Events out of bounds count
against the bundle, like everything that cannot be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from securefedcollm.aggregation.header import MAX_COHORT
from securefedcollm.errors import EvidenceError
from securefedcollm.privacy import events
from securefedcollm.privacy.accounting import MOST_WORK
from securefedcollm.privacy.events import DiscreteGaussian, Event, Events, times

_MOST_TIMES: Final = 10**9
_MOST_SHARES: Final = MAX_COHORT
_MOST_VALUES: Final = 2**40
_NOISE: Final = (1e-2, 1e9)
_MOST_KINDS: Final = 256
_LEAST_DELTA: Final = 1e-100


def decode_events(plain: object) -> Events:
    """:func:`securefedcollm.privacy.events.decode_events`, within bounds.

    Raises:
        EvidenceError: an event that cannot be read, or that no run releases.
    """
    found = events.decode_events(plain)
    for event in found:
        if fault := _fault(event):
            raise EvidenceError(f"no run releases {fault}", hint="ask whoever made the bundle")
    return found


def _fault(event: Event) -> str:
    if times(event) > _MOST_TIMES:
        return f"{times(event)} sums"
    if isinstance(event, DiscreteGaussian):
        if event.shares > _MOST_SHARES or event.values > _MOST_VALUES:
            return f"{event.values} values under {event.shares} shares of noise"
        if not event.share_sigma < math.inf:
            return "noise without bound"
    if not _NOISE[0] <= event.noise_multiplier <= _NOISE[1]:
        return f"with a noise multiplier of {event.noise_multiplier:g}"
    return ""


def check_work(merged: Sequence[Event], delta: float, rough: float) -> None:
    """Refuse events that an accountant could not compute.

    Args:
        merged: events, equal ones counted together.
        rough: an upper bound on their ε at ``delta``.

    Raises:
        EvidenceError: too many kinds, too small a δ, or far too large an ε.
    """
    work = rough * math.sqrt(sum(map(times, merged)))
    if len(merged) > _MOST_KINDS or delta < _LEAST_DELTA or not work <= MOST_WORK:
        raise EvidenceError(
            f"{len(merged)} kinds of releases, of ε ≤ {rough:.3g} at δ = {delta:.3g}, are more "
            "than can be computed",
            hint="ask whoever made the bundle",
        )
