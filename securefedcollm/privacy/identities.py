"""Identities of records, by which the ledger knows them across files, studies and formats.

A record's identity is an HMAC-SHA-256 of its content, cut to 16 bytes, under a random key that is
stored next to the ledger and never leaves the silo. Without the key a reader of a ledger, or of a
copy of it, cannot test guesses of a record's text. Two records of 10^6 share an identity by chance
with probability 2^-89; then both are charged for both.

A record has two identities. One follows from its words: what tasks may read of it, without the
study's labels, the task's kind, the order in the file, and the subject's name. It stays when
somebody corrects a label or adds a column of numbers. The other follows from all text in its row.
It stays when a study names other columns of the file. Two sets share a record if they share either.
Adversary: a study's author who names other columns, to have a row charged as a fresh record.

Where the unit is the subject, a record has a third identity: its subject's, by the value in the
subject's column alone. The column's name has no influence, because a header is easily renamed. Two
sets of such records share a subject if they share this identity, in whatever file its records are.
Adversary: somebody who keeps one file a month, to give a patient a fresh budget in each. Equal
values in different columns ("7" of a ward and of a patient) are taken for one subject: that charges
too much, never too little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import StateError
from securefedcollm.primitives import hmac_sha256, sha256

ID_BYTES: Final = 16
_DTYPE: Final = np.dtype(f"S{ID_BYTES}")
_PAIR: Final = np.dtype(f"S{2 * ID_BYTES}")
_TRIPLE: Final = np.dtype(f"S{3 * ID_BYTES}")
_CHUNK: Final = 1 << 16
_ID: Final = b"securefedcollm/ledger/record/v1\0"
_ROW_ID: Final = b"securefedcollm/ledger/row/v1\0"
_OWNER_ID: Final = b"securefedcollm/ledger/subject/v1\0"
_SET: Final = {
    _DTYPE: b"securefedcollm/ledger/records/v1\0",
    _PAIR: b"securefedcollm/ledger/records/v2\0",
    _TRIPLE: b"securefedcollm/ledger/records/v3\0",
}
_MARKED: Final = b"securefedcollm/ledger/records/v4\0"
_NUMBER_BYTES: Final = 16
_KEY_NAME: Final = b"securefedcollm/ledger/record-key/v1\0"

Ids = npt.NDArray[np.bytes_]


class Content(NamedTuple):
    """The content of a record from which its identities are made."""

    words: bytes
    """Digest of the columns that tasks may read."""
    owner: str | None = None
    """Its subject, where that matters, in one Unicode form and with single spaces."""
    row: bytes = b""
    """Digest of all text in its row; empty where there was none."""


class Records:
    """The records of one file, or of a set that a ledger knows.

    Args:
        rows: identity of every record by its words, in file order, [n] of 16 bytes.
        whole: the same by all text of its row; None for records without rows, or of a ledger that
            did not know these identities yet.
        owners: the same by its subject; None where the unit is no subject, or of a ledger that did
            not know these identities yet.
        subjects: the number of the subject of every record, int [n], where the unit is a subject.
        column: which names the subject, where the unit is a subject.
        also: fingerprints of the file under which an older ledger may know it, besides that of the
            data set.
        key: which key made the identities; empty for a set that was read back from a ledger.
    """

    def __init__(
        self,
        rows: Ids,
        *,
        whole: Ids | None = None,
        owners: Ids | None = None,
        subjects: npt.NDArray[np.int64] | None = None,
        column: str = "",
        also: Sequence[str] = (),
        key: str = "",
    ) -> None:
        self.rows = rows
        self.whole = whole
        self.owners = owners
        self.subjects = subjects
        self.column = column
        self.also = tuple(also)
        self.key = key
        self.part: tuple[Records, npt.NDArray[np.bool_]] | None = None
        """Of which records these are some, bool [n of those], where they were chosen by
        :meth:`only`."""
        self.marks: tuple[str, npt.NDArray[np.bool_]] | None = None
        """Of a set that was read back from :meth:`marked`: digest of the whole set, and which of
        its identities, in ascending order."""

    def only(self, chosen: npt.NDArray[np.bool_]) -> Records:
        """Some of these records, perhaps none.

        Args:
            chosen: bool [n].
        """
        whole = None if self.whole is None else self.whole[chosen]
        some = Records(self.rows[chosen], whole=whole, key=self.key)
        some.part = self, chosen
        return some

    def __len__(self) -> int:
        return len(self.rows)

    def blob(self) -> bytes:
        """The identities of every record, sorted and without repetition, one after the other."""
        if self.owners is not None:
            whole = self.rows if self.whole is None else self.whole
            return _joined(self.rows, whole, self.owners).tobytes()
        return np.unique(self.rows).tobytes() if self.whole is None else self.pairs.tobytes()

    def marked(self) -> tuple[str, bytes]:
        """(digest, content) of a set that :meth:`only` chose: one bit for each record of the whole.

        The content is the whole's digest, 16 random bytes and the bits, in the order of the whole's
        :meth:`blob`. So its length follows from the whole, and nobody had it before. Adversary:
        whoever tells from the time, or from a full disk, whether a set is large, or new.
        """
        assert self.part is not None
        whole, chosen = self.part
        bits = np.zeros(whole._places.max(initial=-1) + 1, dtype=np.bool_)
        bits[whole._places[chosen]] = True
        content = bytes.fromhex(whole.digest) + os.urandom(_NUMBER_BYTES)
        content += np.packbits(bits).tobytes()
        return sha256(_MARKED, content).hex(), content

    @property
    def may_be_marked(self) -> bool:
        """Whether :meth:`marked` has all that the ledger knows of them."""
        return self.part is not None and self.part[0].whole is None and self.part[0].owners is None

    @cached_property
    def _places(self) -> npt.NDArray[np.int64]:
        """The place of every record among the identities in :meth:`blob`, [n]."""
        return np.unique(self.rows, return_inverse=True)[1].reshape(-1)

    @cached_property
    def pairs(self) -> Ids:
        """Both identities of every record, sorted and without repetition, [at most n]."""
        return _joined(self.rows, self.rows if self.whole is None else self.whole)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`blob`."""
        if self.owners is not None:
            return _digest(self.blob(), _TRIPLE)
        return _digest(self.blob(), _DTYPE if self.whole is None else _PAIR)

    @cached_property
    def former(self) -> str:
        """:attr:`digest` as ledgers had it that knew records by their words alone."""
        return _digest(np.unique(self.rows).tobytes(), _DTYPE)

    @cached_property
    def digests(self) -> frozenset[str]:
        """Every digest under which some version's ledger knows this very set."""
        found = {self.digest, self.former}
        return frozenset(found if self.whole is None else {*found, _digest(self.pairs, _PAIR)})

    @cached_property
    def most(self) -> int:
        """The most records that one subject has; 1 without subjects."""
        return 1 if self.subjects is None else int(np.bincount(self.subjects).max())

    @property
    def accounts(self) -> int:
        """How many subjects there are, or records."""
        return len(self) if self.subjects is None else int(self.subjects.max()) + 1

    def within(self, others: Records) -> npt.NDArray[np.bool_]:
        """Which accounts have a record, or are a subject, among ``others``: bool [accounts]."""
        if others.marks is not None and others.marks[0] == self.digest:  # takes the same for all
            return self.by_account(others.marks[1][self._places])
        found = np.zeros(len(self), dtype=np.bool_)
        for kind in _KINDS:
            mine, theirs = getattr(self, kind), getattr(others, kind)
            if mine is not None and theirs is not None:
                found |= _among(mine, self._order(kind), theirs)
        return self.by_account(found)

    def exactly_in(self, others: Records) -> npt.NDArray[np.bool_]:
        """Which rows are a record of ``others`` in every identity that both know: bool [n]."""
        kinds = [k for k in _KINDS if getattr(self, k) is not None]
        kinds = [k for k in kinds if getattr(others, k) is not None]
        mine, theirs = (np.stack([getattr(of, k) for k in kinds], 1) for of in (self, others))
        wide = np.dtype(f"S{len(kinds) * ID_BYTES}")
        ids = mine.view(wide)[:, 0]
        return _among(ids, np.argsort(ids).astype(np.int32), theirs.view(wide)[:, 0])

    def all_in(self, others: Records) -> bool:
        """Whether every record's words and row are those of one record of ``others``."""
        given = np.arange(len(self.pairs), dtype=np.int32)
        return bool(_among(self.pairs, given, others.pairs).all())

    def _order(self, kind: str) -> npt.NDArray[np.int32]:
        """In which the identities ascend: looked up like that, they are found from the cache."""
        if kind not in self._orders:
            self._orders[kind] = np.argsort(getattr(self, kind)).astype(np.int32)
        return self._orders[kind]

    @cached_property
    def _orders(self) -> dict[str, npt.NDArray[np.int32]]:
        return {}

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


_KINDS: Final = ("rows", "whole", "owners")


def _joined(*ids: Ids) -> Ids:
    """The identities of every record side by side, sorted and without repetition."""
    wide = np.dtype(f"S{len(ids) * ID_BYTES}")
    return np.unique(np.stack(ids, axis=1).view(wide)[:, 0])


def _among(ids: Ids, order: npt.NDArray[np.int32], others: Ids) -> npt.NDArray[np.bool_]:
    """Which of ``ids`` [n] are among ``others``: bool [n]."""
    known = np.sort(others)
    found = np.zeros(len(ids), dtype=np.bool_)
    for start in range(0, len(ids) if len(known) else 0, _CHUNK):
        rows = order[start : start + _CHUNK]
        some = ids[rows]
        place = np.searchsorted(known, some)
        place[place == len(known)] = 0
        found[rows] = known[place] == some
    return found


def union_of(sets: Sequence[Records]) -> Records:
    """All records of several sets that one ledger knows, each once, by their words."""
    rows = np.unique(np.concatenate([one.rows for one in sets]))
    return Records(rows)


def identify(
    key: bytes,
    contents: Iterable[Content | tuple[bytes, str | None]],
    *,
    column: str = "",
    also: Sequence[str] = (),
) -> Records:
    """The records with these contents.

    Args:
        key: 32 secret bytes.
    """
    ids = bytearray()
    names: dict[str | None, int] = {}
    numbers: list[int] = []
    owners: list[bytes] = []
    rowless = True
    for given in contents:
        words, subject, row = Content(*given)
        own = hmac_sha256(key, _ID + words)[:ID_BYTES]
        ids += own
        ids += hmac_sha256(key, _ROW_ID + row)[:ID_BYTES] if row else own
        rowless = rowless and not row
        if column:
            if subject not in names:
                owners.append(hmac_sha256(key, _OWNER_ID + (subject or "").encode())[:ID_BYTES])
            numbers.append(names.setdefault(subject, len(names)))
    pairs = np.frombuffer(ids, dtype=_DTYPE)
    subjects = np.array(numbers, dtype=np.int64) if column else None
    return Records(
        pairs[::2],
        whole=None if rowless else pairs[1::2],
        owners=None if subjects is None else np.array(owners, dtype=_DTYPE)[subjects],
        subjects=subjects,
        column=column,
        also=also,
        key=name_of(key),
    )


def read_records(
    blob: bytes, digest: str, whole: Callable[[str], Records] | None = None
) -> Records | None:
    """The set with this :attr:`Records.blob` and digest; None if it is not one.

    Args:
        whole: the set with a digest, for content that :meth:`Records.marked` made.
    """
    if whole is not None and sha256(_MARKED, blob).hex() == digest:
        return _read_marked(blob, whole)
    for dtype in _SET:
        if not len(blob) % dtype.itemsize and _digest(blob, dtype) == digest:
            found = np.frombuffer(blob, dtype=dtype)
            if bool((found[1:] > found[:-1]).all()):
                return _read(found.view(_DTYPE).reshape(-1, dtype.itemsize // ID_BYTES))
    return None


def _read_marked(content: bytes, stored: Callable[[str], Records]) -> Records | None:
    name, packed = content[:32].hex(), content[32 + _NUMBER_BYTES :]
    whole = stored(name)
    if whole.whole is not None or whole.owners is not None or len(packed) != (len(whole) + 7) // 8:
        return None
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=len(whole)).astype(np.bool_)
    records = Records(whole.rows[bits])
    records.marks = name, bits
    return records


def _read(ids: Ids) -> Records:
    """Of [n, identities of each], with the subjects' identities where the ledger knows them."""
    rows, whole, owners = [*ids.T, None, None][:3]
    assert rows is not None
    subjects = None if owners is None else np.unique(owners, return_inverse=True)[1]
    return Records(rows, whole=whole, owners=owners, subjects=subjects)


def _digest(blob: bytes | Ids, dtype: np.dtype[np.bytes_]) -> str:
    return sha256(_SET[dtype], bytes(blob)).hex()


def name_of(key: bytes) -> str:
    """What the ledger remembers of the key: 8 bytes of its digest, hex."""
    return sha256(_KEY_NAME, key).hex()[:16]


def key_path(ledger: Path) -> Path:
    """Path of a ledger's key. The path of the ledger may be a link."""
    return ledger.resolve().with_suffix(".key")


def record_key(ledger: Path, known: str) -> bytes:
    """The key next to the ledger, made on first use (mode 0600).

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
