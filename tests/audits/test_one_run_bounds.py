"""Bounds from one run: right as often as they say on mechanisms whose ε is known, and not idle."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom
from securefedcollm_audits.privacy.one_run_bounds import (
    Tally,
    curve_of,
    epsilon_lower_bound,
    gaussian_curve,
    gaussian_epsilon,
    gaussian_lower_bound,
    p_value,
    refutes_curve,
    tallies,
)

ERROR = 0.05


def randomised_response(rng, count, epsilon):
    """Scores of the one mechanism whose every guess is right with probability e^ε/(1 + e^ε)."""
    present = rng.random(count) < 0.5
    truthful = rng.random(count) < math.exp(epsilon) / (1.0 + math.exp(epsilon))
    return np.where(truthful, present, ~present) + 1e-6 * rng.normal(size=count), present


def gaussian(rng, count, mu):
    present = rng.random(count) < 0.5
    return mu * present + rng.normal(size=count), present


def test_the_largest_and_smallest_scores_are_guessed():
    scores = np.array([5.0, 1.0, 4.0, 0.0, 3.0, 2.0])
    present = np.array([True, False, True, True, False, False])
    assert tallies(scores, present, [0.3, 0.7, 1.0]) == [
        Tally(6, 2, 1),  # 5 is in, 0 is in
        Tally(6, 4, 3),  # 5 and 4 are, 1 is out
        Tally(6, 6, 4),
    ]


def test_without_delta_it_is_the_binomial_tail():
    for guesses, right, epsilon in product((1, 20), (0, 1, 17), (0.0, 1.5)):
        if right <= guesses:
            rate = math.exp(epsilon) / (1.0 + math.exp(epsilon))
            tail = sum(binom.pmf(range(right, guesses + 1), guesses, rate))
            assert p_value(Tally(50, guesses, right), epsilon, 0.0) == pytest.approx(tail)


def test_delta_costs_what_theorem_5_2_says():
    """By hand: 3 of 3 guesses right, about 4 canaries; W is binomial(3, 1/2) at ε = 0.

    max_i P[3 > W >= 3 − i]/i = max(3/8, 6/8/2, 7/8/3) = 3/8.
    """
    assert p_value(Tally(4, 3, 3), 0.0, 0.01) == pytest.approx(1 / 8 + 2 * 4 * 0.01 * 3 / 8)
    # 3 of 4 right about 5: W is binomial(4, 1/2): max(6/16, 10/16/2, 11/16/3) = 6/16.
    assert p_value(Tally(5, 4, 3), 0.0, 0.01) == pytest.approx(5 / 16 + 2 * 5 * 0.01 * 6 / 16)
    assert p_value(Tally(4, 3, 0), 0.0, 0.01) == 1.0
    with pytest.raises(ValueError, match="impossible tally"):
        p_value(Tally(4, 5, 5), 0.0, 0.0)


def test_on_randomised_response_it_is_wrong_no_more_often_than_it_says():
    rng = np.random.default_rng(1)
    wrong = curve_wrong = 0
    for _ in range(400):
        scores, present = randomised_response(rng, 300, 1.0)
        found = tallies(scores, present)
        wrong += any(p_value(t, 1.0, 0.0) <= ERROR / len(found) for t in found)
        curve_wrong += any(
            refutes_curve(t, curve_of([(1.0, 0.0)]), ERROR / len(found)) for t in found
        )
    assert wrong / 400 <= ERROR
    assert curve_wrong / 400 <= ERROR


def test_with_a_single_tally_it_is_wrong_nearly_as_often_as_it_says():
    """So the test above passes by soundness, not by idleness: all canaries guessed, no union."""
    rng = np.random.default_rng(2)
    right = rng.binomial(300, math.e / (1.0 + math.e), 4000)
    wrong = np.mean([p_value(Tally(300, 300, int(v)), 1.0, 0.0) <= ERROR for v in right])
    assert 0.03 < wrong <= ERROR
    curve = curve_of([(1.0, 0.0)])
    by_curve = np.mean([refutes_curve(Tally(300, 300, int(v)), curve, ERROR) for v in right[:400]])
    assert 0.02 < by_curve <= ERROR + 0.02


def test_on_the_gaussian_mechanism_all_three_are_sound():
    rng = np.random.default_rng(3)
    mu, delta = 1.0, 1e-5
    epsilon = gaussian_epsilon(mu, delta)
    curve = curve_of([(gaussian_epsilon(mu, d), d) for d in (0.3, 0.1, 1e-2, 1e-3, 1e-5)])
    wrong = np.zeros(3)
    for _ in range(150):
        found = tallies(*gaussian(rng, 300, mu))
        error = ERROR / len(found)
        wrong += [
            any(p_value(t, epsilon, delta) <= error for t in found),
            any(refutes_curve(t, gaussian_curve(mu), error) for t in found),
            any(refutes_curve(t, curve, error) for t in found),
        ]
    assert (wrong / 150 <= ERROR).all()


def test_they_find_a_good_part_of_what_is_there_and_refute_a_claim_that_is_too_low():
    rng = np.random.default_rng(4)
    found = tallies(*randomised_response(rng, 20_000, 2.0))
    assert 1.8 < epsilon_lower_bound(found, 0.0).epsilon < 2.0
    found = tallies(*gaussian(rng, 4000, 2.0))
    whole = gaussian_epsilon(2.0, 1e-5)
    plain, curved = epsilon_lower_bound(found, 1e-5), gaussian_lower_bound(found, 1e-5)
    assert 0.3 * whole < plain.epsilon < curved.epsilon < whole
    low = curve_of([(gaussian_epsilon(1.0, d), d) for d in (0.3, 0.1, 1e-2, 1e-3, 1e-5)])
    assert any(refutes_curve(t, low, ERROR / len(found)) for t in found)
    chance = tallies(rng.normal(size=4000), rng.random(4000) < 0.5)
    assert epsilon_lower_bound(chance, 1e-5).epsilon == 0.0
    assert gaussian_lower_bound(chance, 1e-5).epsilon == 0.0


def test_the_gaussian_s_epsilon_is_the_accountant_s():
    """Reference values of docs/privacy.md: z = 1 once; z = 2 fifty times."""
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178, rel=2e-4)
    assert gaussian_epsilon(math.sqrt(50) / 2, 1e-5) == pytest.approx(20.675508, rel=2e-4)


def test_curves_are_inverses_of_what_they_promise():
    curve = curve_of([(math.log(3.0), 0.0)])
    assert curve(0.3) == pytest.approx(0.1)  # at most 3·α
    assert curve(5 / 6) == pytest.approx(0.5)  # at most 1 − (1 − α)/3
    assert curve_of([(0.0, 0.05)])(0.55) == pytest.approx(0.5)
    assert gaussian_curve(1.0)(0.5) == pytest.approx(0.158655, abs=1e-6)
    assert gaussian_curve(1.0)(0.0) == 0.0
