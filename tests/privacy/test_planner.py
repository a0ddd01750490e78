"""The planner's arithmetic, and that it tells the hard truth."""

from __future__ import annotations

import math

import msgspec
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.planner import Federation, _silo_distributed, plan

QUICKSTART = Federation(
    values=11_264,
    silos=4,
    least_survivors=3,
    colluders=1,
    records=3000,
    rounds=4,
    steps=15,
    batch_size=256,
)


@pytest.fixture(scope="module")
def quickstart():
    return plan(QUICKSTART, 8.0, 1e-5)


def by_name(made):
    return {option.name: option for option in made.options}


def test_every_option_meets_the_target_and_wastes_little(quickstart):
    for option in quickstart.options:
        assert 7.97 < option.epsilon <= 8.0
    local = by_name(quickstart)["record/local"]
    rate = 256 / 3000
    assert claim([PoissonGaussian(rate, local.noise_multiplier, 60)], 1e-5).epsilon <= 8.0


def test_the_gap_between_charge_and_hope_is_that_of_the_survivors(quickstart):
    """Local noise has none but the ledger's reserve; sums have the fourth silo's share."""
    options = by_name(quickstart)
    local, joint = options["record/local"], options["record/distributed"]
    assert 0.98 * local.epsilon < local.hoped < local.epsilon
    q, z = joint.sampling_rate, joint.noise_multiplier * math.sqrt(3 / 2)
    with_all = claim([PoissonGaussian(q, z, 60)], 1e-5).epsilon
    assert joint.hoped == pytest.approx(with_all, abs=2e-3)
    assert joint.hoped < 0.7 * joint.epsilon


def test_silo_level_privacy_of_four_silos_is_called_hopeless(quickstart):
    silo = by_name(quickstart)["silo/distributed"]
    assert silo.verdict == "hopeless"
    assert silo.noise_to_signal > 17
    assert "silo/distributed would release noise" in quickstart.advice


def test_silo_level_privacy_pays_for_a_large_federation():
    """The remark's number of silos makes it workable, and half of them does not."""
    large = msgspec.structs.replace(QUICKSTART, silos=1000, least_survivors=900)
    silo = _silo_distributed(large, 8.0, 1e-5)
    assert silo.verdict == "workable"
    needed = int(silo.remark.split("about ")[1].split(" silos")[0].replace(",", ""))
    assert needed < 1000

    def verdict(count):
        sized = msgspec.structs.replace(
            QUICKSTART, silos=count, least_survivors=max(3, round(0.9 * count))
        )
        return _silo_distributed(sized, 8.0, 1e-5).verdict

    assert verdict(needed) == "workable"
    assert verdict(needed // 2) != "workable"


def test_noise_follows_the_closed_forms(quickstart):
    options = by_name(quickstart)
    local, joint = options["record/local"], options["record/distributed"]
    assert local.noise_to_signal == pytest.approx(
        local.noise_multiplier * math.sqrt(11_264) / (256 * math.sqrt(4))
    )
    assert joint.noise_to_signal == pytest.approx(
        joint.noise_multiplier * math.sqrt(11_264 * 4 / 2) / (256 * 4)
    )
    assert joint.run_noise_to_signal < local.run_noise_to_signal


def test_colluders_cost_noise(quickstart):
    trusting = plan(msgspec.structs.replace(QUICKSTART, colluders=0), 8.0, 1e-5)
    for name in ("record/distributed", "silo/distributed"):
        ratio = by_name(quickstart)[name].noise_to_signal / by_name(trusting)[name].noise_to_signal
        assert ratio == pytest.approx(math.sqrt(3 / 2), rel=1e-2)


def test_advice_names_only_what_can_be_asked_for():
    made = plan(QUICKSTART, 8.0, 1e-5, lambda unit, noise: noise == "local")
    assert made.advice.startswith("take record/local")
    assert "record/distributed would keep more signal, but" in made.advice
    assert plan(QUICKSTART, 8.0, 1e-5).advice.startswith("take record/distributed")


def test_when_nothing_works_it_says_so():
    tiny = msgspec.structs.replace(QUICKSTART, records=20, batch_size=2, values=10_000_000)
    made = plan(tiny, 0.5, 1e-5)
    assert all(option.verdict == "hopeless" for option in made.options)
    assert made.advice.startswith("no option leaves a signal")


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"batch_size": 3001}, "local.batch_size"), ({"colluders": 3}, "silos.minimum")],
)
def test_impossible_federations(changes, where):
    with pytest.raises(ConfigError) as caught:
        plan(msgspec.structs.replace(QUICKSTART, **changes), 8.0, 1e-5)
    assert caught.value.where == where


def test_an_adaptive_clip_is_planned_with_what_it_costs_and_can_hear(quickstart):
    """Four silos cannot: the noise on the share of unclipped silos is larger than the share."""
    fixed = by_name(quickstart)["silo/distributed"]
    federation = msgspec.structs.replace(QUICKSTART, count_noise=1.25)
    adaptive = _silo_distributed(federation, 8.0, 1e-5)
    assert adaptive.noise_multiplier == fixed.noise_multiplier
    assert adaptive.noise_to_signal == pytest.approx(fixed.noise_to_signal / 0.6)  # √(1 - 0.8²)
    off = 1.25 * fixed.noise_multiplier / 2 * math.sqrt(4 / 2) / 4
    assert f"known to ±{off:.1g}" in adaptive.remark
