"""Data files and how they are read: JSON Lines, CSV or Parquet.

What a row holds depends on the task: :mod:`securefedcollm.tuning.formats`. Files are read by the
builders of the ``datasets`` library, used directly: its ``load_dataset`` reports every call to a
public server and leaves an Arrow copy of the records in the user's cache, and a silo's private file
deserves neither.

An error names the file, the line and the field, never the value: the value may be a patient's.
"""

from __future__ import annotations

import csv
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import DataError
from securefedcollm.tuning.formats import BadField, Format, format_of, row_of
from securefedcollm.tuning.questions import Question
from securefedcollm.tuning.tokenise import Kind

SUFFIXES: Final = (".jsonl", ".csv", ".parquet")


def read_questions(
    path: str | Path,
    *,
    kind: Kind = "multiple_choice",
    labels: Sequence[str] = (),
    labelled: bool = True,
    owner: str | None = None,
) -> list[Question]:
    """Read a ``.jsonl``, ``.csv`` or ``.parquet`` file of records.

    Args:
        path: the file; its suffix says the format.
        kind: the task that the rows are of; ``labels`` are those of a classification.
        labelled: every row must have an answer. When false it may be missing or null, and those
            questions carry ``answer=None``.
        owner: the column that says whose record a row is; then every row must have it.

    Returns:
        one :class:`Question` per row, in file order, ``group`` the row's ``subject`` (or ``""``),
        and ``subject`` the value of the column ``owner``.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is wrong; names the file, the
            line (Parquet: the row) and the field.
    """
    path = Path(path)
    form = format_of(kind, labels)
    _refuse_unreadable(path, form.hint)
    source = _Source(path, form, owner)
    try:
        rows = source.rows()
    except DataError:
        raise
    except Exception as error:
        # The parsers' own messages give no line, or one counted from the start of a block.
        source.blame(labelled)
        raise DataError(
            f"cannot be read as {path.suffix[1:]} ({type(error).__name__})",
            where=str(path),
            hint=f"check that the file really is {path.suffix[1:]}; {form.hint}",
        ) from error
    if not rows:
        raise DataError("holds no questions", where=str(path), hint=form.hint)
    questions = []
    for index, row in enumerate(rows):
        try:
            questions.append(form.question(row, labelled=labelled, owner=owner))
        except BadField as bad:
            raise bad.at(source.place(index), form.hint) from None
    return questions


def inspect_rows(
    path: Path, *, kind: Kind, labels: Sequence[str] = (), owner: str | None = None
) -> Iterator[tuple[str, Question | DataError]]:
    """Every row of a file with its place, and what it is or why it cannot be used.

    Unlike :func:`read_questions` it goes on after a bad row, and answers may be missing.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    form = format_of(kind, labels)
    _refuse_unreadable(path, form.hint)
    source = _Source(path, form, owner)
    for place, row in source.places():
        try:
            if isinstance(row, BadField):
                raise row
            yield place, form.question(row, labelled=False, owner=owner)
        except BadField as bad:
            yield place, bad.at(place, form.hint)


def write_questions(
    path: Path, questions: Sequence[Question], owner: str, kind: Kind = "multiple_choice"
) -> None:
    """Write a ``.jsonl`` file that :func:`read_questions` reads back as the same questions.

    Args:
        owner: the column for whose record each is.
        kind: the task that the rows are of.

    Raises:
        DataError: it cannot be written.
    """
    rows = (json.dumps(row_of(q, kind, owner), ensure_ascii=False) for q in questions)
    try:
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        path.chmod(0o600)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})", where=str(path), hint="choose another --out"
        ) from None


def read_text(path: Path) -> list[str]:
    """Plain text to heal a model on: a UTF-8 file, or every question of a question file.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or a bad question file.
    """
    if path.suffix in SUFFIXES:
        questions = read_questions(path, labelled=False)
        return [" ".join([q.prompt, *q.choices]) for q in questions]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as text ({type(error).__name__})",
            where=str(path),
            hint="give a UTF-8 text file, or a .jsonl, .csv or .parquet question file",
        ) from None


def _refuse_unreadable(path: Path, hint: str) -> None:
    where = str(path)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"unknown suffix '{path.suffix}'",
            where=where,
            hint=f"data files end in {', '.join(SUFFIXES)}",
        )
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except FileNotFoundError:
        raise DataError(
            "no such file", where=where, hint="check the path, or the directory given by --data"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot be opened ({error.strerror})",
            where=where,
            hint="check that it is a file and that this user may read it",
        ) from None
    if not first:
        raise DataError("is empty", where=where, hint=hint)


class _Source:
    """One file: its rows through ``datasets``, and which line of the file a row came from."""

    def __init__(self, path: Path, form: Format, owner: str | None = None) -> None:
        self.path, self.form, self.owner = path, form, owner

    def rows(self) -> list[dict[str, Any]]:
        """All rows; whatever the parsers raise passes through."""
        import datasets
        from datasets.data_files import DataFilesDict, DataFilesList
        from datasets.packaged_modules.csv.csv import Csv
        from datasets.packaged_modules.json.json import Json
        from datasets.packaged_modules.parquet.parquet import Parquet

        name = str(self.path.resolve())
        # Given as a resolved list, so that [ and * in a file name are not taken for a pattern.
        files = DataFilesDict({"train": DataFilesList([name], [(name,)])})
        with tempfile.TemporaryDirectory() as lock_dir, _quiet():
            options: dict[str, Any] = {"cache_dir": lock_dir, "data_files": files}
            match self.path.suffix:
                case ".jsonl":
                    builder = Json(**options)
                case ".parquet":
                    builder = Parquet(**options)
                case _:
                    # Every cell a text: otherwise pandas reads "NA" as NaN and "007" as 7.
                    text = datasets.Value("string")
                    features = datasets.Features(dict.fromkeys(self._header(), text))
                    builder = Csv(**options, features=features, keep_default_na=False)
            return list(builder.as_streaming_dataset(split="train"))

    def blame(self, labelled: bool) -> None:
        """Find the first bad line with the plain parsers; return when they find none.

        Raises:
            DataError: the line that is at fault.
        """
        if self.path.suffix == ".parquet":
            return
        for line, row in self._lines():
            place = f"{self.path}:{line}"
            if isinstance(row, BadField):
                raise row.at(place, self.form.hint)
            try:
                self.form.question(row, labelled=labelled, owner=self.owner)
            except BadField as bad:
                raise bad.at(place, self.form.hint) from None

    def place(self, index: int) -> str:
        """``file:line`` of the row with this index (Parquet: ``file, row n``, from 1)."""
        if self.path.suffix == ".parquet":
            return f"{self.path}, row {index + 1}"
        for number, (line, _) in enumerate(self._lines()):
            if number == index:
                return f"{self.path}:{line}"
        return f"{self.path}, row {index + 1}"

    def places(self) -> Iterator[tuple[str, Any]]:
        """(``file:line``, row as dict or what is wrong with it)."""
        if self.path.suffix != ".parquet":
            yield from ((f"{self.path}:{line}", row) for line, row in self._lines())
            return
        try:
            rows = self.rows()
        except Exception as error:  # the parser's own, of any kind
            raise DataError(
                f"cannot be read as parquet ({type(error).__name__})",
                where=str(self.path),
                hint="check that the file really is parquet",
            ) from error
        yield from ((f"{self.path}, row {i}", row) for i, row in enumerate(rows, start=1))

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """(line, row as dict, or what is wrong with the line), blank lines left out."""
        if self.path.suffix == ".csv":
            yield from self._csv_lines()
            return
        with self.path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield line, _json_row(raw, self.form.columns[0])

    def _csv_lines(self) -> Iterator[tuple[int, Any]]:
        header = self._header()
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file)
            next(reader, None)
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield (
                        line,
                        BadField(
                            header[min(len(cells), len(header)) - 1],
                            f"is where {len(cells)} cells meet a header of {len(header)}",
                            "put a cell that holds a comma in double quotes",
                        ),
                    )
                else:
                    yield line, dict(zip(header, cells, strict=True))

    def _header(self) -> list[str]:
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file), [])
        framed = self.form.framed and "prompt" in header  # then the first column is not needed
        missing = [name for name in self.form.columns[framed:] if name not in header]
        if missing:
            raise DataError(
                f"the header has no column '{missing[0]}'",
                where=f"{self.path}:1",
                hint=f"name the columns {', '.join(self.form.names)} and optionally subject",
            )
        return header


def _json_row(raw: bytes, field: str) -> Any:
    try:
        row = json.loads(raw)
    except UnicodeDecodeError:
        return BadField(field, "is not UTF-8 text", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", 1)
        return BadField(field, f"cannot be reached: broken JSON at column {column}")
    return row if isinstance(row, dict) else BadField(field, "is missing: not a JSON object")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ``datasets`` from logging an error that is about to be reported better."""
    logger = logging.getLogger("datasets")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
