"""The clip norm finds the target quantile from both sides, under real noise shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.adaptive_clip import AdaptiveClip, split
from securefedcollm.privacy.noise import NoiseSource

SILOS = 200
NORMS = np.random.default_rng(5).lognormal(mean=0.0, sigma=0.7, size=SILOS)


def learn(start: float, quantile: float, rounds: int = 300) -> float:
    """Geometric mean of C over the last 30 rounds, with noise of z_b = 10 on the indicator sum."""
    state = AdaptiveClip(start, quantile)
    noise = NoiseSource(b"n" * 32).gaussian(rounds) * 10 * 0.5
    course = []
    for error in noise:
        total = sum(state.indicator(bool(norm > state.clip_norm)) for norm in NORMS)
        state = state.next(total + error, SILOS)
        course.append(math.log(state.clip_norm))
    return math.exp(np.mean(course[-30:]))


@pytest.mark.parametrize("start", [1e-3, 0.9, 1e3])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_it_converges_from_far_below_and_far_above(start, quantile):
    """A sign error (counting the clipped) would diverge from both sides."""
    share = float((learn(start, quantile) >= NORMS).mean())
    assert share == pytest.approx(quantile, abs=0.08)


def test_direction():
    state = AdaptiveClip(1.0)
    everyone_clipped, nobody_clipped = -0.5 * SILOS, 0.5 * SILOS
    assert state.next(everyone_clipped, SILOS).clip_norm > 1.0
    assert state.next(nobody_clipped, SILOS).clip_norm < 1.0
    assert state.next(0.0, SILOS).clip_norm == 1.0


def test_noise_cannot_move_it_further_than_a_unanimous_vote():
    state = AdaptiveClip(1.0)
    assert state.next(-1e9, SILOS) == state.next(-0.5 * SILOS, SILOS)
    bounded = AdaptiveClip(1.0, smallest=0.9, largest=1.05)
    assert bounded.next(-1e9, SILOS).clip_norm == 1.05
    low = AdaptiveClip(1.0, smallest=0.95)
    assert low.next(1e9, SILOS).clip_norm == 0.95


def test_split_conserves_the_total():
    z = split(1.0, 10.0)
    assert 1 / z**2 + 1 / 10.0**2 == pytest.approx(1.0)
    assert 1.0 < z < 1.006
    with pytest.raises(ConfigError):
        split(1.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [{"clip_norm": 0.0}, {"clip_norm": math.nan}, {"quantile": 1.0}, {"learning_rate": 0.0}],
)
def test_impossible_settings(changes):
    with pytest.raises(ConfigError):
        AdaptiveClip(**{"clip_norm": 1.0, **changes})


@pytest.mark.parametrize(("total", "silos"), [(math.nan, 5), (math.inf, 5), (0.0, 0)])
def test_impossible_sums(total, silos):
    with pytest.raises(ConfigError):
        AdaptiveClip(1.0).next(total, silos)
