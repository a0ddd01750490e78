"""``audit mechanism``: the real path does not refute its claim; every weakened build does.

The second part gives the first its weight. A build is weakened in the product's own code, and the
very same audit is played on it.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.privacy.canaries import seats_of, silo_path
from securefedcollm_audits.privacy.mechanism import audit, collect, interval, path_of
from securefedcollm_audits.privacy.probe import local_path

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import silo_unit
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.noise import GridSum, NoiseSource, grid_step
from securefedcollm.privacy.quantise import Quantised, Quantiser
from securefedcollm.privacy.silo_unit import Setting
from tests.support.arithmetic import make_study
from tests.support.noises import Recorded

LOCAL = make_study(
    rounds=1,
    local={"steps": 1, "batch_size": 100, "learning_rate": 0.1, "micro_batch": 200},
    privacy={"epsilon": 1.0, "delta": 1e-5},
)
JOINT = make_study(
    rounds=1,
    local={"steps": 1, "batch_size": 100, "learning_rate": 0.1, "sampling_rate": 0.05},
    privacy={"epsilon": 1.0, "delta": 1e-5, "noise": "distributed"},
    aggregation={"value_bits": 20},
)
SILO = make_study(
    rounds=1,
    silos={"count": 8, "colluders": 1},
    privacy={
        "epsilon": 4.0,
        "delta": 1e-5,
        "unit": "silo",
        "noise": "distributed",
        "clip_norm": 0.5,
    },
    aggregation={"value_bits": 20, "clip_norm": 0.5},
)
GRAPH = make_study(
    rounds=1,
    silos={"count": 12, "minimum": 11, "colluders": 1},
    privacy=SILO.tree["privacy"],
    aggregation={"value_bits": 20, "clip_norm": 0.5, "graph": {"neighbours": 8}},
)
CASES = {
    "local": (LOCAL, {"records": 2000, "trials": 40_000}),
    "joint": (JOINT, {"trials": 40_000}),
    "silo": (SILO, {"trials": 16_000}),
}


def played(name, **fewer):
    study, sizes = CASES[name]
    return audit(study, noise=Recorded(name), **(sizes | fewer))


@pytest.fixture(scope="module")
def honest():
    return {name: played(name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_real_path_is_not_refuted(honest, name):
    finding = honest[name]
    assert finding.held, finding.sentence
    assert finding.bound < finding.claimed
    assert finding.bound > 0.05 or name != "silo"  # a sample of 5 % says little in so few trials
    figures = finding.figures
    assert figures["noise at least"] < figures["noise charged"] < figures["noise at most"]
    assert finding.study is CASES[name][0]


def test_the_claim_is_that_of_one_release_by_the_study_s_own_mechanism(honest):
    unit = silo_unit(SILO, lambda round_: 400, 0)
    assert honest["silo"].claimed == claim([unit.event()], 1e-5).epsilon
    path = path_of(LOCAL, 2000)
    assert (path.event.q, path.event.steps) == (0.05, 1)


def test_canaries_are_in_the_sum_as_often_as_records_are_sampled():
    event = PoissonGaussian(q=0.25, noise_multiplier=0.05, steps=1)
    scores = collect(local_path(LOCAL, event, 1000), 8000, Recorded("rate"), silent)
    taken = scores.present > 0.5
    assert np.mean(taken) == pytest.approx(0.25, abs=0.03)
    assert scores.present[taken].mean() == pytest.approx(1.0, abs=0.01)
    assert np.abs(scores.absent).max() < 0.5


@pytest.mark.soak
def test_noise_is_measured_against_the_sensitivity_that_is_charged():
    """With few bits the quantiser shrinks vectors by 2 %, noise not: seen in clip norms, 2 % less
    noise than is charged would look right."""
    narrow = msgspec.structs.replace(
        SILO, aggregation=msgspec.structs.replace(SILO.aggregation, value_bits=10)
    )
    path = path_of(narrow)
    assert math.sqrt(path.event.values) / (2 * path.event.sensitivity) > 0.019
    scores = collect(path, 48_000, Recorded("narrow"), silent)
    noise, charged = interval(scores.absent), path.event.noise_multiplier
    assert noise.low < charged < noise.high < 1.019 * charged


def test_on_a_graph_the_adversary_meets_the_fewest_shares_that_a_sum_may_have():
    """A lying server may leave 3 of the 11 survivors out, and one colludes: 7 shares are left."""
    release = path_of(GRAPH)
    assert (GRAPH.quorum, GRAPH.graph_bounds.hidden, release.event.shares) == (11, 3, 8)
    scores = release.play(Recorded("graph"))
    assert len(scores.present) == 7
    noise, charged = interval(scores.absent), release.event.noise_multiplier
    assert noise.low < charged < noise.high
    # Control: with the shares of all honest survivors there is more noise than is charged, and a
    # build that adds too little could pass.
    values = len(scores.present) + len(scores.absent)
    unit = silo_unit(GRAPH, lambda round_: values, 0)
    setting = Setting(values, GRAPH.field.bound, GRAPH.quorum, 1)
    every = silo_path(setting, unit, seats_of(GRAPH)).play(Recorded("graph"))
    assert len(every.present) == 10
    assert interval(every.absent).low > charged


def test_the_interval_of_the_noise_is_right():
    rng = np.random.default_rng(5)
    found = [interval(rng.normal(0.0, 2.0, size=400), 0.9) for _ in range(400)]
    inside = np.mean([low < 2.0 < high for low, _, high in found])
    assert 0.86 < inside < 0.94


def test_a_study_without_noise_has_no_mechanism():
    with pytest.raises(ConfigError, match="adds no noise"):
        audit(make_study(privacy=None))


# --- Weakened builds ------------------------------------------------------------------------------


def refuted(name, **fewer):
    finding = played(name, **fewer)
    assert not finding.held
    return finding


def test_dp_sgd_without_noise_is_caught(monkeypatch):
    monkeypatch.setattr(
        NoiseSource, "add_gaussian", lambda self, total, sigma: total * grid_step(sigma)
    )
    finding = refuted("local")
    assert finding.bound > finding.claimed
    assert "the noise is at most 0.00" in finding.sentence


def test_dp_sgd_without_the_clip_is_caught(monkeypatch):
    real = GridSum.add
    monkeypatch.setattr(GridSum, "add", lambda self, blocks, norms: real(self, blocks, 0 * norms))
    assert refuted("local").bound > 1.0


def test_dp_sgd_with_a_tenth_less_noise_is_caught_by_the_noise_alone(monkeypatch):
    real = NoiseSource.add_gaussian
    monkeypatch.setattr(
        NoiseSource, "add_gaussian", lambda self, total, sigma: real(self, total, 0.9 * sigma)
    )
    finding = refuted("local")
    assert finding.bound < finding.claimed  # no attack of this size finds so little
    assert "times the sensitivity; " in finding.sentence


@pytest.mark.soak
def test_a_sampler_that_takes_every_record_is_caught(monkeypatch):
    """Charged as a sample of 5 %, trained with all."""
    monkeypatch.setattr(NoiseSource, "poisson_batch", lambda self, n, q: np.arange(n))
    finding = refuted("local", trials=16_000)
    assert finding.bound > finding.claimed


@pytest.mark.parametrize("name", ["joint", "silo"])
def test_a_dropped_noise_share_is_caught(monkeypatch, name):
    """All honest survivors but one leave their share out."""
    study, _ = CASES[name]
    every, calls = study.quorum, iter(range(10**9))
    real = NoiseSource.add_discrete_gaussian

    def lazy(self, values, sigma):
        if next(calls) % every == 0:
            real(self, values, sigma)

    monkeypatch.setattr(NoiseSource, "add_discrete_gaussian", lazy)
    assert "the noise is at most" in refuted(name).sentence


def test_a_record_s_gradient_without_the_clip_is_caught(monkeypatch):
    """Even where the check in integers is switched off as well, and the field is wide enough."""

    def unclipped(self, vector):
        return Quantised(np.rint(vector * self.scale).astype(np.int64), 0, False)

    monkeypatch.setattr(Quantiser, "encode", unclipped)
    monkeypatch.setattr("securefedcollm_audits.privacy.canaries.LENGTH", 4.0)
    assert refuted("joint").bound > 1.0
