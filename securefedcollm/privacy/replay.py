"""The state that follows from the rows of a ledger's journal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.privacy.charges import About, Budget, Entry, Key, State
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import decode_events
from securefedcollm.privacy.journal import Head, Row

NEXT: Final[dict[str, tuple[str | None, State]]] = {
    "reserve": (None, "reserved"),
    "release": ("reserved", "released"),
    "settle": ("released", "settled"),
    "void": ("reserved", "void"),
}
"""By action: the state before and after."""

PIN: Final = "pin"
"""The owner fixed the budget."""

FILE: Final = "file"
"""The records of a file became known that older charges name only by its fingerprint."""

NOTE: Final = "note"
"""A process began, and noted the head of another ledger."""


class Replay:
    """The state of a ledger after the rows that were applied.

    Args:
        path: of the ledger, for messages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[Key, Entry] = {}
        self.pinned: Budget | None = None
        self.files: dict[str, set[str]] = {}
        """Sets of records by the fingerprint of the file that has them."""
        self.noted: dict[str, Head] = {}
        """Heads of other ledgers, by name, when a process last began to write to them."""
        self.made_with = ""
        """Which key made their identities."""

    def apply(self, row: Row) -> None:
        """Apply the next row.

        Raises:
            EvidenceError: it makes no sense after those before.
        """
        try:
            match row.body["action"]:
                case "pin":
                    self.pinned = msgspec.convert(row.body["budget"], Budget)
                case "file":
                    named = msgspec.convert(row.body["fingerprints"], list[str])
                    self._know(msgspec.convert(row.body, About), named)
                case "note":
                    head = bytes.fromhex(msgspec.convert(row.body["head"], str))
                    rows = msgspec.convert(row.body["rows"], int)
                    self.noted[msgspec.convert(row.body["of"], str)] = Head(rows, head)
                case "reserve":
                    self._reserve(row)
                case _:
                    self._step(row)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise self.nonsense(row.seq, "its content is not a ledger entry") from error

    def _reserve(self, row: Row) -> None:
        body, key = row.body, _key(row)
        events = decode_events(body["events"])
        if not events:
            raise self.nonsense(row.seq, "a reserve of nothing")
        if key in self.entries:
            raise self.nonsense(row.seq, "reserve out of order")
        budget, about = msgspec.convert(body["budget"], Budget), msgspec.convert(body, About)
        made = Entry(key, "reserved", events, None, budget, row.seq, body["time"], about)
        self.entries[key] = made
        self._know(about, made.fingerprints)
        self.pinned = self.pinned or budget

    def _step(self, row: Row) -> None:
        action, key = row.body["action"], _key(row)
        before, after = NEXT[action]
        events = decode_events(row.body["events"]) if after == "settled" else None
        known = self.entries.get(key)
        if known is None or known.state != before:
            raise self.nonsense(row.seq, f"{action} out of order")
        if events is not None and not dominates(known.reserved, events):
            raise self.nonsense(row.seq, "it settles more than was reserved")
        self.entries[key] = msgspec.structs.replace(known, state=after, settled=events)

    def _know(self, about: About, fingerprints: Iterable[str]) -> None:
        if about.records:
            self.made_with = about.made_with
            for fingerprint in fingerprints:
                self.files.setdefault(fingerprint, set()).add(about.records)

    def nonsense(self, seq: int, what: str) -> EvidenceError:
        return EvidenceError(
            f"{self._path}: row {seq} of the privacy ledger does not verify: {what}",
            hint="release nothing; restore a copy whose head is in the evidence log",
        )


def _key(row: Row) -> Key:
    return Key(*(row.body[name] for name in Key._fields))
