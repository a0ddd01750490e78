"""What starting from earlier runs needs of the rest of a study.

Every refusal names the key and the fix.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Study

_MOST: Final = 64
"""Earlier runs: each takes a pass over all weights when a model is loaded."""


def check_continue(study: Study) -> None:
    """Refuse a chain that cannot be folded, or that names one run twice.

    Raises:
        ConfigError: for the first fault found, with its key path and a hint.
    """
    given = study.continues
    _check_retain(study)
    if given is None:
        return
    what = hint = ""
    where = "continue.earlier"
    if not given.earlier or len(given.earlier) > _MOST:
        what = f"{len(given.earlier)} earlier runs"
        hint = f"name 1 to {_MOST}, or remove `continue`; `study continue RUN` writes it"
    elif len({link.study for link in given.earlier}) < len(given.earlier):
        what, hint = "names one study twice", "keep one of the two"
    elif study.task.kind == "own":
        what, where = "a study with own training code has no adapter to fold", "continue"
        hint = "remove it, and start your own training from your own file"
    elif given.orthogonal and study.adapter.method != "ffa-lora":
        what, where = f"{study.adapter.method} has no fixed matrix A", "continue.orthogonal"
        hint = "choose adapter.method: ffa-lora, or remove it"
    for number, link in enumerate(given.earlier):
        if not link.run:
            what, where = "the directory has no name", f"continue.earlier[{number}].run"
            hint = "name it relative to the directory that --data (or --models) gives"
        # Adversary: an author who has participants look where they never meant to.
        elif study.roster and _leads_out(PurePath(link.run)):
            what = "leads out of the participants' own directory"
            where = f"continue.earlier[{number}].run"
            hint = "name a directory below the one that --models gives, without .."
    if what:
        raise ConfigError(what, where=where, hint=hint)
    for name, model in (("slm", study.models.slm), ("llm", study.models.llm)):
        folds = any(link.of("slm" if name == "slm" else "llm") for link in given.earlier)
        if model is not None and folds and model.quantization != "none":
            raise ConfigError(
                f"rounding to {model.quantization} would round an earlier adapter away",
                where=f"models.{name}.quantization",
                hint="choose none; the earlier run itself may have been quantised",
            )
        if model is not None and folds and model.dtype != "float32":
            raise ConfigError(
                f"folding into {model.dtype} would round an earlier adapter away",
                where=f"models.{name}.dtype",
                hint="choose float32",
            )


def _leads_out(path: PurePath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _check_retain(study: Study) -> None:
    plan, what, hint = study.distillation, "", ""
    if not plan.retain:
        return
    if study.continues is None:
        what, hint = "there is no earlier model to keep to", "remove it, or give `continue`"
    elif plan.over != "choices":
        what = f"over: {plan.over} has no choices, which the earlier model's opinion is about"
        hint = "remove it, or choose distillation.over: choices"
    elif plan.loss == "transfer":
        what, hint = "transfer leaves the small model as it is", "remove it, or choose another loss"
    if what:
        raise ConfigError(what, where="distillation.retain", hint=hint)
