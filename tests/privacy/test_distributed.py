"""The mechanism as a whole: what a sum of protected vectors is, and what it is charged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.distributed import DistributedGaussian, mean_noise
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.noise import NoiseSource


def mechanism(**changes) -> DistributedGaussian:
    plain = {
        "values": 20_000,
        "clip_norm": 0.5,
        "field_bound": 2**24,
        "noise_multiplier": 2.0,
        "least_survivors": 6,
        "colluders": 2,
    }
    return DistributedGaussian(**{**plain, **changes})


def test_honest_shares_at_worst_carry_the_designed_noise():
    """6 survivors, 2 of them colluding: the 4 honest shares alone have σ = z·γC."""
    made = mechanism()
    zero = np.zeros(20_000, dtype=np.float32)
    total = sum(made.protect(zero, NoiseSource(bytes([k]) * 32)) for k in range(4))
    designed = 2.0 * made.quantiser.bound
    assert made.event(6).noise_multiplier == pytest.approx(2.0)
    assert stats.kstest(total / designed, "norm").pvalue > 1e-3
    assert total.std() == pytest.approx(designed, rel=0.03)


def test_mean_of_protected_vectors_is_the_mean_plus_the_predicted_noise():
    made, n = mechanism(noise_multiplier=0.05), 8
    vectors = np.random.default_rng(0).normal(size=(n, 20_000)) * 1e-3
    total = sum(made.protect(v, NoiseSource(bytes([k]) * 32)) for k, v in enumerate(vectors))
    noise = made.quantiser.decode(total, n) - vectors.mean(axis=0)
    predicted = 0.5 * mean_noise(20_000, 0.05, n, 4, n)
    assert np.linalg.norm(noise) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("z", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("contributions", [1, 300])
def test_nothing_leaves_the_field(z, contributions):
    made = mechanism(noise_multiplier=z, contributions=contributions)
    assert made.largest <= 2**24
    assert made.largest > 2**24 * 0.99  # and the field is filled
    long = np.full(20_000, 1e3)
    protected = made.protect_sum([long] * min(contributions, 3), NoiseSource(b"k" * 32))
    assert np.abs(protected).max() <= made.largest


def test_settling_with_more_survivors_is_covered_by_the_reservation():
    made = mechanism()
    assert dominates([made.event(6)], [made.event(9)])
    assert not dominates([made.event(6)], [made.event(5)])


def test_joint_sum_has_the_sensitivity_of_one_record():
    made = mechanism(values=100, contributions=4, noise_multiplier=1.0)
    rows = np.random.default_rng(1).normal(size=(4, 100))
    with_all = made.protect_sum(rows, NoiseSource(b"a" * 32))
    without = made.protect_sum(rows[:3], NoiseSource(b"a" * 32))
    difference = sum(int(v) ** 2 for v in with_all - without)
    assert 0 < difference <= made.event(6).sensitivity ** 2
    with pytest.raises(ConfigError, match="5 units"):
        made.protect_sum([rows[0]] * 5, NoiseSource())


@pytest.mark.parametrize(
    "changes",
    [
        {"least_survivors": 2},
        {"field_bound": 10},
        {"field_bound": 2**9, "values": 10, "noise_multiplier": 0.01},
        {"values": 10**9, "field_bound": 2**16},
    ],
)
def test_impossible_designs_are_refused_before_training(changes):
    with pytest.raises(ConfigError):
        mechanism(**changes)


def test_prediction_matches_the_design_note_s_scaling():
    assert mean_noise(100_000, 1.0, 100, 100, 100) == pytest.approx(math.sqrt(1e5) / 100)
