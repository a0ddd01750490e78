"""Accuracy and ε, from a run's ``results.json``: its maker's word, and not evidence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import round_of

if TYPE_CHECKING:
    from securefedcollm_audits.report.rows import SiloRow
    from securefedcollm_audits.verification.case import Case


class Method(msgspec.Struct, frozen=True):
    """Accuracy in [0, 1] by group of questions, of one model tuned in one way."""

    model: str
    method: str
    accuracy: dict[str, float]


class Point(msgspec.Struct, frozen=True):
    """After a round: ε charged so far at the silo that spent most, and accuracy of the small model
    by group."""

    round: int
    epsilon: float
    accuracy: dict[str, float]


class Utility(msgspec.Struct, frozen=True):
    """The utility of the run."""

    methods: list[Method]
    course: list[Point]


def read_utility(path: Path, case: Case, silos: Sequence[SiloRow]) -> Utility:
    """Read ``results.json`` and combine its accuracies with the evidence's ε.

    Raises:
        ConfigError: it cannot be read, or is of another study or run.
    """
    hint = "give the results.json of the run that the bundle is of"
    try:
        results = json.loads(path.read_bytes())
        same = (results["digest"], results["run_id"]) == (case.digest.hex(), case.run.hex())
        # Servers of earlier versions wrote no table.
        table, rounds = results.get("table", []), results["rounds"]
        methods = msgspec.convert(table, list[Method])
        scores = [_small(record) for record in rounds]
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise ConfigError(message, where=str(path), hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError("is not a run's results", where=str(path), hint=hint) from None
    if not same:
        raise ConfigError("is of another study or run", where=str(path), hint=hint)
    return Utility(methods, _course(methods, scores, case, silos))


def _small(record: dict[str, Any]) -> dict[str, float]:
    return {
        group.removeprefix("slm/"): float(value)
        for group, value in record["evaluation"].items()
        if group.startswith("slm/")
    }


def _course(
    methods: list[Method], scores: list[dict[str, float]], case: Case, silos: Sequence[SiloRow]
) -> list[Point]:
    spent: dict[int, float] = {}
    for silo in silos:
        for charge in silo.charges:
            if charge.cumulative is not None:
                at = round_of(case.study, charge.round - 1)
                spent[at] = max(spent.get(at, 0.0), charge.cumulative)
    start = [m.accuracy for m in methods if (m.model, m.method) == ("slm", "zero-shot")]
    points = [Point(0, 0.0, accuracy) for accuracy in start if spent]
    return points + [
        Point(done + 1, spent[done], accuracy)
        for done, accuracy in enumerate(scores)
        if done in spent and accuracy
    ]
