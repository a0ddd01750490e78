"""What classifying pictures or recordings leaves out of a study: refusals with key and fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final, NamedTuple

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Study, Task
from securefedcollm.study.learning import VIRTUAL


class World(NamedTuple):
    """Of a built-in one: its labels, and how many silos it is enough for, which share no owner."""

    labels: list[str]
    silos: int
    owners: str


_WORLDS: Final = {
    "digits": World([*"0123456789"], 800, "built-in digits"),
    "wards": World(
        ["yes", "no", "stop", "help", "pain", "water", "nurse", "light"], 12, "built-in speakers"
    ),
}


def check_signals(study: Study) -> None:
    """Refuse what has a meaning for words alone.

    Raises:
        ConfigError: for the first fault found, with its key path and a hint.
    """
    if study.task.max_seconds != Task().max_seconds and study.task.kind != "audio_classification":
        raise ConfigError(
            f"kind: {study.task.kind} has no recordings", where="task.max_seconds", hint="remove it"
        )
    if not study.task.senses:
        if study.local.augmentation is not None:
            what = "words have no views: only pictures and recordings are varied"
            raise ConfigError(what, where="local.augmentation", hint="remove it")
        return
    for where, what, hint in _faults(study):
        raise ConfigError(what, where=where, hint=hint)


def _faults(study: Study) -> Iterator[tuple[str, str, str]]:
    task, method = study.task, study.adapter.method
    if (world := _WORLDS.get(task.data.builtin or "")) is not None:
        if task.labels != world.labels:
            what = (
                f"the built-in {task.data.builtin} have {len(world.labels)} labels, in this order"
            )
            yield "task.labels", what, f"labels: {json.dumps(world.labels)}"
        if study.silos.count > world.silos:
            what = f"there are {world.silos} {world.owners} for silos, and every silo needs one"
            yield "silos.count", what, f"choose at most {world.silos}"
        if task.data.partition == "dirichlet":
            what = f"the built-in {task.data.builtin} are dealt by site, or iid"
            yield "task.data.partition", what, "choose iid, or leave it out"
    if task.score != "plain":
        what = f"{task.score} is about the words of a label, and a class has none"
        yield "task.score", what, "choose plain"
    if (views := study.local.augmentation) is not None:
        if views.flip and task.kind == "audio_classification":
            what = "a recording cannot be mirrored"
            yield "local.augmentation.flip", what, "remove it"
        if not (views.shift or views.flip or views.noise):
            what = "nothing says how views differ from their record"
            yield "local.augmentation", what, "give a shift, a flip or noise, e.g. shift: 0.1"
    if method in VIRTUAL or method == "full":
        what = f"{method} is for models that read text"
        yield "adapter.method", what, "choose ffa-lora, rolora or lora"
    if study.models.llm is not None and study.distillation.over != "choices":
        what = "two classifiers can be compared over their classes alone"
        yield "distillation.over", what, "choose choices"
    if study.retrieval is not None:
        yield "retrieval", "questions are put to documents or records of text", "remove the section"
    for name, model in (("slm", study.models.slm), ("llm", study.models.llm)):
        if model is not None and model.ask != "cloze":
            yield f"models.{name}.ask", "a class is not asked for by its letter", "choose cloze"
        if model is not None and model.quantization != "none":
            what = "the weights of a classifier are not rounded here"
            yield f"models.{name}.quantization", what, "choose none"
