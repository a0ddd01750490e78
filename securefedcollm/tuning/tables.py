"""Rows as Arrow and ``datasets`` read them, from bytes that :mod:`.rows` has checked.

Everything stays in memory and has the columns and types that are named here. ``load_dataset`` would
report its calls to a public server and leave a copy of the records in the user's cache; and its
builders guess types, so that a text which looks like a date would become one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from securefedcollm.tuning.fields import Row

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal[
    "nothing", "text", "texts", "turns", "whole", "number", "truth", "samples", "greys", "colours"
]
Shape = tuple[tuple[str, Kind], ...]
"""Columns of a row and what each holds."""


def shape_of(row: Row) -> Shape:
    """The columns of a row; those that hold what no task reads, such as mappings, are left out."""
    kinds = ((name, _kind(row[name])) for name in sorted(row))
    return tuple((name, kind) for name, kind in kinds if kind)


def _kind(value: object) -> Kind | None:
    match value:
        case None:
            return "nothing"
        case bool():
            return "truth"
        case str():
            return "text"
        case int():
            return "whole"
        case float():
            return "number"
        case list() if all(isinstance(entry, str) for entry in value):
            return "texts"
        case list() if all(_is_turn(entry) for entry in value):
            return "turns"
        case list() if _are_whole(value):
            return "samples"
        case list() if all(isinstance(entry, list) and entry for entry in value):
            if all(_are_whole(entry) for entry in value):
                return "greys"
            if all(_are_whole(pixel) for entry in value for pixel in entry):
                return "colours"
    return None


def _are_whole(entry: object) -> bool:
    return isinstance(entry, list) and all(type(number) is int for number in entry)


def _is_turn(entry: object) -> bool:
    """Whether it is a turn of a chat with plain words."""
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in _TURN)


_TURN: Final = ("role", "content")


def json_table(lines: Sequence[bytes], shape: Shape) -> pa.Table:
    """Lines of JSON as a table with the columns ``shape``.

    Raises:
        pyarrow.ArrowException: Arrow reads a line differently, or not at all.
    """
    import pyarrow as pa
    import pyarrow.json as reader

    types = {
        "nothing": pa.null(),
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "turns": pa.list_(pa.struct([(key, pa.string()) for key in _TURN])),
        "whole": pa.int64(),
        "number": pa.float64(),
        "truth": pa.bool_(),
        "samples": pa.list_(pa.int64()),
        "greys": pa.list_(pa.list_(pa.int64())),
        "colours": pa.list_(pa.list_(pa.list_(pa.int64()))),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in shape])
    raw = b"\n".join(line.strip() for line in lines)
    return reader.read_json(
        io.BytesIO(raw),
        read_options=reader.ReadOptions(use_threads=False, block_size=len(raw) + 1),
        parse_options=reader.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="ignore"
        ),
    )


def csv_table(records: Sequence[bytes], shape: Shape, delimiter: str = ",") -> pa.Table:
    """Records of CSV as a table with the columns ``shape``: no cell becomes a number or null.

    Raises:
        pyarrow.ArrowException: Arrow reads a record differently, or not at all.
    """
    import pyarrow as pa
    import pyarrow.csv as reader

    names = [name for name, _ in shape]
    raw = b"".join(records)
    return reader.read_csv(
        io.BytesIO(raw),
        read_options=reader.ReadOptions(
            column_names=names, use_threads=False, block_size=len(raw) + 1
        ),
        parse_options=reader.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=reader.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def rows_of_table(table: pa.Table) -> list[Row]:
    """The rows of a table, as a data set of ``datasets`` gives them.

    Adversary: the maker of a Parquet file. Its metadata may declare a column to hold images or
    sound, which ``datasets`` would fetch from the paths or addresses that the file names.
    """
    from datasets import Dataset

    bare = table.replace_schema_metadata(None)
    rows: list[dict[str, Any]] = Dataset(bare, fingerprint="records").to_list()
    return rows
