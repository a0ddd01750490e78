"""The budget ledger: what a silo has spent on a data set, across rounds, runs and studies.

Life of an entry, one journal row per arrow::

    reserve ──▶ reserved ──release──▶ released ──settle──▶ settled
                   └──────void──────▶ void

* ``reserve`` charges the worst case before any work, and refuses what would pass the budget. It
  runs on the silo's own machine, so no server can talk a silo past it.
* ``release`` is durable *before* the first byte leaves. A crash in between counts as spent.
* ``settle`` replaces the worst case by what really happened, which can only be less.
* ``void`` gives a reservation back; possible only while nothing has been released.

A crash before ``release`` leaves the entry ``reserved``: reserving the same (data set, unit, run,
round, attempt) with the same events returns it, counted once. After ``release`` the same attempt
can never be reserved again: a retry is a new attempt and costs again.

Charges are added with a privacy filter (:mod:`.filters`), which stays valid if the next study is
chosen after seeing the results of the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from securefedcollm.errors import BudgetExceeded, ConfigError, EvidenceError, LocalProtocolError
from securefedcollm.privacy.accounting import Claim
from securefedcollm.privacy.events import (
    Event,
    Events,
    decode_events,
    dominates,
    encode_events,
    merge,
    repeat,
)
from securefedcollm.privacy.filters import Terms, filter_epsilon, filter_within
from securefedcollm.privacy.journal import Head, Journal, Row
from securefedcollm.privacy.refusal import explain, explain_run, repeated

State = Literal["reserved", "released", "settled", "void"]

_NEXT: Final[dict[str, tuple[str | None, State]]] = {
    "reserve": (None, "reserved"),
    "release": ("reserved", "released"),
    "settle": ("released", "settled"),
    "void": ("reserved", "void"),
}


class Key(NamedTuple):
    """What one entry is about."""

    dataset: str
    """Fingerprint of the data set."""
    unit: str
    """``record``, ``silo`` or ``subject:COLUMN``."""
    run: str
    round: int
    attempt: int


class Budget(msgspec.Struct, frozen=True):
    """(ε, δ) that all releases about one data set and unit must stay within."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0.0:
            raise ConfigError(f"must be above 0, not {self.epsilon}", where="privacy.epsilon")
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"lies in (0, 1), not {self.delta}", where="privacy.delta")


class Reservation(msgspec.Struct, frozen=True):
    """A place in the ledger that was granted; the argument of release, settle and void."""

    key: Key
    events: Events
    row: int
    """Number of the journal row that granted it."""


class Entry(msgspec.Struct, frozen=True):
    """The current state of one reservation."""

    key: Key
    state: State
    reserved: Events
    settled: Events | None
    budget: Budget
    row: int
    time: str

    @property
    def counted(self) -> Events:
        """What the budget is charged."""
        if self.state == "void":
            return ()
        return self.reserved if self.settled is None else self.settled

    @property
    def terms(self) -> Terms:
        """The filter terms of an account that this entry opens."""
        return Terms(repeat(self.reserved[0], 1), self.budget.epsilon)


class SpentSummary(msgspec.Struct, frozen=True):
    """What a data set and unit have spent."""

    dataset: str
    unit: str
    claim: Claim
    events: Events
    entries: dict[str, int]
    """Number of entries by state."""


class Ledger:
    """A participant's privacy ledger in one SQLite file (WAL, ``synchronous=FULL``, mode 0600).

    Args:
        path: the file; created if absent.
        owner: the participant's name.
        now: the clock that stamps rows, seconds since the epoch.

    Raises:
        StateError: the file cannot be used.
        EvidenceError: a row was changed, removed or does not make sense.
    """

    def __init__(
        self, path: Path | str, owner: str, *, now: Callable[[], float] = time.time
    ) -> None:
        self.owner = owner
        self._journal = Journal(Path(path), owner, now=now)
        self._entries: dict[Key, Entry] = {}
        self._catch_up()

    def reserve(
        self,
        dataset: str,
        unit: str,
        run: str,
        round: int,
        attempt: int,
        events: Sequence[Event],
        budget: tuple[float, float],
    ) -> Reservation:
        """Charge the worst case of a coming release, or refuse it.

        Args:
            events: what will be released at worst (shares = threshold, steps = planned).
            budget: (ε, δ) that everything counted so far plus ``events`` must stay within.

        Returns:
            The reservation; the existing one if this attempt is still ``reserved`` with the same
            events (nothing had left the silo).

        Raises:
            BudgetExceeded: the release does not fit. Nothing was written.
            LocalProtocolError: this attempt was already released, or reserved with other events.
        """
        key, asked, limit = Key(dataset, unit, run, round, attempt), merge(events), Budget(*budget)
        if not asked:
            raise LocalProtocolError("a reservation names at least one event")
        opening = Terms(repeat(asked[0], 1), limit.epsilon)
        filter_within(asked, limit.delta, limit.epsilon, opening)  # imports, outside the lock
        with self._journal.writing():
            self._catch_up()
            known = self._entries.get(key)
            if known is not None:
                return self._again(known, asked)
            counted, terms = self._counted(dataset, unit, opening)
            total = filter_within(merge(counted + asked), limit.delta, limit.epsilon, terms)
            fits = total <= limit.epsilon
            if fits:
                row = self._write(
                    "reserve",
                    key,
                    events=encode_events(asked),
                    budget={"epsilon": limit.epsilon, "delta": limit.delta},
                )
        if not fits:  # explained outside the lock: finding out what would fit takes a second
            message, hint = explain(counted, asked, limit.epsilon, limit.delta, terms)
            raise BudgetExceeded(f"round {round} of {unit} data: {message}", hint=hint)
        self._catch_up()
        return Reservation(key, asked, row.seq)

    def foresee(
        self,
        dataset: str,
        unit: str,
        events: Sequence[Event],
        rounds: int,
        budget: tuple[float, float],
        what: str = "rounds",
    ) -> None:
        """Refuse a run of which not every round would fit, before anything is spent on it.

        Charges nothing: :meth:`reserve` decides about every round again.

        Args:
            events: what one round will release at worst.
            rounds: rounds that are still to come.
            what: what the operator calls them.

        Raises:
            BudgetExceeded: says how much is left and what would fit.
        """
        asked, limit = merge(events), Budget(*budget)
        self._catch_up()
        counted, terms = self._counted(dataset, unit, Terms(repeat(asked[0], 1), limit.epsilon))
        whole = merge(counted + repeated(asked, rounds))
        if filter_within(whole, limit.delta, limit.epsilon, terms) > limit.epsilon:
            message, hint = explain_run(
                counted, asked, rounds, limit.epsilon, limit.delta, terms, what
            )
            raise BudgetExceeded(f"{unit} data: {message}", hint=hint)

    def release(self, reservation: Reservation) -> None:
        """Record, durably, that bytes are about to leave. Call it before they do.

        Raises:
            LocalProtocolError: the reservation was released, settled or voided before.
        """
        self._step("release", reservation)

    def settle(self, reservation: Reservation, actual: Sequence[Event]) -> None:
        """Replace the worst case by what happened.

        Args:
            actual: events that are each no worse than the reserved ones they stand for.

        Raises:
            LocalProtocolError: not released yet, or ``actual`` is not covered by what was reserved.
        """
        merged = merge(actual)
        if not dominates(reservation.events, merged):
            raise LocalProtocolError(
                "a settlement may not exceed its reservation",
                hint="reserve the worst case: threshold shares, all planned steps",
            )
        self._step("settle", reservation, events=encode_events(merged))

    def void(self, reservation: Reservation) -> None:
        """Give back a reservation of which nothing was released.

        Raises:
            LocalProtocolError: it was released.
        """
        self._step("void", reservation)

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

    def entries(self) -> list[Entry]:
        """Current state of every reservation, oldest first."""
        self._catch_up()
        return list(self._entries.values())

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
        replayed: dict[Key, Entry] = {}
        for row in rows:
            self._apply(row, replayed)
        for anchor in anchors:
            found = rows[anchor.rows - 1].digest if 1 <= anchor.rows <= len(rows) else None
            if anchor.rows and found != anchor.digest:
                raise self._nonsense(anchor.rows, "it is not the one that was anchored")
        return Head(len(rows), rows[-1].digest) if rows else self._journal.head()

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- internals ------------------------------------------------------------------------------

    def _again(self, known: Entry, asked: Events) -> Reservation:
        if known.state == "reserved" and known.reserved == asked:
            return Reservation(known.key, known.reserved, known.row)
        state = "reserved with other events" if known.state == "reserved" else known.state
        raise LocalProtocolError(
            f"attempt {known.key.attempt} of round {known.key.round} is already {state}",
            hint="a retry is a new attempt, and is charged as one",
        )

    def _counted(self, dataset: str, unit: str, opening: Terms) -> tuple[Events, Terms]:
        """What the account is charged so far, and the terms of its first entry."""
        account = self._account(dataset, unit)
        counted = merge(event for entry in account for event in entry.counted)
        return counted, account[0].terms if account else opening

    def _account(self, dataset: str, unit: str) -> list[Entry]:
        return [e for e in self._entries.values() if e.key[:2] == (dataset, unit)]

    def _step(self, action: str, reservation: Reservation, **content: Any) -> None:
        with self._journal.writing():
            self._catch_up()
            entry = self._entries.get(reservation.key)
            wanted = _NEXT[action][0]
            if entry is None or entry.row != reservation.row or entry.state != wanted:
                state = "unknown" if entry is None else entry.state
                raise LocalProtocolError(
                    f"cannot {action} a reservation that is {state}; it must be {wanted}"
                )
            self._write(action, reservation.key, **content)
        self._catch_up()

    def _write(self, action: str, key: Key, **content: Any) -> Row:
        return self._journal.append({"action": action, **key._asdict(), **content})

    def _catch_up(self) -> None:
        for row in self._journal.news():
            self._apply(row, self._entries)

    def _apply(self, row: Row, entries: dict[Key, Entry]) -> None:
        body = row.body
        try:
            key = Key(*(body[name] for name in Key._fields))
            before, after = _NEXT[body["action"]]
            weighs = body["action"] in ("reserve", "settle")
            events = decode_events(body["events"]) if weighs else ()
            if weighs and not events:
                raise self._nonsense(row.seq, f"a {body['action']} of nothing")
            known = entries.get(key)
            if (known.state if known else None) != before:
                raise self._nonsense(row.seq, f"{body['action']} out of order")
            if known is None:
                budget = msgspec.convert(body["budget"], Budget)
                entries[key] = Entry(key, after, events, None, budget, row.seq, body["time"])
                return
        except (KeyError, TypeError, ConfigError, msgspec.ValidationError) as error:
            raise self._nonsense(row.seq, "its content is not a ledger entry") from error
        settled = events if after == "settled" else None
        if settled is not None and not dominates(known.reserved, settled):
            raise self._nonsense(row.seq, "it settles more than was reserved")
        entries[key] = msgspec.structs.replace(known, state=after, settled=settled)

    def _nonsense(self, seq: int, what: str) -> EvidenceError:
        return EvidenceError(
            f"{self._journal.path}: row {seq} of the privacy ledger does not verify: {what}",
            hint="release nothing; restore a copy whose head is in the evidence log",
        )
