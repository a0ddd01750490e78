"""Checks of the single fields of a data file's row; :mod:`.formats` puts them together.

An error names the column as the file does, never the value: the value may be a patient's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import DataError
from securefedcollm.foreign import decode_json
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.media import Medium

_WHOLE: Final = re.compile(r"([0-9]+)(?:\.0+)?")
_EXACT: Final = 2**53

Row = dict[str, Any]


class BadField(Exception):  # noqa: N818 - never leaves this room; becomes a DataError
    """A row's field that is not as it must be."""

    def __init__(self, field: str, problem: str, hint: str = "") -> None:
        super().__init__(field, problem)
        self.field, self.problem, self.hint = field, problem, hint

    def at(self, place: str, hint: str) -> DataError:
        """The error to report; ``hint`` is used where this one has none of its own."""
        return DataError(
            f"field '{self.field}' {self.problem}", where=place, hint=self.hint or hint
        )


def multiple_choice(
    row: Row, labelled: bool, frame: str
) -> tuple[str, tuple[str, ...], int | None]:
    prompt = prompt_of(row, "question", frame)
    choices = tuple(_choices(row))
    return prompt, choices, _answer(row, len(choices), labelled)


def prompt_of(row: Row, field: str, frame: str) -> str:
    """The column ``prompt`` as it is, or else ``field`` in its frame."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    return frame.replace("{}", _text(row, field))


def plain_text(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    bare = not labelled and row.get("answer", 0) is None
    return "", (_text(row, "text"),), None if bare else 0


def instruction(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    if not row.get("instruction") and row.get("messages"):
        row = _exchange(row)
    prompt = _text(row, "instruction")
    if row.get("input") not in (None, "") and row["input"] == row["input"]:
        more = _text(row, "input", empty=True)
        prompt = f"{prompt}\n\n{more}".strip()
    if not labelled and row.get("response") in (None, ""):
        return prompt, (), None
    return prompt, (_text(row, "response"),), 0


def _exchange(row: Row) -> Row:
    """The instruction and response of a chat: a system's turn if any, a user's, an assistant's."""
    turns = _decoded(row, "messages", _TURNS)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadField("messages", "is not a list of turns", _TURNS)
    roles = [turn.get("role") for turn in turns]
    asked = [role for role in roles if role != "assistant"]
    if asked not in (["user"], ["system", "user"]) or roles not in (asked, [*asked, "assistant"]):
        raise BadField("messages", "is not one question and its answer", _TURNS)
    try:
        said = [_text(turn, "content") for turn in turns]
    except BadField as bad:
        raise BadField("messages", f"has a turn whose content {bad.problem}", _TURNS) from None
    return {
        "instruction": "\n\n".join(said[: len(asked)]),
        "response": said[-1] if len(said) > len(asked) else None,
    }


_TURNS: Final = (
    'write [{"role": "user", "content": text}, {"role": "assistant", "content": text}], with a '
    "system turn first if there is one; a longer chat is a row for each answer"
)


def label_of(row: Row, labels: Sequence[str], numbers: bool, labelled: bool) -> int | None:
    """``numbers``: some label is a number, so an index could name another: 1 among 1, 2, 3."""
    value = row.get("label")
    hint = f"give one of {', '.join(labels)}"
    if not numbers:
        hint += f", or an index from 0 to {len(labels) - 1}"
    if value is None or value == "" or value != value:
        if labelled:
            raise BadField("label", "is missing", hint)
        return None
    index = _whole(value)
    for name in (value, index):
        if isinstance(name, str | int | float) and str(name).strip() in labels:
            return labels.index(str(name).strip())
    if numbers or isinstance(index, str):
        raise BadField("label", "is none of the study's task.labels", hint)
    return _index(value, "label", len(labels), "labels", hint)


def signal_of(row: Row, medium: Medium, folder: Path) -> tuple[bytes, bytes]:
    """The picture or recording in the medium's column, and the digest that identifies it.

    Args:
        folder: what a path is relative to, and must not leave.
    """
    value = row.get(medium.column)
    if value is None or value == "" or value != value:
        raise BadField(medium.column, "is missing")
    try:
        signal = medium.read(value, folder)
        return signal, medium.digest(signal)
    except UnreadableError as error:
        raise BadField(medium.column, str(error), medium.hint) from None


def owner_of(row: Row, column: str) -> str:
    """Whose record it is. 7 and "7 " are the same person in every format."""
    value = row.get(column)
    hint = "every record needs its subject, or privacy.subject another column"
    if isinstance(value, float) and abs(value) >= _EXACT:
        raise BadField(column, "is a number too large to be exact", "write it as a text, in quotes")
    if isinstance(value, float):
        value = _whole(value)  # a column with a gap, on its way through Arrow
    if value is None or value != value or not str(value).strip():
        raise BadField(column, "is missing", hint)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadField(column, f"is a {type(value).__name__}, not a name or number", hint)
    return str(value).strip()


def _text(row: Row, field: str, *, empty: bool = False) -> str:
    value = row.get(field)
    if value is None:
        raise BadField(field, "is missing")
    if not isinstance(value, str):
        raise BadField(field, f"is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise BadField(field, "is empty", "give it a text or delete the row")
    return value.strip()


def _choices(row: Row) -> list[str]:
    value = _decoded(row, "choices", 'write it as ["first choice", "second choice"]')
    if value is None:
        raise BadField("choices", "is missing")
    if not isinstance(value, list):
        raise BadField("choices", f"is a {type(value).__name__}, not a list of texts")
    if len(value) < 2:
        raise BadField("choices", f"has {len(value)} entries", "give at least two choices")
    for index, choice in enumerate(value):
        if not isinstance(choice, str):
            raise BadField("choices", f"entry {index} is a {type(choice).__name__}, not a text")
        if not choice.strip():
            raise BadField("choices", f"entry {index} is empty", "give it a text or remove it")
    return [choice.strip() for choice in value]


def _decoded(row: Row, field: str, hint: str) -> Any:
    """A value that is JSON text in a cell of CSV."""
    value = row.get(field)
    if not isinstance(value, str):
        return value
    try:
        decoded = decode_json(value)
        json.dumps(decoded, ensure_ascii=False).encode()  # no lone surrogate
    except ValueError:
        raise BadField(field, "is not a JSON list", hint) from None
    return decoded


def _answer(row: Row, count: int, labelled: bool) -> int | None:
    value = row.get("answer")
    hint = f"give the index of the right choice, 0 to {count - 1}"
    if value is None or value == "" or value != value:
        # A column with a gap turns into floats with NaN on its way through Arrow or pandas.
        if labelled:
            raise BadField("answer", "is missing", hint)
        return None
    return _index(value, "answer", count, "choices", hint)


def _index(value: Any, field: str, count: int, things: str, hint: str) -> int:
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadField(field, f"is a {type(value).__name__}, not an index", hint)
    if not 0 <= value < count:
        raise BadField(field, f"is none of the {count} {things}", hint)
    return value


def _whole(value: Any) -> Any:
    """A whole number, also from 1.0 or, in CSV, "1" or "1.0", as a column with a gap has them."""
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value.strip())):
        return int(found[1]) if len(found[1]) < 64 else 10**64  # Python refuses long ones
    return int(value) if isinstance(value, float) and value.is_integer() else value
