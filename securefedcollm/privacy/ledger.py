"""The budget ledger: the spending of a silo's records, across rounds, runs, files and studies.

Life of an entry, one journal row per arrow::

    reserve ──▶ reserved ──release──▶ released ──settle──▶ settled
                   └──────void──────▶ void

* ``reserve`` charges the worst case before any work, and refuses a release that would exceed the
  budget. It runs on the silo's own machine, so no server can talk a silo past it.
* ``release`` is durable *before* the first byte leaves. A crash in between counts as spent.
* ``settle`` replaces the worst case by what really happened, which can only be less.
* ``void`` gives a reservation back; possible only while nothing has been released.

A crash before ``release`` leaves the entry ``reserved``: reserving the same (data set, unit, run,
round, attempt) with the same events returns it, counted once. After ``release`` the same attempt
can never be reserved again: a retry is a new attempt and costs again.

The budget belongs to the *records*, and there is one for all of an owner's: (ε, δ), pinned by
:meth:`Ledger.pin` or by the first reservation. A charge is about a set of records, by identities
that only this silo can compute (:mod:`.identities`); what a record has spent is all charges whose
set has it (:mod:`.accounts`). So neither another study, ε, δ, unit, task, label or order, nor one
record more in the file, opens a fresh account.

Charges are added with a privacy filter (:mod:`.filters`), which stays valid if the next study is
chosen after seeing the results of the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from securefedcollm.errors import BudgetExceeded, ConfigError, LocalProtocolError
from securefedcollm.privacy.accounts import Bools, Overlaps
from securefedcollm.privacy.admission import Asked, Decision, decide
from securefedcollm.privacy.aside import apart, part_key
from securefedcollm.privacy.book import Book, SpentSummary
from securefedcollm.privacy.charges import Budget, Entry, Key
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    Event,
    Events,
    encode_events,
    merge,
)
from securefedcollm.privacy.identities import (
    Content,
    Records,
    identify,
    record_key,
)
from securefedcollm.privacy.journal import Head, Row
from securefedcollm.privacy.replay import FILE, NEXT, NOTE, PIN

__all__ = ["Budget", "Entry", "Key", "Ledger", "Reservation", "SpentSummary"]


_ROOM: Final = 4 << 20
"""Bytes of rows, and of what SQLite writes twice."""


class Reservation(msgspec.Struct, frozen=True):
    """A granted place in the ledger; the argument of release, settle and void."""

    key: Key
    events: Events
    row: int
    """Number of the journal row that granted it."""


class Ledger(Book):
    """A participant's privacy ledger: it charges, releases and refuses."""

    _overlaps: Overlaps | None = None

    def pin(self, epsilon: float, delta: float, *, higher: bool = False) -> None:
        """Fix the budget of every record of this owner, in all studies together.

        Args:
            higher: the owner knows that ε rises after something was charged. The filter's promise
                is then the higher ε, if nobody chose it by what was released.

        Raises:
            ConfigError: impossible; or something was charged, and δ is another or ε is higher.
        """
        budget = Budget(epsilon, delta)
        with self._journal.writing():
            self._catch_up()
            before = self._state.pinned
            if before is not None and self._state.entries:
                _check_change(before, budget, higher)
            if budget != before:
                self._journal.append({"action": PIN, "budget": msgspec.to_builtins(budget)})
        self._catch_up()

    def identify(
        self,
        contents: Iterable[Content | tuple[bytes, str | None]],
        *,
        column: str | None = None,
        also: Sequence[str] = (),
    ) -> Records:
        """The records of a file, under this ledger's own key (made on first use).

        Args:
            contents: of every record, in file order.
            column: which says whose record it is, where the unit is the subject.
            also: fingerprints by which an older ledger may know the file.

        Raises:
            StateError: the key is lost, or another's.
        """
        self._catch_up()
        key = record_key(self._journal.path, self._state.made_with)
        return identify(key, contents, column=column or "", also=also)

    def part_key(self, study: bytes) -> bytes:
        """The key by which a study's validation sets records aside (:mod:`.aside`), 32 bytes.

        Raises:
            StateError: the key of the records' identities is lost, or another's.
        """
        self._catch_up()
        return part_key(record_key(self._journal.path, self._state.made_with), study)

    def recognise(self, records: Records, fingerprints: Sequence[str]) -> None:
        """Remember the records of this file, if charges name the file but not its records.

        Those are of an older ledger. From now on they count for these records, in whatever file.

        Args:
            fingerprints: of the file.
        """
        with self._journal.writing():
            self._catch_up()
            nameless = {e.key.dataset for e in self.entries() if not e.about.records}
            new = [
                fingerprint
                for fingerprint in fingerprints
                if fingerprint in nameless
                and records.digest not in self._state.files.get(fingerprint, ())
            ]
            if new:
                self._journal.keep(records.digest, records.blob)
                about = {"records": records.digest, "made_with": records.key}
                self._journal.append({"action": FILE, "fingerprints": new, **about})
        self._catch_up()

    def require_room(self, records: int) -> None:
        """Check that the disk has room for one more charge of some of so many records.

        Adversary: an asker to whom a full disk would tell which records are charged.

        Raises:
            StateError: it has not.
        """
        self._journal.require_room(_ROOM + 8 * records)

    def note(self, of: str, head: Head) -> None:
        """Write one row: where another ledger, ``of``, is when a process begins to write to it."""
        with self._journal.writing():
            self._catch_up()
            about = {"of": of, "rows": head.rows, "head": head.digest.hex()}
            self._journal.append({"action": NOTE, **about})
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
        *,
        records: Records | None = None,
        study: str = "",
        limit: Budget | None = None,
        individually: bool = False,
    ) -> Reservation:
        """Charge the worst case of a coming release, or refuse the release.

        Args:
            round: number of the secure sum that the release enters, from 0. A round has several
                where it has joint steps or a validation.
            events: what will be released at worst (shares = threshold, steps = planned).
            budget: the study's (ε, δ), within which all releases of the study stay. No more than
                the pinned one; where none is, it becomes that.
            records: those that the release is about; None charges all records of the file with this
                fingerprint.
            study: digest (hex) of the study; without one a run is a study of its own.
            limit: the operator's limit, less than the pinned budget; it is pinned if no budget is.
            individually: the study's budget bounds the study's charges of every record by itself,
                and not all of its charges together.

        Returns:
            The reservation; the existing one if this attempt is still ``reserved`` with the same
            events (nothing had left the silo).

        Raises:
            BudgetExceeded: the release does not fit. Nothing was written.
            LocalProtocolError: this attempt was already released, or reserved with other events.
        """
        key, merged = Key(dataset, unit, run, round, attempt), merge(events)
        if not merged:
            raise LocalProtocolError("a reservation names at least one event")
        asked = Asked(
            *(dataset, unit, run, merged, Budget(*budget), limit, records, study),
            individually=individually,
        )
        self._prepare(asked)
        with self._journal.writing():
            self._catch_up()
            known = self._state.entries.get(key)
            if known is not None:
                return _again(known, self._set_in(known), asked)
            decision = self._decide(asked)
            if decision.fits:
                row = self._write("reserve", key, **self._content(asked, decision))
        if not decision.fits:  # explained outside the lock: what would fit takes a second
            message, hint = decision.refusal()
            raise BudgetExceeded(f"{_sum(round)} of {unit} data: {message}", hint=hint)
        self._granted(asked)
        return Reservation(key, merged, row.seq)

    def foresee(
        self,
        dataset: str,
        unit: str,
        events: Sequence[Event],
        rounds: int,
        budget: tuple[float, float],
        what: str = "rounds",
        *,
        records: Records | None = None,
        study: str = "",
        limit: Budget | None = None,
        may_skip: bool = True,
    ) -> None:
        """Refuse a run if not every round would fit, before anything is spent on it.

        Charges nothing: :meth:`reserve` decides about every round again.

        Args:
            events: what one round will release at worst.
            rounds: rounds that are still to come.
            what: the operator's word for them.
            may_skip: the study can do without the records that cannot pay.

        Raises:
            BudgetExceeded: says how much is left and what would fit.
        """
        claim, merged = Budget(*budget), merge(events)
        self._catch_up()
        asked = Asked(dataset, unit, "", merged, claim, limit, records, study, rounds, may_skip)
        decision = self._decide(asked)
        if not decision.fits:
            message, hint = decision.refusal(what)
            raise BudgetExceeded(f"{unit} data: {message}", hint=hint)

    def payers(
        self,
        dataset: str,
        unit: str,
        events: Sequence[Event],
        rounds: int,
        budget: tuple[float, float],
        *,
        records: Records,
        study: str,
        limit: Budget | None = None,
        individually: bool = False,
    ) -> Bools:
        """Which records, bool [n] in file order, can pay for a whole run; as :meth:`foresee`.

        Records of one subject pay together or not at all.

        Raises:
            BudgetExceeded: the study asks for more than the pinned budget.
        """
        claim, merged = Budget(*budget), merge(events)
        self._catch_up()
        asked = Asked(
            *(dataset, unit, "", merged, claim, limit, records, study, rounds),
            individually=individually,
        )
        decision = self._decide(asked)
        if decision.too_much:
            message, hint = decision.refusal()
            raise BudgetExceeded(f"{unit} data: {message}", hint=hint)
        return records.rows_of(decision.paying)

    def release(self, reservation: Reservation) -> None:
        """Record, durably, that bytes are about to leave. Call it before they do.

        Raises:
            LocalProtocolError: the reservation was released, settled or voided before.
        """
        self._step("release", reservation)
        self._journal.checkpoint()

    def settle(self, reservation: Reservation, actual: Sequence[Event]) -> None:
        """Replace the worst case by the actual releases.

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
        """Give back a reservation from which nothing was released.

        Raises:
            LocalProtocolError: it was released.
        """
        self._step("void", reservation)

    # --- internals ------------------------------------------------------------------------------

    def _granted(self, asked: Asked) -> None:
        """Else the release would do it, whose time shows. Where a reader of the file prevents it
        for now, the release makes up for it: of as many bytes, whatever the charge is about."""
        self._catch_up()
        if asked.individually:
            self._journal.checkpoint()

    def _prepare(self, asked: Asked) -> None:
        """Imports, and reads the sets of records that a new file meets: outside the lock."""
        if self._overlaps is None or not self._overlaps.about(asked.records, asked.fingerprints):
            self._catch_up()
            self._decide(asked).fits  # noqa: B018 - for what it loads

    def _decide(self, asked: Asked) -> Decision:
        entries, records, chosen = list(self._state.entries.values()), asked.records, None
        alone = asked.individually and {asked.unit, *(e.unit.name for e in entries)} == {"record"}
        if alone and records is not None and records.part is not None:
            records, chosen = records.part  # whose sets are known already
        if self._overlaps is None or not self._overlaps.about(records, asked.fingerprints):
            self._overlaps = Overlaps(records, asked.fingerprints, self.stored, self._state.files)
        counted = [entry for entry in entries if not _of_the_other_part(entry, asked)]
        if alone:
            # Adversary: an asker whose questions come to nothing, so that later ones take longer.
            paid = [entry for entry in counted if entry.counted]
            patterns = self._overlaps.alike(paid, chosen)
        else:
            patterns = self._overlaps.patterns(counted)
        return decide(asked, patterns, entries, self._state.pinned)

    def _content(self, asked: Asked, decision: Decision) -> dict[str, Any]:
        """Of the row that grants a reservation. The set of records is kept with its first row.

        A row of answers has one length, whatever was retrieved.
        """
        content = {
            "events": encode_events(asked.events),
            "budget": msgspec.to_builtins(decision.pinned),
            "claim": msgspec.to_builtins(asked.claim),
        }
        if asked.study:
            content["study"] = asked.study
        if asked.individually:
            content["individually"] = True
        records = asked.records
        if records is not None:
            marked = asked.individually and records.may_be_marked
            content |= {
                "records": self._keep_marked(records) if marked else self._keep(records),
                "also": list(records.also),
                "made_with": records.key,
            }
            content |= {"column": records.column, "most": records.most}
            content |= {} if marked else {"rows": len(records)}
        return content

    def _set_in(self, entry: Entry) -> str:
        """Digest of the records that were charged, however they are kept."""
        name = entry.about.records
        return self.stored(name).digest if name and self.stored(name).marks is not None else name

    def _keep(self, records: Records) -> str:
        self._journal.keep(records.digest, records.blob)
        return records.digest

    def _keep_marked(self, records: Records) -> str:
        """The same bytes are written whatever the set is, and whether or not it was charged before.
        Adversary: an asker that times whether a question retrieves the very set of another."""
        assert records.part is not None
        self._keep(records.part[0])
        digest, content = records.marked()
        self._journal.keep(digest, lambda: content)
        return digest

    def _step(self, action: str, reservation: Reservation, **content: Any) -> None:
        with self._journal.writing():
            self._catch_up()
            entry = self._state.entries.get(reservation.key)
            wanted = NEXT[action][0]
            if entry is None or entry.row != reservation.row or entry.state != wanted:
                state = "unknown" if entry is None else entry.state
                raise LocalProtocolError(
                    f"cannot {action} a reservation that is {state}; it must be {wanted}"
                )
            self._write(action, reservation.key, **content)
        self._catch_up()

    def _write(self, action: str, key: Key, **content: Any) -> Row:
        return self._journal.append({"action": action, **key._asdict(), **content})


def _of_the_other_part(entry: Entry, asked: Asked) -> bool:
    """Whether a charge is to units of the study that this release is not about.

    A study that sets units aside charges either part by itself. Units of both may share an
    identity: two subjects a record with the same words, two records the texts of a row in other
    columns. In different studies they would be taken for one. Within a study the part follows from
    a record's words, or the subject's name, alone, and one study reads one way: so they are two.
    """
    return entry.key.unit == asked.unit and apart(entry.about.study, asked.study)


def _again(known: Entry, known_as: str, asked: Asked) -> Reservation:
    digests = {"", *(asked.records.digests if asked.records is not None else ())}
    same = known.reserved == asked.events and known_as in digests
    if known.state == "reserved" and same:
        return Reservation(known.key, known.reserved, known.row)
    other = "records" if known.reserved == asked.events else "events"
    state = f"reserved with other {other}" if known.state == "reserved" else known.state
    raise LocalProtocolError(
        f"attempt {known.key.attempt + 1} of {_sum(known.key.round)} is already {state}",
        hint="a retry is a new attempt, and is charged as one",
    )


def _sum(number: int) -> str:
    """What an operator calls the release of this number, from 0.

    A ledger does not know whether it is a round's, one step of a round, or a validation.
    """
    return f"sum {number + 1}"


def _check_change(before: Budget, budget: Budget, higher: bool) -> None:
    """A pin under which something was charged keeps its δ, and its ε unless the owner insists."""
    if budget.delta != before.delta:
        raise ConfigError(
            f"charges were made at δ = {before.delta:g}, which stays",
            where="delta",
            hint=f"keep δ = {before.delta:g}",
        )
    if budget.epsilon > before.epsilon and not higher:
        raise ConfigError(
            f"ε = {before.epsilon:g} is pinned, and records were charged under it",
            where="epsilon",
            hint="--raise raises it: those records then have the weaker promise",
        )
