"""A privacy ledger that also writes every step into the evidence log, under the ledger's own head.

Order: the ledger first for ``reserve`` and ``settle`` (an entry that is missing from the log after
a crash leaves the worst case counted there), the log first for ``release`` (nothing leaves that it
does not know of).

Adversary: a silo's operator who wants budget back and restores an old ledger file. Each entry holds
the head that the ledger had, so a ledger that no longer contains it is detected
(:func:`check_anchors`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from securefedcollm.errors import EvidenceError, StateError
from securefedcollm.evidence.entries import (
    Entry,
    Opened,
    Released,
    Reserved,
    Settled,
    Spent,
    Voided,
    Voted,
    Voting,
    decode_entry,
)
from securefedcollm.evidence.log import EvidenceLog, blinded
from securefedcollm.evidence.many import UNNAMED
from securefedcollm.privacy.events import Event, encode_events
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.journal import Row
from securefedcollm.privacy.ledger import Budget, Key, Ledger, Reservation

CHARGES = (Reserved, Released, Settled, Voided)
VOTES = (Voting, Voted)
"""Of the ledger by which each record's own answers are counted, which is another file. What the
records paid beforehand is in the silo's own, whose head ``voting`` has besides."""
PREPAID_RUN: Final = 32
"""Length of ``Key.run`` of what a silo's ledger charges for all answers; runs have 64."""


class LoggedLedger(Ledger):
    """A :class:`~securefedcollm.privacy.ledger.Ledger` that writes evidence of every step.

    Args:
        sums: the run may end after so many, or any multiple (``plan.sums_to_an_end``); ``settled``
            then also has the total ε spent.
        stating: how many sums before such an end say so (``plan.stating_sums``).

    Raises:
        EvidenceError: the ledger lacks what the log anchored.
    """

    def __init__(
        self, path: Path | str, owner: str, log: EvidenceLog, *, sums: int, stating: int = 1
    ) -> None:
        super().__init__(path, owner)
        self._log = log
        self._sums, self._stating = sums, stating
        check_anchors(log, self)

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
        """See the base class. The log says the pinned budget, which all studies share."""
        granted = super().reserve(
            *(dataset, unit, run, round, attempt, events, budget),
            records=records,
            study=study,
            limit=limit,
            individually=individually,
        )
        pinned = self._pinned(granted.key)
        self._log.append(
            Reserved(
                **self._about(granted.key),
                events=encode_events(granted.events),
                epsilon=float(pinned.epsilon),
                delta=pinned.delta,
            )
        )
        return granted

    def release(self, reservation: Reservation) -> None:
        """See the base class."""
        self._log.append(Released(**self._about(reservation.key)))
        super().release(reservation)

    def settle(self, reservation: Reservation, actual: Sequence[Event]) -> None:
        """See the base class."""
        super().settle(reservation, actual)
        self._log.append(
            Settled(
                **self._about(reservation.key),
                events=encode_events(actual),
                spent=self._spent(reservation),
            )
        )

    def void(self, reservation: Reservation) -> None:
        """See the base class."""
        super().void(reservation)
        self._log.append(Voided(**self._about(reservation.key)))

    def _spent(self, reservation: Reservation) -> Spent | None:
        key = reservation.key
        if -(key.round + 1) % self._sums >= self._stating:
            return None
        claim = self.most_spent(next(entry for entry in self.entries() if entry.key == key))
        return Spent(float(claim.epsilon), claim.delta, claim.accountant)

    def _pinned(self, key: Key) -> Budget:
        """The budget under which an entry was reserved."""
        return next(entry.budget for entry in self.entries() if entry.key == key)

    def _about(self, key: Key) -> dict[str, Any]:
        account = self._log.blinded(f"account\0{key.dataset}\0{key.unit}".encode())
        return {
            "account": account.hex()[:32],
            "unit": key.unit,
            "round": key.round,
            "training": key.attempt,
            "ledger": anchor(self._log, self.head.digest).hex(),
        }


def anchor(log: EvidenceLog | Anchors, head: bytes) -> bytes:
    """The log's entry in place of a ledger's head."""
    return log.blinded(b"ledger\0" + head)


class Anchors(NamedTuple):
    """The anchors of a ledger in an evidence log, read from its file without the owner's key."""

    path: Path
    blind: bytes
    charges: list[Entry]
    """Oldest first."""
    answered: bool = False
    """Whether records have answered questions, so that the ledger has charged them for that."""
    study: bytes = b""
    """Digest of the log's study, 32 bytes."""

    def blinded(self, content: bytes) -> bytes:
        """The same as the log's own method."""
        return blinded(self.blind, content)

    def missing(self, rows: Sequence[Row]) -> Entry | None:
        """The first charge whose head is not in a ledger of these ``rows``; None if all are."""
        return _missing(self, self.charges, rows)


def read_anchors(path: Path) -> Anchors:
    """The anchors in the evidence log at ``path``; its signatures are not checked.

    Raises:
        StateError, EvidenceError: it cannot be read.
    """
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60.0)
        try:
            own = db.execute("SELECT value FROM own WHERE name = 'blind'").fetchone()
            bodies = db.execute("SELECT body FROM entries ORDER BY seq").fetchall()
        finally:
            db.close()
    except sqlite3.Error as error:
        raise StateError(
            f"{path}: the evidence log cannot be read ({error})",
            hint="restore it; without it an older privacy ledger would not be noticed",
        ) from None
    entries = [
        decode_entry(bytes(body), f"{path}: entry {i}", UNNAMED) for i, (body,) in enumerate(bodies)
    ]
    answered = any(isinstance(entry.what, VOTES) for entry in entries)
    first = entries[0].what if entries else None
    study = bytes.fromhex(first.study) if isinstance(first, Opened) else b""
    return Anchors(path, bytes(own[0]) if own else b"", list(_charges(entries)), answered, study)


def check_anchors(log: EvidenceLog, ledger: Ledger, kinds: tuple[type, ...] = CHARGES) -> int:
    """Check that the ledger still contains every head that the log anchored; returns how many.

    This takes both files, because the anchors are blinded.

    Args:
        kinds: of the entries that anchor this ledger: :data:`CHARGES`, or :data:`VOTES`.

    Raises:
        EvidenceError: naming the entry whose head is gone.
    """
    charges = list(_charges(log.entries, kinds))
    entry = _missing(log, charges, ledger.rows(), kinds)
    if entry is not None:
        raise EvidenceError(
            f"{ledger.owner}: the privacy ledger does not contain what {entry.place} anchored",
            hint="it was cut back, rewritten or replaced; restore the newest copy",
        )
    return len(charges)


def _charges(entries: Iterable[Entry], kinds: tuple[type, ...] = CHARGES) -> Iterator[Entry]:
    return (entry for entry in entries if _head(entry, kinds))


def _missing(
    log: EvidenceLog | Anchors,
    charges: Iterable[Entry],
    rows: Sequence[Row],
    kinds: tuple[type, ...] = CHARGES,
) -> Entry | None:
    heads = {anchor(log, row.digest).hex(): row.seq for row in rows}
    last = 0
    for entry in charges:
        row = heads.get(_head(entry, kinds), 0)
        if not row or (row < last and isinstance(entry.what, kinds)):
            return entry
        last = max(last, row)  # a `voting` has the head that the ledger had when its process began
    return None


def _head(entry: Entry, kinds: tuple[type, ...]) -> str:
    """The head that an entry has of the ledger that these kinds anchor; empty if it has none."""
    what = entry.what
    if isinstance(what, kinds):
        assert isinstance(what, CHARGES + VOTES)
        return what.ledger
    return what.prepaid or "" if isinstance(what, Voting) else ""
