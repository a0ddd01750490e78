"""The ledger's storage: an append-only, hash-chained journal in one SQLite file.

A row's digest is the SHA-256 of its body, canonical JSON (RFC 8785) that contains the digest of the
row before. To edit, drop or reorder a row, somebody must rewrite every later one. That shows as
soon as any head of the old chain was anchored elsewhere (the evidence log), because a chain that
was rewritten or cut back no longer contains it. Content that is too large for a row is stored in a
second table, under its digest; the row has the digest.

Adversary: somebody with *later* write access to the file, who wants budget back. Without an anchor,
a whole rewrite or a restored old copy of the file cannot be told from the original.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from shutil import disk_usage
from typing import Any, Final, NamedTuple

import rfc8785

from securefedcollm.errors import EvidenceError, StateError
from securefedcollm.primitives import sha256

_GENESIS: Final = b"securefedcollm/ledger/v1\0"
_BUSY_SECONDS: Final = 60.0
_CHECKPOINT_MS: Final = 200
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS journal
  (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS journal_keep BEFORE UPDATE ON journal
  BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER IF NOT EXISTS journal_hold BEFORE DELETE ON journal
  BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS kept_keep BEFORE UPDATE ON kept
  BEGIN SELECT RAISE(ABORT, 'what is kept beside the journal stays'); END;
CREATE TRIGGER IF NOT EXISTS kept_hold BEFORE DELETE ON kept
  BEGIN SELECT RAISE(ABORT, 'what is kept beside the journal stays'); END;
"""


_rehearsed: ContextVar[bool] = ContextVar("rehearsed", default=False)


@contextmanager
def rehearsed() -> Iterator[None]:
    """Databases that are opened within it wait for no disk: their commits outlive the process, not
    a power cut. For simulations of many silos only, whose ledgers are nobody's."""
    token = _rehearsed.set(True)
    try:
        yield
    finally:
        _rehearsed.reset(token)


def durable_database(path: Path, schema: str) -> sqlite3.Connection:
    """An SQLite file in WAL mode whose commits survive a power cut; made with mode 0600.

    Several processes may open, and create, the same file at once.

    Raises:
        OSError, sqlite3.Error: it cannot be opened, or stayed locked for a minute.
    """
    with suppress(FileExistsError):  # never open and close an existing one: that drops its locks
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:  # SQLite's own waiting does not cover the change into WAL
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    try:
        db.execute(f"PRAGMA synchronous = {'NORMAL' if _rehearsed.get() else 'FULL'}")
        db.executescript(schema)
    except UnicodeDecodeError:  # SQLite's message quotes bytes of the damaged file
        raise sqlite3.DatabaseError("it is damaged") from None
    return db


class Head(NamedTuple):
    """Digest of the newest row; anchor it where the ledger's owner cannot quietly change it."""

    rows: int
    digest: bytes


class Row(NamedTuple):
    """One journal row: number from 1, content, digest."""

    seq: int
    body: dict[str, Any]
    digest: bytes


class Journal:
    """Append and read rows. One object per process and thread.

    Args:
        path: the SQLite file; created with mode 0600.
        owner: whose ledger it is; another owner's file is refused.

    Raises:
        StateError: the file cannot be opened or written.
        EvidenceError: the chain does not verify.
    """

    def __init__(self, path: Path, owner: str, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._owner = owner
        self._now = now
        self._head = Head(0, sha256(_GENESIS, owner.encode()))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = durable_database(path, _SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock: everything read inside stays true until the end of the block."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._unusable(error) from error
            raise

    def news(self) -> list[Row]:
        """Rows that this object has not seen yet, checked against the chain.

        Raises:
            EvidenceError: naming the first row that does not verify.
        """
        try:
            if self._head.rows:
                (kept,) = self._db.execute(
                    "SELECT count(*) FROM journal WHERE seq = ? AND digest = ?", self._head
                ).fetchone()
                if not kept:
                    raise self._broken(self._head.rows, "it changed while the ledger was open")
            found = self._db.execute(
                "SELECT seq, body, digest FROM journal WHERE seq > ? ORDER BY seq",
                (self._head.rows,),
            ).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        rows = []
        for seq, body, digest in found:
            row = self._check(seq, body, digest)
            self._head = Head(row.seq, row.digest)
            rows.append(row)
        return rows

    def append(self, content: dict[str, Any]) -> Row:
        """Write one row; inside :meth:`writing`, after :meth:`news`."""
        seq = self._head.rows + 1
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now()))
        body = {
            **content,
            "owner": self._owner,
            "seq": seq,
            "time": stamp,
            "previous": self._head.digest.hex(),
        }
        raw = rfc8785.dumps(body)
        digest = sha256(raw)
        self._db.execute("INSERT INTO journal VALUES (?, ?, ?)", (seq, raw, digest))
        return Row(seq, body, digest)

    def keep(self, name: str, content: Callable[[], bytes]) -> None:
        """Store content under its digest; inside :meth:`writing`, with the row that names it."""
        known = self._db.execute("SELECT 1 FROM kept WHERE name = ?", (name,)).fetchone()
        if known is None:
            self._db.execute("INSERT INTO kept VALUES (?, ?)", (name, content()))

    def kept(self, name: str) -> bytes | None:
        """The content that :meth:`keep` stored; the caller compares it with its digest."""
        try:
            row = self._db.execute("SELECT content FROM kept WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return None if row is None else bytes(row[0])

    def require_room(self, size: int) -> None:
        """Raises: StateError, if the disk has no room for so many bytes more."""
        try:
            free = disk_usage(self.path.parent).free
        except OSError as error:
            raise self._unusable(error) from error
        if free < size:
            raise self._unusable(OSError(f"{free} bytes are free, and {size} are needed"))

    def checkpoint(self) -> None:
        """Move the content of the ``-wal`` file into the main file.

        Adversary: a copy of the main file alone, after a crash. A release would be missing from it.
        A reader at that moment may prevent the move; then the next call makes up for it.
        """
        with suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_MS}")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA busy_timeout = {round(_BUSY_SECONDS * 1000)}")

    @staticmethod
    def owner_of(path: Path) -> str | None:
        """The owner that the file names; None if it has no row. Opening the ledger verifies it.

        Raises:
            StateError: there is no such file, or it is not a ledger.
        """
        if not path.is_file():
            raise StateError(
                f"{path}: there is no such ledger", hint="name the ledger file of a silo"
            )
        try:
            db = sqlite3.connect(path, timeout=_BUSY_SECONDS)
            try:
                row = db.execute("SELECT body FROM journal WHERE seq = 1").fetchone()
            finally:
                db.close()
            owner = json.loads(row[0])["owner"] if row else None
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{path}: this is not a privacy ledger", hint="name the ledger file of a silo"
            ) from error
        return str(owner) if row else None

    def head(self) -> Head:
        return self._head

    def close(self) -> None:
        self._db.close()

    def _check(self, seq: int, raw: object, digest: object) -> Row:
        if seq != self._head.rows + 1:
            raise self._broken(self._head.rows + 1, "it is missing")
        if not isinstance(raw, bytes) or sha256(raw) != digest:
            raise self._broken(seq, "its content does not match its digest")
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise self._broken(seq, "it is not JSON") from error
        if not isinstance(body, dict) or body.get("seq") != seq:
            raise self._broken(seq, "it carries another number")
        if body.get("previous") != self._head.digest.hex():
            what = "it does not follow the row before"
            raise self._broken(seq, what + (" (or the ledger has another owner)" * (seq == 1)))
        assert isinstance(digest, bytes)
        return Row(seq, body, digest)

    def _broken(self, seq: int, what: str) -> EvidenceError:
        return EvidenceError(
            f"{self.path}: row {seq} of the privacy ledger does not verify: {what}",
            hint="release nothing; restore a copy whose head is in the evidence log",
        )

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            f"{self.path}: the privacy ledger cannot be used: {error}",
            hint="check path, permissions and free space; without a ledger nothing is released",
        )
