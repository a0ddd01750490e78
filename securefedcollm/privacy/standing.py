"""What the records of a file, or of a set that a ledger knows, have spent of their budget."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from securefedcollm.privacy.accounts import Most, Overlaps, accounts_of
from securefedcollm.privacy.charges import Budget, Entry, Unit
from securefedcollm.privacy.events import Events
from securefedcollm.privacy.refusal import reading


class Standing(msgspec.Struct, frozen=True):
    """By account: a record, or a subject where that is the unit."""

    accounts: int
    untouched: int
    """Accounts that nothing was charged to."""
    worst: float
    """Upper bound on the ε spent of the account that has spent most, at the pinned δ."""
    median: float
    left: float
    """Of the worst account."""
    budget: Budget
    unattributed: int
    """Charges of an older ledger whose file is not known any more: they count towards no record."""


def standing_of(
    overlaps: Overlaps,
    entries: Sequence[Entry],
    budget: Budget,
    unit: Unit,
    plus: Events,
) -> Standing:
    """The standing of the file's records after ``entries``, and ``plus`` of ``unit``."""
    patterns = overlaps.patterns(entries)
    spent = [_spent(charges, plus, unit, budget, patterns.most) for charges in patterns.charges]
    untouched = sum(
        count
        for charges, count in zip(patterns.charges, patterns.counts, strict=True)
        if not any(entry.counted for entry in charges)
    )
    worst = max(spent)
    return Standing(
        accounts=sum(patterns.counts),
        untouched=untouched,
        worst=worst,
        median=_median(spent, patterns.counts),
        left=max(0.0, budget.epsilon - worst),
        budget=budget,
        unattributed=len(overlaps.unattributed(entries)),
    )


def _spent(charges: list[Entry], plus: Events, unit: Unit, budget: Budget, most: Most) -> float:
    if not plus and not any(entry.counted for entry in charges):
        return 0.0
    return max(map(reading, accounts_of(charges, plus, unit, budget, budget.epsilon, most)))


def _median(values: Sequence[float], counts: Sequence[int]) -> float:
    order = np.argsort(values)
    reached = np.cumsum(np.asarray(counts)[order])
    return float(values[order[int(np.searchsorted(reached, (reached[-1] + 1) // 2))]])
