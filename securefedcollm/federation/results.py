"""What a finished run says of itself beside its evidence: accuracy by method, one row a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from securefedcollm.study import Study


def rows(method: str, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """``{"slm/private": .7, …}`` → one row per model, in the order of ``scores``."""
    found: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        model, _, group = key.partition("/")
        found.setdefault(model, {})[group] = value
    return [{"model": m, "method": method, "accuracy": a} for m, a in found.items()]


def method_of(study: Study) -> str:
    """What the study's own run is called: without an LLM it is FedAvg."""
    return "FedCoLLM" if study.models.llm else "FedAvg"


def best_method(method: str, best: int) -> str:
    """The row of the best round (from 1), beside that of the last."""
    return f"{method}, round {best} (best)"
