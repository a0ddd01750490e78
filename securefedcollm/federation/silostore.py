"""A silo's memory across crashes: protocol journal and finished updates. An authority with a key
has such a store too, for its journal.

One SQLite file (WAL, ``synchronous=FULL``, mode 0600) and one file per finished update, on the
silo's own machine. Keys of the aggregation protocol are never among it.
"""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from securefedcollm.aggregation.header import MOST_ATTEMPTS
from securefedcollm.errors import RemoteProtocolError, StateError
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.plan import run_key, run_scope, sum_name
from securefedcollm.privacy.journal import durable_database
from securefedcollm.privacy.quantise import Integers
from securefedcollm.study import Study

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trainings (
  run BLOB NOT NULL, round INTEGER NOT NULL, failed INTEGER NOT NULL, PRIMARY KEY (run, round)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
  run BLOB NOT NULL, round INTEGER NOT NULL, begun INTEGER NOT NULL, PRIMARY KEY (run, round)
) WITHOUT ROWID;
"""


class SiloStore:
    """Durable memory of one participant. Implements the aggregation room's ``Journal``."""

    def __init__(self, directory: Path, file: str = "silo.sqlite") -> None:
        """Open or create the store in ``directory``.

        Raises:
            StateError: the directory cannot be written, or the file is not this store.
        """
        self._directory = make_directory(directory)
        self._together = self._lost = False
        path = directory / file
        try:
            self._db = durable_database(path, _SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StateError(
                f"{path}: the participant's journal cannot be opened ({error})",
                hint="mend what the message names; if the file is lost or damaged sit this study "
                "out, and never restore it from a backup: an old one does not know what was said",
            ) from None

    def record(self, key: bytes, value: bytes) -> bytes:
        """Durable put-if-absent: the stored value, which is ``value`` only for the first writer."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO journal VALUES (?, ?)", (key, value))
            row = db.execute("SELECT value FROM journal WHERE key = ?", (key,)).fetchone()
        return bytes(row[0])

    def recorded(self, key: bytes) -> bytes | None:
        """What :meth:`record` stored under ``key``."""
        with self._reading() as db:
            row = db.execute("SELECT value FROM journal WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def enter_round(self, run: bytes, round_: int) -> bool:
        """Note that ``round_`` has begun; False if a later round of this run has begun before."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO trainings VALUES (?, ?, 0)", (run, round_))
            row = db.execute("SELECT MAX(round) FROM trainings WHERE run = ?", (run,)).fetchone()
        return int(row[0]) == round_

    def begin_attempt(self, run: bytes, round_: int) -> bool:
        """Count one more attempt at this round; False, and nothing is written, if it has had
        :data:`MOST_ATTEMPTS`."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO attempts VALUES (?, ?, 0)", (run, round_))
            done = db.execute(
                "UPDATE attempts SET begun = begun + 1 WHERE run = ? AND round = ? AND begun < ?",
                (run, round_, MOST_ATTEMPTS),
            )
        return done.rowcount == 1

    def attempts(self, run: bytes, round_: int) -> int | None:
        """How many attempts at this round have begun; None if none was counted."""
        with self._reading() as db:
            row = db.execute(
                "SELECT begun FROM attempts WHERE run = ? AND round = ?", (run, round_)
            ).fetchone()
        return None if row is None else int(row[0])

    def last_round(self, run: bytes) -> int | None:
        """The last round of this run that has begun; None if none has."""
        with self._reading() as db:
            row = db.execute("SELECT MAX(round) FROM trainings WHERE run = ?", (run,)).fetchone()
        return None if row[0] is None else int(row[0])

    def failed_trainings(self, run: bytes, round_: int) -> int:
        """How many trainings of this round were charged and gave no update."""
        with self._reading() as db:
            row = db.execute(
                "SELECT failed FROM trainings WHERE run = ? AND round = ?", (run, round_)
            ).fetchone()
        return int(row[0])

    def count_failed_training(self, run: bytes, round_: int) -> int:
        """Count one more; returns the new number."""
        with self._writing() as db:
            db.execute(
                "UPDATE trainings SET failed = failed + 1 WHERE run = ? AND round = ?",
                (run, round_),
            )
        return self.failed_trainings(run, round_)

    @contextmanager
    def together(self) -> Iterator[None]:
        """One durable write for all that the block records, at its end, whatever ends the block.

        Until then nothing that rests on a record may leave this process or reach another file.
        From the first record on, another process that has the store open waits to write.

        Raises:
            StateError: a record could not be written, even if its own error was dealt with.
        """
        self._together = True
        try:
            yield
        finally:
            self._together = False
            lost, self._lost = self._lost, False
            try:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._undo()
                raise self._unwritable(error) from None
            if lost:
                raise self._unwritable("an earlier record was lost")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            if not self._together:
                self._db.execute("COMMIT")
        except BaseException as error:
            self._lost = self._together
            self._undo()
            if isinstance(error, sqlite3.Error):
                raise self._unwritable(error) from None
            raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._db
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    def _undo(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _unwritable(self, why: object) -> StateError:
        return StateError(
            f"{self._directory}: the silo's state cannot be written ({why})",
            hint="free some space; nothing was answered",
        )

    def save_update(self, run: bytes, round_: int, training: int, update: Integers) -> None:
        """Keep a finished update, quantised and noised, until the next round's."""
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(update))
        write_durably(self._update(run, round_, training), head.getvalue(), update.data)
        for old in self._directory.glob(f"update-{run.hex()}-*.npy"):
            if int(old.stem.split("-")[2]) < round_:
                old.unlink(missing_ok=True)

    def load_update(self, run: bytes, round_: int, training: int) -> Integers | None:
        """The finished update, or None if this training was never finished."""
        path = self._update(run, round_, training)
        try:
            vector = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            raise StateError(
                f"{path}: a finished update cannot be read ({error})",
                hint="this silo sits the round out; it takes part again in the next",
            ) from None
        if vector.dtype not in (np.int32, np.int64):
            raise StateError(
                f"{path}: not a finished update of this version",
                hint="this silo sits the round out; it takes part again in the next",
            )
        found: Integers = vector
        return found

    def _update(self, run: bytes, round_: int, training: int) -> Path:
        return self._directory / f"update-{run.hex()}-{round_:05d}-{training}.npy"

    def close(self) -> None:
        self._db.close()


def restored(why: str) -> StateError:
    """The journal knows less than something written after it."""
    return StateError(
        f"the journal of this run was lost or restored: {why}, but the journal does not; this "
        "participant sits the study out",
        hint="without it a server could have two sums of one round opened, and subtract them",
    )


class Mark(NamedTuple):
    """How far a run had come when something other than the journal was last written.

    Args:
        keeper: name of what was written, for messages.
        sum: the newest secure sum in it.
        attempts: the least number of them at that sum.
    """

    keeper: str
    sum: int
    attempts: int


class OneRun:
    """The one run of a study that a participant takes part in, and how far it has come. Durable."""

    def __init__(self, store: SiloStore, study: Study) -> None:
        self._store = store
        self._study = study

    def enter(self, run_id: bytes, sum_: int, *marks: Mark) -> bytes:
        """Go on to an attempt at secure sum ``sum_``; returns the run's scope, 32 bytes.

        Args:
            marks: how far the participant had come, by what it keeps beside this journal.

        Raises:
            RemoteProtocolError: of another run, of a sum before the newest, or one too many.
            StateError: the journal is older than a mark.
        """
        # Adversary: a server that starts the study again under another run id, to have the same
        # updates summed over other survivors; the difference would be one silo's own.
        if self._store.record(run_key(self._study), run_id) != run_id:
            raise RemoteProtocolError(
                "asked for a second run of a study that this participant is in",
                peer="server",
                hint="resume the run; for another one agree on a new study, e.g. with another seed "
                "(only the privacy ledger bounds what both together tell)",
            )
        scope = run_scope(self._study, run_id)
        self._check_age(scope, marks)
        # Adversary: a server that burns a silo's budget on rounds whose updates it never sums.
        if not self._store.enter_round(scope, sum_):
            raise RemoteProtocolError(
                f"asked for the past {sum_name(self._study, sum_)}", peer="server"
            )
        # Adversary: a server that fills this disk with attempts that it never finishes.
        if not self._store.begin_attempt(scope, sum_):
            raise RemoteProtocolError(
                f"asked for more than {MOST_ATTEMPTS} attempts at {sum_name(self._study, sum_)}",
                peer="server",
                hint="this participant takes no further part in it; the server's log says why "
                "they failed",
            )
        return scope

    def _check_age(self, scope: bytes, marks: Iterable[Mark]) -> None:
        """Adversary: a server that hears of a journal that was lost, or restored from a backup, and
        has a sum opened over other silos than the one that the journal has forgotten. Whoever wrote
        a mark had entered that attempt here, durably, before."""
        for mark in marks:
            newest = self._store.last_round(scope)
            begun = self._store.attempts(scope, mark.sum) if newest == mark.sum else None
            if mark.sum > (-1 if newest is None else newest) or (
                begun is not None and begun < mark.attempts
            ):
                raise restored(
                    f"its {mark.keeper} knows of {mark.attempts} attempt(s) at "
                    f"{sum_name(self._study, mark.sum)}"
                )

    def end(self, run_id: bytes) -> bytes:
        """No further attempt at this run; returns its scope.

        Raises:
            RemoteProtocolError: it is not the run that this participant is in.
        """
        scope = self.scope(run_id)
        self._store.enter_round(scope, self._study.sums)
        return scope

    def scope(self, run_id: bytes) -> bytes:
        """The scope of the run that this participant is in.

        Raises:
            RemoteProtocolError: it is another.
        """
        if self._store.recorded(run_key(self._study)) != run_id:
            raise RemoteProtocolError(
                "spoke of a run that this participant takes no part in", peer="server"
            )
        return run_scope(self._study, run_id)

    @property
    def over(self) -> bool:
        """Whether the server has ended it."""
        run = self._store.recorded(run_key(self._study))
        if run is None:
            return False
        return self._store.last_round(run_scope(self._study, run)) == self._study.sums


class SumMemory:
    """A silo's knowledge of the one sum of a round that its update went into.

    Durable, first writer wins, like everything in the journal.
    """

    def __init__(self, store: SiloStore, run: bytes, round_: int) -> None:
        self._store = store
        self._key = run[:16] + round_.to_bytes(4, "big")

    def uploaded(self, attempt: int) -> None:
        """Note that the update is about to leave in ``attempt``."""
        number = attempt.to_bytes(4, "big")
        if self._store.record(b"uploaded:" + self._key, number) != number:
            self._store.record(b"again:" + self._key, number)

    def opened(self, attempt: int, survivors: int) -> None:
        """Note that shares are about to leave that open a sum.

        Args:
            survivors: silos whose noise counts in it (:meth:`.Study.noise_shares`).
        """
        self._store.record(
            b"opened:" + self._key, attempt.to_bytes(4, "big") + survivors.to_bytes(2, "big")
        )

    def survivors(self) -> int | None:
        """How many silos' noise counts in the sum, if it can only be the one that this silo opened.

        None if the update left in a second attempt too, or this silo never saw it opened. A
        threshold of silos agrees to one survivor set per attempt, so one attempt is one sum. On a
        graph a silo does not see that a threshold has agreed, and :meth:`opened` was told of the
        fewest.
        """
        opened = self._store.recorded(b"opened:" + self._key)
        if opened is None or self._store.recorded(b"again:" + self._key) is not None:
            return None
        return int.from_bytes(opened[4:], "big")
