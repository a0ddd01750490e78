"""What a row of a data file says, for every kind of task.

``multiple_choice``
    ``question`` (text; or ``prompt``, which is taken as it stands), ``choices`` (list of at least
    two texts; in CSV a JSON list in one cell), ``answer`` (index into ``choices``, from 0).
``classification``
    ``text`` (or ``prompt``), ``label`` (one of the study's ``task.labels``, or its index).
``instruction``
    ``instruction`` (text), ``response`` (text); training is on the response alone.
``text``
    ``text``: every token but the first is predicted. Where labels may be missing, ``answer: null``
    marks a text that is for distillation alone.

Any row may have ``subject`` (text; which topic), and a column of any name that says whose record it
is. An error names the field, never the value: the value may be a patient's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from securefedcollm.errors import DataError
from securefedcollm.foreign import decode_json
from securefedcollm.tuning.content import content_digest, folded
from securefedcollm.tuning.questions import Question
from securefedcollm.tuning.tokenise import Kind

QUESTION: Final = "Question: {}\nAnswer:"
CLASSIFY: Final = "Text: {}\nLabel:"
WORDS: Final = ("prompt", "question", "text", "instruction", "response")
"""Columns that some task reads words from."""

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


@dataclass(frozen=True)
class Format:
    """How the rows of one kind of task are read.

    ``columns``: those that every file must have; ``names``: all of the task's; ``hint``: a row,
    spelled out.
    """

    columns: tuple[str, ...]
    names: tuple[str, ...]
    hint: str
    read: Callable[[Row, bool], tuple[str, tuple[str, ...], int | None]]
    framed: bool = False  # a column "prompt" may stand in for the first of ``columns``

    def question(self, row: Row, *, labelled: bool, owner: str | None = None) -> Question:
        """One checked row.

        Raises:
            BadField: a field is missing or wrong.
        """
        prompt, choices, answer = self.read(row, labelled)
        subject = row.get("subject")
        if isinstance(subject, bool | dict | list) or subject != subject:
            raise BadField("subject", "is not a text", "give a text, a number or leave it out")
        if owner == "subject":  # then it is no topic
            subject = None
        return Question(
            prompt=prompt,
            choices=choices,
            answer=answer,
            group="" if subject is None else str(subject).strip(),
            subject=None if owner is None else _owner(row, owner),
            content=content_of(row),
        )


def format_of(kind: Kind, labels: Sequence[str] = ()) -> Format:
    """The format of the rows of a task; ``labels`` are those of a classification."""
    match kind:
        case "classification":
            return Format(
                ("text",),
                ("text", "label"),
                f'every row is {{"text": text, "label": one of {", ".join(labels)}}}',
                lambda row, labelled: (
                    _prompt(row, "text", CLASSIFY),
                    tuple(labels),
                    _label(row, labels, labelled),
                ),
                framed=True,
            )
        case "instruction":
            return Format(
                ("instruction",),
                ("instruction", "response"),
                'every row is {"instruction": text, "response": text}',
                _instruction,
            )
        case "text":
            hint = 'every row is {"text": text}'
            return Format(("text",), ("text",), hint, _plain_text)
        case "multiple_choice":
            return Format(
                ("question", "choices"),
                ("question", "choices", "answer"),
                'every row is {"question": text, "choices": [text, text, …], "answer": index}',
                _multiple_choice,
                framed=True,
            )


def content_of(row: Row) -> bytes:
    """SHA-256 of a row's own words: of every column that some task reads words from.

    It is the same whatever the study makes of the row: blind to the task's kind, to labels and
    answers, to columns that no task reads, to the names of columns, to white space and Unicode
    form, and to the order of choices. So a label that was mended, a column of numbers or a subject
    that was added, and a study of another kind leave a record the record that it was.
    """
    words = [folded(row[name]) for name in WORDS if isinstance(row.get(name), str)]
    return content_digest(words, _listed(row.get("choices")))


def _listed(choices: object) -> list[str]:
    if isinstance(choices, str):  # a CSV cell
        try:
            choices = decode_json(choices)
        except ValueError:
            choices = [choices]
    return [c for c in choices if isinstance(c, str)] if isinstance(choices, list) else []


def row_of(question: Question, kind: Kind, owner: str) -> Row:
    """The row that :meth:`Format.question` reads as ``question``; ``owner``: whose column."""
    response = question.choices[0] if question.choices else None
    row: Row
    match kind:
        case "multiple_choice":
            row = {"prompt": question.prompt, "choices": question.choices}
            row["answer"] = question.answer
        case "classification":
            row = {"prompt": question.prompt, "label": question.answer}
        case "instruction":
            row = {"instruction": question.prompt, "response": response}
        case "text":
            row = {"text": response, "answer": question.answer}
    if question.group:
        row["subject"] = question.group
    if question.subject is not None:
        row[owner] = question.subject
    return row


def _multiple_choice(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    prompt = _prompt(row, "question", QUESTION)
    choices = tuple(_choices(row))
    return prompt, choices, _answer(row, len(choices), labelled)


def _prompt(row: Row, field: str, frame: str) -> str:
    """The column ``prompt`` as it is, or else ``field`` in its frame."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    return frame.format(_text(row, field))


def _plain_text(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    bare = not labelled and row.get("answer", 0) is None
    return "", (_text(row, "text"),), None if bare else 0


def _instruction(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    prompt = _text(row, "instruction")
    if not labelled and row.get("response") in (None, ""):
        return prompt, (), None
    return prompt, (_text(row, "response"),), 0


def _label(row: Row, labels: Sequence[str], labelled: bool) -> int | None:
    value = row.get("label")
    hint = f"give one of {', '.join(labels)}, or an index from 0 to {len(labels) - 1}"
    if value is None or value == "" or value != value:
        if labelled:
            raise BadField("label", "is missing", hint)
        return None
    if isinstance(value, str) and value.strip() in labels:
        return labels.index(value.strip())
    if isinstance(value, str) and not value.strip().isdecimal():
        raise BadField("label", "is none of the study's task.labels", hint)
    return _index(value, "label", len(labels), "labels", hint)


def _owner(row: Row, column: str) -> str:
    """Whose record it is. 7 and "7 " are the same person in every format."""
    value = row.get(column)
    hint = "every record needs its subject, or privacy.subject another column"
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with a gap, on its way through Arrow
    if value is None or value != value or not str(value).strip():
        raise BadField(column, "is missing", hint)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadField(column, f"is a {type(value).__name__}, not a name or number", hint)
    return str(value).strip()


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None:
        raise BadField(field, "is missing")
    if not isinstance(value, str):
        raise BadField(field, f"is a {type(value).__name__}, not a text")
    if not value.strip():
        raise BadField(field, "is empty", "give it a text or delete the row")
    return value.strip()


def _choices(row: Row) -> list[str]:
    value = row.get("choices")
    if isinstance(value, str):  # a CSV cell
        try:
            value = decode_json(value)
            json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate
        except ValueError:
            raise BadField(
                "choices", "is not a JSON list", 'write it as ["first choice", "second choice"]'
            ) from None
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
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value) if len(value) < 64 else count  # a CSV cell; Python refuses long ones
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadField(field, f"is a {type(value).__name__}, not an index", hint)
    if not 0 <= value < count:
        raise BadField(field, f"is none of the {count} {things}", hint)
    return value
