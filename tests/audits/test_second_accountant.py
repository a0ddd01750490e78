"""The second accountant against the first, which shares no formula with it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import msgspec
import pytest
from securefedcollm_audits.verification.second_accountant import bracket

from securefedcollm.federation.plan import joint_step
from securefedcollm.federation.sizes import unit_records
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate, claim, epsilon
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    RoundedGaussian,
)
from securefedcollm.study import study_from_tree
from securefedcollm.study.life import load_life

DELTA = 1e-5
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALLEST = {"pretrain-english": 779}
"""Records of the smallest silo, where each has a file of its own."""

_calibrated = lru_cache(calibrate)  # some studies differ in their questions only


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_agrees_with_the_claim_of_every_shipped_config(path):
    """All of a study's releases, planned to its ε, within the width of PRV's bracket."""
    study = study_from_tree(load_life(path)[0])
    privacy, local = study.privacy, study.local
    assert privacy is not None
    delta = TIGHT_SHARE * privacy.delta
    step = joint_step(study, 11264)
    if step is not None:
        events = [msgspec.structs.replace(step.event(), count=study.sums)]
    else:
        records = SMALLEST.get(path.stem) or unit_records(study)
        rate, steps = local.batch_size / records, local.steps * study.rounds
        noise = _calibrated(privacy.epsilon, privacy.delta, rate, steps)
        events = [PoissonGaussian(rate, noise, steps)]
    found, claimed = bracket(events, delta), claim(events, delta).epsilon
    assert found.low <= claimed <= found.high
    assert 0.99 * privacy.epsilon < claimed <= privacy.epsilon
    assert found.method == "prv-accountant"
    assert found.high - found.low < 0.03


def discrete(**changes):
    return DiscreteGaussian(
        **({"share_sigma": 2.0**18, "sensitivity": 2**18, "values": 10, "shares": 4} | changes)
    )


def test_prv_brackets_dp_sgd():
    found = bracket([PoissonGaussian(0.05, 1.0, 40)], DELTA)
    assert found.low < epsilon([PoissonGaussian(0.05, 1.0, 40)], DELTA) < found.high
    assert found.high - found.low < 0.05


def test_noised_sums_lie_between_the_exact_curve_and_zcdp():
    """Two shares known to the adversary: z = √(4 − 2)·1."""
    events = [discrete(colluders=2, count=5)]
    found = bracket(events, DELTA)
    exact = epsilon([Gaussian(2.0**0.5, 5)], DELTA)
    assert found.low == pytest.approx(exact, rel=2e-3)
    assert found.low < epsilon(events, DELTA, "zcdp") < found.high


def test_sampled_noised_sums_lie_between_prv_and_the_renyi_bound():
    events = [discrete(q=0.1, count=20), discrete(q=0.1, shares=3, count=4)]
    found = bracket(events, DELTA)
    assert found.high == pytest.approx(epsilon(events, DELTA, "rdp"), rel=1e-6)
    assert found.low < found.high < 1.5 * found.low


def test_prv_brackets_rounded_sums_from_both_sides():
    """Below, with all of the noise; above, without what rounds it: the claim lies between, also
    where the integers are coarse."""
    for share in (2.0**18, 10.0):
        fields = {"share_sigma": share, "sensitivity": int(share), "values": 10, "shares": 4}
        for q, count in ((1.0, 5), (0.1, 20)):
            event = RoundedGaussian(**fields, count=count, q=q)
            found = bracket([event], DELTA)
            assert found.method == "prv-accountant"
            assert found.low <= epsilon([event], DELTA) <= found.high
            assert found.high - found.low < (0.03 if share > 100.0 else 0.1)
            less = RoundedGaussian(**{**fields, "shares": 3}, count=count, q=q)
            assert epsilon([less], DELTA) > found.high


def test_rounded_sums_with_older_ones_are_bracketed_as_the_older_ones():
    found = bracket([discrete(q=0.1), RoundedGaussian(2.0**18, 2**18, 10, 4, q=0.1)], DELTA)
    assert found == bracket([discrete(q=0.1, count=2)], DELTA)


def test_nothing_costs_nothing():
    assert bracket([], DELTA)[:2] == (0.0, 0.0)
