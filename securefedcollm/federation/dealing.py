"""A study's questions, dealt out for a simulation: public, private by silo, and test.

A real silo reads its own file instead and never comes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import silo_names
from securefedcollm.study import Study
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.questions import Question
from securefedcollm.tuning.splits import split_questions
from securefedcollm.tuning.world import Sizes, World


@dataclass(frozen=True)
class Dealt:
    """``public`` questions without an answer are unlabelled; ``test`` ones carry their group."""

    public: tuple[Question, ...]
    silos: dict[str, tuple[Question, ...]]
    test: tuple[Question, ...]


def deal(study: Study, data: Path | None) -> Dealt:
    """Deal the study's questions out, the same on every call.

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
        return Dealt(
            public=tuple(world.public()),
            silos={name: tuple(world.records(i)) for i, name in enumerate(names)},
            test=tuple(world.tests()),
        )
    if data is None:
        raise ConfigError(
            f"this study reads {spec.train} and {spec.test}",
            where="--data",
            hint="give the directory that holds them: --data DIR",
        )
    # study.checks has seen to it that file studies have all of these
    assert spec.train
    assert spec.test
    assert spec.public
    assert spec.per_silo
    split = split_questions(
        read_records(study, data / spec.train),
        silos=len(names),
        per_silo=spec.per_silo,
        public=spec.public,
        public_labelled=spec.public_labelled,
        seed=study.seed,
    )
    test = read_records(study, data / spec.test, private=False)
    return Dealt(
        public=split.public_labelled + split.public_unlabelled,
        silos=dict(zip(names, split.silos, strict=True)),
        test=tuple(test[: spec.max_test]),
    )


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
