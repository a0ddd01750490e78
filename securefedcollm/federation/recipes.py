"""A study's plans for :mod:`securefedcollm.tuning` in a round.

Importing this module imports torch.
"""

from __future__ import annotations

import msgspec

from securefedcollm.primitives import sha256
from securefedcollm.study import Study
from securefedcollm.study.config import Central, Distillation, Local
from securefedcollm.tuning.plans import (
    Augmentation,
    DistilLossPlan,
    DistilPlan,
    LossPlan,
    TrainPlan,
)
from securefedcollm.tuning.questions import Scoring
from securefedcollm.tuning.recipe import Pace


def loss_plan(local: Local, scoring: Scoring) -> LossPlan:
    """What a silo minimises, under a model's scoring of choices."""
    given = local.augmentation
    return LossPlan(
        kind=local.loss,
        scoring=scoring,
        micro_batch=local.micro_batch,
        augmentation=None if given is None else Augmentation(**msgspec.structs.asdict(given)),
    )


def train_plan(
    study: Study, loss: LossPlan, round_: int, *, steps: int, batch_size: int
) -> TrainPlan:
    """A silo's tuning in a round; every round has ``steps`` steps."""
    local = study.local
    return TrainPlan(
        steps=steps,
        batch_size=batch_size,
        learning_rate=local.learning_rate,
        optimizer=local.optimizer,
        loss=loss,
        pace=pace_of(study, local, steps, round_),
    )


def distil_plan(study: Study, scorings: tuple[Scoring, Scoring], round_: int) -> DistilPlan:
    """The server's phase of a round; ``scorings``: of the choices, by (LLM, SLM)."""
    given = study.distillation
    loss = DistilLossPlan(
        kind=given.loss,
        over=given.over,
        top_k=given.top_k,
        weight=given.weight,
        temperature=given.temperature,
        direction=given.direction,
        sharpness=given.sharpness,
        change=given.change,
        weighting=given.weighting,
        retain=given.retain,
        scoring=scorings[1],
        scoring_llm=scorings[0],
        micro_batch=study.local.micro_batch,
    )
    return DistilPlan(
        steps=given.steps,
        batch_labelled=given.batch_labelled,
        batch_unlabelled=given.batch_unlabelled,
        learning_rate_llm=given.learning_rate_llm,
        learning_rate_slm=given.learning_rate_slm,
        order=given.order,
        loss=loss,
        pace=pace_of(study, given, given.steps, round_),
    )


def central_plan(study: Study, plan: Central, scoring: Scoring, round_: int) -> TrainPlan:
    """The server's steps of a round on public rows, by the loss that the silos minimise."""
    return TrainPlan(
        steps=plan.steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        loss=loss_plan(study.local, scoring),
        pace=pace_of(study, plan, plan.steps, round_),
    )


def pace_of(study: Study, plan: Local | Central | Distillation, steps: int, round_: int) -> Pace:
    """The course of the learning rate in this round; every round has ``steps`` steps."""
    return Pace(
        schedule=plan.schedule,
        warmup=plan.warmup,
        total=steps * study.rounds,
        first=steps * round_,
        weight_decay=plan.weight_decay,
    )


def steps_of(local: Local, records: int) -> int:
    """Steps of a round of ``local.epochs`` epochs, at a silo with this many records.

    An epoch has whole batches only; other records are left over each time.
    """
    batches = max(1, records // local.batch_size)
    return max(1, round((local.epochs or 0) * batches))


def training_seed(study: Study, who: str, round_: int) -> int:
    """Seed of shuffling and dropout; never of keys, noise or Poisson samples."""
    text = f"{study.seed}\0{who}\0{round_}".encode()
    return int.from_bytes(sha256(b"securefedcollm/training-seed/v1\0", text)[:6], "big")
