"""Privacy filters: which applies, what it charges, and that the two together keep to one δ."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate, claim, epsilon
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    merge,
    repeat,
)
from securefedcollm.privacy.filters import Terms, filter_epsilon, filter_orders, filter_within

DELTA = 1e-5
STEP = PoissonGaussian(0.085, 1.5, 1)
TERMS = Terms(STEP, 3.0)


def terms(first, budget=8.0):
    return Terms(repeat(first, 1), budget)


def test_the_mechanism_reserved_first_gets_the_tight_accountant():
    found = filter_epsilon([repeat(STEP, 30)] * 2, DELTA, TERMS)
    tight = claim([repeat(STEP, 60)], TIGHT_SHARE * DELTA)
    assert (found.epsilon, found.accountant, found.delta) == (tight.epsilon, "pld", DELTA)


def test_gentler_releases_are_charged_as_the_first_mechanism():
    events = [repeat(STEP, 15), PoissonGaussian(0.08, 1.6, 45)]
    found = filter_epsilon(events, DELTA, TERMS)
    assert found.epsilon <= claim([repeat(STEP, 60)], TIGHT_SHARE * DELTA).epsilon
    assert found.epsilon >= claim(events, DELTA).epsilon


def test_a_worse_release_moves_the_account_to_the_general_filter():
    events = [repeat(STEP, 15), PoissonGaussian(0.085, 1.4, 45)]
    found = filter_epsilon(events, DELTA, TERMS)
    assert found.accountant == "rdp-filter"
    fixed = epsilon(events, DELTA, "rdp")
    assert fixed < found.epsilon < 1.6 * fixed
    assert filter_within(events, DELTA, 3.0, TERMS) == found.epsilon


def test_gaussians_of_any_noise_share_one_tight_filter():
    events = [Gaussian(3.0, 2), Gaussian(5.0)]
    found = filter_epsilon(events, DELTA, terms(events[1]))
    assert found.accountant == "pld"
    assert found.epsilon == claim(events, TIGHT_SHARE * DELTA).epsilon


@pytest.mark.parametrize("steps", [3, 60])
def test_dp_sgd_on_every_record_is_shown_at_what_it_was_calibrated_for(steps):
    """An honest run spends its budget and no more; the tight accountant is that of calibration."""
    z = calibrate(8.0, DELTA, 1.0, steps)
    events, first = [PoissonGaussian(1.0, z, steps)], PoissonGaussian(1.0, z, 1)
    found = filter_epsilon(events, DELTA, terms(first))
    assert found.accountant == "pld"
    assert 7.99 < found.epsilon <= 8.0
    assert found.epsilon == filter_epsilon([Gaussian(z, steps)], DELTA, terms(first)).epsilon
    assert filter_within(events, DELTA, 8.0, terms(first)) <= 8.0


def test_discrete_sums_with_changing_survivors_share_the_zcdp_filter():
    sums = [DiscreteGaussian(500.0, 200, 10, shares) for shares in (6, 8, 9)]
    found = filter_epsilon(sums, DELTA, terms(sums[0]))
    assert found.accountant == "zcdp"
    assert found.epsilon == pytest.approx(epsilon(sums, TIGHT_SHARE * DELTA, "zcdp"))


def test_joint_sums_with_more_survivors_are_charged_at_most_as_reserved():
    """Every step of joint DP-SGD settles with its own survivors; the account must not lose the
    tight filter by that."""
    worst = DiscreteGaussian(2.0**18, 2**18, 11_264, 6, 2, 60, 0.085)
    real = [DiscreteGaussian(2.0**18, 2**18, 11_264, shares, 2, 20, 0.085) for shares in (6, 8, 10)]
    reserved = filter_epsilon([worst], DELTA, terms(worst)).epsilon
    assert filter_epsilon(real, DELTA, terms(worst)).epsilon <= reserved
    assert reserved == claim([worst], TIGHT_SHARE * DELTA).epsilon


def test_the_two_filters_failure_probabilities_add_up_to_delta():
    """Homogeneous outcomes are bounded at 7/8 δ, all others at δ/8 over three orders: recomputed
    from the RDP of dp-accounting for a mixed sequence."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    events = [repeat(STEP, 15), PoissonGaussian(0.085, 1.4, 45)]
    orders = filter_orders(STEP, 3.0, DELTA)
    accountant = RdpAccountant(list(orders))
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.q, gaussian), event.steps)
    share = (1 - TIGHT_SHARE) * DELTA / 3
    by_hand = min(
        rdp + math.log1p(-1 / order) - math.log(share * order) / (order - 1)
        for order, rdp in zip(orders, accountant.rdp, strict=True)
    )
    assert filter_epsilon(events, DELTA, TERMS).epsilon == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("q", [0.01, 0.085])
def test_calibration_is_for_the_filter_not_only_for_the_formula(q):
    z = calibrate(2.0, DELTA, q, 100)
    step = PoissonGaussian(q, z, 1)
    assert filter_within([repeat(step, 100)], DELTA, 2.0, Terms(step, 2.0)) <= 2.0
    assert filter_within([repeat(step, 103)], DELTA, 2.0, Terms(step, 2.0)) > 2.0


def test_the_general_filter_is_usable_where_low_orders_are_best():
    """q = 0.01, z near 1: the Rényi curve explodes at the orders that suit a plain Gaussian."""
    events = [PoissonGaussian(0.01, 1.1, 500), PoissonGaussian(0.01, 1.0, 500)]
    found = filter_epsilon(events, DELTA, terms(events[0], 3.0))
    assert found.accountant == "rdp-filter"
    assert found.epsilon < 1.6 * epsilon(events, DELTA, "rdp")


def test_nothing_costs_nothing():
    assert filter_epsilon([], DELTA, TERMS).epsilon == 0.0
    assert filter_within([], DELTA, 1.0, TERMS) == 0.0


@given(st.floats(0.05, 30.0), st.sampled_from([1e-4, 1e-5, 1e-8]), st.floats(0.6, 20.0))
def test_orders_depend_on_the_terms_alone_and_are_at_least_two(budget, delta, z):
    orders = filter_orders(PoissonGaussian(0.1, z, 1), budget, delta)
    assert 1 <= len(orders) <= 3
    assert min(orders) >= 2
    assert list(orders) == sorted(set(orders))


def test_quick_answers_bound_the_tight_ones():
    events = merge([repeat(STEP, 60)])
    exact = filter_epsilon(events, DELTA, TERMS).epsilon
    for limit in (10.0, exact + 1e-3, exact - 1e-3, 0.5):
        bound = filter_within(events, DELTA, limit, TERMS)
        assert bound >= exact
        assert (bound <= limit) == (exact <= limit)
