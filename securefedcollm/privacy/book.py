"""The reading side of a ledger: its entries, their verification, and what records have spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from securefedcollm.errors import EvidenceError, StateError
from securefedcollm.privacy.accounting import Claim
from securefedcollm.privacy.accounts import Overlaps
from securefedcollm.privacy.charges import Budget, Entry, Unit
from securefedcollm.privacy.events import Event, Events, merge
from securefedcollm.privacy.filters import filter_epsilon
from securefedcollm.privacy.identities import Records, key_path, read_records
from securefedcollm.privacy.journal import Head, Journal, Row
from securefedcollm.privacy.replay import Replay
from securefedcollm.privacy.standing import Standing, standing_of

_NO_BUDGET: Final = Budget(1e9, 1e-5)
"""To read an empty ledger with."""


def _require_beside_key(path: Path) -> None:
    """Adversary: whoever removes a spent ledger. The key is made after the file, never before it.

    The check comes before the file is made, so it is the same the next time.
    """
    key = key_path(path)
    if not path.exists() and key.exists():
        raise StateError(
            f"{path}: the privacy ledger is gone, and the key of its records ({key.name}) is there",
            hint=f"restore the newest copy of the ledger; only if it never held a charge, remove "
            f"{key}",
        )


class SpentSummary(msgspec.Struct, frozen=True):
    """The spending of a data set and unit."""

    dataset: str
    unit: str
    claim: Claim
    events: Events
    entries: dict[str, int]
    """Number of entries by state."""


class Book:
    """A participant's ledger in one SQLite file (WAL, ``synchronous=FULL``, mode 0600).

    Args:
        path: the file; created if absent.
        owner: the participant's name.
        now: the clock that stamps rows, seconds since the epoch.

    Raises:
        StateError: the file cannot be used, or is gone while its key is there.
        EvidenceError: a row was changed, removed or does not make sense.
    """

    def __init__(
        self, path: Path | str, owner: str, *, now: Callable[[], float] = time.time
    ) -> None:
        self.owner = owner
        _require_beside_key(Path(path))
        self._journal = Journal(Path(path), owner, now=now)
        self._wholes: dict[str, Records] = {}
        self._state = Replay(self._journal.path)
        self._catch_up()

    @property
    def pinned(self) -> Budget | None:
        """The budget of every record of this owner; None before the first reservation."""
        self._catch_up()
        return self._state.pinned

    def standing(
        self,
        records: Records,
        fingerprints: Iterable[str] = (),
        *,
        besides: Collection[str] = (),
        unit: str = "record",
        plus: Sequence[Event] = (),
        budget: Budget | None = None,
    ) -> Standing:
        """What these records have spent.

        Args:
            fingerprints: of their file, for charges that name no records.
            besides: leave out the charges of these studies (digests, hex).
            plus: count these releases of ``unit`` too: what would be spent after them.
            budget: what would be pinned, where nothing is yet.
        """
        self._catch_up()
        entries = [e for e in self.entries() if e.about.study not in besides]
        overlaps = Overlaps(records, (*fingerprints, *records.also), self.stored, self._state.files)
        whom = Unit(unit, records.column, records.most)
        limit = self._state.pinned or budget or _NO_BUDGET
        return standing_of(overlaps, entries, limit, whom, merge(plus))

    def sets(self) -> dict[str, list[Entry]]:
        """Every set of records that the ledger knows, by digest, with the charges that name it."""
        self._catch_up()
        found: dict[str, list[Entry]] = {}
        for entry in self.entries():
            if entry.about.records:
                found.setdefault(entry.about.records, []).append(entry)
        for digest in sorted(set().union(*self._state.files.values())):
            found.setdefault(digest, [])
        return found

    def unattributed(self) -> list[Entry]:
        """Charges that name no records, and no file of which the ledger knows the records."""
        self._catch_up()
        files = self._state.files
        return [
            e
            for e in self.entries()
            if e.counted and not e.about.records and e.key.dataset not in files
        ]

    def set_of(self, study: str) -> Records | None:
        """The records that a study was first charged for; None if it was not."""
        named = (e.about.records for e in self.entries() if e.about.study == study)
        digest = next(filter(None, named), None)
        return None if digest is None else self.stored(digest)

    def stored(self, digest: str) -> Records:
        """A set of records that was charged.

        Raises:
            EvidenceError: it is missing, or was changed.
        """
        content = self._journal.kept(digest)
        records = None if content is None else read_records(content, digest, self._whole)
        if records is None:
            what = "is missing" if content is None else "does not match its digest"
            raise EvidenceError(
                f"{self._journal.path}: a set of records of the privacy ledger {what}",
                hint="release nothing; restore a copy whose head is in the evidence log",
            )
        return records

    def _whole(self, digest: str) -> Records:
        """:meth:`stored`, of which many sets are parts."""
        if digest not in self._wholes:
            self._wholes = {digest: self.stored(digest)}
        return self._wholes[digest]

    def spent(self, dataset: str, unit: str, delta: float) -> SpentSummary:
        """ε at ``delta`` of everything counted for the data set and unit, as a reading on the way.

        See :func:`~.filters.filter_epsilon`: the promise is the agreed budget.
        """
        self._catch_up()
        entries = self._account(dataset, unit)
        states: dict[str, int] = {}
        for entry in entries:
            states[entry.state] = states.get(entry.state, 0) + 1
        events = merge(event for entry in entries for event in entry.counted)
        claim = Claim(0.0, delta, "none")
        if entries:
            claim = filter_epsilon(events, delta, entries[0].terms)
        return SpentSummary(dataset, unit, claim, events, states)

    def most_spent(self, entry: Entry) -> Claim:
        """Of those that ``entry`` charged, the one that has spent most, at that entry's δ.

        Some of them may also have been in other files, and paid for other studies.
        """
        dataset, unit = entry.key[:2]
        claim = self.spent(dataset, unit, entry.budget.delta).claim
        apart = any(e.counted and e.key[:2] != (dataset, unit) for e in self.entries())
        if not apart or not entry.about.records:
            return claim
        worst = self.standing(self.stored(entry.about.records), unit=unit).worst
        # The bound may be coarse. Every charge since then fitted what was pinned when it was made.
        since = [e.budget.epsilon for e in self.entries() if e.counted and e.row >= entry.row]
        worst = min([worst, max(since)]) if since else worst
        return msgspec.structs.replace(claim, epsilon=max(claim.epsilon, worst))

    def entries(self) -> list[Entry]:
        """Current state of every reservation, oldest first."""
        self._catch_up()
        return list(self._state.entries.values())

    def noted(self, of: str) -> Head | None:
        """The head that another ledger had when a process last began to write to it."""
        self._catch_up()
        return self._state.noted.get(of)

    def rows(self) -> list[Row]:
        """Every journal row, oldest first, read and verified afresh."""
        fresh = Journal(self._journal.path, self.owner)
        try:
            return fresh.news()
        finally:
            fresh.close()

    @property
    def head(self) -> Head:
        """Digest of the newest row, to anchor in the evidence log."""
        self._catch_up()
        return self._journal.head()

    def verify(self, *anchors: Head) -> Head:
        """Re-read the whole file: chain, transitions, settlements, and that ``anchors`` are in it.

        Raises:
            EvidenceError: naming the row that does not verify.
        """
        rows = self.rows()
        replayed = Replay(self._journal.path)
        for row in rows:
            replayed.apply(row)
        for digest in set().union(*replayed.files.values()):
            self.stored(digest)
        for anchor in anchors:
            found = rows[anchor.rows - 1].digest if 1 <= anchor.rows <= len(rows) else None
            if anchor.rows and found != anchor.digest:
                raise self._state.nonsense(anchor.rows, "it is not the one that was anchored")
        return Head(len(rows), rows[-1].digest) if rows else self._journal.head()

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _account(self, dataset: str, unit: str) -> list[Entry]:
        return [e for e in self._state.entries.values() if e.key[:2] == (dataset, unit)]

    def _catch_up(self) -> None:
        for row in self._journal.news():
            self._state.apply(row)
