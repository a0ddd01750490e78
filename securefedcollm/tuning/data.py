"""Data files and how they are read: JSON Lines, CSV or Parquet.

The content of a row depends on the task (:mod:`securefedcollm.tuning.formats`). ``datasets`` and
Arrow read the file, behind a guard (:mod:`securefedcollm.tuning.reading`).

An error names the file, the line and the field, never the value: the value may be a patient's.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Unpack

from securefedcollm.errors import DataError
from securefedcollm.tuning.fields import BadField
from securefedcollm.tuning.formats import Format, Layout, format_of, row_of
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.reading import Found, questions_of
from securefedcollm.tuning.tokenise import Kind

SUFFIXES: Final = (".jsonl", ".csv", ".parquet", ".npz")


def read_questions(
    path: str | Path,
    *,
    labelled: bool = True,
    owner: str | None = None,
    **layout: Unpack[Layout],
) -> list[Question]:
    """Read a ``.jsonl``, ``.csv``, ``.parquet`` or ``.npz`` file of records.

    Args:
        path: the file; its suffix says the format.
        labelled: every row must have an answer. When false it may be missing or null, and those
            questions carry ``answer=None``.
        owner: the column that says whose record a row is; then every row must have it.
        layout: the rows' task, as in :func:`.formats.format_of`.

    Returns:
        one :class:`Question` per row, in file order. ``group`` is the row's ``subject`` (or
        ``""``), and ``subject`` is the value of the column ``owner``.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is wrong; names the file, the
            line (Parquet and NumPy: the row) and the field.
    """
    form = format_of(**layout, folder=Path(path).parent)
    questions = []
    for place, found in _found(Path(path), form, labelled=labelled, owner=owner):
        if isinstance(found, BadField):
            raise found.at(place, form.hint)
        questions.append(found)
    return questions


def inspect_rows(
    path: Path, *, owner: str | None = None, **layout: Unpack[Layout]
) -> Iterator[tuple[str, Question | DataError]]:
    """Every row of a file with its place, and its question or why it cannot be used.

    Unlike :func:`read_questions` it goes on after a bad row, and answers may be missing.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    form = format_of(**layout, folder=path.parent)
    for place, found in _found(path, form, labelled=False, owner=owner):
        yield place, found.at(place, form.hint) if isinstance(found, BadField) else found


def _found(path: Path, form: Format, *, labelled: bool, owner: str | None) -> Iterator[Found]:
    _refuse_unreadable(path, form.hint)
    holds = False
    for found in questions_of(path, form, labelled=labelled, owner=owner):
        holds = True
        yield found
    if not holds:
        raise DataError("holds no records", where=str(path), hint=form.hint)


def write_questions(
    path: Path,
    questions: Sequence[Question],
    owner: str,
    kind: Kind = "multiple_choice",
    columns: Mapping[str, str] | None = None,
) -> None:
    """Write a ``.jsonl`` file that :func:`read_questions` reads back as the same questions.

    Args:
        owner: the column that says whose record each is.
        kind: the rows' task; ``columns``: their names in the file.

    Raises:
        DataError: it cannot be written.
    """
    rows = (json.dumps(row_of(q, kind, owner, columns), ensure_ascii=False) for q in questions)
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
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
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
            first = file.read(2)
    except FileNotFoundError:
        raise DataError(
            "no such file", where=where, hint="check the path, or the directory given by --data"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(
            f"cannot be opened ({getattr(error, 'strerror', 'no path')})",
            where=where,
            hint="check that it is a file and that this user may read it",
        ) from None
    if not first:
        raise DataError("is empty", where=where, hint=hint)
    if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError("is UTF-16 text", where=where, hint="save the file as UTF-8")
