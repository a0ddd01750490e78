"""A study's questions, dealt out for a simulation: public, private by silo, and test.

A real silo reads its own file instead and never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import silo_names
from securefedcollm.study import Study
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.questions import Question
from securefedcollm.tuning.splits import silo_sizes, split_questions, without
from securefedcollm.tuning.world import FAMILIES, Sizes, World


@dataclass(frozen=True)
class Dealt:
    """``public`` questions without an answer are unlabelled; ``test`` ones carry their group."""

    public: tuple[Question, ...]
    silos: dict[str, tuple[Question, ...]]
    test: tuple[Question, ...]


def deal(study: Study, data: Path | None, noisy: int = 0) -> Dealt:
    """Deal the study's questions out, the same on every call.

    A question of the test file that is in the training file as well is nobody's to train on.

    Args:
        study: with ``task.data``, which says how.
        data: directory of the study's files.
        noisy: so many silos, the last ones, get meaningless answers (:func:`noisy_answers`).

    Raises:
        ConfigError: files are needed and no directory was given, or the built-in world does not
            fit the study.
        DataError: a file is missing, has a bad row, or has too few questions.
    """
    names = silo_names(study)
    spec = study.task.data
    if spec.builtin:
        sizes = Sizes(records_per_silo=spec.per_silo) if spec.per_silo else Sizes()
        world = World(seed=study.seed, silos=len(names), sizes=sizes)
        counts = silo_sizes(len(names), sizes.records_per_silo, spec.skew)
        shares = _family_shares(study)
        return Dealt(
            public=tuple(world.public()),
            silos={
                name: _noisy(tuple(world.records(i, counts[i], shares[i])), study, name, noisy)
                for i, name in enumerate(names)
            },
            test=tuple(world.tests()),
        )
    if data is None:
        raise ConfigError(
            f"this study reads {spec.train} and {spec.test}",
            where="--data",
            hint="give the directory that holds them: --data DIR",
        )
    # study.checks has seen to it that file studies have these
    assert spec.train
    assert spec.test
    assert spec.per_silo
    test = read_records(study, data / spec.test, private=False)
    split = split_questions(
        without(read_records(study, data / spec.train), test),
        silos=len(names),
        per_silo=spec.per_silo,
        public=spec.public or 0,
        public_labelled=spec.public_labelled,
        seed=study.seed,
        concentration=spec.alpha if spec.partition == "dirichlet" else None,
        skew=spec.skew,
    )
    return Dealt(
        public=split.public_labelled + split.public_unlabelled,
        silos={
            name: _noisy(questions, study, name, noisy)
            for name, questions in zip(names, split.silos, strict=True)
        },
        test=tuple(test[: spec.max_test]),
    )


def noisy_answers(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """The same questions with answers that mean nothing.

    Of choices every one is as likely (other records' answers would be right too often where most
    are the same); responses are passed on among the records.

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
    """By silo the part of each disease family in its records; None: the hospital's own ones."""
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
    """The records of the study's task in a file; ``private`` ones with whose they are, if asked.

    ``labelled``: every record must have its answer.

    Raises:
        DataError: the file is missing or has a bad row.
    """
    task = study.task
    owner = study.subject if private else None
    return read_questions(path, kind=task.kind, labels=task.labels, labelled=labelled, owner=owner)
