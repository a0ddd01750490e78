"""Learning-rate schedules and weight decay: values by hand, and that training follows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.recipes import pace_of, steps_of
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import load_study
from securefedcollm.tuning.adapters import attach, layout_of
from securefedcollm.tuning.descent import Descent
from securefedcollm.tuning.local import train_dp, train_plain
from securefedcollm.tuning.recipe import Pace
from tests.support.plans import protection, train_plan

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_factors_by_hand() -> None:
    linear = Pace("linear", warmup=0.2, total=10)
    found = [linear.factor(step) for step in range(11)]
    rise, fall = [1 / 3, 2 / 3], [1 - k / 8 for k in range(9)]
    assert found == pytest.approx(rise + fall)
    cosine = Pace("cosine", total=4)
    assert cosine.factor(0) == 1
    assert cosine.factor(1) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert cosine.factor(2) == pytest.approx(0.5)
    assert [Pace().factor(step) for step in (0, 5)] == [1, 1]
    # A round goes on where the last one ended.
    second = Pace("linear", warmup=0.2, total=10, first=5)
    assert second.factor(2) == linear.factor(7)


def test_a_round_s_place_in_the_run_and_the_steps_of_an_epoch() -> None:
    study = load_study(
        QUICKSTART,
        ["privacy=none", "local={epochs: 1.5, batch_size: 32, learning_rate: 0.01}", "rounds=4"],
    )
    assert steps_of(study.local, 100) == round(1.5 * 3)
    assert steps_of(study.local, 10) == round(1.5 * 1)
    pace = pace_of(study, study.local, 5, 2)
    assert (pace.first, pace.total) == (10, 20)


def train(toy: Any, how: str, **more: Any) -> Any:
    model, data = attach(toy.model(), seed=1), toy.encoded(8)
    settings = {"steps": 2, "batch_size": 8, "learning_rate": 0.5, "optimizer": "sgd", **more}
    layout, plan = layout_of(model, "ffa-lora"), train_plan(**settings)
    if how == "plain":
        return train_plain(model, layout, data, plan, seed=3).delta
    noise = NoiseSource(bytes(32))
    return train_dp(model, layout, data, plan, protection(), noise=noise).delta


@pytest.mark.parametrize("how", ["plain", pytest.param("dp", marks=pytest.mark.soak)])
def test_training_follows_the_rate_and_the_decay(toy: Any, how: str) -> None:
    steady = train(toy, how, steps=1)
    # The second of two steps on a line: half the rate.
    halved = train(toy, how, steps=1, pace=Pace("linear", total=2, first=1))
    np.testing.assert_allclose(halved, steady / 2, atol=1e-6)
    both = train(toy, how)
    assert not np.array_equal(train(toy, how, pace=Pace("cosine", total=2)), both)
    decayed = train(toy, how, pace=Pace(weight_decay=1.0))
    assert not np.array_equal(decayed, both)
    adam = train(toy, how, optimizer="adam", pace=Pace(weight_decay=1.0))
    assert not np.array_equal(adam, train(toy, how, optimizer="adam"))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_server_s_steps_go_on_after_a_kill(optimizer: Any) -> None:
    pace = Pace("linear", total=5, weight_decay=0.1)
    gradient = np.ones(3, dtype=np.float32)
    whole, cut = (Descent(optimizer, 0.1, pace) for _ in range(2))
    point = other = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    moves = []
    for _ in range(5):
        last, point = point, whole.step(point, gradient)
        other = cut.step(other, gradient)
        moves.append(float(np.abs(point - last).max()))
        state, cut = cut.state(), Descent(optimizer, 0.1, pace)
        cut.restore(state)
        assert np.array_equal(point, other)
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < moves[0] / 3
    assert Descent(optimizer, 0.1).state() == {}
    assert all(torch.is_tensor(torch.from_numpy(value)) for value in state.values())


def test_no_step_is_forgotten_however_many_there_were() -> None:
    descent = Descent("sgd", 0.1, Pace("linear", total=10**11))
    descent.step(np.ones(1, dtype=np.float32), np.ones(1, dtype=np.float32))
    many = 2**36 + 2**24 + 1
    (name,) = descent.state()
    for _ in range(2):  # as it is saved after every step, and read after every kill
        descent.restore({name: np.array(divmod(many, 65536), dtype=np.float32)})
        descent.step(np.ones(1, dtype=np.float32), np.ones(1, dtype=np.float32))
        many += 1
        high, low = descent.state()[name]
        assert int(high) * 65536 + int(low) == many


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["local.steps=0"], r"local\.steps: no steps, and no epochs"),
        (["local.epochs=1"], r"local\.steps: local\.epochs also sets the length"),
        (["local.steps=0", "local.epochs=1"], r"local\.epochs: DP-SGD draws every batch anew"),
        (
            [
                "local={epochs: 1, batch_size: 32, learning_rate: 0.01, sampling_rate: 0.1}",
                "privacy.noise=distributed",
            ],
            r"local\.epochs: in joint DP-SGD all silos take every step together",
        ),
    ],
)
def test_a_study_says_how_long_a_round_is_once(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_study(QUICKSTART, changes)
