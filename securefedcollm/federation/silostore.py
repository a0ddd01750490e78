"""What a silo remembers across crashes: protocol journal and finished updates.

One SQLite file (WAL, ``synchronous=FULL``, mode 0600) and one file per finished update, on the
silo's own machine. Keys of the aggregation protocol are never among it.
"""

from __future__ import annotations

import io
import os
import sqlite3
from pathlib import Path

import numpy as np

from securefedcollm.errors import StateError
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.workload import Vector

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trainings (
  run BLOB NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL, training INTEGER NOT NULL,
  PRIMARY KEY (run, round, model), UNIQUE (run, round, training)
) WITHOUT ROWID;
"""


class SiloStore:
    """Durable memory of one silo. Implements the aggregation room's ``Journal``."""

    def __init__(self, directory: Path) -> None:
        """Open or create the store in ``directory``.

        Raises:
            StateError: the directory cannot be written, or the file is not this store.
        """
        self._directory = make_directory(directory)
        path = directory / "silo.sqlite"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StateError(
                f"{path}: the silo's state cannot be opened ({error})",
                hint="restore it from a backup; without it, finished work cannot be resumed",
            ) from None

    def record(self, key: bytes, value: bytes) -> bytes:
        """Durable put-if-absent: the stored value, which is ``value`` only for the first writer."""
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO journal VALUES (?, ?)", (key, value))
            row = self._db.execute("SELECT value FROM journal WHERE key = ?", (key,)).fetchone()
        return bytes(row[0])

    def training(self, run: bytes, round_: int, model: bytes) -> int:
        """Number of the training of this round that starts from this global model: 0, 1, …

        The same model gives the same number, also after a crash, so that its budget reservation
        is found again. A server that sends a second model for a round pays a second reservation.
        """
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT OR IGNORE INTO trainings SELECT ?1, ?2, ?3, "
                "COALESCE(1 + MAX(training), 0) FROM trainings WHERE run = ?1 AND round = ?2",
                (run, round_, model),
            )
            row = self._db.execute(
                "SELECT training FROM trainings WHERE run = ? AND round = ? AND model = ?",
                (run, round_, model),
            ).fetchone()
        return int(row[0])

    def new_training(self, run: bytes, round_: int, model: bytes) -> int:
        """Give up this model's training, whose result was lost, for a further one; its number."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "UPDATE trainings SET training = (SELECT 1 + MAX(training) FROM trainings "
                "WHERE run = ?1 AND round = ?2) WHERE run = ?1 AND round = ?2 AND model = ?3",
                (run, round_, model),
            )
        return self.training(run, round_, model)

    def save_update(self, run: bytes, round_: int, training: int, update: Vector) -> None:
        """Keep a finished update until the run's next round but one."""
        buffer = io.BytesIO()
        np.save(buffer, update, allow_pickle=False)
        write_durably(self._update(run, round_, training), buffer.getvalue())
        for old in self._directory.glob(f"update-{run.hex()}-*.npy"):
            if int(old.stem.split("-")[2]) < round_ - 1:
                old.unlink(missing_ok=True)

    def load_update(self, run: bytes, round_: int, training: int) -> Vector | None:
        """The finished update, or None if this training was never finished."""
        path = self._update(run, round_, training)
        try:
            vector = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StateError(
                f"{path}: a finished update cannot be read ({error})",
                hint="remove the file to train this round again (it will cost its ε again)",
            ) from None
        return np.asarray(vector, dtype=np.float32)

    def _update(self, run: bytes, round_: int, training: int) -> Path:
        return self._directory / f"update-{run.hex()}-{round_:05d}-{training}.npy"

    def close(self) -> None:
        self._db.close()
