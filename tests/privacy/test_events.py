"""Events as data: what can be said, written down, read back and compared."""

from __future__ import annotations

import json
import math

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.privacy.accounting import epsilon
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    decode_events,
    encode_events,
    louder,
    merge,
    times,
)

noise = st.floats(0.3, 50.0)
runs = st.integers(1, 40)
events = st.one_of(
    st.builds(Gaussian, noise, runs),
    st.builds(PoissonGaussian, st.floats(0.001, 1.0), noise, runs),
    st.builds(
        lambda z, shares, colluders, count, q: DiscreteGaussian(
            z * 2**12 / math.sqrt(shares - colluders), 2**12, 1000, shares, colluders, count, q
        ),
        noise,
        st.integers(4, 20),
        st.integers(0, 3),
        runs,
        st.sampled_from([1.0, 0.1]),
    ),
)


@given(st.lists(events, max_size=5))
def test_events_survive_canonical_json(listed):
    raw = rfc8785.dumps(encode_events(listed))
    assert decode_events(json.loads(raw)) == tuple(listed)


@given(st.lists(events, max_size=6), st.randoms(use_true_random=False))
def test_merge_is_canonical_and_keeps_the_total(listed, random):
    shuffled = listed[:]
    random.shuffle(shuffled)
    assert merge(listed) == merge(shuffled) == merge(merge(listed))
    assert sum(map(times, merge(listed))) == sum(map(times, listed))


@pytest.mark.parametrize(
    "plain",
    [
        [{"kind": "laplace", "noise_multiplier": 1.0}],
        [{"kind": "gaussian"}],
        [{"kind": "gaussian", "noise_multiplier": "1"}],
        [{"kind": "gaussian", "noise_multiplier": 0.0}],
        [{"kind": "gaussian", "noise_multiplier": 1.0, "discount": 0.5}],
        [{"kind": "poisson-gaussian", "q": 0.0, "noise_multiplier": 1.0, "steps": 1}],
        [{"noise_multiplier": 1.0}],
        {"kind": "gaussian"},
        None,
    ],
)
def test_what_is_not_understood_is_refused_not_skipped(plain):
    with pytest.raises(EvidenceError, match="cannot be read"):
        decode_events(plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(math.inf),
        lambda: Gaussian(math.nan),
        lambda: Gaussian(1.0, 0),
        lambda: PoissonGaussian(1.5, 1.0, 1),
        lambda: PoissonGaussian(0.5, 1.0, 0),
        lambda: DiscreteGaussian(10.0, 0, 1, 3),
        lambda: DiscreteGaussian(10.0, 1, 0, 3),
        lambda: DiscreteGaussian(10.0, 1, 1, 3, 3),
        lambda: DiscreteGaussian(10.0, 1, 1, 3, -1),
    ],
)
def test_impossible_events_cannot_be_made(make):
    with pytest.raises(ConfigError):
        make()


def test_noise_multiplier_counts_honest_shares_only():
    event = DiscreteGaussian(100.0, 200, 10, 10, 6)
    assert event.honest == 4
    assert event.noise_multiplier == pytest.approx(1.0)


RESERVED = DiscreteGaussian(100.0, 200, 10, 6, 2, 5)


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"shares": 8}, True),
        ({"count": 3}, True),
        ({"q": 0.5}, True),
        ({"share_sigma": 120.0}, True),
        ({"sensitivity": 100}, True),
        ({"shares": 5}, False),
        ({"count": 6}, False),
        ({"share_sigma": 99.0}, False),
        ({"sensitivity": 201}, False),
        ({"values": 11}, False),
        ({"colluders": 0}, False),
    ],
)
def test_a_settlement_is_covered_only_if_no_parameter_is_worse(change, covered):
    fields = {name: getattr(RESERVED, name) for name in RESERVED.__struct_fields__}
    assert dominates([RESERVED], [DiscreteGaussian(**{**fields, **change})]) is covered


def test_a_settlement_may_split_but_not_multiply_runs():
    reserved = [PoissonGaussian(0.1, 1.0, 10)]
    assert dominates(reserved, [PoissonGaussian(0.1, 1.0, 4), PoissonGaussian(0.05, 2.0, 6)])
    assert not dominates(reserved, [PoissonGaussian(0.1, 1.0, 4), PoissonGaussian(0.05, 2.0, 7)])
    assert not dominates(reserved, [PoissonGaussian(0.2, 1.0, 1)])
    assert not dominates(reserved, [Gaussian(100.0)])
    assert not dominates(reserved, [])


def test_a_cover_is_found_whatever_the_order():
    """The gentle run must leave the harsh reservation to the run that needs it."""
    reserved = [Gaussian(1.0, 2), Gaussian(5.0, 3)]
    assert dominates(reserved, [Gaussian(15.0, 3), Gaussian(3.0, 2)])
    assert dominates(reserved[::-1], [Gaussian(15.0, 3), Gaussian(3.0, 2)])
    assert not dominates(reserved, [Gaussian(15.0, 2), Gaussian(3.0, 3)])


costs = st.builds(PoissonGaussian, st.sampled_from([0.1, 0.2, 0.3]), noise, st.integers(1, 4))


@given(st.lists(costs, min_size=1, max_size=5), st.lists(costs, min_size=1, max_size=5))
def test_cover_is_hall_s_condition(reserved, actual):
    """Against brute force over all subsets of the actual events (Hall 1935)."""
    from itertools import combinations

    def covers(worst, event):
        return event.q <= worst.q and event.noise_multiplier >= worst.noise_multiplier

    feasible = all(
        sum(event.steps for event in some)
        <= sum(worst.steps for worst in reserved if any(covers(worst, e) for e in some))
        for size in range(1, len(actual) + 1)
        for some in combinations(actual, size)
    )
    assert dominates(reserved, actual) is feasible


@settings(max_examples=10, deadline=None)
@given(st.lists(events, min_size=1, max_size=3), st.floats(1.0, 3.0))
def test_more_noise_is_covered_and_costs_less(listed, factor):
    quieter = merge(listed)
    noisier = merge(louder(event, factor) for event in listed)
    assert dominates(quieter, noisier)
    assert epsilon(noisier, 1e-5, "rdp") <= epsilon(quieter, 1e-5, "rdp") * (1 + 1e-9)
