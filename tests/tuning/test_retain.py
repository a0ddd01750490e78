"""The earlier model as a further teacher: the term against float64 arithmetic, and what it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.study import load_study
from securefedcollm.tuning.adapters import full_layout, layout_of, load_vector
from securefedcollm.tuning.choice_distil import ChoiceObjective, predict
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.head import without_adapter
from securefedcollm.tuning.plans import DistilLossPlan
from securefedcollm.tuning.questions import choice_scores
from tests.support.plans import attached, distil_plan

TAU, RETAIN = 1.7, 0.6


def pair(toy: Any) -> tuple[Any, Any]:
    """Two models whose adapters say something of their own."""
    models = attached(toy.model(hidden=32, seed=5), "lora", rank=2), attached(toy.model(), "lora")
    for seed, model in enumerate(models):
        layout = full_layout(model)
        load_vector(model, layout, np.random.default_rng(seed).normal(scale=0.4, size=layout.size))
    return models


def said(model: Any, data: Any) -> np.ndarray:
    with torch.no_grad():
        scores = choice_scores(model, data).double().numpy() / TAU
    return np.where(np.isfinite(scores), scores, -1e3)  # a choice that does not exist


def log_softmax(scores: np.ndarray) -> np.ndarray:
    top = scores - scores.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
def test_the_term_is_the_divergence_from_the_model_without_its_adapter(toy: Any, kind: Any) -> None:
    models, data = pair(toy), toy.encoded(12, labelled=True)
    rows = torch.arange(12)
    found = []
    for retain in (0.0, RETAIN):
        loss = DistilLossPlan(kind=kind, temperature=TAU, retain=retain)
        objective = ChoiceObjective(models, (data, data), loss)
        parts = [objective.terms(rows, part) for part in rows.split(5)]
        found.append([sum(float(terms[i].detach()) for terms in parts) for i in range(2)])
    for i, model in enumerate(models):
        own = log_softmax(said(model, data))
        with without_adapter(model):
            earlier = log_softmax(said(model, data))
        kept = (np.exp(earlier) * (earlier - own)).sum() * TAU**2 / 12
        assert kept > 0.05  # the adapters do say something else
        assert found[1][i] - found[0][i] == pytest.approx(RETAIN * kept, abs=1e-5)


def test_a_model_that_keeps_to_what_it_said_forgets_less(toy: Any) -> None:
    def moved(retain: float) -> list[float]:
        models = (
            attached(toy.model(hidden=32, seed=5), "ffa-lora"),
            attached(toy.model(), "ffa-lora"),
        )
        data = toy.encoded(24, labelled=True)
        before = [predict(model, data) for model in models]
        layouts = layout_of(models[0], "ffa-lora"), layout_of(models[1], "ffa-lora")
        settings = {"batch_labelled": 24, "batch_unlabelled": 0, "loss": "none"}
        rates = {"learning_rate_llm": 0.05, "learning_rate_slm": 0.05}
        plan = distil_plan(steps=40, retain=retain, **settings, **rates)
        distil(models, layouts, (data, data), plan, seed=1)
        after = [predict(model, data) for model in models]
        return [
            float((p * (p.clamp_min(1e-9) / q.clamp_min(1e-9)).log()).sum(1).mean())
            for p, q in zip(before, after, strict=True)
        ]

    free, held = moved(0.0), moved(5.0)
    assert all(kept < 0.5 * lost for kept, lost in zip(held, free, strict=True))


LINK = {"run": "r", "study": "0" * 64, "entries": 3, "root": "1" * 64, "scale": 2, "slm": "2" * 64}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no earlier model"),
        ({"continue": {"earlier": [LINK]}, "distillation.over": "answer"}, "has no choices"),
        ({"continue": {"earlier": [LINK]}, "distillation.loss": "transfer"}, "leaves the small"),
        ({"continue": {"earlier": [LINK]}, "models.llm": "none"}, "no large model"),
    ],
)
def test_where_nothing_can_be_retained_the_study_is_refused(changes, said):
    kept = {"distillation.retain": 0.5}
    with pytest.raises(ConfigError, match=said) as caught:
        load_study("quickstart", kept | changes)
    assert caught.value.hint
    load_study("quickstart", kept | {"continue": {"earlier": [LINK]}})  # the control
