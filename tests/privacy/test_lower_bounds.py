"""Lower bounds on ε are right as often as they say, and tell a leak from none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from securefedcollm_audits.privacy.lower_bounds import Guesses, audit_scores, epsilon_lower_bound


def test_rates_are_those_of_clopper_and_pearson():
    interval = stats.binomtest(30, 40).proportion_ci(0.95, method="exact")
    other = stats.binomtest(3, 50).proportion_ci(0.95, method="exact")
    expected = math.log((interval.low - 1e-3) / other.high)
    assert epsilon_lower_bound(Guesses(30, 40, 3, 50), 1e-3) == pytest.approx(expected, rel=1e-6)


def test_it_is_wrong_no_more_often_than_it_says_and_close_with_many_trials():
    """Randomised response with ε = 1: the one mechanism whose best attack is known exactly."""
    truth = math.e / (1.0 + math.e)
    rng = np.random.default_rng(11)
    hits, alarms = rng.binomial(200, truth, 2000), rng.binomial(200, 1.0 - truth, 2000)
    bounds = [
        epsilon_lower_bound(Guesses(int(h), 200, int(a), 200), 0.0)
        for h, a in zip(hits, alarms, strict=True)
    ]
    assert np.mean([bound > 1.0 for bound in bounds]) <= 0.05
    many = Guesses(round(truth * 10**7), 10**7, round((1.0 - truth) * 10**7), 10**7)
    assert 0.995 < epsilon_lower_bound(many, 0.0) < 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_search_over_thresholds_costs_no_confidence(sign):
    """Scores that tell nothing: a threshold chosen and tested on the same scores would find ε."""
    rng = np.random.default_rng(12)
    found = [
        audit_scores(sign * rng.normal(size=60), sign * rng.normal(size=60), 0.0).epsilon
        for _ in range(200)
    ]
    assert np.mean([bound > 0.0 for bound in found]) <= 0.05


def test_the_direction_is_found():
    """Some leaks show only in the rate of "out": here a score of 0 proves absence."""
    rng = np.random.default_rng(13)
    present = np.ones(4000)
    absent = (rng.random(4000) < 0.5).astype(np.float64)
    forwards = epsilon_lower_bound(Guesses(2000, 2000, 1000, 2000), 0.0)
    assert forwards < 1.0
    assert audit_scores(present, absent, 0.0).epsilon > 4.0


@pytest.mark.parametrize(
    "guesses", [Guesses(1, 0, 0, 1), Guesses(2, 1, 0, 1), Guesses(0, 1, -1, 1)]
)
def test_impossible_counts(guesses):
    with pytest.raises(ValueError, match="impossible counts"):
        epsilon_lower_bound(guesses, 0.0)
