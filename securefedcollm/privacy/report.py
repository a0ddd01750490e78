"""The privacy budget of one participant as data, for ``budget show`` and ``budget report``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accounting import TIGHT_SHARE, Claim, delta_of_slack, prv_bounds
from securefedcollm.privacy.adversaries import AdversaryRow, per_adversary
from securefedcollm.privacy.events import DiscreteGaussian, Events, encode_events, merge
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.identities import Records, union_of
from securefedcollm.privacy.journal import Journal
from securefedcollm.privacy.ledger import Budget, Entry, Ledger
from securefedcollm.privacy.standing import Standing

_MOST_POINTS: Final = 40
_SHOWN: Final = 8

ASSUMPTIONS: Final = (
    "Neighbouring data sets differ by adding or removing one unit (a zero contribution).",
    "The number of units in the data set is public.",
    "Only the releases listed here are covered. Metrics shown to others, tuning runs outside the "
    "ledger, checkpoints and logs that left the silo are not.",
    "The agreed budget holds even if people chose later studies, or the survivors of a sum, "
    "after seeing earlier results: a privacy filter refuses a release that would exceed it. A "
    "figure of ε spent so far is a bound only if nobody chose by such results.",
    "The silo's machine, its operating system's random source and this software are trusted; "
    "timing of the silo's process is not visible to the adversary.",
    "Where noise is distributed, at most the stated number of silos collude or leave out noise.",
)


class Line(msgspec.Struct, frozen=True):
    """One ledger entry."""

    run: str
    round: int
    attempt: int
    state: str
    time: str
    reserved: list[dict[str, object]]
    settled: list[dict[str, object]] | None
    cumulative: float | None
    """Upper bound on ε after this entry; None where left out of a long ledger."""


class Account(msgspec.Struct, frozen=True):
    """Everything about one data set and unit."""

    dataset: str
    """The first hex digits of its fingerprint, to tell files apart."""
    unit: str
    budget: Budget
    spent: Claim
    left: float
    delta_residual: float
    """The part of δ that implementation residuals take (sampler, batch cap, sum of shares)."""
    adversaries: list[AdversaryRow]
    second_opinion: tuple[float, float, float] | None
    """(lower, estimate, upper) of ε by prv-accountant at the tight filter's 7/8 of δ, parameters
    and survivors taken as fixed; None where it has no analysis (sums of older versions)."""
    lines: list[Line]
    records_known: bool = False
    """Whether its charges name their records: then they count by record, in ``sets``."""


class RecordSet(msgspec.Struct, frozen=True):
    """The spending of the records of one file, in all files and studies that had them."""

    records: str
    """Digest of the set."""
    units: list[str]
    """Of the charges that name this very set."""
    standing: Standing
    entries: dict[str, int]
    """Those charges by state."""


class BudgetReport(msgspec.Struct, frozen=True):
    """A participant's ledger, read and verified."""

    owner: str
    ledger: str
    head: str
    rows: int
    accounts: list[Account]
    pinned: Budget | None = None
    """Of every record of this owner, in all studies together."""
    sets: list[RecordSet] = []
    unattributed: int = 0
    """Charges of an older version about files that are not known: they count for no record."""
    assumptions: tuple[str, ...] = ASSUMPTIONS


def read_report(path: Path, *, details: bool = True) -> BudgetReport:
    """Verify the ledger at ``path`` and sum it up.

    ``details``: also ε per adversary, the second opinion and the course of ε (seconds more).

    Raises:
        StateError: no such file, or not a ledger.
        EvidenceError: it does not verify.
    """
    owner = Journal.owner_of(path)
    if owner is None:
        return BudgetReport("", str(path), "", 0, [])
    with Ledger(path, owner) as ledger:
        head = ledger.verify()
        entries = ledger.entries()
        sets = [_record_set(ledger, *one) for one in _by_file(ledger)]
        pinned, unattributed = ledger.pinned, len(ledger.unattributed())
        keys = dict.fromkeys(entry.key[:2] for entry in entries)
        accounts = [
            _account(ledger, [e for e in entries if e.key[:2] == key], details) for key in keys
        ]
    return BudgetReport(
        owner, str(path), head.digest.hex(), head.rows, accounts, pinned, sets, unattributed
    )


def _by_file(ledger: Ledger) -> list[tuple[Records, list[Entry]]]:
    """Every set of records with the charges that name it. Those of one file's answers, each about
    the few records that a question retrieved, are one set."""
    found: dict[str, tuple[list[Records], list[Entry]]] = {}
    for digest, named in ledger.sets().items():
        alone = named and all(entry.about.individually for entry in named)
        sets, entries = found.setdefault(named[0].key.dataset if alone else digest, ([], []))
        sets.append(ledger.stored(digest))
        entries += named
    whole = [
        (sets[0] if len(sets) == 1 else union_of(sets), entries) for sets, entries in found.values()
    ]
    return [(records, entries) for records, entries in whole if len(records)]


def _record_set(ledger: Ledger, records: Records, named: Sequence[Entry]) -> RecordSet:
    return RecordSet(
        records=records.digest,
        units=sorted({entry.key.unit for entry in named}),
        standing=ledger.standing(records),
        entries=dict(Counter(entry.state for entry in named)),
    )


def _account(ledger: Ledger, entries: Sequence[Entry], details: bool) -> Account:
    dataset, unit = entries[0].key[:2]
    budget = entries[-1].budget
    summary = ledger.spent(dataset, unit, budget.delta)
    terms = entries[0].terms
    return Account(
        # Adversary: a reader of the report who tries guesses of a file; its hash has no key.
        dataset=dataset[:_SHOWN],
        unit=unit,
        budget=budget,
        spent=summary.claim,
        left=max(0.0, budget.epsilon - summary.claim.epsilon),
        delta_residual=delta_of_slack(summary.events, summary.claim.epsilon),
        adversaries=_adversaries(summary.events, budget.delta, terms) if details else [],
        second_opinion=_second_opinion(summary.events, budget.delta) if details else None,
        lines=_lines(entries, budget.delta, terms, details),
        records_known=all(entry.about.records for entry in entries),
    )


def _adversaries(events: Events, delta: float, terms: Terms) -> list[AdversaryRow]:
    colluders = max((e.colluders for e in events if isinstance(e, DiscreteGaussian)), default=0)
    deltas = [delta * 10.0, delta, delta / 10.0]
    return per_adversary(events, [d for d in deltas if d < 1.0], colluders, terms=terms)


def _second_opinion(events: Events, delta: float) -> tuple[float, float, float] | None:
    if not events:
        return None
    try:
        return prv_bounds(events, TIGHT_SHARE * delta)
    except ConfigError:
        return None


def _lines(entries: Sequence[Entry], delta: float, terms: Terms, details: bool) -> list[Line]:
    every = max(1, math.ceil(len(entries) / _MOST_POINTS))
    counted: Events = ()
    lines = []
    for index, entry in enumerate(entries):
        counted = merge(counted + entry.counted)
        wanted = details and (index % every == 0 or index == len(entries) - 1)
        key = entry.key
        lines.append(
            Line(
                run=key.run,
                round=key.round,
                attempt=key.attempt,
                state=entry.state,
                time=entry.time,
                reserved=encode_events(entry.reserved),
                settled=None if entry.settled is None else encode_events(entry.settled),
                cumulative=filter_within(counted, delta, 0.0, terms) if wanted else None,
            )
        )
    return lines
