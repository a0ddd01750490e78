"""What is wrong with a silo's data file, before it is tuned on.

A federation cannot look at its silos' records, so each silo has to look at its own: a silo with
wrong labels makes every other silo's model worse (``experiment --noisy-silos`` shows by how much).
Findings name lines, never values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from securefedcollm.errors import DataError
from securefedcollm.tuning.content import folded
from securefedcollm.tuning.data import inspect_rows
from securefedcollm.tuning.formats import Layout
from securefedcollm.tuning.media import medium_of
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import Progress, silent
from securefedcollm.tuning.sounds import RATE, clipped, is_sound, unfold
from securefedcollm.tuning.splits import record_id
from securefedcollm.tuning.tokenise import Kind, tokenise

_NO_LIMIT = 1 << 40
_FIXES = 20  # a file can be broken in more ways than anybody reads


@dataclass
class Cleaning:
    """What was found in a file; places are ``file:line``, or ``file, row n`` of Parquet.

    Attributes:
        rows: all of them.
        usable: those that can be read.
        unusable: (place, why): a missing or empty field, a wrong type, an answer out of range.
        fixes: the first twenty different hints about those.
        unlabelled: rows without an answer, which a silo cannot train on.
        duplicates: places of a record that is there twice or more; of a picture or recording, by
            its pixels or samples. Record-level privacy counts each as a record of its own, so its
            content is protected less.
        conflicts: places of the same question with the same choices and different answers.
        shortened: rows longer than ``max_tokens``, which lose the beginning of their prompt (a
            plain text and a recording: their end).
        unfit: rows whose choice or response alone is longer, which are refused.
        constant: pictures of one colour and silent recordings: nothing is seen or heard.
        clipped: recordings so loud that many samples are at the ends of their scale.
    """

    rows: int = 0
    usable: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)
    fixes: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)

    @property
    def stops_a_run(self) -> bool:
        """Whether tuning would refuse the file."""
        return bool(self.unusable or self.unlabelled or self.unfit or not self.usable)

    def refuse(self, place: str, error: DataError) -> None:
        """Note a row that cannot be used."""
        self.unusable.append((place, error.problem))
        if len(self.fixes) < _FIXES and error.hint not in self.fixes:
            self.fixes.append(error.hint)


def check_file(
    path: Path,
    *,
    owner: str | None = None,
    tokenizer: Any = None,
    max_tokens: int = 256,
    max_seconds: float | None = None,
    progress: Progress = silent,
    **layout: Unpack[Layout],
) -> Cleaning:
    """Look at every row of a data file.

    Args:
        tokenizer: of the model that will be tuned; None: lengths of texts are not checked.
        max_seconds: longer recordings are cut; None: their lengths are not checked.
        layout: the rows' task, as in :func:`.formats.format_of`.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    found, kind = Cleaning(), layout.get("kind", "multiple_choice")
    places: list[str] = []
    questions: list[Question] = []
    for place, row in inspect_rows(path, owner=owner, **layout):
        found.rows += 1
        if isinstance(row, DataError):
            found.refuse(place, row)
            continue
        places.append(place)
        questions.append(row)
        if row.answer is None and kind != "text":
            found.unlabelled.append(place)
        if row.signal:
            _look(found, place, row.signal, max_seconds)
    found.usable = len(questions)
    found.duplicates = _together(places, [record_id(question) for question in questions])
    found.conflicts = _conflicts(places, questions, kind)
    if tokenizer is not None:
        for done, (place, question) in enumerate(zip(places, questions, strict=True), start=1):
            _measure(found, place, question, tokenizer, max_tokens, kind)
            progress(done, len(questions), "tokens")
    return found


def _look(found: Cleaning, place: str, signal: bytes, max_seconds: float | None) -> None:
    if medium_of(signal).empty(signal):
        found.constant.append(place)
    if is_sound(signal):
        if clipped(signal):
            found.clipped.append(place)
        if max_seconds is not None and len(unfold(signal)) > max_seconds * RATE:
            found.shortened.append(place)


def _together(places: Sequence[str], keys: Sequence[Any]) -> list[list[str]]:
    """Groups of two or more places that share a key."""
    groups: dict[Any, list[str]] = {}
    for place, key in zip(places, keys, strict=True):
        groups.setdefault(key, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _conflicts(places: Sequence[str], questions: Sequence[Question], kind: Kind) -> list[list[str]]:
    """An instruction may have many good responses and a text asks nothing: no conflict there."""
    if kind in {"instruction", "text"}:
        return []
    asked: dict[Any, list[tuple[str, str]]] = {}
    for place, question in zip(places, questions, strict=True):
        if question.answer is not None:
            choices = tuple(sorted(folded(choice) for choice in question.choices))
            right = folded(question.choices[question.answer])
            asked.setdefault((folded(question.prompt), choices), []).append((place, right))
    return [
        [place for place, _ in group]
        for group in asked.values()
        if len({right for _, right in group}) > 1
    ]


def _measure(
    found: Cleaning, place: str, question: Question, tokenizer: Any, max_tokens: int, kind: Kind
) -> None:
    try:
        ((prompt, choices),) = tokenise([question], tokenizer, _NO_LIMIT, kind)
    except DataError as error:
        found.refuse(place, error)
        found.usable -= 1
        return
    longest = max((len(choice.ids) for choice in choices), default=0)
    if kind != "text" and max_tokens - longest < 2:
        found.unfit.append(place)
    elif len(prompt.ids) + longest > max_tokens:
        found.shortened.append(place)
