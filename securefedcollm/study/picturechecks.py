"""What classifying pictures leaves out of a study. Refusals name the key and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Study
from securefedcollm.study.learning import VIRTUAL

DIGITS = [*"0123456789"]
"""The labels of ``task.data.builtin: digits``."""
MOST_SILOS: Final = 800
"""No two of them share a digit."""


def check_pictures(study: Study) -> None:
    """Refuse what has a meaning for words alone.

    Raises:
        ConfigError: for the first fault found, with its key path and a hint.
    """
    if study.task.kind != "image_classification":
        return
    for where, what, hint in _faults(study):
        raise ConfigError(what, where=where, hint=hint)


def _faults(study: Study) -> Iterator[tuple[str, str, str]]:
    task, method = study.task, study.adapter.method
    if task.data.builtin == "digits" and task.labels != DIGITS:
        hint = f"labels: {json.dumps(DIGITS)}"
        yield "task.labels", "the built-in digits have ten labels, 0 to 9 in this order", hint
    if task.data.builtin == "digits" and study.silos.count > MOST_SILOS:
        what = f"there are {MOST_SILOS} built-in digits for silos, and every silo needs one"
        yield "silos.count", what, f"choose at most {MOST_SILOS}"
    if task.data.builtin == "digits" and task.data.partition == "dirichlet":
        what = "the built-in digits are dealt by site, or iid"
        yield "task.data.partition", what, "choose iid, or leave it out"
    if task.score != "plain":
        what = f"{task.score} is about the words of a label, and a class has none"
        yield "task.score", what, "choose plain"
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
            what = "the weights of a classifier of pictures are not rounded here"
            yield f"models.{name}.quantization", what, "choose none"
