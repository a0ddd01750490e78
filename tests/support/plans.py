"""Plans and adapters from settings by name, so that a test says only what it changes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from securefedcollm.tuning.adapters import Method, attach
from securefedcollm.tuning.plans import (
    DistilLossPlan,
    DistilPlan,
    LossPlan,
    Protection,
    TrainPlan,
)
from securefedcollm.tuning.prompts import attach_prompt


def train_plan(**settings: Any) -> TrainPlan:
    """``loss``, ``scoring`` and ``micro_batch`` are those of the loss plan."""
    return TrainPlan(loss=_part(LossPlan, settings), **settings)


def distil_plan(**settings: Any) -> DistilPlan:
    """``loss``, ``over``, ``weight`` and so on are those of the loss plan."""
    return DistilPlan(loss=_part(DistilLossPlan, settings), **settings)


def protection(clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> Protection:
    return Protection(noise_multiplier=noise_multiplier, clip_norm=clip_norm)


def attached(base: Any, method: Method, *, tokens: int = 3, **low_rank: Any) -> Any:
    """``base`` with an adapter of any method; ``low_rank`` is for those with matrices."""
    if method == "prompt" or method == "prefix":
        return attach_prompt(base, method=method, tokens=tokens, seed=1)
    return attach(base, method=method, seed=1, **low_rank)


def _part(plan: Any, settings: dict[str, Any]) -> Any:
    """The plan of the loss; what it takes is taken out of ``settings``."""
    names = {"loss" if f.name == "kind" else f.name for f in fields(plan)} & settings.keys()
    taken = {name: settings.pop(name) for name in names}
    return plan(**({"kind": taken.pop("loss")} if "loss" in taken else {}), **taken)
