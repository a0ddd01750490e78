"""The outer optimiser against torch's own, against the papers' formulas, and across kills."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.tuning.outer import Outer, OuterPlan

SIZE, STEPS = 257, 20
PLANS = {
    "sgd": OuterPlan(optimizer="sgd", learning_rate=0.6, momentum=0.0),
    "momentum": OuterPlan(optimizer="sgd", learning_rate=0.6, momentum=0.9),
    "nesterov": OuterPlan(optimizer="nesterov", learning_rate=0.7, momentum=0.9),
    "adam": OuterPlan(optimizer="adam", learning_rate=0.02, momentum=0.8, beta2=0.95, tau=1e-4),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def means(seed: int = 7) -> np.ndarray[Any, Any]:
    """Mean updates of many sizes, some of them zero: float32 [STEPS, SIZE]."""
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(STEPS, SIZE)) * 10.0 ** draw.uniform(-4, 1, size=SIZE)
    found[:, :5] = 0.0
    return found.astype(np.float32)


def torch_of(plan: OuterPlan, point: torch.nn.Parameter) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        betas = (plan.momentum, plan.beta2)
        return torch.optim.Adam([point], lr=plan.learning_rate, betas=betas, eps=plan.tau)
    look_ahead = plan.optimizer == "nesterov"
    return torch.optim.SGD(
        [point], lr=plan.learning_rate, momentum=plan.momentum, nesterov=look_ahead
    )


@each_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_are_those_of_torch_on_the_negative_mean(
    plan: OuterPlan, dtype: torch.dtype
) -> None:
    ours = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(ours, dtype=dtype))
    outer, descend = Outer(plan), torch_of(plan, theirs)
    for mean in means():
        theirs.grad = -torch.tensor(mean, dtype=dtype)
        descend.step()
        step = outer.step("all", mean)
        assert step.dtype == np.float32
        ours = ours + step
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-5)
    assert np.abs(ours).max() > 1
    uphill = Outer(plan).step("all", -means()[0])  # the control: the sign matters
    assert np.abs(uphill - Outer(plan).step("all", means()[0])).max() > 0.01


def test_at_rate_one_without_momentum_it_is_fedavg_bit_for_bit() -> None:
    plan = OuterPlan(optimizer="sgd", learning_rate=1.0, momentum=0.0)
    outer = Outer(plan)
    for mean in means():
        np.testing.assert_array_equal(outer.step("all", mean), mean)
    assert outer.state() == {}


@each_plan
def test_killed_after_every_step_it_goes_on_bit_for_bit(plan: OuterPlan) -> None:
    whole, cut = Outer(plan), Outer(plan)
    for mean in means():
        kept = cut.state()
        cut.step("all", np.ones_like(mean))  # a step that was not saved
        cut = Outer(plan)
        cut.restore(kept)
        np.testing.assert_array_equal(cut.step("all", mean), whole.step("all", mean))
    forgetful = Outer(plan).step("all", means()[-1])
    same = np.array_equal(forgetful, whole.step("all", means()[-1]))
    assert same == (plan == PLANS["sgd"])  # the control: what is remembered counts


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam"])
def test_each_part_of_the_adapter_has_a_memory_of_its_own(name: str) -> None:
    """RoLoRA: B in one round, A in the next, of different sizes or of the same."""
    plan, found = PLANS[name], means()
    both, alone = Outer(plan), {"A": Outer(plan), "B": Outer(plan)}
    mixed = Outer(plan)
    for round_, mean in enumerate(found):
        part = "BA"[round_ % 2]
        here = mean if part == "B" else mean[:100]
        np.testing.assert_array_equal(both.step(part, here), alone[part].step(part, here))
        if round_ == 1:  # the control: one memory for both would show
            mixed.step("x", found[0])
            assert not np.array_equal(mixed.step("x", mean), both.step("C", mean))
    assert {key.split("/")[0] for key in both.state()} == {"A", "B", "C"}


def test_what_it_remembers_is_its_own() -> None:
    nesterov, adam = Outer(PLANS["nesterov"]), Outer(PLANS["adam"])
    mean = means()[0]
    nesterov.step("all", mean)
    adam.step("all", mean)
    for optimizer, state in ((adam, nesterov.state()), (nesterov, adam.state())):
        with pytest.raises(ValueError, match="of all are not"):
            optimizer.restore(state)
    state = nesterov.state()
    state["all/momentum"][:] = 0  # a copy
    other = Outer(PLANS["nesterov"])
    other.restore(nesterov.state())
    np.testing.assert_array_equal(other.step("all", mean), nesterov.step("all", mean))
