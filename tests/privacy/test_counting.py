"""Noised counts of right answers: exact without noise, hidden with it, within ε.

Adversary: the server and c silos, who know the opened sum and their own shares of the noise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accounting import TIGHT_SHARE, epsilon
from securefedcollm.privacy.counting import Counting, CountSetting, calibrate_counting
from securefedcollm.privacy.noise import NoiseSource

BOUND = 2**15 - 1
ALONE = CountSetting(BOUND, shares=1, colluders=0)
TOGETHER = CountSetting(BOUND, shares=4, colluders=1)
RIGHT = np.array([1.0, 0.0, 1.0, 1.0, 0.25])


def source(number: int) -> NoiseSource:
    return NoiseSource(number.to_bytes(32, "big"))


def test_without_noise_the_counts_are_exact_and_free():
    made = Counting(ALONE, None)
    total = made.protect(RIGHT, source(0)) + made.protect(np.ones(7), source(1))
    found = made.read((int(total[0]), int(total[1])), 2)
    assert (found.right, found.wrong, found.sigma) == (10.25, 1.75, 0.0)
    assert found.accuracy == pytest.approx(10.25 / 12)
    assert found.margin == 0.0
    assert made.events() == ()


@pytest.mark.parametrize("z", [0.3, 1.0, 40.0])
def test_one_unit_moves_the_integers_by_the_sensitivity_at_most(z):
    """With its noise key the mechanism is a function: one unit more shows as it is. The control is
    the pair right and asked, of which one unit moves more than is charged for."""
    made = Counting(TOGETHER, z)
    (event,) = made.events()
    worst = control = 0
    for share in (*np.linspace(0, 1, 41), math.nan, math.inf, -math.inf, 7.0):
        with_it = made.protect(np.append(RIGHT, share), source(3))
        moved = with_it - made.protect(RIGHT, source(3))
        worst = max(worst, int((moved**2).sum()))
        control = max(control, int(moved[0] ** 2 + moved.sum() ** 2))
    assert worst == event.sensitivity**2
    assert control == 2 * event.sensitivity**2


def test_every_silo_adds_a_share_and_what_colluders_leave_is_the_noise_that_is_charged():
    """Least survivors 4, one of them colludes: it subtracts its own share. The control is a second
    silo without noise: then less is left than the claim rests on."""
    z, draws = 2.0, 3000
    made = Counting(TOGETHER, z)
    nobody = np.zeros(0)
    shares = np.array(
        [[made.protect(nobody, source(4 * i + j)) for j in range(4)] for i in range(draws)]
    )
    assert (np.abs(shares).sum((0, 2)) > 0).all()
    charged = z * made.levels
    honest = np.std(shares[:, :3].sum(1), axis=0)
    assert honest == pytest.approx([charged, charged], rel=0.05)
    (event,) = made.events()
    assert event.noise_multiplier == pytest.approx(z)
    assert np.std(shares[:, :2].sum(1), axis=0).max() < 0.9 * charged
    found = made.read((0, 0), 4)
    assert np.std(shares.sum(1) / made.levels) == pytest.approx(found.sigma, rel=0.05)


def test_under_local_noise_each_silo_alone_adds_all_of_it():
    made = Counting(ALONE, 2.0)
    drawn = np.array([made.protect(RIGHT, source(i)) for i in range(3000)]) / made.levels
    assert np.std(drawn, axis=0) == pytest.approx([2.0, 2.0], rel=0.05)
    assert (made.events()[0].shares, made.events()[0].colluders) == (1, 0)


@pytest.mark.parametrize("setting", [ALONE, TOGETHER])
def test_the_planned_noise_is_the_least_that_keeps_epsilon(setting):
    z = calibrate_counting(2.0, 1e-5, 10, setting)
    kept = epsilon(Counting(setting, z).events(10), TIGHT_SHARE * 1e-5, "pld")
    spent = epsilon(Counting(setting, z - 2e-3).events(10), TIGHT_SHARE * 1e-5, "pld")
    assert kept <= 2.0 < spent


def test_the_interval_holds_the_noiseless_accuracy_as_often_as_it_says():
    made, right = Counting(TOGETHER, 4.0), np.repeat([1.0, 0.0], [130, 70])
    inside = 0
    for i in range(600):
        total = sum(made.protect(right, source(4 * i + j)) for j in range(4))
        found = made.read((int(total[0]), int(total[1])), 4)
        inside += abs(found.accuracy - 0.65) <= found.margin
    assert 0.92 < inside / 600 < 0.975


def test_a_count_that_the_noise_drowns_says_nothing():
    made = Counting(ALONE, 5.0)
    few = made.read((10 * made.levels, 0), 4)
    assert (few.accuracy, few.margin) == (None, None)
    assert made.read((100 * made.levels, 0), 4).accuracy == 1.0
    assert made.read((-5, -9), 4).accuracy is None


def test_what_does_not_fit_the_field_is_refused_before_any_answer():
    made = Counting(ALONE, 2.0)
    with pytest.raises(ConfigError, match="room for") as refused:
        made.protect(np.ones(made.most + 1), source(0))
    assert refused.value.where == "validation.share"
    full = made.protect(np.ones(made.most), source(0))
    assert int(np.abs(full).max()) <= BOUND
    with pytest.raises(ConfigError, match="field is too narrow"):
        Counting(ALONE._replace(field_bound=100), 2.0)


def test_another_mechanism_has_another_name():
    names = {Counting(s, z).identity for s in (ALONE, TOGETHER) for z in (1.0, 2.0, None)}
    assert len(names) == 5  # without noise there is one
