"""One step of joint DP-SGD is one step of central DP-SGD over all silos' records.

Central: the same Poisson batches put together, clipped and summed by an independent loop, and a
torch optimizer over the model's own parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.privacy.joint import JointSetting, JointStep
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import layout_of, load_vector, select, to_vector
from securefedcollm.tuning.descent import Descent
from securefedcollm.tuning.local import sampled_gradients
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.recipe import make_optimizer
from tests.support.gradients import CLIP, adapted, clipped, single_gradients

SILOS, RECORDS, RATE = 4, 12, 0.5


def silo_gradients(
    toy: Any, silo: int, model: Any, loss: LossPlan | None = None, subjects: Any = None
) -> list[np.ndarray]:
    return list(
        sampled_gradients(
            model,
            layout_of(model, "ffa-lora"),
            toy.encoded(RECORDS, seed=silo),
            loss or LossPlan(),
            q=RATE,
            noise=NoiseSource(bytes([silo]) * 32),
            subjects=subjects,
        )
    )


def central_sum(toy: Any, model: Any) -> np.ndarray:
    """Σ of the clipped gradients of the same samples, by one backward pass a record."""
    total = np.zeros(layout_of(model, "ffa-lora").size)
    for silo in range(SILOS):
        taken = NoiseSource(bytes([silo]) * 32).poisson_batch(RECORDS, RATE)
        data = toy.encoded(RECORDS, seed=silo).select(torch.from_numpy(taken))
        total += clipped(single_gradients(model, "ffa-lora", data, "answer")).sum(0)
    return total


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("micro_batch", [3, pytest.param(64, marks=pytest.mark.soak)])
def test_with_hardly_any_noise_the_steps_agree(toy: Any, micro_batch: int, optimizer: Any) -> None:
    model = adapted(toy)
    layout = layout_of(model, "ffa-lora")
    batch = round(SILOS * RECORDS * RATE)
    setting = JointSetting(layout.size, 2**50, SILOS - 1, 1, RATE, batch)
    step = JointStep(setting, 1e-7, CLIP)  # shares of some hundred integers of two thousand million
    point = to_vector(model, layout)
    loss = LossPlan(micro_batch=micro_batch)
    gradients = [silo_gradients(toy, i, model, loss) for i in range(SILOS)]
    sums = [step.protect(rows, NoiseSource()) for rows in gradients]
    joint = step.decode(np.sum(sums, axis=0))
    central = central_sum(toy, model) / batch
    np.testing.assert_allclose(joint, central, atol=2e-6)
    assert np.linalg.norm(central) > 0.1

    parameters = select(model, layout)
    descend = make_optimizer(optimizer, parameters, 0.01)
    for turn in range(3):  # the same gradient thrice: the optimizer's memory counts
        at = 0
        for parameter in parameters:
            part = central[at : at + parameter.numel()]
            parameter.grad = torch.from_numpy(part.astype(np.float32)).view(parameter.shape)
            at += parameter.numel()
        descend.step()
        if turn == 0:
            ours = Descent(optimizer, 0.01)
        else:  # as after a kill: a new process takes the state up
            state, ours = ours.state(), Descent(optimizer, 0.01)
            ours.restore(state)
        point = ours.step(point, joint)
        np.testing.assert_allclose(point, to_vector(model, layout), atol=3e-5)


@pytest.mark.soak
def test_a_subject_is_one_gradient(toy: Any) -> None:
    model = adapted(toy)
    names = [f"patient {i // 3}" for i in range(RECORDS)]
    found = silo_gradients(toy, 2, model, subjects=names)
    taken = NoiseSource(bytes([2]) * 32).poisson_batch(RECORDS // 3, RATE)
    assert len(found) == len(taken) > 0
    by_record = single_gradients(model, "ffa-lora", toy.encoded(RECORDS, seed=2), "answer")
    whole = by_record.reshape(RECORDS // 3, 3, -1).sum(1)[taken].sum(0)
    np.testing.assert_allclose(np.sum(found, axis=0), whole, atol=1e-4)


def test_a_gradient_that_overflows_counts_as_zero(toy: Any) -> None:
    """Adversary: a server whose adapter makes some records' gradients overflow."""
    model = adapted(toy)
    layout = layout_of(model, "ffa-lora")
    values = to_vector(model, layout)
    load_vector(model, layout, np.where(np.arange(layout.size) % 2, 1e30, values))
    found = silo_gradients(toy, 0, model)
    assert len(found) == len(NoiseSource(bytes(32)).poisson_batch(RECORDS, RATE))
    assert all(np.isfinite(row).all() for row in found)
    assert any(not row.any() for row in found)
