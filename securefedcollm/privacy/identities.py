"""Which records a data file holds, as the ledger knows them across files, studies and formats.

A record's identity is an HMAC-SHA-256 of its content, cut to 16 bytes, under a random key that lies
beside the ledger and never leaves the silo. Who reads a ledger, or a copy of it, without the key
cannot try out guesses of a record's text. Two records of 10^6 share an identity by chance with
probability 2^-89; then both are charged for both.

What a record's content is the data room says: without the study's labels, the task's kind, the
order in the file, and the subject's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import StateError
from securefedcollm.primitives import hmac_sha256, sha256

ID_BYTES: Final = 16
_DTYPE: Final = np.dtype(f"S{ID_BYTES}")
_CHUNK: Final = 1 << 16
_ID: Final = b"securefedcollm/ledger/record/v1\0"
_KEY_NAME: Final = b"securefedcollm/ledger/record-key/v1\0"

Ids = npt.NDArray[np.bytes_]


class Records:
    """The records of one file.

    Args:
        rows: identity of every record in file order, [n] of 16 bytes.
        subjects: the number of the subject of every record, int [n], where the unit is a subject.
        column: which says whose record it is, where the unit is a subject.
        also: fingerprints of the file under which an older ledger may know it, besides that of the
            data set.
        key: which key made the identities; empty for a set that was read back from a ledger.
    """

    def __init__(
        self,
        rows: Ids,
        *,
        subjects: npt.NDArray[np.int64] | None = None,
        column: str = "",
        also: Sequence[str] = (),
        key: str = "",
    ) -> None:
        self.rows = rows
        self.subjects = subjects
        self.column = column
        self.also = tuple(also)
        self.key = key

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _unique(self) -> tuple[Ids, npt.NDArray[np.int32]]:
        ids, inverse = np.unique(self.rows, return_inverse=True)
        return ids, inverse.astype(np.int32)

    @property
    def ids(self) -> Ids:
        """Sorted and without repetition."""
        return self._unique[0]

    @property
    def blob(self) -> bytes:
        """:attr:`ids`, one after the other."""
        return self.ids.tobytes()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`blob`."""
        return digest_of(self.blob)

    @cached_property
    def most(self) -> int:
        """The most records that one subject has; 1 without subjects."""
        return 1 if self.subjects is None else int(np.bincount(self.subjects).max())

    @property
    def accounts(self) -> int:
        """How many subjects there are, or records."""
        return len(self) if self.subjects is None else int(self.subjects.max()) + 1

    def within(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which accounts have a record among ``ids``, sorted: bool [accounts]."""
        return self.by_account(self.rows_in(ids))

    def rows_in(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which rows are among ``ids``, sorted: bool [n]."""
        mine, inverse = self._unique
        found = np.zeros(len(mine), dtype=np.bool_)
        for start in range(0, len(mine) if len(ids) else 0, _CHUNK):
            some = mine[start : start + _CHUNK]
            place = np.searchsorted(ids, some)
            place[place == len(ids)] = 0
            found[start : start + _CHUNK] = ids[place] == some
        rows: npt.NDArray[np.bool_] = found[inverse]
        return rows

    def by_account(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which accounts have a record among ``rows``, bool [n]: bool [accounts]."""
        if self.subjects is None:
            return rows
        found = np.zeros(self.accounts, dtype=np.bool_)
        found[self.subjects[rows]] = True
        return found

    def rows_of(self, accounts: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """The rows of ``accounts``, bool [accounts]: bool [n]."""
        return accounts if self.subjects is None else accounts[self.subjects]


def identify(
    key: bytes,
    contents: Iterable[tuple[bytes, str | None]],
    *,
    column: str = "",
    also: Sequence[str] = (),
) -> Records:
    """The records with these contents.

    Args:
        key: 32 secret bytes.
        contents: a digest of every record's content, and whose record it is where that matters.
    """
    ids = bytearray()
    names: dict[str | None, int] = {}
    numbers: list[int] = []
    for content, subject in contents:
        ids += hmac_sha256(key, _ID + content)[:ID_BYTES]
        if column:
            numbers.append(names.setdefault(subject, len(names)))
    return Records(
        np.frombuffer(ids, dtype=_DTYPE),
        subjects=np.array(numbers, dtype=np.int64) if column else None,
        column=column,
        also=also,
        key=name_of(key),
    )


def read_ids(blob: bytes) -> Ids | None:
    """The inverse of :attr:`Records.blob`; None if it is not one."""
    if len(blob) % ID_BYTES:
        return None
    ids = np.frombuffer(blob, dtype=_DTYPE)
    return ids if bool((ids[1:] > ids[:-1]).all()) else None


def digest_of(blob: bytes) -> str:
    return sha256(b"securefedcollm/ledger/records/v1\0", blob).hex()


def name_of(key: bytes) -> str:
    """What the ledger remembers of the key: 8 bytes of its digest, hex."""
    return sha256(_KEY_NAME, key).hex()[:16]


def key_path(ledger: Path) -> Path:
    """Where the key of a ledger lies; the ledger may be named by a link."""
    return ledger.resolve().with_suffix(".key")


def record_key(ledger: Path, known: str) -> bytes:
    """The key beside the ledger, made on first use (mode 0600).

    Several processes may make it at once: one wins, and all read that one.

    Args:
        known: the name of the key that made the identities in the ledger; empty if there are none.

    Raises:
        StateError: the key is lost, or is not the one that made the ledger's identities. With
            another key every record would look new, and its budget unspent.
    """
    path = key_path(ledger)
    try:
        if not known and not path.exists():
            _make(path)
        key = path.read_bytes()
    except OSError as error:
        raise StateError(
            f"{path}: the key of the ledger's record identities cannot be used "
            f"({error.strerror or error})",
            hint="restore it from the backup of the ledger; without it no record is recognised",
        ) from None
    if len(key) != 32 or (known and name_of(key) != known):
        raise StateError(
            f"{path}: this is not the key that made the record identities of {ledger.name}",
            hint="restore both from one backup; with another key no record is recognised",
        )
    return key


def _make(path: Path) -> None:
    """Adversary: a power cut. The name appears only once the whole key is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:  # another process was faster
            return
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)
