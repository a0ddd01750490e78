"""A participant's evidence log: append-only, in one SQLite file, under a signed Merkle head.

An entry is on disk, together with a head over it signed by the owner, before :meth:`~.append`
returns; the caller acts after that. So everything that has taken effect is in the log. A crash can
only leave an entry for something that did not happen.

Adversary: somebody with the file but not the owner's key; and later, the owner. The first cannot
change anything under the newest head. The second can write another log, but not one that agrees
with the heads that others have cosigned, or with what their logs say.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import structs

from securefedcollm.aggregation.header import Roster
from securefedcollm.errors import CryptoError, EvidenceError, StateError
from securefedcollm.evidence.entries import Entry, Opening, What, decode_entry, encode_entry
from securefedcollm.evidence.many import ROOT_DIGITS, Many, agreements_of, are_many
from securefedcollm.evidence.merkle import Frontier
from securefedcollm.evidence.note import Checkpoint, origin, parse_checkpoint, sign_checkpoint
from securefedcollm.primitives import KEY_BYTES, SigningKey, sha256
from securefedcollm.privacy.journal import durable_database

FILE_NAME: Final = "evidence.sqlite"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS heads (size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS own (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS entries_keep BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entries_hold BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""
_KEPT: Final = """
CREATE TABLE IF NOT EXISTS kept (root TEXT PRIMARY KEY, signatures BLOB NOT NULL) STRICT;
"""


def blinded(blind: bytes, content: bytes) -> bytes:
    """See :meth:`EvidenceLog.blinded`."""
    return sha256(b"securefedcollm/evidence/blind/v1\0", blind, content)


class EvidenceLog:
    """One participant's log in one study. Not thread-safe; several processes may share the file.

    Args:
        path: the SQLite file (WAL, ``synchronous=FULL``, mode 0600); created if absent.
        study: the study's digest, 32 bytes.
        owner: the participant's name.
        key: its identity; None to read only.
        now: the clock that stamps entries, seconds since the epoch.
        on_entry: called with every entry that is appended here, once it is durable.
        silos: of the study; needed where they are more than 128, for the log's spelling
            (:mod:`~.many`).

    Raises:
        StateError: the file cannot be used.
        EvidenceError: its content is not what its owner signed, naming the entry.
    """

    def __init__(
        self,
        path: Path,
        *,
        study: bytes,
        owner: str,
        key: SigningKey | None,
        now: Callable[[], float] = time.time,
        on_entry: Callable[[Entry], None] | None = None,
        silos: Roster | None = None,
    ) -> None:
        self.path = path
        self.owner = owner
        self.study = study
        self.origin = origin(study, owner)
        self._key = key
        self._now = now
        self._on_entry = on_entry
        self._many = Many(silos, {}) if silos and are_many(len(silos)) else None
        self._parsed: tuple[str, Checkpoint] | None = None
        self._tree = Frontier()
        self.leaves: list[bytes] = []
        self.entries: list[Entry] = []
        try:
            self._db = durable_database(path, _SCHEMA + (_KEPT if self._many else ""))
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO own VALUES ('blind', ?)", (os.urandom(KEY_BYTES),))
            (self.blind,) = db.execute("SELECT value FROM own WHERE name = 'blind'").fetchone()
            self._catch_up()
            self._check_head()

    def append(self, what: What) -> Entry:
        """Write one entry and a signed head over it, durably.

        Raises:
            StateError: the file cannot be written; the caller must not act.
        """
        if self._key is None:
            raise StateError(f"{self.path}: opened for reading", hint="give the owner's identity")
        with self._writing() as db:
            self._catch_up()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now()))
            entry = Entry(self.size, stamp, self.owner, what)
            raw = encode_entry(entry, self._many)
            if self._many is not None and isinstance(what, Opening):
                root = agreements_of(raw)[:ROOT_DIGITS]
                db.execute("INSERT OR IGNORE INTO kept VALUES (?, ?)", (root, self.kept[root]))
            db.execute("INSERT INTO entries VALUES (?, ?)", (entry.seq, raw))
            tip = self._tree.size
            self._take(raw, entry)
            head = sign_checkpoint(self.origin, self._key, self.size, self._tree.root)
            # Heads that nobody else has signed are superseded by the next.
            db.execute("DELETE FROM heads WHERE size = ? AND note NOT LIKE '%\n— %\n— %'", (tip,))
            db.execute("INSERT INTO heads VALUES (?, ?)", (head.size, head.note))
        if self._on_entry is not None:
            self._on_entry(entry)
        return entry

    @property
    def size(self) -> int:
        """Entries so far."""
        return len(self.leaves)

    @property
    def kept(self) -> dict[str, bytes]:
        """Signatures that entries name by their root, hex (:mod:`~.many`); root → signatures."""
        return {} if self._many is None or self._many.kept is None else self._many.kept

    @property
    def head(self) -> Checkpoint:
        """The newest head, with the cosignatures collected for it.

        Raises:
            EvidenceError: the log is empty.
        """
        try:
            row = self._db.execute("SELECT note FROM heads ORDER BY size DESC LIMIT 1").fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if row is None:
            raise EvidenceError(f"{self.path}: the evidence log is empty")
        if self._parsed is None or self._parsed[0] != row[0]:
            self._parsed = row[0], parse_checkpoint(row[0])
        return self._parsed[1]

    def heads(self) -> list[Checkpoint]:
        """The newest head and every earlier one that somebody cosigned, by size."""
        try:
            rows = self._db.execute("SELECT note FROM heads ORDER BY size").fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return [parse_checkpoint(note) for (note,) in rows]

    def add_cosignatures(self, size: int, lines: Mapping[str, bytes]) -> None:
        """Keep witnesses' signatures (already verified) under the head of ``size`` entries.

        Args:
            lines: key name → signature line's bytes.
        """
        with self._writing() as db:
            row = db.execute("SELECT note FROM heads WHERE size = ?", (size,)).fetchone()
            if row is None:
                return
            head = parse_checkpoint(row[0])
            there = {signer for signer, _ in head.lines}
            # One may be there: asked again by a server that died before it was done.
            new = tuple(line for line in lines.items() if line[0] not in there)
            head = structs.replace(head, lines=head.lines + new)
            db.execute("UPDATE heads SET note = ? WHERE size = ?", (head.note, size))

    def blinded(self, content: bytes) -> bytes:
        """A 32-byte commitment that only the holder of this file can check.

        Adversary: a reader of the log who guesses private content and compares.
        """
        return blinded(self.blind, content)

    def close(self) -> None:
        self._db.close()

    def _take(self, raw: bytes, entry: Entry) -> None:
        self._tree.append(raw)
        self.leaves.append(raw)
        self.entries.append(entry)

    def _catch_up(self) -> None:
        found = self._db.execute(
            "SELECT seq, body FROM entries WHERE seq >= ? ORDER BY seq", (self.size,)
        ).fetchall()
        if found and self._many is not None:
            self.kept.update(self._db.execute("SELECT root, signatures FROM kept").fetchall())
        for seq, body in found:
            entry = decode_entry(bytes(body), f"{self.path}: entry {self.size}", self._many)
            if (seq, entry.seq, entry.owner) != (self.size, self.size, self.owner):
                raise EvidenceError(
                    f"{self.path}: entry {self.size} is missing or of another log",
                    hint="do nothing more in this run; restore the file",
                )
            self._take(bytes(body), entry)

    def _check_head(self) -> None:
        if not self.size:
            return
        head = self.head
        if head.origin != self.origin or (head.size, head.root) != (self.size, self._tree.root):
            raise EvidenceError(
                f"{self.path}: the entries are not those that {self.owner} signed for this study",
                hint="one log serves one study; restore the file, or use another directory",
            )
        if self._key is not None:
            try:
                head.verify(self._key.public)
            except CryptoError:
                raise EvidenceError(
                    f"{self.path}: the log was begun with another identity of {self.owner}",
                    hint="continue with the identity that began the run",
                ) from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            f"{self.path}: the evidence log cannot be used ({error})",
            hint="check path, permissions and free space; without a log this participant does "
            "nothing",
        )
