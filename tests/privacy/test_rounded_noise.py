"""Discrete noise as rounded continuous noise: the lemma by numbers, and the ε that follows from it.

Adversary: whoever reads every opened sum and knows the colluders' shares.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.federation.plan import joint_step
from securefedcollm.privacy.accounting import TIGHT_SHARE, claim, epsilon, prv_bounds
from securefedcollm.privacy.charges import grouped, halved
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    ROUNDING,
    ROUNDING_GAP,
    SAMPLER_SLACK,
    SMALLEST_SHARE,
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    RoundedGaussian,
    continuous,
    decode_events,
    encode_events,
    louder,
    repeat,
)
from securefedcollm.privacy.filters import Terms, filter_epsilon, filter_within
from securefedcollm.study import study_from_tree
from securefedcollm.study.life import load_life
from tests.support import loss

DELTA = 1e-5
CONFIGS = Path(__file__).parents[2] / "configs"


def weights(x, sigma):
    return np.exp(-(x**2) / (2.0 * sigma**2))


def discrete(sigma, reach):
    found = weights(np.arange(-reach, reach + 1), sigma)
    return found / found.sum()


# --- the lemma ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "sigma"), [(0.4, 0.6), (0.4, 1.6), (0.5, 0.75), (0.6, 1.5), (0.6, 4.0)]
)
def test_a_discrete_gaussian_is_a_rounded_continuous_one(s, sigma):
    """Both divergences stay below the lemma's bound, and come near it: it is no idle bound."""
    t = math.sqrt(sigma**2 - s**2)
    step = min(t, s) / 60.0
    y = np.arange(-9.0 * t, 9.0 * t + step, step)
    drawn = weights(y, t)
    drawn /= drawn.sum()
    reach = math.ceil(9.0 * sigma) + 12
    k = np.arange(-reach, reach + 1)
    kernel = weights(k[:, None] - y[None, :], s)
    kernel /= kernel.sum(axis=0)  # a probability on the integers, for every y
    rounded, exact = kernel @ drawn, discrete(sigma, reach)
    near = np.abs(k) <= 5.0 * sigma
    gap = np.max(np.abs(np.log(rounded[near] / exact[near])))
    square = 2.0 * (math.pi * s) ** 2
    bound = 3.0 * math.exp(-square * (2.0 - (s / sigma) ** 2)) + 6.0 * math.exp(-2.0 * square)
    bound += 3.0 * math.exp(-2.0 * (math.pi * sigma) ** 2)
    assert bound / 4.0 < gap <= bound


@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.75])
def test_the_sum_of_shares_is_near_one_discrete_gaussian(sigma):
    share = discrete(sigma, 40)
    total, gaps = share, 0.0
    for k in range(1, 4):
        total = np.convolve(total, share)
        gaps += 10.0 * math.exp(-2.0 * (math.pi * sigma) ** 2 * k / (k + 1))
        reach = (len(total) - 1) // 2
        exact = discrete(sigma * math.sqrt(k + 1), reach)
        near = np.abs(np.arange(-reach, reach + 1)) <= 6.0 * sigma
        gap = np.max(np.abs(np.log(total[near] / exact[near])))
        assert gaps / 100.0 < gap <= gaps


def test_the_gap_is_below_what_the_sampler_is_charged_with():
    """The lemma at the smallest σ of a share: its other two terms are far below the first."""
    square = 2.0 * math.pi**2 * ROUNDING**2
    first = 3.0 * math.exp(-square * (2.0 - ROUNDING**2 / SMALLEST_SHARE**2))
    assert pytest.approx(first, rel=1e-12) == ROUNDING_GAP
    assert 3.0 * math.exp(-2.0 * square) < 0.01 * first
    assert ROUNDING_GAP < 2.0**-117 < SAMPLER_SLACK
    ours = RoundedGaussian(4.0, 4, 10**7, 1)
    other = DiscreteGaussian(4.0, 4, 10**7, 1)
    assert ours.slack - other.slack == pytest.approx(10**7 * ROUNDING_GAP, rel=1e-6)


# --- ε ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "shift", "count"), [(1.0, 12, 5), (0.1, 12, 20), (0.3, 20, 10), (1.0, 9, 3)]
)
def test_the_discrete_mechanism_itself_costs_no_more_than_the_claim(q, shift, count):
    """The exact loss of summed discrete shares, by FFT, where the grid of integers is coarse:
    three shares of σ = 8, one of them the adversary's."""
    event = RoundedGaussian(8.0, shift, 1, 3, 1, count, q)
    noise = np.convolve(discrete(8.0, 100), discrete(8.0, 100))
    exact = loss.epsilon(loss.lattice(noise, shift, q), count, DELTA)
    claimed = claim([event], DELTA)
    assert claimed.accountant == "pld"
    # s² of σ² is given away: 2 % of the variance here, nothing at the σ of a study.
    assert exact <= claimed.epsilon < 1.03 * exact
    finer = msgspec.structs.replace(event, share_sigma=8.0 * 2**12, sensitivity=shift * 2**12)
    assert claim([finer], DELTA).epsilon == pytest.approx(exact, abs=0.02)


@lru_cache
def planned(name):
    study = study_from_tree(load_life(CONFIGS / f"{name}.yaml")[0])
    step = joint_step(study, 11_264)
    assert step is not None
    return study, step, repeat(step.event(), study.sums)


JOINT = [
    ("quickstart-joint", 0.617),
    ("consortium-10", 0.923),
    ("smollm2-openbookqa-joint", 0.600),
]


@pytest.mark.parametrize(("name", "most"), JOINT)
@pytest.mark.soak
def test_shipped_joint_studies_need_this_much_noise_and_three_computations_agree(name, most):
    study, step, event = planned(name)
    delta = TIGHT_SHARE * study.privacy.delta
    assert step.noise_multiplier <= most
    claimed = claim([event], delta).epsilon
    assert 0.995 * study.privacy.epsilon < claimed <= study.privacy.epsilon
    assert prv_bounds([event], delta)[1] == pytest.approx(claimed, abs=0.02)
    third = loss.sampled_gaussian(event.q, event.noise_multiplier)
    assert loss.epsilon(third, event.count, delta) == pytest.approx(claimed, abs=0.02)
    quieter = loss.sampled_gaussian(event.q, 0.98 * event.noise_multiplier)
    assert loss.epsilon(quieter, event.count, delta) > study.privacy.epsilon


@pytest.mark.parametrize(
    "event",
    [
        RoundedGaussian(2.0**18, 2**18, 11_264, 4, 1, 60, 0.0427),
        RoundedGaussian(5.0 * 2**18 / math.sqrt(6), 2**18, 100_000, 6, 0, 10),
        RoundedGaussian(8.0, 16, 2, 1, 0, 3),
    ],
    ids=["joint", "silo", "counts"],
)
def test_three_computations_agree(event):
    ideal = event.continuous
    claimed = claim([event], DELTA).epsilon
    low, estimate, high = prv_bounds([event], DELTA)
    assert low < claimed < high
    assert estimate == pytest.approx(claimed, abs=0.02)
    third = loss.sampled_gaussian(event.q, ideal.noise_multiplier)
    assert loss.epsilon(third, event.count, DELTA) == pytest.approx(claimed, abs=0.02)


def test_pld_is_far_below_rdp_and_zcdp():
    joint = RoundedGaussian(2.0**18, 2**18, 11_264, 4, 1, 60, 0.0427)
    assert claim([joint], DELTA).epsilon < 0.9 * epsilon([joint], DELTA, "rdp")
    silo = RoundedGaussian(2.0**18, 2**18, 11_264, 4, 1, 10)
    assert claim([silo], DELTA).epsilon < 0.96 * epsilon([silo], DELTA, "zcdp")


# --- the kind of event --------------------------------------------------------------------------


def test_the_continuous_mechanism_has_less_noise_by_the_rounding():
    event = RoundedGaussian(10.0, 20, 5, 4, 1, 7, 0.25)
    ideal = continuous(event)
    assert isinstance(ideal, PoissonGaussian)
    assert (ideal.q, ideal.steps) == (0.25, 7)
    assert ideal.noise_multiplier == pytest.approx(math.sqrt(300.0 - 2.25) / 20.0)
    assert event.noise_multiplier == pytest.approx(math.sqrt(300.0) / 20.0)
    assert continuous(msgspec.structs.replace(event, q=1.0)) == Gaussian(ideal.noise_multiplier, 7)
    assert continuous(DiscreteGaussian(10.0, 20, 5, 4)) is None


def test_older_versions_refuse_the_kind_and_its_own_survives_storage():
    event = RoundedGaussian(10.0, 20, 5, 4, 1, 7, 0.25)
    plain = encode_events([event])
    assert plain[0]["kind"] == "rounded-gaussian"
    assert decode_events(plain) == (event,)
    assert type(decode_events(plain)[0]) is RoundedGaussian
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, tuple[Gaussian | PoissonGaussian | DiscreteGaussian, ...])
    with pytest.raises(EvidenceError, match="cannot be read"):
        decode_events([{**plain[0], "rounding": 4.0}])


def test_charges_of_the_older_kind_keep_their_epsilon():
    """The numbers are of the version before PLD took discrete noise."""
    joint = DiscreteGaussian(2.0**18, 2**18, 11_264, 4, 1, 60, 0.085)
    found = claim([joint], DELTA)
    assert found.accountant == "rdp"
    assert found.epsilon == pytest.approx(2.0929200230623652, abs=1e-9)
    silo = DiscreteGaussian(5 * 2**18 / math.sqrt(6), 2**18, 100_000, 6, 0, 10)
    found = claim([silo], DELTA)
    assert found.accountant == "zcdp"
    assert found.epsilon == pytest.approx(2.8136532471298397, abs=1e-9)


def test_changes_of_an_event_keep_its_kind():
    event = RoundedGaussian(2.0**18, 2**18, 100, 6, 2, 3, 0.1)
    for changed in (halved(event), grouped(event, 3, 3), louder(event, 2.0), repeat(event, 9)):
        assert type(changed) is RoundedGaussian
    assert epsilon([halved(event)], DELTA) > epsilon([event], DELTA)


def test_a_settlement_may_not_lose_the_kind():
    """Without it PLD cannot charge it: it could cost more than what was reserved."""
    fields = msgspec.structs.asdict(RoundedGaussian(100.0, 200, 10, 6, 2, 5))
    rounded, plain = RoundedGaussian(**fields), DiscreteGaussian(**fields)
    assert dominates([rounded], [msgspec.structs.replace(rounded, shares=8)])
    assert dominates([plain], [rounded])
    assert not dominates([rounded], [plain])


# --- filters ------------------------------------------------------------------------------------

STEP = RoundedGaussian(2.0**18, 2**18, 11_264, 6, 2, 1, 0.085)


def test_a_fixed_plan_of_joint_steps_is_charged_by_pld():
    terms = Terms(STEP, 8.0)
    whole = repeat(STEP, 60)
    reserved = filter_epsilon([whole], DELTA, terms)
    assert reserved.accountant == "pld"
    assert reserved.epsilon == claim([whole], TIGHT_SHARE * DELTA).epsilon
    settled = [repeat(msgspec.structs.replace(STEP, shares=n), 20) for n in (6, 8, 10)]
    assert filter_epsilon(settled, DELTA, terms).epsilon <= reserved.epsilon


def test_survivors_chosen_on_the_way_are_not_credited_by_pld():
    """Adversary: a server that lets silos drop out by what it has seen. With more survivors the
    Rényi filter alone may charge less; PLD charges as reserved."""
    first = RoundedGaussian(0.6164 / math.sqrt(2) * 2**18, 2**18, 11_264, 3, 1, 1, 0.0427)
    terms = Terms(first, 8.0)
    reserved = filter_epsilon([repeat(first, 60)], DELTA, terms)
    assert (reserved.accountant, round(reserved.epsilon, 1)) == ("pld", 8.0)
    all_survive = msgspec.structs.replace(first, shares=4, count=60)
    found = filter_epsilon([all_survive], DELTA, terms)
    assert found.accountant == "rdp-filter"
    assert 1.5 * claim([all_survive], DELTA).epsilon < found.epsilon < reserved.epsilon


def test_the_budget_ends_where_the_plan_does():
    terms = Terms(STEP, 1.0)
    inside, outside = repeat(STEP, 24), repeat(STEP, 25)
    assert filter_within([inside], DELTA, 1.0, terms) <= 1.0
    assert claim([outside], TIGHT_SHARE * DELTA).epsilon > 1.0
    assert filter_within([outside], DELTA, 1.0, terms) > 1.0


def test_unsampled_rounded_sums_of_any_scale_share_the_gaussian_filter():
    sums = [RoundedGaussian(500.0, 200, 10, shares) for shares in (6, 8, 9)]
    found = filter_epsilon([*sums, Gaussian(3.0)], DELTA, Terms(sums[0], 8.0))
    assert found.accountant == "pld"
    squares = sum(1.0 / continuous(event).noise_multiplier ** 2 for event in sums) + 1.0 / 9.0
    one = claim([Gaussian(1.0 / math.sqrt(squares))], TIGHT_SHARE * DELTA).epsilon
    assert found.epsilon == pytest.approx(one, abs=1e-3)


COARSE = RoundedGaussian(SMALLEST_SHARE, 6, 1000, 1)
"""One honest silo's share, as coarse as allowed: the continuous mechanism has 7 % less noise."""


@pytest.mark.parametrize("limit", [7.6, 7.7, 7.8, 9.0])
def test_a_filter_admits_nothing_that_its_own_reading_calls_overspent(limit):
    """RDP of the discrete noise is below PLD of the continuous one here. If either sufficed, two
    tight filters would run side by side, and their failure probabilities would pass δ."""
    terms = Terms(COARSE, limit)
    within = filter_within((COARSE,), DELTA, limit, terms)
    assert (within <= limit) == (filter_epsilon((COARSE,), DELTA, terms).epsilon <= limit)
    assert epsilon([COARSE], TIGHT_SHARE * DELTA, "rdp") < 7.7 < within or limit == 9.0


@pytest.mark.parametrize(("sensitivity", "delta", "values"), [(21, 1e-5, 10**8), (19, 1e-8, 15000)])
def test_the_price_of_slack_is_that_of_the_charged_mechanism(sensitivity, delta, values):
    """At the ε of the discrete noise the slack would seem to fit into δ; at that of PLD it does
    not."""
    event = RoundedGaussian(SMALLEST_SHARE, sensitivity, values, 1)
    assert math.isinf(epsilon([event], delta, "pld"))


def test_an_absurd_release_is_claimed_without_a_grid_of_gigabytes():
    """Adversary: the maker of a bundle, whose event is harmless until the report takes away the
    shares of the study's colluders. PLD would need 450 million cells."""
    found = claim([RoundedGaussian(8.0, 1600, 1000, 101, 100)], DELTA)
    assert found.accountant == "rdp"
    assert found.epsilon > 1000.0


@pytest.mark.parametrize(
    "change",
    [
        {"sensitivity": 10**400},
        {"share_sigma": 1e200, "sensitivity": 10**200},
        {"shares": 10**9},
        {"count": 10**400},
        {"values": 10**400},
        {"q": 5e-324},
    ],
)
@pytest.mark.parametrize("kind", [RoundedGaussian, DiscreteGaussian])
def test_numbers_that_no_accountant_could_take_are_no_event(kind, change):
    with pytest.raises(ConfigError):
        kind(**{"share_sigma": 8.0, "sensitivity": 9, "values": 10, "shares": 3} | change)


def test_an_account_that_began_with_the_older_kind_stays_in_its_filter():
    """Two tight filters at 7/8 of δ each would be too much: the first mechanism names the one."""
    first = DiscreteGaussian(500.0, 200, 10, 6)
    events = [first, RoundedGaussian(500.0, 200, 10, 8)]
    found = filter_epsilon(events, DELTA, Terms(first, 8.0))
    assert found.accountant == "zcdp"
    assert found.epsilon == pytest.approx(epsilon(events, TIGHT_SHARE * DELTA, "zcdp"))
