"""Which round was the best, and whether the run has waited long enough for a better one.

Both follow from one number a round, so a run that was killed comes to the same answers, and so does
an auditor, who reads the numbers in the server's log. They come from public questions and from
models that were released, or from the noised counts of a validation: post-processing. Adversary: a
server that lies about them. It could end a run early, or not, at will anyway; it cannot change
later what it wrote when it did so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from securefedcollm.evidence.bundle import BEST as BEST
from securefedcollm.privacy.counting import Counting
from securefedcollm.study import Study

Record = dict[str, Any]
Scores = Sequence[float | None]
"""One per finished round: the loss, accuracy or private accuracy that the study's ``keep`` names;
None: no number."""


def score_of(study: Study, record: Record) -> float | None:
    """A round's score: its record's value of the model and metric by which rounds are compared.

    None without ``keep``, or if nothing was measured, or the model diverged: a value that is no
    finite number is never the best one.
    """
    if study.keep is not None and study.keep.metric == "private":
        value = record.get("private", {}).get("accuracy")
    else:
        value = record.get("validation", {}).get(_key(study))
    return value if value is not None and math.isfinite(value) else None


def best_of(study: Study, scores: Scores) -> int | None:
    """The round, from 1, with the best score; None if the study asks for none, or there is none."""
    if study.keep is None:
        return None
    sign = 1 if study.keep.metric == "loss" else -1
    found = [(sign * score, i) for i, score in enumerate(scores, start=1) if score is not None]
    return min(found)[1] if found else None


def ended(study: Study, scores: Scores) -> bool:
    """Whether no round may follow these: all were run, or patience is at its end."""
    done, best = len(scores), best_of(study, scores)
    if done >= study.rounds:
        return True
    patience = study.keep and study.keep.patience
    return best is not None and bool(patience) and done - best >= (patience or 0)


def best_round(study: Study, history: Sequence[Record]) -> int | None:
    """:func:`best_of` of the rounds' records, the first of which is round 1's."""
    return best_of(study, [score_of(study, record) for record in history])


def describe_best(study: Study, history: Sequence[Record]) -> Record | None:
    """The best round, as ``results.json`` describes it."""
    best, keep = best_round(study, history), study.keep
    if best is None or keep is None:
        return None
    value = score_of(study, history[best - 1])
    return {"round": best, "model": keep.best, "metric": keep.metric, "value": value}


def is_over(study: Study, history: Sequence[Record]) -> bool:
    """:func:`ended` of the rounds' records."""
    return ended(study, [score_of(study, record) for record in history])


def counted(mechanism: Counting, counts: Sequence[int], survivors: int) -> Record:
    """A round's record of the counts that its validation opened.

    ``counts``: as they were opened. ``right``, ``wrong``: the same in records or subjects.
    ``sigma``: of the noise on each. ``accuracy`` and ``margin``: the latter is half its 95 %
    interval from the noise alone; None where the noise drowns it. ``silos``: how many answered.
    """
    found = mechanism.read((counts[0], counts[1]), survivors)
    return {
        "counts": list(counts),
        "right": found.right,
        "wrong": found.wrong,
        "sigma": found.sigma,
        "accuracy": found.accuracy,
        "margin": found.margin,
        "silos": survivors,
    }


def counts_of(record: Record) -> tuple[int, int] | None:
    """The opened counts in a round's record."""
    found = record.get("private", {}).get("counts")
    return None if found is None else (found[0], found[1])


def _key(study: Study) -> str:
    return f"{study.keep.best}/{study.keep.metric}" if study.keep else ""
