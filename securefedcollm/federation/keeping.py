"""Which round was the best, and whether the run has waited long enough for a better one.

Both follow from the rounds' records alone, so a run that was killed comes to the same answers. They
look at public questions and at models that were released: post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from securefedcollm.study import Study

Record = dict[str, Any]
BEST = "adapters-best"
"""Beside ``adapters/``: the same of the best round."""


def best_round(study: Study, history: Sequence[Record]) -> int | None:
    """The round, from 1, whose model did best; None if the study asks for none, or none was
    measured."""
    key = _key(study)
    scores = [(record["validation"][key], record["round"]) for record in _measured(key, history)]
    if not scores or study.keep is None:
        return None
    sign = 1 if study.keep.metric == "loss" else -1
    return int(min(scores, key=lambda found: (sign * found[0], found[1]))[1])


def describe_best(study: Study, history: Sequence[Record]) -> Record | None:
    """What ``results.json`` says of it."""
    best, keep = best_round(study, history), study.keep
    if best is None or keep is None:
        return None
    value = history[best - 1]["validation"][_key(study)]
    return {"round": best, "model": keep.best, "metric": keep.metric, "value": value}


def is_over(study: Study, history: Sequence[Record]) -> bool:
    """Whether no round is left to run: all were, or patience is at its end."""
    done = len(history)
    if done >= study.rounds:
        return True
    best = best_round(study, history)
    if best is None or study.keep is None or study.keep.patience is None:
        return False
    return done - best >= study.keep.patience


def _key(study: Study) -> str:
    return f"{study.keep.best}/{study.keep.metric}" if study.keep else ""


def _measured(key: str, history: Sequence[Record]) -> list[Record]:
    return [record for record in history if key in record.get("validation", {})]
