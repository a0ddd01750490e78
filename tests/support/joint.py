"""Runs of joint DP-SGD: every optimiser step is one secure sum."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.federation.plan import joint_step
from securefedcollm.privacy.ledger import Ledger
from tests.support.arithmetic import SIZE, make_study
from tests.support.rounds import Run

ROUNDS = 2


STEPS = 3


PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "noise": "distributed"}


def study(rate=1.0, **changes):
    """Four silos with ten records each; a step takes each with probability ``rate``."""
    local = {"steps": STEPS, "batch_size": round(40 * rate), "learning_rate": 0.1}
    tree = {
        "rounds": ROUNDS,
        "local": local | {"sampling_rate": rate},
        "privacy": PRIVACY,
        "aggregation": {"value_bits": 20},
    }
    return make_study(**(tree | changes))


def run(directory, made, **options) -> Run:
    return Run(directory, made, private=False, **options)


def noise_of_a_step(made, shares=4):
    """Standard deviation of a coordinate of one step's gradient."""
    step = joint_step(made, SIZE)
    return step.noise_multiplier * np.sqrt(shares / 2) / made.local.batch_size


def charged(directory, name="silo-1"):
    with Ledger(directory / "silos" / name / "ledger.sqlite", name) as ledger:
        return [
            (e.key.round, e.key.attempt, e.state, e.counted[0].shares) for e in ledger.entries()
        ]


def check_theta(made, theta, server):
    """Every step's clipped gradients pull one coordinate by 1; distillation halves what was."""
    expected = np.zeros(SIZE)
    expected[:ROUNDS] = [-STEPS * 0.5 ** (ROUNDS - round_) for round_ in range(ROUNDS)]
    spread = noise_of_a_step(made) * np.sqrt(STEPS * (0.5**2 + 0.25**2))
    assert np.abs(theta - expected).max() < 6 * spread
    assert np.std((theta - expected)[ROUNDS:]) == pytest.approx(spread, rel=0.35)
    assert server.descents == ROUNDS * STEPS
