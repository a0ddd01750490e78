"""A study's questions for a simulation: public, private by silo, and test.

They are dealt out of one file, made by the built-in world, or read from a file for each
participant, as with real roles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.federation.plan import check_names, silo_names
from securefedcollm.study import Study
from securefedcollm.study.config import Task
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.digits import PER_SILO, Digits
from securefedcollm.tuning.formats import Layout
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import SplitPlan, silo_sizes, split_questions, without
from securefedcollm.tuning.wards import Wards
from securefedcollm.tuning.world import FAMILIES, Sizes, World, as_text


class Dealt:
    """``public`` questions without an answer are unlabelled; ``test`` ones carry their group.

    A silo's process asks for one silo's questions. So a part that an embedded world makes is made
    when it is first asked for, and kept.
    """

    def __init__(
        self,
        public: Callable[[], Iterable[Question]],
        silos: Mapping[str, tuple[Question, ...]],
        test: Callable[[], Iterable[Question]],
    ) -> None:
        self._public, self._test = public, test
        self.silos = silos

    @cached_property
    def public(self) -> tuple[Question, ...]:
        return tuple(self._public())

    @cached_property
    def test(self) -> tuple[Question, ...]:
        return tuple(self._test())

    def among(self, silos: Mapping[str, tuple[Question, ...]]) -> Dealt:
        """The same with other questions of the silos."""
        return Dealt(lambda: self.public, silos, lambda: self.test)


class _Silos(Mapping[str, tuple[Question, ...]]):
    """The silos' questions, made when they are first asked for."""

    def __init__(
        self, names: Sequence[str], make: Callable[[int, str], Iterable[Question]]
    ) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._make = make
        self._made: dict[str, tuple[Question, ...]] = {}

    def __getitem__(self, name: str) -> tuple[Question, ...]:
        if name not in self._made:
            self._made[name] = tuple(self._make(self._places[name], name))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class Files:
    """The participants' own files: each silo's by its name, and the server's."""

    silos: Mapping[str, Path]
    public: Path | None
    """None in a study whose server learns from none."""
    test: Path


def given_files(
    study: Study, silos: Sequence[tuple[str, Path]], public: Path | None, test: Path | None
) -> Files:
    """What ``simulate --silo … --public … --test …`` names.

    Raises:
        ConfigError: some are missing, or they are not those of the study's silos.
    """
    where, names = "--silo", [name for name, _ in silos]
    untaught = public is None and study.needs_public
    what = hint = ""
    if study.task.data.builtin:
        what, hint = "the built-in world makes its own records", "remove task.data.builtin"
    elif untaught or test is None or not silos:
        where = "--silo" if not silos else "--public" if untaught else "--test"
        what, hint = "this file is missing", "give --silo NAME=FILE …, --public and --test"
    if what:
        raise ConfigError(what, where=where, hint=hint)
    check_names(study, names, where)
    assert test is not None
    return Files(dict(sorted(silos)), public, test)


def deal(study: Study, data: Path | None, noisy: int = 0, files: Files | None = None) -> Dealt:
    """Deal the study's questions out, the same on every call.

    Nobody trains on a question of the training file that is in the test file as well.

    Args:
        study: its ``task.data`` says how.
        data: directory of the study's files.
        noisy: this many silos, the last ones, get random answers (:func:`noisy_answers`).
        files: nothing is dealt out: each participant has its own.

    Raises:
        ConfigError: files are needed and no directory was given, or the built-in world does not
            fit the study.
        DataError: a file is missing, has a bad row, or has too few questions.
    """
    spec = study.task.data
    _ = study.task.rows  # refuses own training
    if files is not None:
        public = tuple(read_public(study, files.public)) if files.public else ()
        silos = {name: tuple(read_records(study, path)) for name, path in files.silos.items()}
        test = tuple(read_records(study, files.test, private=False)[: spec.max_test])
        return Dealt(lambda: public, silos, lambda: test)
    dealt = _made_up(study) if spec.builtin else _split(study, data)
    if not noisy:
        return dealt
    return dealt.among({name: _noisy(own, study, name, noisy) for name, own in dealt.silos.items()})


def _made_up(study: Study) -> Dealt:
    """The built-in world's questions."""
    names, spec = silo_names(study), study.task.data
    if spec.builtin in CLASSIFIED:
        return _classified(study, CLASSIFIED[spec.builtin])
    sizes = Sizes(records_per_silo=spec.per_silo) if spec.per_silo else Sizes()
    world = World(seed=study.seed, silos=len(names), sizes=sizes, part=spec.part_of)
    counts = silo_sizes(len(names), sizes.records_per_silo, spec.skew)
    shares = _family_shares(study)
    texts = study.task.kind == "text"

    def records(place: int, name: str) -> Iterable[Question]:
        found = world.records(place, counts[place], shares[place])
        return map(as_text, found) if texts else found

    return Dealt(
        world.public_texts if texts else world.public,
        _Silos(names, records),
        lambda: map(as_text, world.tests()) if texts else world.tests(),
    )


CLASSIFIED: Final[dict[str, type[Digits | Wards]]] = {"digits": Digits, "wards": Wards}
"""The embedded worlds of pictures and of speech."""


def _classified(study: Study, kind: type[Digits | Wards]) -> Dealt:
    """The embedded world of pictures, or that of speech."""
    names, spec = silo_names(study), study.task.data
    world = kind(study.seed, len(names))
    counts = silo_sizes(len(names), spec.per_silo or PER_SILO, spec.skew)
    mixed = spec.partition == "iid"
    return Dealt(
        world.public,
        _Silos(names, lambda place, name: world.records(place, counts[place], mixed=mixed)),
        lambda: world.tests()[: spec.max_test],
    )


def _split(study: Study, data: Path | None) -> Dealt:
    """The questions of the study's training file, dealt out, and those of its test file."""
    names, spec = silo_names(study), study.task.data
    if spec.train is None:
        raise ConfigError(
            "this study names no records: every participant has its own file",
            where="task.data",
            hint="simulate --silo NAME=FILE … --public FILE --test FILE; or give train, test, "
            "public and per_silo",
        )
    if data is None:
        raise ConfigError(
            f"this study reads {spec.train} and {spec.test}",
            where="--data",
            hint="give the directory that holds them: --data DIR",
        )
    # study.checks ensures that studies on files have these
    assert spec.test
    assert spec.per_silo
    test = read_records(study, data / spec.test, private=False)
    plan = SplitPlan(
        silos=len(names),
        per_silo=spec.per_silo,
        public=spec.public or 0,
        public_labelled=spec.public_labelled,
        concentration=spec.alpha if spec.partition == "dirichlet" else None,
        skew=spec.skew,
    )
    questions = without(read_records(study, data / spec.train), test)
    split = split_questions(questions, plan, seed=study.seed)
    return Dealt(
        lambda: split.public_labelled + split.public_unlabelled,
        dict(zip(names, split.silos, strict=True)),
        lambda: test[: spec.max_test],
    )


def noisy_answers(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """The same questions with random answers.

    Every choice is equally likely (other records' answers would be right too often where most are
    the same); responses are permuted among the records.

    Raises:
        ConfigError: the records are plain texts, which have no answers.
    """
    if any(not question.prompt for question in questions):
        raise ConfigError(
            "plain texts have no answers to spoil",
            where="--noisy-silos",
            hint="leave it out, or choose another task.kind",
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    givers = [questions[int(i)] for i in draw.permutation(len(questions))]
    return tuple(
        replace(question, answer=int(draw.integers(len(question.choices))))
        if len(question.choices) > 1
        else replace(question, choices=giver.choices)
        for question, giver in zip(questions, givers, strict=True)
    )


def _noisy(
    questions: tuple[Question, ...], study: Study, name: str, noisy: int
) -> tuple[Question, ...]:
    names = silo_names(study)
    if name not in names[len(names) - noisy :]:
        return questions
    return noisy_answers(questions, study.seed)


def _family_shares(study: Study) -> list[npt.NDArray[np.float64] | None]:
    """Each silo's share of every disease family in its records; None: the hospital's own ones."""
    spec, silos = study.task.data, study.silos.count
    if spec.partition is None:
        return [None] * silos
    if spec.partition == "iid":
        return [np.full(len(FAMILIES), 1 / len(FAMILIES))] * silos
    rng = np.random.Generator(np.random.Philox(key=[study.seed, _FAMILIES_STREAM]))
    owners = rng.dirichlet(np.full(silos, spec.alpha), size=len(FAMILIES)).T + 1e-9
    return list(owners / owners.sum(axis=1, keepdims=True))


_FAMILIES_STREAM = 0xFA_111E5  # keeps this use of a study's seed apart from every other one


def read_records(
    study: Study, path: Path, *, private: bool = True, labelled: bool = True
) -> list[Question]:
    """The records of the study's task in a file; ``private`` ones with their owners, if needed.

    ``labelled``: every record must have its answer.

    Raises:
        DataError: the file is missing or has a bad row.
    """
    owner = study.subject if private else None
    return read_questions(path, labelled=labelled, owner=owner, **layout_of(study.task))


def read_public(study: Study, path: Path) -> list[Question]:
    """The server's public records; their answers may be missing.

    Raises:
        DataError: the file is missing or has a bad row, or a row that the study cannot use.
    """
    questions = read_records(study, path, private=False, labelled=False)
    if study.needs_responses and any(not question.choices for question in questions):
        raise DataError(
            "a public instruction without its response has no answer to compare",
            where=str(path),
            hint="add the responses, choose distillation.over: all, or set "
            "distillation.batch_unlabelled to 0",
        )
    return questions


def layout_of(task: Task) -> Layout:
    """How the rows of the task's files are read."""
    return Layout(kind=task.rows, labels=task.labels, columns=task.columns, template=task.template)
