"""opacus' accountant agrees with the claim, and says nothing about what it does not know."""

from __future__ import annotations

import pytest

from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    RoundedGaussian,
)
from securefedcollm.tuning.opinion import opacus_epsilon


@pytest.mark.parametrize(
    ("events", "delta", "expected"),
    [
        ([Gaussian(1.0)], 1e-5, 4.387414),
        ([PoissonGaussian(0.01, 1.0, 1000)], 1e-5, 1.838372),
        ([Gaussian(1.0, 5), Gaussian(1.5, 10), Gaussian(2.0, 20)], 1e-5, 22.774393),
        ([RoundedGaussian(2.0**18, 2**18, 100, 4, 1, 3)], 1e-5, 4.387414),
    ],
)
def test_it_gives_its_reference_values_a_hundredth_above_the_claim(events, delta, expected):
    found = opacus_epsilon(events, delta)
    assert found == pytest.approx(expected, abs=2e-4)
    assert 0.005 < found - claim(events, delta).epsilon < 0.015


def test_it_is_not_asked_about_the_discrete_sums_of_older_versions():
    assert opacus_epsilon([DiscreteGaussian(100.0, 300, 10, 3)], 1e-5) is None
