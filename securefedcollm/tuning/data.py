"""Data files and how they are read: JSON Lines, CSV or Parquet.

What a row holds depends on the task: :mod:`securefedcollm.tuning.formats`. How a file is read, by
``datasets`` and Arrow behind a guard: :mod:`securefedcollm.tuning.reading`.

An error names the file, the line and the field, never the value: the value may be a patient's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from securefedcollm.errors import DataError
from securefedcollm.tuning.formats import BadField, format_of, row_of
from securefedcollm.tuning.questions import Question
from securefedcollm.tuning.reading import questions_of
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
    questions = []
    for place, found in questions_of(path, form, labelled=labelled, owner=owner):
        if isinstance(found, BadField):
            raise found.at(place, form.hint)
        questions.append(found)
    if not questions:
        raise DataError("holds no questions", where=str(path), hint=form.hint)
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
    for place, found in questions_of(path, form, labelled=False, owner=owner):
        yield place, found.at(place, form.hint) if isinstance(found, BadField) else found


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
