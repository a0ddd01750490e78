"""The rows of a data file, one after the other, each with its place: the guard before the reader.

A file is read once; a row that passes here goes on, byte for byte, to
:mod:`securefedcollm.tuning.tables`, which parses it with Arrow and ``datasets``.

Adversary: whoever made the file: the study's author for the public questions, an exporter of a
hospital's system, somebody with a hand in a silo's records. Lines, cells, nesting and what a
compressed column unfolds to are bounded before they are held in memory; a row that two readers
could read differently is refused. No error quotes a value: it may be a patient's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from securefedcollm.errors import DataError
from securefedcollm.foreign import decode_json, printable
from securefedcollm.tuning.formats import WORDS, BadField, Format, Row
from securefedcollm.tuning.parquet_footer import Footer, read_footer
from securefedcollm.tuning.tables import Shape, rows_of_table, shape_of

MOST_LINE: Final = 16 << 20
"""Bytes of a line, characters of a cell: a long book."""
_FREE: Final = 64 << 20
_UNFOLDING: Final = 100
"""A column may unfold to so many times the file, beyond ``_FREE`` bytes: text shrinks ten times."""
_MOST_COLUMNS: Final = 1000
BATCH: Final = 1024
"""Rows that are held at a time."""


class Checked(NamedTuple):
    """One row.

    ``place``: ``file:line`` (Parquet: ``file, row n``, from 1); ``row``: what it says, or what is
    wrong with it; ``raw``: its bytes in the file, and ``shape``: the columns that are to be read
    from them. A row of a Parquet file has no bytes of its own.
    """

    place: str
    row: Row | BadField
    raw: bytes = b""
    shape: Shape = ()


def rows_of(path: Path, form: Format, owner: str | None) -> Iterator[Checked]:
    """Every row of a file, blank lines left out.

    Args:
        owner: a column that is needed besides those of the format.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    # A record is known by its words in every column that any task reads.
    wanted = {*form.names, *WORDS, "choices", "answer", "subject", *([owner] if owner else [])}
    match path.suffix:
        case ".jsonl":
            return _json_rows(path, form, wanted)
        case ".csv":
            return _csv_rows(path, form)
        case _:
            return _parquet_rows(path, wanted)


def _json_rows(path: Path, form: Format, wanted: set[str]) -> Iterator[Checked]:
    with path.open("rb") as file:
        for line, raw in enumerate(_lines(path, file, b""), start=1):
            if raw.strip():
                row = _json_row(raw, form.columns[0], wanted)
                shape = () if isinstance(row, BadField) else shape_of(row)
                yield Checked(f"{path}:{line}", row, raw, shape)


def _lines(path: Path, file: IO[Any], end: Any) -> Iterator[Any]:
    for line, text in enumerate(iter(lambda: file.readline(MOST_LINE + 1), end), start=1):
        if len(text) > MOST_LINE:
            raise DataError(
                f"the line is over {MOST_LINE >> 20} MiB",
                where=f"{path}:{line}",
                hint="is every record on a line of its own?",
            )
        yield text


def _json_row(raw: bytes, field: str, wanted: set[str]) -> Row | BadField:
    try:
        row = decode_json(raw)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return BadField(field, "is not UTF-8 text", "save the file as UTF-8")
    except UnicodeEncodeError:
        return BadField(field, "is in a row with half a character (a lone surrogate)")
    except json.JSONDecodeError as error:
        return BadField(field, f"cannot be reached: broken JSON at column {error.colno}")
    except ValueError as error:  # ours, or of a number with thousands of digits
        return BadField(field, f"cannot be reached: {str(error)[:80]}")
    if not isinstance(row, dict):
        return BadField(field, "is missing: not a JSON object")
    return {name: value for name, value in row.items() if name in wanted}


def _csv_rows(path: Path, form: Format) -> Iterator[Checked]:
    before = csv.field_size_limit(MOST_LINE)
    reader = None
    passed: list[str] = []  # the lines of the row that the reader is at
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(_noted(_lines(path, file, ""), passed))
            header = _header(next(reader, []), path, form)
            shape: Shape = tuple((name, "text") for name in header)
            line = reader.line_num
            passed.clear()
            for cells in reader:
                place, line = f"{path}:{line + 1}", reader.line_num
                if cells:
                    row, text = _csv_row(header, cells), "".join(passed)
                    if len(cells) < len(header):  # a sheet's last cells may be left out
                        text = text.rstrip("\r\n") + "," * (len(header) - len(cells)) + "\n"
                    bad = isinstance(row, BadField)
                    yield Checked(place, row, b"" if bad else text.encode(), shape)
                passed.clear()
    except csv.Error as error:
        raise DataError(
            f"is not CSV ({error})",
            where=f"{path}:{reader.line_num if reader else 1}",
            hint="put a cell that holds a quote or line break in double quotes",
        ) from None
    finally:
        csv.field_size_limit(before)


def _noted(lines: Iterator[str], passed: list[str]) -> Iterator[str]:
    for line in lines:
        passed.append(line)
        yield line


def _header(header: list[str], path: Path, form: Format) -> list[str]:
    framed = form.framed and "prompt" in header  # then the first column is not needed
    missing = [name for name in form.columns[framed:] if name not in header]
    if missing:
        raise DataError(
            f"the header has no column '{missing[0]}'",
            where=f"{path}:1",
            hint=f"name the columns {', '.join(form.names)} and optionally subject",
        )
    return _once(header, f"{path}:1")


def _once(header: Iterable[str], where: str) -> list[str]:
    """Adversary: a file whose second column ``answer`` is the one that is read."""
    names = list(header)
    what = ""
    if len(names) > _MOST_COLUMNS:
        what = f"has {len(names)} columns, {_MOST_COLUMNS} are the most"
    elif twice := [name for name in names if names.count(name) > 1]:
        what = f"the column '{printable(twice[0], 60)}' is there twice"
    if what:
        raise DataError(what, where=where, hint="remove the columns that are not needed")
    return names


def _csv_row(header: list[str], cells: list[str]) -> Row | BadField:
    if len(cells) > len(header):
        return BadField(
            header[-1],
            f"is where {len(cells)} cells meet a header of {len(header)}",
            "put a cell that holds a comma in double quotes",
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadField(header[0], "is in a row that is not UTF-8 text", "save the file as UTF-8")
    return dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))


def _parquet_rows(path: Path, wanted: set[str]) -> Iterator[Checked]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as content:
            about, size = read_footer(content), content.seek(0, 2)
            content.seek(0)
            file = pq.ParquetFile(content)
            names = _once(file.schema_arrow.names, str(path))
            columns = [name for name in names if name in wanted]
            most, batch = _allowed(path, size, about, columns)
            number = held = 0
            for part in file.iter_batches(batch, columns=columns, use_threads=False):
                held += part.nbytes
                if held > most:
                    raise _bomb(path)
                for row in rows_of_table(pa.Table.from_batches([part])):
                    number += 1
                    yield Checked(f"{path}, row {number}", row)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # the parser's own, of any kind
        raise DataError(
            f"cannot be read as parquet ({type(error).__name__})",
            where=str(path),
            hint="check that the file really is parquet",
        ) from None


def _allowed(path: Path, size: int, about: Footer, columns: list[str]) -> tuple[int, int]:
    """(bytes that the columns may unfold to, rows to unfold at a time).

    Adversary: a file of 245 kB whose columns unfold to gigabytes, by compression, or by one long
    value in a dictionary that a million rows refer to. What it says of itself is looked at first,
    and then what really comes, a few rows at a time. That a page is as long as the file says is not
    checked here: one that lies can take 2 GB, once.
    """
    most = _FREE + _UNFOLDING * size
    chunks = [chunk for chunk in about.chunks if chunk.column in columns]
    unfolded = sum(chunk.unfolded for chunk in chunks)
    values = about.rows + sum(chunk.values for chunk in chunks)
    if unfolded > most or 8 * values > most:
        raise _bomb(path)
    longest = max((chunk.unfolded for chunk in chunks), default=0)
    return most, max(1, min(BATCH, most // (longest + 1)))


def _bomb(path: Path) -> DataError:
    return DataError(
        f"unfolds to more than {_UNFOLDING} times its size",
        where=str(path),
        hint="write it anew without compression, or as .jsonl",
    )
