"""Whether a release is admitted: by the pinned budget of every record, and by the study's claim.

Adversary: the author of a study, who wants the records to pay for more than they may, by a larger
ε, another δ, another unit, or another study. The pinned budget is the owner's. A study may ask for
less of it, never for more.

* A study whose ε is above the pinned one, or whose δ is, is refused as such. A larger δ is a weaker
  promise than the owner made.
* Every release about a record is charged at the pinned (ε, δ), also one of a study with a smaller
  δ: its events say what it costs at any δ.
* In addition, all charges of one study stay within the study's own (ε, δ), which its participants
  signed, whatever is left of the pinned budget.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Final, NamedTuple

import numpy as np

from securefedcollm.privacy.accounts import Account, Bools, Patterns, accounts_of
from securefedcollm.privacy.charges import Budget, Entry, Unit
from securefedcollm.privacy.events import Events, merge, repeat
from securefedcollm.privacy.filters import Terms
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.refusal import explain, explain_run, reading, repeated
from securefedcollm.privacy.shown import down, up

_UNCLEAR: Final = (
    "an earlier study also used records whose subjects the ledger does not know, so nobody "
    "knows how many of them belong to one subject; nothing is released"
)
_ELSE: Final = "use other data: no promise to these subjects can be kept"


class Asked(NamedTuple):
    """A release, or a run of them, that a study asks for."""

    dataset: str
    unit: str
    run: str
    events: Events
    """Of one round."""
    claim: Budget
    limit: Budget | None
    records: Records | None
    study: str
    rounds: int = 0
    """Rounds of a run that is only planned; 0 for a release."""
    may_skip: bool = True
    """Whether records that cannot pay may be left out of the study."""
    individually: bool = False
    """Whether the study's claim bounds each record's charges, and not all of the study's together:
    where every release is about records of its own, as in answers."""

    @property
    def fingerprints(self) -> frozenset[str]:
        """Of the file."""
        return frozenset((self.dataset, *(self.records.also if self.records is not None else ())))

    @property
    def whole(self) -> Events:
        return merge(repeated(self.events, self.rounds)) if self.rounds else self.events

    @property
    def whom(self) -> Unit:
        records = self.records
        return (
            Unit(self.unit, records.column, records.most)
            if records is not None
            else Unit(self.unit)
        )


class Decision:
    """The decision on a request; computed only as far as needed."""

    def __init__(
        self, asked: Asked, patterns: Patterns, own: Account, pinned: Budget, limit: float
    ) -> None:
        self.asked = asked
        self.pinned = pinned
        self._limit = limit
        self._patterns = patterns
        self._own = own

    @property
    def too_much(self) -> bool:
        """The study, or the operator, asks for more than the owner pinned."""
        asked, pinned = self.asked, self.pinned
        most = max(asked.claim.epsilon, asked.limit.epsilon if asked.limit else 0.0)
        return most > pinned.epsilon or asked.claim.delta > pinned.delta

    @cached_property
    def _accounts(self) -> list[Account]:
        whole, whom = self.asked.whole, self.asked.whom
        found = [
            account
            for number, charges in enumerate(self._patterns.charges)
            for account in accounts_of(
                charges, whole, whom, self.pinned, self._limit, self._patterns.most, number
            )
        ]
        if self.asked.individually:
            for number, charges in enumerate(self._patterns.charges):
                found.append(_own_claim(self.asked, charges)._replace(pattern=number))
        return found

    @cached_property
    def _poor(self) -> list[Account]:
        """The accounts that cannot pay."""
        return [account for account in self._accounts if not _can_pay(account)]

    @cached_property
    def _own_pays(self) -> bool:
        return _can_pay(self._own)

    @cached_property
    def fits(self) -> bool:
        return not self.too_much and self._own_pays and not self._poor

    @property
    def paying(self) -> Bools:
        """Which of the file's accounts (records, or subjects) can pay: bool [accounts]."""
        poor = np.zeros(len(self._patterns.counts), dtype=np.bool_)
        poor[[account.pattern for account in self._poor]] = True
        paying: Bools = ~poor[self._patterns.of] if self._own_pays else np.zeros(1, dtype=np.bool_)
        return np.broadcast_to(paying, self._patterns.of.shape)

    def refusal(self, what: str = "rounds") -> tuple[str, str]:
        """(message, hint): what is spent, what is left, and what would fit."""
        if self.too_much:
            return self._refuse_more()
        failing = [self._own] if not self._own_pays else self._poor
        worst = max(failing, key=reading)
        if worst.unclear:
            return self._who(worst) + _UNCLEAR, self._others().removeprefix("; or ") or _ELSE
        counted, terms, budget = worst.counted, worst.terms, worst.budget
        limits, asked = (budget.epsilon, budget.delta), self.asked
        if asked.rounds:
            message, hint = explain_run(
                counted, worst.asked, asked.rounds, *limits, terms, what, own=asked.events
            )
        else:
            message, hint = explain(counted, worst.asked, *limits, terms, own=asked.events)
        return self._who(worst) + message, hint + self._others()

    def _who(self, worst: Account) -> str:
        if worst.promise == "study":
            return "of this study's own claim "
        many = sum(self._patterns.counts)
        poor = many - int(self.paying.sum())
        units = "subjects" if self.asked.whom.column else "records"
        who = f"{poor:,} of {many:,} {units} cannot pay: " if poor < many else ""
        if worst.promise != self.asked.unit:
            who += f"seen from one {worst.promise}, "
        return who

    def _others(self) -> str:
        left, asked = int(self.paying.sum()), self.asked
        may = asked.may_skip and asked.rounds > 0  # a study that has begun keeps its records
        if not left or asked.records is None or not may:
            return ""
        units = "subjects" if self.asked.whom.column else "records"
        return f"; or --records skip: the other {left:,} {units} can pay"

    def _refuse_more(self) -> tuple[str, str]:
        asked, pinned = self.asked, self.pinned
        accounts = [
            account
            for charges in self._patterns.charges
            if charges
            for account in accounts_of(
                charges, (), asked.whom, pinned, pinned.epsilon, self._patterns.most
            )
        ]
        spent = max(map(reading, accounts), default=0.0)
        left = down(pinned.epsilon - spent)
        budget = f"the budget of these records is pinned at ε = {pinned.epsilon:g}, δ = "
        budget += f"{pinned.delta:g}, of which ε = {up(spent)} is spent and {left} is left"
        if asked.claim.epsilon > pinned.epsilon:
            return f"the study asks for ε = {asked.claim.epsilon:g}; {budget}", (
                f"agree on a study with privacy.epsilon of at most {left}; "
                "only `securefedcollm budget set` changes what is pinned"
            )
        if asked.claim.delta > pinned.delta:
            return f"the study asks for δ = {asked.claim.delta:g}; {budget}", (
                f"agree on a study with privacy.delta of at most {pinned.delta:g}"
            )
        assert asked.limit is not None
        return f"this silo allows ε = {asked.limit.epsilon:g}; {budget}", (
            "--budget may only be lower; `securefedcollm budget set` changes what is pinned"
        )


def _can_pay(account: Account) -> bool:
    """The same for accounts that differ only in their owners."""
    return _fits(account._replace(promise="", pattern=0))


@lru_cache(maxsize=4096)
def _fits(account: Account) -> bool:
    return account.fits


def decide(
    asked: Asked, patterns: Patterns, entries: list[Entry], pinned: Budget | None
) -> Decision:
    """Whether the records, grouped by ``patterns``, can pay for what is asked.

    Args:
        entries: of the whole ledger.
        pinned: None if nothing is: then it becomes what the operator, or else the study, names.
    """
    pinned = pinned or asked.limit or asked.claim
    limit = min(pinned.epsilon, asked.limit.epsilon if asked.limit else pinned.epsilon)
    own = _own_claim(asked, [] if asked.individually else entries)
    return Decision(asked, patterns, own, pinned, limit)


def _own_claim(asked: Asked, entries: list[Entry]) -> Account:
    """What the study has spent of its own (ε, δ) in these charges."""
    mine = [
        entry
        for entry in entries
        if (entry.about.study == asked.study if asked.study else entry.key.run == asked.run)
    ]
    counted = merge(event for entry in mine for event in entry.counted)
    first = (mine[0].reserved if mine else asked.events)[0]
    terms = Terms(repeat(first, 1), asked.claim.epsilon)
    return Account(counted, asked.whole, terms, asked.claim, "study")
