"""Documents and what a shelf holds of them: texts to embed, with an id that is a citation.

A ``.txt`` or ``.md`` file has one passage for each paragraph, named by its first line:
``guide.md:12``. A heading of Markdown goes with the paragraph below it. The rows of ``.jsonl``,
``.csv`` and ``.parquet`` files are texts (column ``text``), named by their line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from securefedcollm.errors import DataError
from securefedcollm.tuning.data import SUFFIXES, inspect_rows, read_text

PLAIN: Final = (".txt", ".md")


def read_documents(
    files: Sequence[Path], columns: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """(id, text) of everything in ``files``, in order.

    Ids hold the files' names, not their directories: whoever fetches a passage sees its id.

    Args:
        columns: the file's own name of the column ``text``.

    Raises:
        DataError: a file is missing, unreadable or empty, has a bad row, or is called as another;
            names the file and line.
    """
    found: list[tuple[str, str]] = []
    seen: dict[str, Path] = {}
    for path in files:
        other = seen.setdefault(path.name, path)
        if other is not path:
            raise DataError(
                f"is called as {other}: nobody could tell their passages apart",
                where=str(path),
                hint="rename one of the two",
            )
        before = len(found)
        found += _paragraphs(path) if path.suffix in PLAIN else _rows(path, columns)
        if len(found) == before:
            raise DataError("holds no text", where=str(path), hint="leave it out")
    return found


def _rows(path: Path, columns: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"unknown suffix '{path.suffix}'",
            where=str(path),
            hint=f"documents end in {', '.join((*PLAIN, *SUFFIXES))}",
        )
    for place, row in inspect_rows(path, kind="text", columns=columns or {}):
        if isinstance(row, DataError):
            raise row
        yield path.name + place.removeprefix(str(path)), row.choices[0]


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs, which blank lines part."""
    (text,) = read_text(path)
    block: list[str] = []
    first = 0
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            first = first if block else number
            block.append(line.rstrip())
            continue
        heading = path.suffix == ".md" and all(part.startswith("#") for part in block)
        if block and not heading:
            yield f"{path.name}:{first}", "\n".join(block)
            block = []
    if block:  # a heading with nothing below it
        yield f"{path.name}:{first}", "\n".join(block)
