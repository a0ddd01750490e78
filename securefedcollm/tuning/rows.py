"""The rows of a data file, one after the other, each with its place: the guard before the reader.

A file is read once; a row that passes here goes on, byte for byte, to
:mod:`securefedcollm.tuning.tables`, which parses it with Arrow and ``datasets``.

Adversary: whoever made the file: the study's author for the public questions, an exporter of a
hospital's system, somebody with a hand in a silo's records. Lines, cells, nesting and what a
compressed column unfolds to are bounded before they are held in memory; a row that two readers
could read differently is refused. No error quotes a value: it may be a patient's.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from securefedcollm.errors import DataError
from securefedcollm.foreign import decode_json, printable
from securefedcollm.tuning.arrays import lines_of
from securefedcollm.tuning.content import whole_row
from securefedcollm.tuning.fields import BadField, Row
from securefedcollm.tuning.formats import READ, Format
from securefedcollm.tuning.parquet_footer import Footer, read_footer
from securefedcollm.tuning.tables import Shape, csv_table, json_table, rows_of_table, shape_of

if TYPE_CHECKING:
    import pyarrow as pa

MOST_LINE: Final = 16 << 20
"""Bytes of a line, characters of a cell: a long book."""
_FREE: Final = 64 << 20
_UNFOLDING: Final = 100
"""A column may unfold to this multiple of the file, beyond ``_FREE`` bytes: text shrinks 10:1."""
_MOST_COLUMNS: Final = 1000
BATCH: Final = 1024
"""Rows that are held at a time."""
_DELIMITERS: Final = ",;\t|"
_TOLD: Final = re.compile(rf'"?sep=([{_DELIMITERS}])"?\s*')
"""A spreadsheet's first line that says what separates the cells."""
_LARGEST: Final = 2**63
_UTF8: Final = "save the file as UTF-8 (it may be in the encoding of an older Windows)"


class Checked(NamedTuple):
    """One row.

    ``place``: ``file:line`` (Parquet and NumPy: ``file, row n``, from 1); ``row``: what it says, or
    what is wrong with it; ``raw``: its bytes in the file, ``shape``: the columns that are to be
    read from them, and ``table``: by what. A row of a Parquet file has no bytes of its own.
    ``whole``: a digest of all its text, also in columns that are not read.
    """

    place: str
    row: Row | BadField
    raw: bytes = b""
    shape: Shape = ()
    table: Callable[[Sequence[bytes], Shape], pa.Table] = json_table
    whole: bytes = b""


def rows_of(path: Path, form: Format, owner: str | None) -> Iterator[Checked]:
    """Every row of a file, blank lines left out.

    Args:
        owner: a column that is needed in addition to the format's.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    # A record is known by its words in every column that any task reads.
    wanted = {*READ, *form.names, *form.renamed.values(), *([owner] if owner else [])}
    match path.suffix:
        case ".jsonl":
            return _json_rows(path, form, wanted)
        case ".csv":
            return _csv_rows(path, form)
        case ".npz":
            return _archived_rows(path, form, wanted)
        case _:
            return _parquet_rows(path, form, wanted)


def _json_rows(path: Path, form: Format, wanted: set[str]) -> Iterator[Checked]:
    with path.open("rb") as file:
        first = True
        for line, raw in enumerate(_lines(path, file, b""), start=1):
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)  # Arrow expects none
            if raw.strip():
                if first and (raw.lstrip()[:1] == b"[" or raw.strip() == b"{"):
                    raise DataError(
                        f"this is a JSON {'array' if b'[' in raw else 'text of many lines'}, not "
                        "JSON Lines",
                        where=f"{path}:{line}",
                        hint="write one object a line, e.g. with `jq -c '.[]'`",
                    )
                first = False
                yield _json_checked(f"{path}:{line}", raw, form, wanted)


def _json_checked(place: str, raw: bytes, form: Format, wanted: set[str]) -> Checked:
    row = _json_row(raw, form.columns[0], wanted)
    if isinstance(row, BadField):
        return Checked(place, row, raw)
    read = {name: value for name, value in row.items() if name in wanted}
    return _known(Checked(place, read, raw, shape_of(read)), row, form)


def _archived_rows(path: Path, form: Format, wanted: set[str]) -> Iterator[Checked]:
    with path.open("rb") as file:
        names, lines = lines_of(file, str(path))
    _refuse_missing(names, str(path), form)
    for number, raw in enumerate(lines, start=1):
        place = f"{path}, row {number}"
        if len(raw) > MOST_LINE:
            over = BadField(form.columns[0], f"is in a row of over {MOST_LINE >> 20} MiB")
            yield Checked(place, over)
        else:
            yield _json_checked(place, raw, form, wanted)


def _known(checked: Checked, row: Row, form: Format) -> Checked:
    """``checked``, known by all text of its ``row``, or what is wrong with that."""
    if isinstance(checked.row, BadField):
        return checked
    try:
        return checked._replace(whole=whole_row(row, signals=form.signal is not None))
    except BadField as bad:
        return checked._replace(row=bad)


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
    except UnicodeDecodeError:
        return BadField(field, "is not UTF-8 text", _UTF8)
    except json.JSONDecodeError as error:
        return BadField(field, f"cannot be reached: broken JSON at column {error.colno}")
    except ValueError as error:  # ours, or of a number with thousands of digits
        return BadField(field, f"cannot be reached: {str(error)[:80]}")
    if not isinstance(row, dict):
        return BadField(field, "is missing: not a JSON object")
    for name, value in row.items():
        if b"\\u" in raw and not _whole_characters(json.dumps({name: value}, ensure_ascii=False)):
            return BadField(printable(name, 60), "holds half a character (a lone surrogate)")
        if isinstance(value, int) and not -_LARGEST <= value < _LARGEST and name in wanted:
            return BadField(
                printable(name, 60),
                "is a number beyond 2^63, which programs round to another",
                "write it as a text, in quotes",
            )
    return row


def _whole_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(path: Path, form: Format) -> Iterator[Checked]:
    before = csv.field_size_limit(MOST_LINE)
    reader = None
    passed: list[str] = []  # the lines of the row that the reader is at
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = next(_lines(path, file, ""), "")
            told = _TOLD.fullmatch(first)
            by = told[1] if told else _delimiter(first, str(path))
            file.seek(0)
            reader = csv.reader(_noted(_lines(path, file, ""), passed), delimiter=by)
            if told:
                next(reader)
            line = reader.line_num + 1
            header = _header(next(reader, []), f"{path}:{line}", form)
            shape: Shape = tuple((name, "text") for name in header)
            table = partial(csv_table, delimiter=by)
            line = reader.line_num
            passed.clear()
            for cells in reader:
                place, line = f"{path}:{line + 1}", reader.line_num
                if cells:
                    row, text = _csv_row(header, cells), "".join(passed)
                    if len(cells) < len(header):  # a sheet's last cells may be left out
                        text = text.rstrip("\r\n") + by * (len(header) - len(cells)) + "\n"
                    if isinstance(row, BadField):
                        yield Checked(place, row, b"", shape, table)
                    else:
                        yield _known(Checked(place, row, text.encode(), shape, table), row, form)
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


def _delimiter(first: str, where: str) -> str:
    """The separator of the cells: the one in the header, or a comma for a single column.

    Adversary: a study's author. If the study's columns decided this, a study that names the
    column "text,label" would read each line as one cell, so every record as another.
    """
    found = [
        delimiter
        for delimiter in _DELIMITERS
        if len(next(csv.reader([first], delimiter=delimiter), [])) > 1
    ]
    if len(found) > 1:
        raise DataError(
            f"the header can be separated by {' or by '.join(map(repr, found))}",
            where=f"{where}:1",
            hint=f"write which it is into a first line of its own, e.g. sep={found[0]}",
        )
    return found[0] if found else ","


def _header(cells: list[str], where: str, form: Format) -> list[str]:
    """Names of the columns. One without a name, such as a data frame's index, is not read."""
    if not _whole_characters("".join(cells)) or "\0" in "".join(cells):
        raise DataError("the header is not UTF-8 text", where=where, hint=_UTF8)
    header = [cell.strip() or f"(column {i})" for i, cell in enumerate(cells, start=1)]
    _refuse_missing(header, where, form)
    return _once(header, where)


def _refuse_missing(header: Sequence[str], where: str, form: Format) -> None:
    if (name := form.missing(header)) is not None:
        raise DataError(
            f"the header has no column '{name}'",
            where=where,
            hint=f"name the columns {', '.join(form.names)} and optionally subject, or say what "
            "they are called: task.columns (--column); CSV is separated by , ; | or tabs",
        )


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
            f"is in a row of {len(cells)} cells under a header of {len(header)}",
            "put a cell that holds a comma (or what else separates the cells) in double quotes",
        )
    if not _whole_characters("".join(cells)):
        name = next(
            n for n, cell in zip(header, cells, strict=False) if not _whole_characters(cell)
        )
        return BadField(printable(name, 60), "is not UTF-8 text", _UTF8)
    return dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))


def _parquet_rows(path: Path, form: Format, wanted: set[str]) -> Iterator[Checked]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as content:
            about, size = read_footer(content), content.seek(0, 2)
            content.seek(0)
            file = pq.ParquetFile(content)
            names = _once(file.schema_arrow.names, str(path))
            _refuse_missing(names, str(path), form)
            label = form.named("label")
            classes = _classes(file.schema_arrow, label)
            # A study that names other columns reads other text of the same row; a number of a
            # class is text, too.
            types = {name: file.schema_arrow.field(name).type for name in names}
            said = {name for name, kind in types.items() if _may_hold_text(kind)}
            if form.signal is not None:  # and other pictures or recordings of it
                said |= {name for name, kind in types.items() if _may_hold_signal(kind)}
            columns = [name for name in names if name in {*wanted, *said, *classes}]
            most, batch = _allowed(path, size, about, columns)
            number = held = 0
            for part in file.iter_batches(batch, columns=columns, use_threads=False):
                held += sum(part.column(name).nbytes for name in columns)
                table = pa.Table.from_batches([part])
                reading = rows_of_table(table.select([n for n in columns if n in wanted]))
                # A row is identified by its whole text, never by a study's reading of it.
                for row, whole in zip(reading, table.to_pylist(), strict=True):
                    number += 1
                    letters = _letters(whole)
                    held += letters  # one long value may stand in a million rows
                    if held > 2 * most:
                        raise _bomb(path)
                    checked = _parquet_row(f"{path}, row {number}", row, label, classes)
                    if letters > MOST_LINE:
                        over = BadField(label, f"is in a row of over {MOST_LINE >> 20} MiB")
                        checked = checked._replace(row=over)
                    _parquet_row("", whole, label, classes)
                    yield _known(checked, whole, form)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # the parser's own, of any kind
        raise DataError(
            f"cannot be read as parquet ({type(error).__name__})",
            where=str(path),
            hint="check that the file really is parquet",
        ) from None


def _parquet_row(place: str, row: Row, label: str, classes: dict[str, list[str]]) -> Checked:
    """A row whose numbers of ``classes`` become their names, in place."""
    for name in classes.keys() & row.keys():
        said = _by_name(row[name], name, classes[name])
        if not isinstance(said, BadField):
            row[name] = said
        elif name == label:
            return Checked(place, said)
    return Checked(place, row)


def _letters(value: object) -> int:
    """How many characters of text a value holds, whatever its type."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_letters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_letters, value))
    return 0


def _may_hold_text(kind: pa.DataType) -> bool:
    """Whether values of a type may hold text: the file's type, whatever a study reads."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _may_hold_text(kind.storage_type)
    if pa.types.is_nested(kind):  # lists of every sort, mappings, structures, unions
        return any(_may_hold_text(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    bare = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_decimal,
        pa.types.is_temporal,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
    )
    return not any(is_it(kind) for is_it in bare)


def _may_hold_signal(kind: pa.DataType) -> bool:
    """Whether values of a type may hold a file or rows of numbers."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _may_hold_signal(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _may_hold_signal(kind.value_type)
    held = (
        pa.types.is_nested,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(is_it(kind) for is_it in held)


def _classes(schema: pa.Schema, label: str) -> dict[str, list[str]]:
    """The names that the file itself gives to numbers, by column: every ClassLabel of ``datasets``.

    Raises:
        ValueError: those of the label cannot be read.
    """
    about: Any = decode_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    found = {}
    for column in schema.names:
        try:
            feature = about["info"]["features"][column]
            names = feature["names"] if feature["_type"] == "ClassLabel" else None
        except (LookupError, TypeError):
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
        elif names is not None and column == label:
            raise ValueError("names that are none")
    return found


def _by_name(number: object, column: str, classes: list[str]) -> str | BadField | None:
    if number is None or number == -1:  # -1: a test set's way to say that there is none
        return None
    if not isinstance(number, int) or not 0 <= number < len(classes):
        return BadField(column, "is none of the classes that the file names")
    return classes[number]


def _allowed(path: Path, size: int, about: Footer, columns: list[str]) -> tuple[int, int]:
    """(bytes that the columns may unfold to, rows to unfold at a time).

    Adversary: a file of 245 kB whose columns unfold to gigabytes, by compression, or by one long
    value in a dictionary that a million rows refer to. Its footer is checked first,
    and then what really comes, a few rows at a time. Whether a page is as long as the file says is
    not checked here: one that lies can take 2 GB, once.
    """
    most = _FREE + _UNFOLDING * size
    chunks = [chunk for chunk in about.chunks if chunk.column in columns]
    unfolded = sum(chunk.unfolded for chunk in chunks)
    values = about.rows + sum(chunk.values for chunk in chunks)
    if unfolded > most or 8 * values > most:
        raise _bomb(path)
    longest: dict[str, int] = {}  # value of each column
    for chunk in chunks:
        longest[chunk.column] = max(chunk.unfolded, longest.get(chunk.column, 0))
    return most, max(1, min(BATCH, most // (sum(longest.values()) + 1)))


def _bomb(path: Path) -> DataError:
    return DataError(
        f"unfolds to more than {_UNFOLDING} times its size",
        where=str(path),
        hint="write it anew without compression, or as .jsonl",
    )
