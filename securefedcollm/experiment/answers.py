"""What the rows of an experiment compute in addition to a federation: answers to every question.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from securefedcollm.errors import DataError
from securefedcollm.federation.dealing import Dealt
from securefedcollm.federation.recipes import loss_plan, steps_of, training_seed
from securefedcollm.federation.results import remembered
from securefedcollm.federation.serverparts import CentralSteps
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.simulation.plan import SiloPlan
from securefedcollm.simulation.simulate import tuned_alone
from securefedcollm.study import Study
from securefedcollm.study.config import Model
from securefedcollm.tuning.choice_distil import predict, teacher_of
from securefedcollm.tuning.evaluate import Evaluation
from securefedcollm.tuning.local import train_plain
from securefedcollm.tuning.plans import TrainPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import Pace

Answers = dict[str, list[float]]
"""Metric (``accuracy``, ``gold_log_prob``) → one value per test question, in their order."""


def answers_of(
    study: Study,
    models: Iterable[str],
    test: Sequence[Question],
    *,
    adapters: Path | None,
    data: Path | None,
    device: str,
    progress: Progress = silent,
) -> dict[str, Answers]:
    """The answers of the study's ``models`` (``slm``, ``llm``), loaded one after another.

    ``adapters``: the directory with an adapter of each; None: the bare bases.
    """
    found = {}
    for name in models:
        spec = study.models.slm if name == "slm" else study.models.llm
        assert spec is not None  # experiment.arms asks for no model that the study lacks
        tuned = Tuned.load(study, spec, data=data, device=device, progress=progress)
        encoded = tuned.encode(test, public=True, progress=progress)
        if adapters is not None:
            tuned.load_adapter(adapters / name)
        found[name] = _plain(tuned.answers(encoded))
    return found


def teacher_answers(
    study: Study,
    test: Sequence[Question],
    *,
    adapters: Path,
    data: Path | None,
    device: str,
    progress: Progress = silent,
) -> Answers:
    """The answers of the study's pooled target to the test questions, before anybody learns it.

    It is pooled from the SLM with the adapter in ``adapters`` and from the untuned LLM, as in
    :func:`securefedcollm.tuning.distil.distil`. It is the best that distillation could convey if
    its prompts were all possible questions.
    """
    plan = study.distillation
    assert study.models.llm is not None
    assert plan.loss == "entropy-pooled" or plan.loss == "dual-min-ce"

    def says(spec: Model, adapter: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        tuned = Tuned.load(study, spec, data=data, device=device, progress=progress)
        encoded = tuned.encode(test, public=True, progress=progress)
        if adapter is not None:
            tuned.load_adapter(adapter)
        said = predict(tuned.model, encoded, scoring=tuned.scoring, temperature=plan.temperature)
        return said, encoded.answers

    llm, answers = says(study.models.llm, None)
    slm, _ = says(study.models.slm, adapters / "slm")
    unknown = torch.full_like(answers, -1)  # a test question's answer teaches nobody
    target = teacher_of(plan.loss, llm, slm, unknown, plan.sharpness)
    gold = target.gather(1, answers[:, None])[:, 0]
    return {
        "accuracy": (target.argmax(1) == answers).double().tolist(),
        "gold_log_prob": gold.double().clamp_min(torch.finfo(torch.float32).tiny).log().tolist(),
    }


def answers_alone(name: str, *, plan: SiloPlan, directory: Path) -> Answers:
    """A silo that tunes by itself (:func:`securefedcollm.simulation.simulate.tune_alone`)."""

    def tune() -> Answers:
        alone, test = tuned_alone(name, plan)
        return _plain(alone.answers(test))

    return remembered(directory / f"{name}.json", tune)


def mean_answers(of: Sequence[Answers]) -> Answers:
    """The mean over several models, question by question."""
    return {m: np.mean([a[m] for a in of], axis=0).tolist() for m in of[0]}


def centralized(
    study: Study, dealt: Dealt, *, data: Path | None, device: str, progress: Progress
) -> Answers:
    """The LLM tuned on everything at one place, without privacy: the upper bound.

    In a study without an LLM it is the model that the silos tune.

    It uses every silo's records and the labelled public questions, in as many steps as all silos
    take together in the federation, of ``local.batch_size`` records, at that model's learning rate.

    Raises:
        DataError: nothing has an answer.
    """
    everything = [q for questions in dealt.silos.values() for q in questions]
    everything += [q for q in dealt.public if q.answer is not None]
    if not everything:
        raise DataError("no record has an answer", hint="give labelled records")
    local = study.local
    spec, rate = study.models.llm, study.distillation.learning_rate_llm
    if spec is None:
        spec, rate = study.models.slm, local.learning_rate
    tuned = Tuned.load(study, spec, data=data, device=device, progress=progress)
    steps = local.steps * study.rounds * (1 if study.joint else study.silos.count)
    if local.epochs is not None:
        counts = [len(questions) for questions in dealt.silos.values()]
        steps = study.rounds * sum(steps_of(local, count) for count in counts)
    plan = TrainPlan(
        steps=steps,
        batch_size=min(local.batch_size, len(everything)),
        learning_rate=rate,
        optimizer=local.optimizer,
        loss=loss_plan(local, tuned.scoring),
        pace=Pace(local.schedule, local.warmup, steps, 0, local.weight_decay),
    )
    train_plain(
        tuned.model,
        tuned.broadcast_layout(),
        tuned.encode(everything),
        plan,
        seed=training_seed(study, "centralized", 0),
        max_grad_norm=local.max_grad_norm,
        progress=progress,
    )
    return _plain(tuned.answers(tuned.encode(dealt.test, public=True)))


def central_only(
    study: Study, dealt: Dealt, *, data: Path | None, device: str, progress: Progress
) -> Answers:
    """The silos' model after nothing but the server's central steps of all rounds.

    Raises:
        ConfigError: no public row has its answer.
    """
    tuned = Tuned.load(study, study.models.slm, data=data, device=device, progress=progress)
    steps = CentralSteps(study, tuned, dealt.public)
    for round_ in range(study.rounds):
        steps.run(round_, progress)
    return _plain(tuned.answers(tuned.encode(dealt.test, public=True)))


def _plain(evaluation: Evaluation) -> Answers:
    return {
        "accuracy": [round(float(value), 6) for value in evaluation.correct],
        "gold_log_prob": [round(float(value), 6) for value in evaluation.gold_log_prob],
    }
