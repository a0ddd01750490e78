"""Rows of a NumPy archive (``.npz``), one array a column, as lines of JSON for the next guard.

So a row of an archive is the same record as the same row in JSON Lines, in ledgers too.

Adversary: whoever made the file. Its members' headers are read first: what they say must be what
the archive's directory says, within a bound, before an array has any memory. Nothing is unpickled.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, Final

import numpy.typing as npt
from numpy.lib import format as npy

from securefedcollm.errors import DataError
from securefedcollm.foreign import printable

_FREE: Final = 64 << 20
_UNFOLDING: Final = 100
"""An archive may unfold to this multiple of its size, beyond ``_FREE`` bytes; as for Parquet."""
_MOST_MEMBERS: Final = 1000
_HINT: Final = (
    "save it with numpy.savez_compressed(FILE, image=…, label=…): whole numbers or texts, and as "
    "many rows in each array"
)
_Columns = Mapping[str, npt.NDArray[Any]]


def lines_of(file: IO[bytes], where: str) -> tuple[list[str], Iterator[bytes]]:
    """The columns' names, and every row as a line of JSON.

    Args:
        where: the file, for errors.

    Raises:
        DataError: it is no archive of such arrays, or unfolds to too much.
    """
    try:
        columns = _columns(file, where)
    except DataError:
        raise
    except Exception as error:  # the readers' own, of any kind
        raise DataError(
            f"cannot be read as an archive of arrays ({type(error).__name__})",
            where=where,
            hint=_HINT,
        ) from None
    return list(columns), _lines(columns)


def _columns(file: IO[bytes], where: str) -> _Columns:
    most = _FREE + _UNFOLDING * file.seek(0, 2)
    found = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS or sum(member.file_size for member in members) > most:
            raise _refused("unfolds to far more than it is long", where)
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise _refused(f"the column '{printable(name, 60)}' is there twice", where)
            _check(archive, member, where)
            with archive.open(member) as part:
                found[name] = npy.read_array(part, allow_pickle=False)
    if len({len(column) for column in found.values()}) != 1:
        raise _refused("its arrays have different numbers of rows", where)
    return found


def _check(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> None:
    """Raises: DataError unless the member is an array of the size that the directory says."""
    with archive.open(member) as part:
        version = npy.read_magic(part)
        if version == (1, 0):
            shape, _, kind = npy.read_array_header_1_0(part)
        else:
            shape, _, kind = npy.read_array_header_2_0(part)
        begins = part.tell()
    texts = kind.kind == "U" and len(shape) == 1
    if kind.kind not in "iuU" or (kind.kind == "U" and not texts) or not shape:
        what = f"the column '{printable(member.filename.removesuffix('.npy'), 60)}'"
        raise _refused(f"{what} holds neither whole numbers nor a text a row", where)
    count = 1
    for size in shape:
        count *= size
    if begins + count * kind.itemsize != member.file_size:
        raise _refused("an array has another size than it says", where)


def _lines(columns: _Columns) -> Iterator[bytes]:
    for row in range(len(next(iter(columns.values())))):
        cells = {name: column[row].tolist() for name, column in columns.items()}
        yield json.dumps(cells).encode()


def _refused(what: str, where: str) -> DataError:
    return DataError(what, where=where, hint=_HINT)
