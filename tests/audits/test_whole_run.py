"""``audit whole-run``: the real path does not refute its claim; every weakened build does.

The studies are small and their ε is too, so that few trials do. The commands of docs/audits.md play
the shipped studies with a million.
"""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom, norm
from securefedcollm_audits.privacy.canaries import joint_path, seats_of, silo_path
from securefedcollm_audits.privacy.mechanism import audit as audit_mechanism
from securefedcollm_audits.privacy.mechanism import path_of
from securefedcollm_audits.privacy.whole_run import audit, likelihood

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import joint_setting, joint_step, silo_unit
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Gaussian, PoissonGaussian, repeat
from securefedcollm.privacy.noise import GridSum, NoiseSource
from securefedcollm.privacy.quantise import Quantised, Quantiser
from securefedcollm.privacy.silo_unit import Setting
from tests.support.arithmetic import make_study
from tests.support.noises import Recorded

JOINT = make_study(
    rounds=2,
    local={"steps": 3, "batch_size": 400, "learning_rate": 0.1, "sampling_rate": 0.2},
    privacy={"epsilon": 1.0, "delta": 1e-3, "noise": "distributed"},
    aggregation={"value_bits": 20},
)
SILO = make_study(
    rounds=2,
    silos={"count": 8, "colluders": 1},
    privacy={
        "epsilon": 2.0,
        "delta": 1e-3,
        "unit": "silo",
        "noise": "distributed",
        "clip_norm": 0.5,
    },
    aggregation={"value_bits": 20, "clip_norm": 0.5},
)
LOCAL = make_study(
    rounds=2,
    local={"steps": 3, "batch_size": 60, "learning_rate": 0.1, "micro_batch": 200},
    privacy={"epsilon": 1.0, "delta": 1e-3},
)
CASES = {
    "joint": (JOINT, {"trials": 24_000}),
    "silo": (SILO, {"trials": 120_000}),
    "local": (LOCAL, {"trials": 8000, "records": 2000}),
}
SLOW = [pytest.param("local", marks=pytest.mark.soak)]


def played(name):
    study, sizes = CASES[name]
    return audit(study, noise=Recorded(name), **sizes)


@pytest.fixture(scope="module")
def honest():
    """The control of every weakened build below: the same audit with the same noise."""
    return cache(played)


@pytest.mark.parametrize("name", ["joint", "silo", *SLOW])
def test_the_real_path_is_not_refuted(honest, name):
    finding = honest(name)
    assert finding.held, finding.sentence
    assert finding.bound < finding.claimed
    assert finding.bound >= {"joint": 0.4, "silo": 0.25, "local": 0.0}[name] * finding.claimed
    figures = finding.figures
    assert figures["noise at least"] < figures["noise charged"] < figures["noise at most"]
    assert (0.4 if name == "local" else 0.7) < figures["moved at least"] <= 1.0


def test_the_claim_is_that_of_all_releases(honest):
    step = joint_step(JOINT, 2 * 2 * 500)
    assert honest("joint").claimed == claim([repeat(step.event(), 6)], 1e-3).epsilon
    assert 0.95 < honest("joint").claimed < 1.0  # the ledger keeps δ/8
    path = path_of(LOCAL, 2000, whole=True)
    assert (path.event.q, path.event.steps) == (0.03, 3)


def test_more_trials_of_the_whole_run_prove_more_than_one_release(honest):
    one = audit_mechanism(JOINT, noise=Recorded("one"), trials=24_000)
    assert honest("joint").bound > 2.0 * one.bound


def test_masks_change_no_integer():
    """What the audit leaves out is nothing: with masks, shares of colluders and all, the adversary
    has the same sum."""
    values = 40
    step, setting = joint_step(JOINT, values), joint_setting(JOINT, values)
    given = (setting, step, seats_of(JOINT), JOINT.privacy.clip_norm, 10)
    unit = silo_unit(SILO, lambda round_: values, 0)
    whole = (Setting(values, SILO.field.bound, SILO.quorum, 1), unit, seats_of(SILO))
    for make, words in ((joint_path, given), (silo_path, whole)):
        with_, without = (
            make(*words, masked=masked).play(Recorded("masks")) for masked in (True, False)
        )
        np.testing.assert_array_equal(with_.present, without.present)
        np.testing.assert_array_equal(with_.absent, without.absent)


@pytest.mark.parametrize(
    "event", [PoissonGaussian(0.2, 0.7, 1), PoissonGaussian(0.3, 0.9, 4), Gaussian(1.5)]
)
def test_the_score_is_the_likelihood_ratio(event):
    steps = getattr(event, "steps", 1)
    seen = np.linspace(-2.0, 4.0, 9)
    sigma = event.noise_multiplier * math.sqrt(steps)
    taken = np.arange(steps + 1)
    weights = binom.pmf(taken, steps, getattr(event, "q", 1.0))
    inside = (weights * norm.pdf(seen[:, None], taken, sigma)).sum(axis=1)
    np.testing.assert_allclose(
        likelihood(event)(seen), np.log(inside / norm.pdf(seen, 0.0, sigma)), rtol=1e-9
    )


def test_a_study_without_noise_has_nothing_to_attack():
    with pytest.raises(ConfigError, match="adds no noise"):
        audit(make_study(privacy=None))


# --- Weakened builds ------------------------------------------------------------------------------


def refuted(name):
    finding = played(name)
    assert not finding.held
    return finding


def quieter(monkeypatch, factor):
    for name in ("add_discrete_gaussian", "add_gaussian"):
        real = getattr(NoiseSource, name)
        monkeypatch.setattr(
            NoiseSource,
            name,
            lambda self, given, sigma, real=real: real(self, given, factor * sigma),
        )


@pytest.mark.parametrize("name", ["joint", "silo", *SLOW])
def test_half_the_noise_is_caught(monkeypatch, honest, name):
    assert honest(name).held
    quieter(monkeypatch, 0.5)
    finding = refuted(name)
    assert "the noise is at most" in finding.sentence
    assert finding.bound > finding.claimed or name == "local"


@pytest.mark.parametrize("name", ["joint", "silo"])
def test_a_share_that_is_left_out_is_caught(monkeypatch, honest, name):
    """One of the honest survivors adds no noise."""
    assert honest(name).held
    study, _ = CASES[name]
    shares, calls = study.quorum - study.silos.colluders, iter(range(10**9))
    real = NoiseSource.add_discrete_gaussian

    def lazy(self, values, sigma):
        if next(calls) % shares:
            real(self, values, sigma)

    monkeypatch.setattr(NoiseSource, "add_discrete_gaussian", lazy)
    finding = refuted(name)
    assert "the noise is at most" in finding.sentence
    expected = math.sqrt(1.0 - 1.0 / shares) * finding.figures["noise charged"]
    assert finding.figures["noise measured"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["joint", "silo"])
def test_a_sensitivity_of_one_and_a_half_clip_norms_is_caught(monkeypatch, honest, name):
    """Even where the check in integers lets it pass."""
    assert honest(name).held
    real = Quantiser.encode

    def wide(self, vector):
        found = real(self, vector)
        return Quantised(np.rint(1.5 * found.integers).astype(np.int64), 0, False)

    monkeypatch.setattr(Quantiser, "encode", wide)
    finding = refuted(name)
    assert "a canary moves a sum by at least 1." in finding.sentence
    assert finding.bound > finding.claimed or name == "silo"  # 600 canaries prove little


@pytest.mark.soak
def test_dp_sgd_with_a_sensitivity_of_one_and_a_half_clip_norms_is_caught(monkeypatch, honest):
    assert honest("local").held
    real = GridSum.add
    monkeypatch.setattr(GridSum, "add", lambda self, blocks, norms: real(self, blocks, norms / 1.5))
    assert "a canary moves a sum by at least 1." in refuted("local").sentence


# --- Power ----------------------------------------------------------------------------------------


def test_it_says_how_much_missing_noise_it_would_notice(monkeypatch, honest):
    finding = honest("joint")
    by_epsilon = finding.figures["notices noise below, by epsilon"]
    assert 0.5 < by_epsilon < 0.95
    found = re.fullmatch(
        r"would notice a build whose noise is below (0\.9\d+) of what is charged; (0\.\d\d) by ε "
        r"alone",
        finding.power,
    )
    assert found
    by_sigma = float(found[1])
    assert float(found[2]) == pytest.approx(by_epsilon, abs=0.006)
    quieter(monkeypatch, 0.97 * by_sigma)
    less = refuted("joint")
    assert less.bound < less.claimed  # by the noise alone
    monkeypatch.undo()
    quieter(monkeypatch, 0.9 * by_epsilon)
    assert refuted("joint").bound > finding.claimed
