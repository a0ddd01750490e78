"""Whose budget a release draws on: the accounts of one file's records in a ledger of many charges.

A charge names the set of records that it is about. Records of a file that occur in the same sets
have spent the same; so there are as many accounts as membership patterns that occur, and a release
is admitted if every one of them can pay.

What one account promises
-------------------------
All releases about a record are together (ε, δ) private, at the owner's pinned budget.

* Releases of one unit only: the promise is that unit's. For a silo, say, it compares what was
  released with what would have been released had the silo stayed away.
* As soon as units meet on an account, the promise is the *record's*, with against without one
  record. A release that clips all of a silo, or of a subject, then counts with half its noise
  (:func:`~.charges.halved`).
* If one of them is the subject, the *subject's* promise is kept besides: a release by record counts
  with the noise over k and the sampling rate of k draws (:func:`~.charges.grouped`), where k is the
  most records that a subject of the charged files has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.privacy.charges import Budget, Entry, Unit, grouped, halved
from securefedcollm.privacy.events import Event, Events, merge, repeat
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.identities import Records

Bools = npt.NDArray[np.bool_]


class Account(NamedTuple):
    """What some records have been charged, what is asked of them now, and what they may spend."""

    counted: Events
    asked: Events
    terms: Terms
    budget: Budget
    promise: str
    """For whom: ``record``, ``subject``, ``silo``, or ``study`` for a study's own claim."""
    pattern: int = 0

    @property
    def fits(self) -> bool:
        limit, delta = self.budget.epsilon, self.budget.delta
        return filter_within(merge(self.counted + self.asked), delta, limit, self.terms) <= limit


class Patterns(NamedTuple):
    """The accounts of a file: which charges each is about, and how many there are of each kind."""

    of: npt.NDArray[np.int32]
    """The pattern of every account, [accounts]."""
    charges: list[list[Entry]]
    """By pattern, oldest first."""
    counts: list[int]
    """Accounts by pattern."""


class Overlaps:
    """How a file's records overlap with the sets that a ledger has charged.

    Args:
        records: of the file.
        fingerprints: by which a charge that names no records may know the file.
        stored: a set, by its digest.
        files: the sets that are known to be the records of a file, by its fingerprint.
    """

    def __init__(
        self,
        records: Records | None,
        fingerprints: Iterable[str],
        stored: Callable[[str], Records],
        files: Mapping[str, set[str]],
    ) -> None:
        self.records = records
        self._files = files
        self._fingerprints = frozenset(fingerprints)
        self._stored = stored
        self._sets: dict[str, npt.NDArray[np.uint8]] = {}

    def about(self, records: Records | None, fingerprints: Iterable[str]) -> bool:
        """Whether this is the same file: what was read of the ledger's sets is of use again."""
        return self.records is records and self._fingerprints == frozenset(fingerprints)

    def patterns(self, entries: Sequence[Entry]) -> Patterns:
        """Group the accounts of this file by the charges that they share.

        A charge of which the ledger does not know the records, being older, is about all records of
        every file that has its fingerprint.
        """
        accounts = self.records.accounts if self.records else 1
        sources = [self._source(entry) for entry in entries]
        columns = {source: self._column(source) for source in dict.fromkeys(sources)}
        of = _grouped(list(columns.values()), accounts)
        firsts = np.unique(of, return_index=True)[1]
        within = {
            source: np.unpackbits(column, count=accounts)[firsts].astype(np.bool_)
            for source, column in columns.items()
        }
        charges = [
            [entry for entry, source in zip(entries, sources, strict=True) if within[source][i]]
            for i in range(len(firsts))
        ]
        return Patterns(of, charges, np.bincount(of).tolist())

    def unattributed(self, entries: Sequence[Entry]) -> list[Entry]:
        """Charges of which nobody knows any more what they were about."""
        known = {*self._files, *self._fingerprints}
        return [
            e for e in entries if not e.about.records and e.counted and e.key.dataset not in known
        ]

    def _source(self, entry: Entry) -> frozenset[str]:
        """The sets that together are what the charge is about; "" stands for all of this file."""
        if entry.about.records:
            mine = self.records is not None and entry.about.records in self.records.digests
            same = self.records is None and bool(entry.fingerprints & self._fingerprints)
            return frozenset([""] if mine or same else [entry.about.records])
        if entry.key.dataset in self._fingerprints:
            return frozenset([""])
        return frozenset(self._files.get(entry.key.dataset, ()))

    def _column(self, source: frozenset[str]) -> npt.NDArray[np.uint8]:
        """Which accounts a charge is about, as packed bits."""
        accounts = self.records.accounts if self.records else 1
        if "" in source:
            return np.packbits(np.ones(accounts, dtype=np.bool_))
        found = np.zeros((accounts + 7) // 8, dtype=np.uint8)
        for digest in source if self.records else ():
            if digest not in self._sets:
                assert self.records is not None
                self._sets[digest] = np.packbits(self.records.within(self._stored(digest)))
            found |= self._sets[digest]
        return found


def _grouped(columns: Sequence[npt.NDArray[np.uint8]], accounts: int) -> npt.NDArray[np.int32]:
    """Number the accounts by their bits in all ``columns``, eight columns at a time."""
    groups = np.zeros(accounts, dtype=np.int32)
    for start in range(0, len(columns), 8):
        codes = groups.astype(np.int64)
        for column in columns[start : start + 8]:
            codes *= 2
            codes += np.unpackbits(column, count=accounts)
        present = np.unique(codes)
        groups = np.searchsorted(present, codes).astype(np.int32)
    return groups


def accounts_of(
    charges: Sequence[Entry],
    asked: Events,
    unit: Unit,
    pinned: Budget,
    limit: float,
    pattern: int = 0,
) -> list[Account]:
    """Every promise that these charges and this release share.

    Args:
        asked: what is to be released; empty to ask what is spent.
        unit: of ``asked``.
        limit: the ε to stay within; at most the pinned one.
    """
    units = [entry.unit for entry in charges if entry.counted] + ([unit] if asked else [])
    kinds = {(one.name, one.column) for one in units}
    promises = [Unit("record")] if len(kinds) != 1 else [units[-1]]
    if len(kinds) > 1:
        most = max(one.most for one in units)
        promises += [Unit(*kind, most) for kind in sorted(kinds) if kind[0] == "subject"]
    found, alone = [], len(kinds) == 1
    for promise in promises:
        counted = merge(
            event
            for entry in charges
            for event in as_seen(entry.counted, entry.unit, promise, alone)
        )
        seen = as_seen(asked, unit, promise, alone)
        if charges:
            first, *_ = as_seen(charges[0].reserved, charges[0].unit, promise, alone)
            terms = Terms(repeat(first, 1), charges[0].budget.epsilon)
        else:
            terms = Terms(repeat(seen[0], 1), pinned.epsilon)
        budget = Budget(limit, pinned.delta)
        found.append(Account(counted, seen, terms, budget, promise.name, pattern))
    return found


def as_seen(events: Iterable[Event], unit: Unit, promise: Unit, alone: bool) -> Events:
    """Releases of ``unit`` as they count towards ``promise``; ``alone``: no other unit is there."""
    if alone or unit[:2] == promise[:2]:
        return tuple(events)
    if promise.name == "record":
        return tuple(halved(event) for event in events)
    # The subject's promise. Its k records are k units elsewhere, each in one group at most; of a
    # group that only loses some of its records the clipped vector moves by 2C.
    k = promise.most
    if unit.name == "record":
        return tuple(grouped(event, k, k) for event in events)
    if unit.name == "silo":
        return tuple(halved(event) for event in events)
    return tuple(grouped(event, 2 * k, k) for event in events)
