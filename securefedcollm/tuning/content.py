"""The words of a record, in one canonical form: they identify it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from securefedcollm.foreign import decode_json, printable
from securefedcollm.tuning.fields import BadField, Row

WORDS: Final = ("prompt", "question", "text", "instruction", "input", "response")
"""Columns that some task reads words from, besides ``choices`` and ``messages``."""
_TIME: Final = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?(?: ?(?:Z|UTC|[-+][0-9:]{2,6}))?"
_SCALAR: Final = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?inf(?:inity)?"
    rf"|nan|nat|none|null|<na>|true|false|[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}(?:[T ]{_TIME})?|{_TIME}",
    re.IGNORECASE,
)
"""How programs write a value that is not text."""
_BRACKETS: Final = frozenset({("[", "]"), ("{", "}")})
_SPELT: Final = re.compile(r"""[\[{] ?["'\[{\]}0-9tfnTFN-]""")
_MOST_SPELT: Final = 1 << 20
_FILE_NAME: Final = re.compile(r".*\.(?:png|jpe?g|webp|bmp|tiff?|dcm)", re.IGNORECASE)
"""Not of recordings: rows in ledgers are known by this, and a longer list would renew them."""
_ANY_FILE: Final = re.compile(r".*\.[a-z][a-z0-9]{1,4}", re.IGNORECASE)
_LONG: Final = 1600
"""Numbers of the shortest recording that is read."""
_PROSE: Final = 4
"""Words of a text that no other row is likely to have."""


def folded(text: str) -> str:
    """``text`` in one Unicode form, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def content_digest(words: Iterable[str], choices: Iterable[str]) -> bytes:
    """SHA-256 (32 bytes) of a record's words, and of its choices as a set.

    Args:
        words: already :func:`folded`; empty ones and repetitions do not count.
    """
    listed = sorted({folded(choice) for choice in choices})
    canonical = json.dumps([sorted({*words} - {""}), listed]).encode()
    return hashlib.sha256(b"securefedcollm/record-content/v1\0" + canonical).digest()


def row_digest(texts: Iterable[str]) -> bytes:
    """SHA-256 (32 bytes) of all texts of a row as a set, already :func:`folded`. Empty for none."""
    said = sorted({*texts} - {""})
    if not said:
        return b""
    return hashlib.sha256(b"securefedcollm/record-row/v1\0" + json.dumps(said).encode()).digest()


def content_of(row: Row) -> bytes:
    """SHA-256 of a row's own words: of every column that some task reads words from.

    It does not depend on what the study makes of the row: the task's kind, labels and answers,
    columns that no task reads, names of columns, white space, Unicode form, and the order of
    choices. So a record stays the same if somebody mends its label, adds a column of numbers or a
    subject, or reads it in a study of another kind.

    Args:
        row: under our names of the columns.
    """
    said = (turn.get("content") for turn in _listed(row.get("messages")) if isinstance(turn, dict))
    words = [*(row.get(name) for name in WORDS), *said]
    return content_digest(
        [folded(text) for text in words if isinstance(text, str)],
        [choice for choice in _listed(row.get("choices")) if isinstance(choice, str)],
    )


def whole_row(row: Row, *, signals: bool = False) -> bytes:
    """SHA-256 of all text in a row, whatever a study reads of it and calls it; empty for none.

    It leaves out numbers, truth values and dates, because a CSV file makes texts of them. It also
    leaves out the names of columns and of a mapping's fields.

    Args:
        row: all of it, under the file's names of the columns.
        signals: the task reads pictures or recordings. Then files and arrays of numbers in the row
            count too if a label and names of image files are all its text. A flat list, as a
            recording may be written, counts only if there is neither one of these nor a file name.

    Raises:
        BadField: a cell holds a list that is too long to be taken apart.
    """
    texts = {text for name, value in row.items() for text in _texts(value, name)}
    if signals and not _tells_apart(texts):
        found = {one for value in row.values() for one in _contents(value, _is_array)}
        if not found and not any(_ANY_FILE.fullmatch(text) for text in texts):
            found = {one for value in row.values() for one in _contents(value, _is_recording)}
        texts |= found
    return row_digest(texts)


def _tells_apart(texts: Iterable[str]) -> bool:
    """Whether a row with a signal is known by its texts alone, as a study of texts knows it.

    Adversary: a study's author, who has a row read once as a picture or a recording and once as a
    text, or names other columns. So nothing that a study says decides this.
    """
    said = {text for text in texts if text and not _FILE_NAME.fullmatch(text)}
    return len(said) > 1 or any(len(text.split()) >= _PROSE for text in said)


def _contents(value: object, counts: Callable[[object], bool]) -> Iterator[str]:
    """Digests of the files in a value, and of the lists that count."""
    if isinstance(value, str):
        value = _written_out(folded(value), "")  # a cell of CSV
    if isinstance(value, bytes):
        yield f"file {hashlib.sha256(value).hexdigest()}"
    elif isinstance(value, dict):
        for one in value.values():
            yield from _contents(one, counts)
    elif counts(value):
        spelt = json.dumps(value, default=str)
        yield f"array {hashlib.sha256(spelt.encode()).hexdigest()}"
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _contents(one, counts)


def _is_array(value: object) -> bool:
    """Whether a value is rows of numbers, as a picture may be written."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], list | int | float)


def _is_recording(value: object) -> bool:
    """Whether a value is a long list of numbers, as a recording may be written."""
    return isinstance(value, list) and len(value) >= _LONG and isinstance(value[0], int | float)


def _texts(value: object, name: str) -> Iterator[str]:
    if isinstance(value, str):
        text = folded(value)
        inner = _written_out(text, name)  # a CSV cell may hold a list or mapping
        if inner is not None:
            yield from _texts(inner, name)
        elif not _SCALAR.fullmatch(text):
            yield text
    elif isinstance(value, dict):
        yield from _texts(list(value.values()), name)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, name)


def _written_out(text: str, name: str) -> list[object] | dict[str, object] | None:
    """The list or mapping that a text spells, as JSON or as Python prints it.

    Adversary: a file of some kilobytes whose cells are lists of millions of numbers.
    """
    if (text[:1], text[-1:]) not in _BRACKETS or not _SPELT.match(text):
        return None
    if len(text) > _MOST_SPELT:
        raise BadField(
            printable(name, 60),
            f"holds a list of over {_MOST_SPELT >> 20} MiB in one cell",
            "write the file as JSON Lines",
        )
    for read in (decode_json, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(found, list | dict):
            return found
    return None


def _listed(value: object) -> list[object]:
    if isinstance(value, str):  # a CSV cell
        try:
            value = decode_json(value) if len(value) <= _MOST_SPELT else [value]
        except ValueError:
            value = [value]
    return value if isinstance(value, list) else []
