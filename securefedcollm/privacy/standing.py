"""The spending of the records of a file, or of a set that a ledger knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from securefedcollm.privacy.accounts import Account, Overlaps, Patterns, accounts_of
from securefedcollm.privacy.charges import Budget, Entry, Unit
from securefedcollm.privacy.events import Events
from securefedcollm.privacy.refusal import bound, reading

MOST_TIGHT: Final = 16
"""Number of patterns that get a tight ε."""


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
    spent = _Spent(patterns, plus, unit, budget)
    untouched = sum(
        count
        for charges, count in zip(patterns.charges, patterns.counts, strict=True)
        if not any(entry.counted for entry in charges)
    )
    worst = spent.refined(lambda values: int(np.argmax(values)))
    return Standing(
        accounts=sum(patterns.counts),
        untouched=untouched,
        worst=worst,
        median=spent.refined(lambda values: _middle(values, patterns.counts)),
        left=max(0.0, budget.epsilon - worst),
        budget=budget,
        unattributed=len(overlaps.unattributed(entries)),
    )


class _Spent:
    """The spending of the accounts of each pattern.

    Studies on overlapping parts of a file make many patterns, and a tight ε takes a tenth of a
    second. So where there are many, only the patterns that decide the answer are computed tightly.
    The others, and beyond ``MOST_TIGHT`` those too, have a larger bound.
    """

    def __init__(self, patterns: Patterns, plus: Events, unit: Unit, budget: Budget) -> None:
        self._accounts = [
            []
            if not plus and not any(entry.counted for entry in charges)
            else accounts_of(charges, plus, unit, budget, budget.epsilon, patterns.most)
            for charges in patterns.charges
        ]
        few = len(self._accounts) <= MOST_TIGHT
        self._tight = [few] * len(self._accounts)
        self._values = [self._of(i, reading if few else bound) for i in range(len(self._tight))]

    def refined(self, which: Callable[[list[float]], int]) -> float:
        """The value that ``which`` points at, as tight as it can be; never below the true one."""
        for _ in range(MOST_TIGHT):
            chosen = which(self._values)
            if self._tight[chosen]:
                break
            self._values[chosen] = min(self._values[chosen], self._of(chosen, reading))
            self._tight[chosen] = True
        return self._values[which(self._values)]

    def _of(self, pattern: int, measure: Callable[[Account], float]) -> float:
        return max(map(measure, self._accounts[pattern]), default=0.0)


def _middle(values: Sequence[float], counts: Sequence[int]) -> int:
    """The place of the median."""
    order = np.argsort(values)
    reached = np.cumsum(np.asarray(counts)[order])
    return int(order[int(np.searchsorted(reached, (reached[-1] + 1) // 2))])
