"""The questions of a data file: every row checked by :mod:`.rows`, then read by :mod:`.tables`.

Adversary: whoever made the file. A row that the guard and Arrow read differently is refused, so
that it cannot be one thing to whoever looks at it and another to the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from securefedcollm.errors import DataError
from securefedcollm.tuning.fields import BadField, Row
from securefedcollm.tuning.formats import Format
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.rows import BATCH, Checked, rows_of
from securefedcollm.tuning.tables import Shape, rows_of_table

_HELD: Final = 8 << 20
"""Bytes of rows that are held at a time, and one row more."""
_SHAPES: Final = 256

Found = tuple[str, Question | BadField]
"""``file:line`` (Parquet: ``file, row n``, from 1), and the question or what is wrong with it."""


def questions_of(
    path: Path, form: Format, *, labelled: bool, owner: str | None = None
) -> Iterator[Found]:
    """Every row of a file, in its order.

    Args:
        labelled: every row must have an answer.
        owner: the column that says whose record a row is.

    Raises:
        DataError: the file as a whole cannot be read.
    """

    def question(row: Row | BadField, whole: bytes = b"") -> Question | BadField:
        if isinstance(row, BadField):
            return row
        try:
            return form.question(row, labelled=labelled, owner=owner, whole=whole)
        except BadField as bad:
            return bad

    def settled(checked: Checked, row: Row | None) -> Question | BadField:
        if row == checked.row:
            return question(row, checked.whole)
        asked = question(checked.row, checked.whole)
        if isinstance(asked, BadField):
            return asked  # it says what is wrong with the row
        alike = row is not None and question(row) == asked
        return asked if alike else _two_ways(checked.row, row, form)

    rows = rows_of(path, form, owner)
    if path.suffix == ".parquet":
        yield from ((each.place, question(each.row, each.whole)) for each in rows)
        return
    shapes: set[Shape] = set()
    for batch in _batches(rows):
        good = [i for i, checked in enumerate(batch) if isinstance(checked.row, dict)]
        shapes.update(batch[i].shape for i in good)
        if len(shapes) > _SHAPES:  # Adversary: a table for every row takes hours
            raise DataError(
                f"its rows are of more than {_SHAPES} shapes",
                where=str(path),
                hint="give every column one type",
            )
        read = dict(zip(good, _read([batch[i] for i in good]), strict=True))
        for i, checked in enumerate(batch):
            yield checked.place, settled(checked, read.get(i))


def _two_ways(one: Row | BadField, other: Row | None, form: Format) -> BadField:
    mine, read = one if isinstance(one, dict) else {}, other or {}
    return BadField(
        next((name for name in read if read[name] != mine.get(name)), form.columns[0]),
        "is in a row that two readers read differently",
        "numbers are within 2^63, other values are texts; quotes in CSV are doubled",
    )


def _batches(rows: Iterator[Checked]) -> Iterator[list[Checked]]:
    batch: list[Checked] = []
    held = 0
    for checked in rows:
        batch.append(checked)
        held += len(checked.raw)
        if len(batch) == BATCH or held > _HELD:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _read(batch: Sequence[Checked]) -> list[Row | None]:
    """Each row as Arrow and ``datasets`` read it; None for one that they do not."""
    alike: dict[Shape, list[int]] = {}
    for i, checked in enumerate(batch):
        alike.setdefault(checked.shape, []).append(i)
    found: list[Row | None] = [None] * len(batch)
    for shape, members in alike.items():
        rows = _rows([batch[i] for i in members], shape)
        if rows is None:  # reading one by one shows which
            alone = [_rows([batch[i]], shape) for i in members]
            rows = [one[0] if one else None for one in alone]
        for i, row in zip(members, rows, strict=True):
            found[i] = row
    return found


def _rows(alike: list[Checked], shape: Shape) -> list[Row | None] | None:
    import pyarrow as pa

    try:
        table = alike[0].table([checked.raw for checked in alike], shape)
        rows: list[Row | None] = [*rows_of_table(table)]
    except pa.ArrowException:
        return None
    return rows if len(rows) == len(alike) else None
