"""How long a study takes on this machine, from a timed sample of its own rows and models.

A few rows of one silo and of the server go through the passes that a run makes; the rest follows
by counting. One-off work (loading, the test of independence, ledgers), masks, noise and the wire
are not counted; they take minutes at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import by_unit
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.recipes import (
    central_plan,
    distil_plan,
    loss_plan,
    steps_of,
    train_plan,
)
from securefedcollm.federation.tuned import Tuned, remembering
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.study import Study
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.local import records_of, train_public
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import evaluation_mode
from securefedcollm.tuning.vocabulary import vocabulary_of

T = TypeVar("T")

_ROWS: Final = 16
"""Rows of a sample."""


@dataclass(frozen=True)
class Seconds:
    """Seconds for one row, on this machine.

    Attributes:
        tuned: a silo's record in a step.
        read: a silo's record in the frozen layers, once.
        distilled: a public row in a step of the server, by all its models; 0 without an LLM.
        central: a public row in a central step; 0 without them.
        scored: a test row after a round, or a public row whose target is made, by all models.
        shown: a public or test row in the frozen layers of all models, once.
    """

    tuned: float
    read: float
    distilled: float
    central: float
    scored: float
    shown: float


@dataclass(frozen=True)
class Rows:
    """Numbers of rows: of the largest silo, of all silos, and at the server."""

    silo: int
    silos: int
    public: int
    test: int


def hours(
    study: Study, data: Path | None, *, device: str = "cpu", progress: Progress = silent
) -> dict[str, Any]:
    """Seconds of a silo's round, of the server's, and of a simulation without its baselines.

    Loads the models.

    Args:
        data: directory of the study's files.

    Raises:
        ConfigError: own training, or a model or the data cannot be read.
        DataError: a file cannot be read as the study's.
    """
    dealt = deal(study, data)
    sizes = [len(questions) for questions in dealt.silos.values()]
    rows = Rows(max(sizes), sum(sizes), len(dealt.public), len(dealt.test))
    largest = max(dealt.silos.values(), key=len)
    place: dict[str, Any] = {"data": data, "device": device, "progress": progress}
    with remembering(32):  # the server's models are loaded once
        tuned, read = _silo(study, largest, place)
        server = _server(study, dealt.public, dealt.test, place)
    found = Seconds(tuned=tuned, read=read, **server)
    return {
        **time_of(study, found, rows),
        "rows": vars(rows),
        "seconds_a_row": vars(found),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def time_of(study: Study, row: Seconds, rows: Rows) -> dict[str, float]:
    """The seconds that follow from those of one row."""
    local, plan, parts = study.local, study.distillation, study.server
    steps = local.steps or steps_of(local, rows.silo)
    silo = steps * local.batch_size * row.tuned
    batch = plan.batch_labelled + plan.batch_unlabelled
    server = rows.test * row.scored
    if study.models.llm is not None:
        server += plan.steps * batch * row.distilled + rows.public * row.scored
    if parts is not None and parts.central is not None:
        server += parts.central.steps * parts.central.batch_size * row.central
    once = rows.silos * row.read + (rows.public + rows.test) * row.shown
    whole = once + study.rounds * (study.silos.count * silo + server)
    return {
        "silo_round_s": silo,
        "server_round_s": server,
        "frozen_layers_once_s": once,
        "simulation_s": whole,
    }


def _silo(
    study: Study, questions: Sequence[Question], place: dict[str, Any]
) -> tuple[float, float]:
    """Seconds of one record (in a step, in the frozen layers)."""
    tuned = Tuned.load(study, study.models.slm, **place)
    loss, private = loss_plan(study.local, tuned.scoring), by_unit(study)
    asked = _spread(questions)
    tuned.encode(asked[:1], private=private)  # what is only done once
    encoded, read = _timed(lambda: tuned.encode(asked, private=private))
    layout = tuned.update_layout(0)
    if private:
        records = records_of(tuned.model, layout, encoded, loss)

        def step() -> None:
            with evaluation_mode(tuned.model):
                for _ in records.of_units(np.arange(len(asked))):
                    pass
    else:
        plan = train_plan(study, loss, 0, steps=1, batch_size=len(asked))

        def step() -> None:
            train_public(tuned.model, layout, encoded, plan, seed=0)

    step()
    _, took = _timed(step)
    return took / len(asked), read / len(asked)


def _server(
    study: Study, public: Sequence[Question], test: Sequence[Question], place: dict[str, Any]
) -> dict[str, float]:
    """The other attributes of :class:`Seconds`."""
    slm = Tuned.load(study, study.models.slm, **place)
    llm = Tuned.load(study, study.models.llm, **place) if study.models.llm else None
    shown = scored = distilled = central = 0.0
    asked = _spread(test)
    for tuned in (slm, *([llm] if llm else ())):
        tuned.encode(asked[:1])  # what is only done once
        encoded, took = _timed(partial(tuned.encode, asked))
        shown += took / len(asked)
        scored += _timed(partial(tuned.answers, encoded))[1] / len(asked)
    if llm is not None:
        distilled = _distilled(study, llm, slm, _spread(public))
    if study.server is not None and study.server.central is not None:
        answered = _spread([question for question in public if question.answer is not None])
        plan = central_plan(study, study.server.central, slm.scoring, 0)
        plan = replace(plan, steps=1, batch_size=len(answered))
        rows = slm.encode(answered)
        step = partial(train_public, slm.model, slm.broadcast_layout(), rows, plan, seed=0)
        step()
        central = _timed(step)[1] / len(answered)
    return {"shown": shown, "scored": scored, "distilled": distilled, "central": central}


def _distilled(study: Study, llm: Tuned, slm: Tuned, public: Sequence[Question]) -> float:
    """Seconds of one public row in a step of both models: the extra time of two steps over none."""
    known = None
    if study.distillation.over != "choices":
        known = (vocabulary_of(llm.tokenizer), vocabulary_of(slm.tokenizer))
    apart = known is not None and known[0] != known[1]
    encoded = (llm.encode(public, cuts=apart), slm.encode(public, cuts=apart))
    plan = replace(
        distil_plan(study, (llm.scoring, slm.scoring), 0),
        batch_labelled=len(public),
        batch_unlabelled=len(public),
    )
    took = []
    for steps in (1, 1, 3):
        phase = partial(
            distil,
            (llm.model, slm.model),
            (llm.broadcast_layout(), slm.broadcast_layout()),
            encoded,
            replace(plan, steps=steps),
            seed=0,
            vocabularies=known,
        )
        took.append(_timed(phase)[1])
    return max(0.0, took[2] - took[1]) / 2 / len(public)


def _spread(questions: Sequence[Question]) -> tuple[Question, ...]:
    """A few rows from the shortest to the longest.

    Raises:
        ConfigError: there is none.
    """
    if not questions:
        raise ConfigError(
            "there are no rows to time",
            where="task.data",
            hint="a study of files needs --data DIR, with public and test rows",
        )
    ordered = sorted(questions, key=lambda q: len(q.prompt) + sum(map(len, q.choices)))
    picked = np.linspace(0, len(ordered) - 1, min(_ROWS, len(ordered))).round().astype(int)
    return tuple(ordered[i] for i in picked)


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """Its result, and the seconds that it takes."""
    begin = time.perf_counter()
    found = call()
    return found, time.perf_counter() - begin
