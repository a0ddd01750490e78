"""Multiple-choice question files and how they are read.

A file is JSON Lines, CSV or Parquet with the fields ``question`` (text; or ``prompt``, which is
taken as it stands), ``choices`` (list of at
least two texts; in CSV a JSON list in one cell), ``answer`` (index into ``choices``) and optionally
``subject`` (text; which topic), and a column of any name that says whose record it is. Files are
read by the builders of the ``datasets`` library, used directly: its ``load_dataset`` reports every
call to a public server and leaves an Arrow copy of the records in the user's cache, and a silo's
private file deserves neither.

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
from securefedcollm.tuning.questions import Question

SUFFIXES: Final = (".jsonl", ".csv", ".parquet")
PROMPT: Final = "Question: {question}\nAnswer:"
"""How a question file's text becomes the prompt."""

_ROW_HINT = 'every row is {"question": text, "choices": [text, text, …], "answer": index}'


def read_questions(
    path: str | Path, *, labelled: bool = True, owner: str | None = None
) -> list[Question]:
    """Read a ``.jsonl``, ``.csv`` or ``.parquet`` file of multiple-choice questions.

    Args:
        path: the file; its suffix says the format.
        labelled: every row must have an ``answer``. When false the answer may be missing or null,
            and those questions carry ``answer=None``.
        owner: the column that says whose record a row is; then every row must have it.

    Returns:
        one :class:`Question` per row, in file order, with the prompt of :data:`PROMPT`, ``group``
        the row's ``subject`` (or ``""``), and ``subject`` the value of the column ``owner``.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is wrong; names the file, the
            line (Parquet: the row) and the field.
    """
    path = Path(path)
    _refuse_unreadable(path)
    source = _Source(path, owner)
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
            hint=f"check that the file really is {path.suffix[1:]}; {_ROW_HINT}",
        ) from error
    if not rows:
        raise DataError("holds no questions", where=str(path), hint=_ROW_HINT)
    questions = []
    for index, row in enumerate(rows):
        try:
            questions.append(_question(row, labelled=labelled, owner=owner))
        except _BadField as bad:
            raise bad.at(source.place(index)) from None
    return questions


def write_questions(path: Path, questions: Sequence[Question], owner: str) -> None:
    """Write a ``.jsonl`` file that :func:`read_questions` reads back as the same questions.

    Args:
        owner: the column for whose record each is.

    Raises:
        DataError: it cannot be written.
    """
    lines = []
    for question in questions:
        row: dict[str, Any] = {"prompt": question.prompt, "choices": question.choices}
        row["answer"] = question.answer
        if question.group:
            row["subject"] = question.group
        if question.subject is not None:
            row[owner] = question.subject
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        path.write_text("".join(lines), encoding="utf-8")
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


class _BadField(Exception):  # noqa: N818 - never leaves this module; becomes a DataError
    def __init__(self, field: str, problem: str, hint: str = _ROW_HINT) -> None:
        super().__init__(field, problem)
        self.field, self.problem, self.hint = field, problem, hint

    def at(self, place: str) -> DataError:
        return DataError(f"field '{self.field}' {self.problem}", where=place, hint=self.hint)


def _question(row: dict[str, Any], *, labelled: bool, owner: str | None = None) -> Question:
    """One checked row; raises :class:`_BadField`."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        prompt = PROMPT.format(question=_text(row, "question"))
    choices = _choices(row)
    subject = row.get("subject")
    if isinstance(subject, bool | dict | list) or subject != subject:
        raise _BadField("subject", "is not a text", "give a text, a number or leave it out")
    if owner == "subject":  # then it is no topic
        subject = None
    return Question(
        prompt=prompt.strip(),
        choices=tuple(choices),
        answer=_answer(row, len(choices), labelled),
        group="" if subject is None else str(subject).strip(),
        subject=None if owner is None else _owner(row, owner),
    )


def _owner(row: dict[str, Any], column: str) -> str:
    """Whose record it is. 7 and "7 " are the same person in every format."""
    value = row.get(column)
    hint = "every record needs its subject, or privacy.subject another column"
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with a gap, on its way through Arrow
    if value is None or value != value or not str(value).strip():
        raise _BadField(column, "is missing", hint)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _BadField(column, f"is a {type(value).__name__}, not a name or number", hint)
    return str(value).strip()


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        raise _BadField(field, "is missing")
    if not isinstance(value, str):
        raise _BadField(field, f"is a {type(value).__name__}, not a text")
    if not value.strip():
        raise _BadField(field, "is empty", "give it a text or delete the row")
    return value.strip()


def _choices(row: dict[str, Any]) -> list[str]:
    value = row.get("choices")
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            raise _BadField(
                "choices", "is not a JSON list", 'write it as ["first choice", "second choice"]'
            ) from None
    if value is None:
        raise _BadField("choices", "is missing")
    if not isinstance(value, list):
        raise _BadField("choices", f"is a {type(value).__name__}, not a list of texts")
    if len(value) < 2:
        raise _BadField("choices", f"has {len(value)} entries", "give at least two choices")
    for index, choice in enumerate(value):
        if not isinstance(choice, str):
            raise _BadField("choices", f"entry {index} is a {type(choice).__name__}, not a text")
        if not choice.strip():
            raise _BadField("choices", f"entry {index} is empty", "give it a text or remove it")
    return [choice.strip() for choice in value]


def _answer(row: dict[str, Any], count: int, labelled: bool) -> int | None:
    value = row.get("answer")
    hint = f"give the index of the right choice, 0 to {count - 1}"
    if value is None or value == "" or value != value:
        # A column with a gap turns into floats with NaN on its way through Arrow or pandas.
        if labelled:
            raise _BadField("answer", "is missing", hint)
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)  # a CSV cell
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _BadField("answer", f"is a {type(value).__name__}, not an index", hint)
    if not 0 <= value < count:
        raise _BadField("answer", f"is {value}, but there are {count} choices", hint)
    return value


def _refuse_unreadable(path: Path) -> None:
    where = str(path)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"unknown suffix '{path.suffix}'",
            where=where,
            hint=f"question files end in {', '.join(SUFFIXES)}",
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
        raise DataError("is empty", where=where, hint=_ROW_HINT)


class _Source:
    """One file: its rows through ``datasets``, and which line of the file a row came from."""

    def __init__(self, path: Path, owner: str | None = None) -> None:
        self.path = path
        self.owner = owner

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
            if isinstance(row, _BadField):
                raise row.at(place)
            try:
                _question(row, labelled=labelled, owner=self.owner)
            except _BadField as bad:
                raise bad.at(place) from None

    def place(self, index: int) -> str:
        """``file:line`` of the row with this index (Parquet: ``file, row n``, from 1)."""
        if self.path.suffix == ".parquet":
            return f"{self.path}, row {index + 1}"
        for number, (line, _) in enumerate(self._lines()):
            if number == index:
                return f"{self.path}:{line}"
        return f"{self.path}, row {index + 1}"

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """(line, row as dict, or what is wrong with the line), blank lines left out."""
        if self.path.suffix == ".csv":
            yield from self._csv_lines()
            return
        with self.path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield line, _json_row(raw)

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
                        _BadField(
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
        needed = ("prompt" if "prompt" in header else "question", "choices")
        missing = [name for name in needed if name not in header]
        if missing:
            raise DataError(
                f"the header has no column '{missing[0]}'",
                where=f"{self.path}:1",
                hint="name the columns question, choices, answer and optionally subject",
            )
        return header


def _json_row(raw: bytes) -> Any:
    try:
        row = json.loads(raw)
    except UnicodeDecodeError:
        return _BadField("question", "is not UTF-8 text", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", 1)
        return _BadField(
            "question", f"cannot be reached: broken JSON at column {column}", _ROW_HINT
        )
    return row if isinstance(row, dict) else _BadField("question", "is missing: not a JSON object")


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
