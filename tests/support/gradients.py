"""Gradients of single records by ordinary backward passes, to compare the product's with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from securefedcollm.tuning.adapters import full_layout, layout_of, load_vector, select
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions
from tests.support.plans import attached

CLIP = 0.7


def adapted(toy: Any, method: str = "ffa-lora") -> Any:
    """A model whose adapter is not the identity, so that every matrix has a gradient."""
    model = attached(toy.model(), method, rank=2, alpha=4)
    layout = full_layout(model)
    values = np.random.default_rng(3).normal(scale=0.2, size=layout.size)
    load_vector(model, layout, values)
    select(model, layout_of(model, method))
    return model


def single_gradients(model: Any, method: str, data: EncodedQuestions, loss: str) -> np.ndarray:
    """float64 [N, d]: one ordinary backward pass per question."""
    parameters = select(model, layout_of(model, method))
    rows = []
    for i in range(len(data)):
        model.zero_grad()
        question_losses(model, data.select(torch.tensor([i])), loss, PLAIN).sum().backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in parameters]).double().numpy())
    model.zero_grad()
    return np.array(rows)


def clipped(gradients: np.ndarray) -> np.ndarray:
    """Each row scaled down to norm CLIP where it is longer."""
    return np.array([g * min(1.0, CLIP / np.linalg.norm(g)) for g in gradients])
