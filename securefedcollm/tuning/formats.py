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
``image_classification``
    ``image`` (the path of an image file, relative to the data file; or rows of numbers from 0 to
    255, or of three of them a pixel; or, in Parquet, an image file's bytes, as ``datasets`` has
    its ``Image`` feature), ``label`` as above.
``audio_classification``
    ``audio`` (the path of a WAV or FLAC file, relative to the data file; or a list of samples from
    -32768 to 32767; or, in Parquet, a file's bytes, as ``datasets`` has its ``Audio`` feature),
    ``label`` as above.
``text``
    ``text``: every token but the first is predicted. Where labels may be missing, ``answer: null``
    marks a text that is for distillation alone.

Any row may have ``subject`` (text; which topic), and a column of any name that says whose record it
is. A study may give other names to the columns. An error names the column as the file does, never
the value: the value may be a patient's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

from securefedcollm.tuning.content import WORDS, content_of
from securefedcollm.tuning.fields import (
    BadField,
    Row,
    instruction,
    label_of,
    multiple_choice,
    owner_of,
    plain_text,
    prompt_of,
    signal_of,
)
from securefedcollm.tuning.media import MEDIA, medium_of
from securefedcollm.tuning.question import Ask, Question, lettered
from securefedcollm.tuning.tokenise import Form, Kind

QUESTION: Final = "Question: {}\nAnswer:"
CLASSIFY: Final = "Text: {}\nLabel:"
READ: Final = frozenset({*WORDS, "choices", "messages", "answer", "subject"})
"""Columns that a row is read with, whatever the task."""
_NAMES: Final[dict[Kind, tuple[str, ...]]] = {
    "multiple_choice": ("question", "choices", "answer"),
    "classification": ("text", "label"),
    "instruction": ("instruction", "response"),
    "text": ("text",),
    "image_classification": ("image", "label"),
    "audio_classification": ("audio", "label"),
}
_MUST: Final[dict[Kind, int]] = {
    "multiple_choice": 2,
    "classification": 1,
    "instruction": 1,
    "text": 1,
    "image_classification": 1,
    "audio_classification": 1,
}
"""How many of them every file has; the others may be left out where answers may be missing."""
_INSTEAD: Final[dict[Kind, str]] = {
    "multiple_choice": "prompt",
    "classification": "prompt",
    "instruction": "messages",
    "text": "",
    "image_classification": "",
    "audio_classification": "",
}
_NUMBER: Final = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?")


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
    the first of ``columns``. ``renamed``: what the file calls some of our columns. ``signal``:
    a row's picture or recording and its digest, where the task has one.
    """

    columns: tuple[str, ...]
    names: tuple[str, ...]
    hint: str
    read: Callable[[Row, bool], tuple[str, tuple[str, ...], int | None]]
    instead: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    signal: Callable[[Row], tuple[bytes, bytes]] | None = None

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
        signal, digest = b"", b""
        try:
            if self.signal is not None:
                signal, digest = self.signal(ours)
            prompt, choices, answer = self.read(ours, labelled)
            prompt = medium_of(signal).name(digest) if signal else prompt
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
            subject=None if owner is None else owner_of(row, owner),
            content=digest or content_of(ours),
            row=whole,
            signal=signal,
        )


def format_of(
    kind: Kind = "multiple_choice",
    labels: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    folder: Path = Path(),
) -> Format:
    """The format of the rows of a task.

    Args:
        folder: what paths in rows are relative to, and must not leave.
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
        **{medium.column: f"path of a {medium.file}" for medium in MEDIA.values()},
    }
    row = (
        f'"{name}": {told.get(our, "text")}' for our, name in zip(_NAMES[kind], names, strict=True)
    )
    medium = MEDIA.get(kind)

    def classes(row: Row, labelled: bool) -> tuple[str, tuple[str, ...], int | None]:
        return "", tuple(labels), label_of(row, labels, numbers, labelled)

    reads: dict[Kind, Callable[[Row, bool], tuple[str, tuple[str, ...], int | None]]] = {
        "multiple_choice": lambda row, labelled: multiple_choice(
            row, labelled, template or QUESTION
        ),
        "classification": lambda row, labelled: (
            prompt_of(row, "text", template or CLASSIFY),
            tuple(labels),
            label_of(row, labels, numbers, labelled),
        ),
        "instruction": instruction,
        "text": plain_text,
        "image_classification": classes,
        "audio_classification": classes,
    }
    return Format(
        columns=names[: _MUST[kind]],
        names=names,
        hint=f"every row is {{{', '.join(row)}}}",
        read=reads[kind],
        instead=renamed.get(_INSTEAD[kind], _INSTEAD[kind]),
        renamed=renamed,
        signal=None if medium is None else lambda row: signal_of(row, medium, folder),
    )


def cue_of(asking: Asking) -> str:
    """What follows the text in every prompt that is made by a template."""
    frame = asking.template or (CLASSIFY if asking.kind == "classification" else QUESTION)
    return frame.partition("{}")[2]


@dataclass(frozen=True)
class Asking:
    """What a record is, and how it is put to a model (:mod:`.question`)."""

    kind: Kind = "multiple_choice"
    ask: Ask = "cloze"
    template: str | None = None
    """The template of its prompts, if not the default of its kind."""

    def put(self, questions: Sequence[Question], tokenizer: Any) -> tuple[list[Question], Form]:
        """The questions as the model with this ``tokenizer`` is asked them, and their form.

        Raises:
            DataError: a question has more choices than there are letters.
        """
        if self.ask == "cloze":
            return [*questions], self.kind
        chat, cue = bool(getattr(tokenizer, "chat_template", None)), cue_of(self)
        return [lettered(question, cue, chat=chat) for question in questions], "letters"


def row_of(
    question: Question, kind: Kind, owner: str, columns: Mapping[str, str] | None = None
) -> Row:
    """The row that :meth:`Format.question` reads as ``question``; ``owner``: the owner's column."""
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
        case "image_classification" | "audio_classification":
            right = None if question.answer is None else question.choices[question.answer]
            medium = MEDIA[kind]
            row = {medium.column: medium.as_array(question.signal), "label": right}
    if question.group:
        row["subject"] = question.group
    row = {(columns or {}).get(name, name): value for name, value in row.items()}
    if question.subject is not None:
        row[owner] = question.subject
    return row
