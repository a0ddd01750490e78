"""What a row of a data file says, for every kind of task.

``multiple_choice``
    ``question`` (text; or ``prompt``, which is taken as it stands), ``choices`` (list of at least
    two texts; in CSV a JSON list in one cell), ``answer`` (index into ``choices``, from 0).
``classification``
    ``text`` (or ``prompt``), ``label`` (one of the study's ``task.labels``, or its index; where a
    label is a number itself, numbers are names and never an index).
``instruction``
    ``instruction`` (text), ``input`` (text that may follow it), ``response`` (text); or
    ``messages``, one exchange of a chat. Training is on the response alone.
``text``
    ``text``: every token but the first is predicted. Where labels may be missing, ``answer: null``
    marks a text that is for distillation alone.

Any row may have ``subject`` (text; which topic), and a column of any name that says whose record it
is. A study may give other names to the columns. An error names the column as the file does, never
the value: the value may be a patient's.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from securefedcollm.errors import DataError
from securefedcollm.foreign import decode_json, printable
from securefedcollm.tuning.content import content_digest, folded, row_digest
from securefedcollm.tuning.question import Ask, Question, lettered
from securefedcollm.tuning.tokenise import Form, Kind

QUESTION: Final = "Question: {}\nAnswer:"
CLASSIFY: Final = "Text: {}\nLabel:"
WORDS: Final = ("prompt", "question", "text", "instruction", "input", "response")
"""Columns that some task reads words from, besides ``choices`` and ``messages``."""
READ: Final = frozenset({*WORDS, "choices", "messages", "answer", "subject"})
"""Columns that a row is read with, whatever the task."""
_NAMES: Final[dict[Kind, tuple[str, ...]]] = {
    "multiple_choice": ("question", "choices", "answer"),
    "classification": ("text", "label"),
    "instruction": ("instruction", "response"),
    "text": ("text",),
}
_MUST: Final[dict[Kind, int]] = {
    "multiple_choice": 2,
    "classification": 1,
    "instruction": 1,
    "text": 1,
}
"""How many of them every file has; the others may be left out where answers may be missing."""
_INSTEAD: Final[dict[Kind, str]] = {
    "multiple_choice": "prompt",
    "classification": "prompt",
    "instruction": "messages",
    "text": "",
}
_WHOLE: Final = re.compile(r"([0-9]+)(?:\.0+)?")
_NUMBER: Final = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?")
_TIME: Final = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?(?: ?(?:Z|UTC|[-+][0-9:]{2,6}))?"
_SCALAR: Final = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?inf(?:inity)?"
    rf"|nan|nat|none|null|<na>|true|false|[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}(?:[T ]{_TIME})?|{_TIME}",
    re.IGNORECASE,
)
"""What a program writes for a value that is no text."""
_BRACKETS: Final = frozenset({("[", "]"), ("{", "}")})
_SPELT: Final = re.compile(r"""[\[{] ?["'\[{\]}0-9tfnTFN-]""")
_MOST_SPELT: Final = 1 << 20
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


class Layout(TypedDict, total=False):
    """What a study says about the rows of its files; see :func:`format_of`."""

    kind: Kind
    labels: Sequence[str]
    columns: Mapping[str, str]
    template: str | None


@dataclass(frozen=True)
class Format:
    """How the rows of one kind of task are read.

    ``columns``: those that every file must have; ``names``: all of the task's; both as they are
    called in the file. ``hint``: a row, spelled out. ``instead``: a column that may stand in for
    the first of ``columns``. ``renamed``: what the file calls some of our columns.
    """

    columns: tuple[str, ...]
    names: tuple[str, ...]
    hint: str
    read: Callable[[Row, bool], tuple[str, tuple[str, ...], int | None]]
    instead: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def missing(self, header: Sequence[str]) -> str | None:
        """The first column that a file with these columns lacks."""
        spared = bool(self.instead) and self.instead in header
        return next((name for name in self.columns[spared:] if name not in header), None)

    def named(self, name: str) -> str:
        """What the file calls our column ``name``."""
        return self.renamed.get(name, name)

    def _ours(self, row: Row) -> Row:
        """A row under our names. Another column under one of them is not read at all."""
        if not self.renamed:
            return row
        taken = {*self.renamed, *self.renamed.values()}
        if self.columns[0] in taken and self.columns[0] in row:
            taken.add(self.instead)  # the study asks for the other one
        rest = {name: value for name, value in row.items() if name not in taken}
        return rest | {ours: row[name] for ours, name in self.renamed.items() if name in row}

    def question(
        self, row: Row, *, labelled: bool, owner: str | None = None, whole: bytes = b""
    ) -> Question:
        """One checked row; ``whole``: see :func:`whole_row`.

        Raises:
            BadField: a field is missing or wrong.
        """
        ours = self._ours(row)
        try:
            prompt, choices, answer = self.read(ours, labelled)
            subject = ours.get("subject")
            if isinstance(subject, bool | dict | list) or subject != subject:
                raise BadField("subject", "is not a text", "give a text, a number or leave it out")
        except BadField as bad:
            raise BadField(self.named(bad.field), bad.problem, bad.hint) from None
        if owner == self.named("subject"):  # then it is no topic
            subject = None
        return Question(
            prompt=prompt,
            choices=choices,
            answer=answer,
            group="" if subject is None else str(subject).strip(),
            subject=None if owner is None else _owner(row, owner),
            content=content_of(ours),
            row=whole,
        )


def format_of(
    kind: Kind = "multiple_choice",
    labels: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
) -> Format:
    """The format of the rows of a task.

    Args:
        labels: those of a classification.
        columns: what the file calls our columns, where it has other names for them.
        template: the prompt, with ``{}`` where the text or question is.
    """
    renamed = dict(columns or {})
    numbers = any(_NUMBER.fullmatch(label) for label in labels)
    names = tuple(renamed.get(name, name) for name in _NAMES[kind])
    told = {
        "choices": "[text, text, …]",
        "answer": "index",
        "label": f"one of {', '.join(labels)}",
    }
    row = (
        f'"{name}": {told.get(our, "text")}' for our, name in zip(_NAMES[kind], names, strict=True)
    )
    reads: dict[Kind, Callable[[Row, bool], tuple[str, tuple[str, ...], int | None]]] = {
        "multiple_choice": lambda row, labelled: _multiple_choice(
            row, labelled, template or QUESTION
        ),
        "classification": lambda row, labelled: (
            _prompt(row, "text", template or CLASSIFY),
            tuple(labels),
            _label(row, labels, numbers, labelled),
        ),
        "instruction": _instruction,
        "text": _plain_text,
    }
    return Format(
        columns=names[: _MUST[kind]],
        names=names,
        hint=f"every row is {{{', '.join(row)}}}",
        read=reads[kind],
        instead=renamed.get(_INSTEAD[kind], _INSTEAD[kind]),
        renamed=renamed,
    )


def cue_of(asking: Asking) -> str:
    """What follows the text in every prompt that is made by a template."""
    frame = asking.template or (CLASSIFY if asking.kind == "classification" else QUESTION)
    return frame.partition("{}")[2]


@dataclass(frozen=True)
class Asking:
    """What a record is, and how a model is asked it (:mod:`.question`)."""

    kind: Kind = "multiple_choice"
    ask: Ask = "cloze"
    template: str | None = None
    """What its prompts were made by, if not by the default of its kind."""

    def put(self, questions: Sequence[Question], tokenizer: Any) -> tuple[list[Question], Form]:
        """The questions as the model with this ``tokenizer`` is asked them, and their form.

        Raises:
            DataError: a question has more choices than there are letters.
        """
        if self.ask == "cloze":
            return [*questions], self.kind
        chat, cue = bool(getattr(tokenizer, "chat_template", None)), cue_of(self)
        return [lettered(question, cue, chat=chat) for question in questions], "letters"


def content_of(row: Row) -> bytes:
    """SHA-256 of a row's own words: of every column that some task reads words from.

    It is the same whatever the study makes of the row: blind to the task's kind, to labels and
    answers, to columns that no task reads, to the names of columns, to white space and Unicode
    form, and to the order of choices. So a label that was mended, a column of numbers or a subject
    that was added, and a study of another kind leave a record the record that it was.

    Args:
        row: under our names of the columns.
    """
    said = (turn.get("content") for turn in _listed(row.get("messages")) if isinstance(turn, dict))
    words = [*(row.get(name) for name in WORDS), *said]
    return content_digest(
        [folded(text) for text in words if isinstance(text, str)],
        [choice for choice in _listed(row.get("choices")) if isinstance(choice, str)],
    )


def whole_row(row: Row) -> bytes:
    """SHA-256 of all text in a row, whatever a study reads of it and calls it; empty of none.

    Numbers, truth values and dates have no part in it, because a CSV file makes texts of them. Nor
    have the names of columns and of the fields of a mapping.

    Args:
        row: all of it, under the file's names of the columns.

    Raises:
        BadField: a cell holds a list that is too long to be taken apart.
    """
    return row_digest(text for name, value in row.items() for text in _texts(value, name))


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


def row_of(
    question: Question, kind: Kind, owner: str, columns: Mapping[str, str] | None = None
) -> Row:
    """The row that :meth:`Format.question` reads as ``question``; ``owner``: whose column."""
    response = question.choices[0] if question.choices else None
    row: Row
    match kind:
        case "multiple_choice":
            row = {"prompt": question.prompt, "choices": question.choices}
            row["answer"] = question.answer
        case "classification":
            right = None if question.answer is None else question.choices[question.answer]
            row = {"prompt": question.prompt, "label": right}
        case "instruction":
            row = {"instruction": question.prompt, "response": response}
        case "text":
            row = {"text": response, "answer": question.answer}
    if question.group:
        row["subject"] = question.group
    row = {(columns or {}).get(name, name): value for name, value in row.items()}
    if question.subject is not None:
        row[owner] = question.subject
    return row


def _multiple_choice(
    row: Row, labelled: bool, frame: str
) -> tuple[str, tuple[str, ...], int | None]:
    prompt = _prompt(row, "question", frame)
    choices = tuple(_choices(row))
    return prompt, choices, _answer(row, len(choices), labelled)


def _prompt(row: Row, field: str, frame: str) -> str:
    """The column ``prompt`` as it is, or else ``field`` in its frame."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    return frame.replace("{}", _text(row, field))


def _plain_text(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
    bare = not labelled and row.get("answer", 0) is None
    return "", (_text(row, "text"),), None if bare else 0


def _instruction(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
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


def _label(row: Row, labels: Sequence[str], numbers: bool, labelled: bool) -> int | None:
    """``numbers``: some label is one. An index would be another's name then: 1 among 1, 2, 3."""
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


def _owner(row: Row, column: str) -> str:
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
    """A whole number as one, also as 1.0 or, in CSV, "1" or "1.0": a column that had a gap."""
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value.strip())):
        return int(found[1]) if len(found[1]) < 64 else 10**64  # Python refuses long ones
    return int(value) if isinstance(value, float) and value.is_integer() else value
