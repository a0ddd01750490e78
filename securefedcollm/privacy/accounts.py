"""The accounts of one file's records in a ledger of many charges: whose budget a release draws on.

A charge names the set of records that it is about. Records of a file that occur in the same sets
have spent the same. So there is one account for each membership pattern that occurs, and a release
is admitted if every account can pay.

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
  most records that one subject has in *that release*. It is known if all of the release's records
  are in a file whose subjects are known (:meth:`Overlaps.most`). Otherwise the release may have
  been of many more records of a subject: then these accounts have no bound, and cannot pay.
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


Most = Callable[["Entry | None", str, "Sequence[Entry]"], "int | None"]
"""See :meth:`Overlaps.most`."""


class Account(NamedTuple):
    """What some records were charged, what a release asks of them now, and what they may spend."""

    counted: Events
    asked: Events
    terms: Terms
    budget: Budget
    promise: str
    """For whom: ``record``, ``subject``, ``silo``, or ``study`` for a study's own claim."""
    pattern: int = 0
    unclear: bool = False
    """Nobody knows how many records of one subject a release used, so no ε bounds it."""

    @property
    def fits(self) -> bool:
        if self.unclear:
            return False
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
    most: Most
    """How many records of one subject a release used."""


class _Profile(NamedTuple):
    """How accounts were charged: by which charges, which kind of charge came first (numbered from
    1; what opens an account fixes its terms), and how often each kind came: int64 [accounts]."""

    keys: list[tuple[int, object]]
    first: npt.NDArray[np.int64]
    counts: dict[object, npt.NDArray[np.int64]]

    def add(self, key: tuple[int, object], column: npt.NDArray[np.uint8]) -> None:
        """Add a charge to the accounts in ``column``, packed bits."""
        found = np.unpackbits(column, count=len(self.first)).astype(np.int64)
        counts = self.counts.setdefault(key[1], np.zeros_like(found))
        number = list(self.counts).index(key[1]) + 1
        self.first[:] += number * found * (self.first == 0)
        counts += found
        self.keys.append(key)


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
        self._parts: dict[tuple[int | None, ...], bool] = {}
        self._added: _Profile | None = None

    def about(self, records: Records | None, fingerprints: Iterable[str]) -> bool:
        """Whether this is the same file, so that its sets can be used again."""
        return self.records is records and self._fingerprints == frozenset(fingerprints)

    def patterns(self, entries: Sequence[Entry]) -> Patterns:
        """Group the accounts of this file by the charges that they share.

        If a charge is older and the ledger does not know its records, it is about all records of
        every file that has its fingerprint.
        """
        accounts = self.records.accounts if self.records is not None else 1
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
        return Patterns(of, charges, np.bincount(of).tolist(), self.most)

    def alike(self, entries: Sequence[Entry], chosen: Bools | None) -> Patterns:
        """As :meth:`patterns`, where only what was charged matters, and not with whom.

        Accounts that the same kinds of charges are about, as often, are one pattern. So there are
        few, and it takes the same time for all accounts.

        Args:
            entries: by record.
            chosen: the accounts that matter, bool [accounts]; None: all.
        """
        accounts = self.records.accounts if self.records is not None else 1
        wanted = np.ones(accounts, dtype=np.bool_) if chosen is None else chosen
        columns = [self._column(self._source(entry)) for entry in entries]
        profile = self._profile(entries, columns)
        of = np.zeros(int(wanted.sum()), dtype=np.int64)
        for counts in (each[wanted] for each in (*profile.counts.values(), profile.first)):
            codes = of * (int(counts.max(initial=0)) + 1) + counts
            of = np.unique(codes, return_inverse=True)[1].reshape(-1)
        firsts = np.flatnonzero(wanted)[np.unique(of, return_index=True)[1]]
        places, shifts = firsts >> 3, 7 - firsts % 8
        taken = np.array([column[places] for column in columns], dtype=np.uint8)
        hits = taken.reshape(len(columns), len(firsts)) >> shifts & 1
        charges = [[entries[at] for at in np.flatnonzero(hit).tolist()] for hit in hits.T]
        return Patterns(of.astype(np.int32), charges, np.bincount(of).tolist(), self.most)

    def _profile(
        self, entries: Sequence[Entry], columns: Sequence[npt.NDArray[np.uint8]]
    ) -> _Profile:
        """How the accounts were charged.

        What has left stays as it is, so its charges are added up once. Adversary: an asker of very
        many questions, so that later ones take long.
        """
        accounts = self.records.accounts if self.records is not None else 1
        keys = [(entry.row, _kind(entry)) for entry in entries]
        added = self._added
        if added is None or keys[: len(added.keys)] != added.keys:
            added = _Profile([], np.zeros(accounts, dtype=np.int64), {})
        at = len(added.keys)
        while at < len(entries) and entries[at].state in ("released", "settled"):
            added.add(keys[at], columns[at])
            at += 1
        self._added = added
        whole = _Profile([], added.first.copy(), {k: v.copy() for k, v in added.counts.items()})
        for key, column in zip(keys[at:], columns[at:], strict=True):
            whole.add(key, column)
        return whole

    def most(self, release: Entry | None, column: str, charges: Sequence[Entry]) -> int | None:
        """A bound on the records that one subject has in a release; None if it is unknown.

        If all records of the release are in one file, that file's subjects give the bound.
        Adversary: the author of a study by subject on a file with one record of each, after a study
        by record on a file with many.

        Args:
            release: None for what is asked of this file.
            column: which names the subject of a record; empty for a charge of an older ledger.
            charges: on the same account: files whose subjects may be known.
        """
        if self.records is None:
            return max((entry.about.most for entry in charges), default=1)
        bounds = [
            entry.about.most
            for entry in charges
            if entry.about.records and entry.unit[:2] == ("subject", column)
            if self._part(release, entry)
        ]
        mine = self.records.column
        if mine and column in ("", mine) and self._part(release, None):
            bounds.append(self.records.most)
        return min(bounds, default=None)

    def _part(self, release: Entry | None, file: Entry | None) -> bool:
        """Whether all records of a release are among those of another; None: of this file."""
        key = tuple(None if entry is None else entry.row for entry in (release, file))
        if key not in self._parts:
            sets = self._named(file)
            found = [
                any(_is_part(*part, *whole) for whole in sets) for part in self._named(release)
            ]
            self._parts[key] = all(found) and bool(found)
        return self._parts[key]

    def _named(self, entry: Entry | None) -> list[tuple[Records, int]]:
        """The sets that a charge is about, and how many records it says that it was of, or 0."""
        assert self.records is not None
        if entry is None:
            return [(self.records, len(self.records))]
        sources = self._source(entry)
        if "" in sources:
            return [(self.records, entry.about.rows)]
        return [(self._stored(digest), entry.about.rows) for digest in sorted(sources)]

    def unattributed(self, entries: Sequence[Entry]) -> list[Entry]:
        """Charges whose records nobody knows any more."""
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
        accounts = self.records.accounts if self.records is not None else 1
        if "" in source:
            return np.packbits(np.ones(accounts, dtype=np.bool_))
        found = np.zeros((accounts + 7) // 8, dtype=np.uint8)
        for digest in source if self.records is not None else ():
            if digest not in self._sets:
                assert self.records is not None
                self._sets[digest] = np.packbits(self.records.within(self._stored(digest)))
            found |= self._sets[digest]
        return found


def _kind(entry: Entry) -> object:
    """What two charges by record share that count the same."""
    study = entry.about.study or entry.key.run
    return entry.unit, entry.reserved, entry.counted, entry.budget, study


def _is_part(part: Records, many: int, whole: Records, of: int) -> bool:
    """Whether no subject has more records in ``part`` than in ``whole``.

    A set holds a record once that is in a file twice, or in the files of two subjects. So where the
    file had repetitions it has to be the same one.

    Args:
        many, of: records of the two, with repetitions; 0 where a ledger does not say it.
    """
    if part.whole is None or whole.whole is None:
        same = inside = part.former == whole.former
    else:
        inside = part.all_in(whole)
        same = inside and len(part.pairs) == len(whole.pairs)
    return inside and (many in (0, len(part.pairs)) or (same and many == of))


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
    most: Most,
    pattern: int = 0,
) -> list[Account]:
    """Every promise to which these charges and this release count.

    Args:
        asked: what is to be released; empty to ask what is spent.
        unit: of ``asked``.
        limit: the ε to stay within; at most the pinned one.
        most: of the file that the charges are found for.
    """
    units = [entry.unit for entry in charges if entry.counted] + ([unit] if asked else [])
    kinds = {(one.name, one.column) for one in units}
    promises = [Unit("record")] if len(kinds) != 1 else [units[-1]]
    if len(kinds) > 1:
        promises += [Unit(*kind) for kind in sorted(kinds) if kind[0] == "subject"]
    found, alone = [], len(kinds) == 1
    for promise in promises:
        view = _View(promise, alone, most, charges)
        counted = merge(e for entry in charges for e in view.of(entry, entry.unit, entry.counted))
        seen = view.of(None, unit, asked)
        if charges:
            first, *_ = view.of(charges[0], charges[0].unit, charges[0].reserved)
            terms = Terms(repeat(first, 1), charges[0].budget.epsilon)
        else:
            terms = Terms(repeat(seen[0], 1), pinned.epsilon)
        unclear = any(view.draws(e, e.unit) is None for e in charges if e.counted)
        unclear = unclear or (bool(asked) and view.draws(None, unit) is None)
        budget = Budget(limit, pinned.delta)
        found.append(Account(counted, seen, terms, budget, promise.name, pattern, unclear))
    return found


class _View(NamedTuple):
    """How releases count towards one promise of an account."""

    promise: Unit
    alone: bool
    """No other unit is on the account."""
    most: Most
    charges: Sequence[Entry]

    def of(self, release: Entry | None, unit: Unit, events: Iterable[Event]) -> Events:
        """``events`` of the release (None: what is asked), as they count towards the promise."""
        k = self.draws(release, unit) or 1
        return as_seen(events, unit, self.promise._replace(most=k), self.alone)

    def draws(self, release: Entry | None, unit: Unit) -> int | None:
        """Largest number of records of one subject in the release; None if it is unknown."""
        if self.alone or unit[:2] == self.promise[:2]:
            return 1
        if self.promise.name != "subject" or unit.name == "silo":
            return 1
        return self.most(release, self.promise.column, self.charges)


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
