"""A shelf's count of questions, in one file that outlives processes, runs and studies.

The count is next to the index file, because a shelf tells the same whichever run asks: some d
questions tell all its embeddings. Askers count by name.

Adversary: an asker that begins another run, or another study, on the same shelf, or replaces or
copies a run's directory, to begin at 0 again. Also an asker that has the silo killed in the middle
of an answer, or asks two processes of it at once, to be answered more often. A question is on disk
before it is answered, in one transaction with the look at the limit. A crash after that counts as
an answer.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from securefedcollm.errors import BudgetExceeded, EvidenceError, StateError
from securefedcollm.evidence.entries import Counted
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.privacy.journal import durable_database

SUFFIX: Final = ".questions.sqlite"
DAMAGE: Final = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises over a damaged file. The second: its own message quotes bytes of the file."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS questions
  (asker TEXT NOT NULL, number BLOB NOT NULL, PRIMARY KEY (asker, number)) STRICT;
CREATE TRIGGER IF NOT EXISTS questions_keep BEFORE UPDATE ON questions
  BEGIN SELECT RAISE(ABORT, 'a question stays counted'); END;
CREATE TRIGGER IF NOT EXISTS questions_hold BEFORE DELETE ON questions
  BEGIN SELECT RAISE(ABORT, 'a question stays counted'); END;
"""


def beside(index: Path) -> Path:
    """Where the count of this index file is. Links to the file share it."""
    real = index.resolve()
    return real.with_name(real.name + SUFFIX)


class StoredQuota:
    """At most ``most`` questions of each asker.

    Args:
        path: the SQLite file (WAL, ``synchronous=FULL``, mode 0600); created if absent. Several
            processes may share it.
        most: questions of one asker that are answered, with all that the file already counts.

    Raises:
        StateError: the file cannot be used.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most = path, most
        try:
            self._db = durable_database(path, _SCHEMA)
        except (OSError, *DAMAGE) as error:
            raise self._unusable(error) from None

    def spent(self, asker: str) -> int:
        """Questions of ``asker`` that were counted."""
        try:
            (found,) = self._db.execute(
                "SELECT count(*) FROM questions WHERE asker = ?", (asker,)
            ).fetchone()
        except DAMAGE as error:
            raise self._unusable(error) from None
        return int(found)

    def take(self, asker: str, number: bytes) -> int | None:
        """Count question ``number`` (16 bytes), durably, before this returns.

        Returns:
            how many questions of ``asker`` are counted now; None if this one was before.

        Raises:
            BudgetExceeded: this asker has no question left. Nothing was counted.
            StateError: the file cannot be written.
        """
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                known = self._db.execute(
                    "SELECT 1 FROM questions WHERE asker = ? AND number = ?", (asker, number)
                ).fetchone()
                if known:
                    return None
                spent = self.spent(asker)
                if spent >= self._most:
                    raise BudgetExceeded(
                        f"{asker} has asked all of its {self._most} questions",
                        hint="the study sets the limit, retrieval.questions; all runs and studies "
                        "that ask this shelf count together",
                    )
                self._db.execute("INSERT INTO questions VALUES (?, ?)", (asker, number))
        except DAMAGE as error:
            raise self._unusable(error) from None
        return spent + 1

    def check(self, log: EvidenceLog) -> None:
        """Refuse a file that knows of fewer questions than this silo's own evidence.

        Adversary: whoever puts an older copy back, removes the file, or goes on with a copy of the
        index elsewhere.

        Raises:
            EvidenceError: it does.
        """
        logged: dict[str, int] = {}
        for entry in log.entries:
            if isinstance(entry.what, Counted):
                logged[entry.what.asker] = max(entry.what.number, logged.get(entry.what.asker, 0))
        for asker, number in logged.items():
            if (here := self.spent(asker)) < number:
                raise EvidenceError(
                    f"{self._path}: counts {here} questions of {asker}, and the evidence log "
                    f"{number}",
                    hint="put the newest copy back; the count lies beside the index file, and goes "
                    "where that goes",
                )

    def close(self) -> None:
        self._db.close()

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            f"{self._path}: the count of questions cannot be used ({error})",
            hint="check path, permissions and free space; without it no question is answered",
        )
