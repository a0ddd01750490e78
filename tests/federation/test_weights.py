"""Silos whose updates count by a public weight, such as their number of records."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.experiment.rows import arms
from securefedcollm.federation import charged
from securefedcollm.federation.plan import check_names, weight_of, weight_of_all
from securefedcollm.study import digest
from tests.support.arithmetic import NAMES, SIZE, make_study, update_of
from tests.support.rounds import Cut, Run

WEIGHTS = {name: 10.0**place for place, name in enumerate(NAMES[:3])} | dict.fromkeys(
    NAMES[3:], 3.0
)


def weighted_theta(study, weights, survivors=NAMES):
    """In float64, with the clip before the weight, and no integers."""
    theta, most = np.zeros(SIZE), study.aggregation.clip_norm
    for round_ in range(study.rounds):
        total = np.zeros(SIZE)
        for name in survivors:
            update = update_of(name, round_, theta.astype(np.float32)).astype(np.float64)
            total += weights[name] * update * min(1.0, most / np.linalg.norm(update))
        theta = (theta + total / sum(weights[name] for name in survivors)) / 2
    return theta


@pytest.mark.parametrize("clip_norm", [1.0, 64.0])
def test_the_mean_is_the_weighted_one_of_the_survivors(tmp_path, clip_norm):
    """Control: the plain mean is far from it."""
    study = make_study(aggregation={"weights": WEIGHTS, "clip_norm": clip_norm})
    theta = Run(tmp_path / "all", study).go()
    near = {"atol": 2e-4 * clip_norm, "rtol": 0}
    np.testing.assert_allclose(theta, weighted_theta(study, WEIGHTS), **near)
    alike = weighted_theta(study, dict.fromkeys(NAMES, 1.0))
    assert np.abs(theta - alike).max() > 20 * near["atol"]

    lost = Run(tmp_path / "lost", study, wrap=lambda engine: Cut(engine, NAMES[-1:], 0)).go()
    np.testing.assert_allclose(lost, weighted_theta(study, WEIGHTS, NAMES[:-1]), **near)


def test_a_light_silo_cannot_outgrow_its_weight(tmp_path, monkeypatch):
    """Adversary: none; a long update of a silo with few records. The clip comes before the weight.

    Control: clipped after it, the same update counts for more than its share.
    """
    weights = dict.fromkeys(NAMES, 1.0) | {NAMES[0]: 0.05}
    study = make_study(rounds=1, aggregation={"weights": weights, "clip_norm": 1.0})
    theta = Run(tmp_path / "as it is", study).go()
    np.testing.assert_allclose(theta, weighted_theta(study, weights), atol=2e-4, rtol=0)

    def late(update, weight, clip_norm):
        return update * np.float32(weight)

    monkeypatch.setattr(charged, "weighted", late)
    theta = Run(tmp_path / "late", study).go()
    assert np.abs(theta - weighted_theta(study, weights)).max() > 2e-3


def test_where_the_silo_is_the_unit_no_update_gets_longer(tmp_path):
    """What is noised stays within the clip norm that its noise is made for."""
    privacy = {"unit": "silo", "noise": "distributed", "epsilon": 30.0, "delta": 1e-5}
    study = make_study(
        privacy=privacy | {"clip_norm": 1.0}, aggregation={"weights": WEIGHTS, "clip_norm": 1.0}
    )
    assert max(weight_of(study, name) for name in NAMES) == 1.0
    norms = []
    kept = charged.SiloUnit.protect

    def protect(self, update, noise):
        norms.append(float(np.linalg.norm(update.astype(np.float64))))
        return kept(self, update, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charged.SiloUnit, "protect", protect)
        Run(tmp_path, study).go()
    light = sorted(norms)[: -study.rounds]  # the heaviest is clipped by what noises it
    assert len(light) == study.rounds * (len(NAMES) - 1)
    assert light[0] == pytest.approx(0.01, rel=1e-5)
    assert light[-1] <= 0.1 * (1 + 1e-6)


def test_equal_weights_are_as_none_and_a_study_without_has_its_old_digest(tmp_path):
    even = {"weights": dict.fromkeys(NAMES, 7.0), "clip_norm": 20.0}
    plain, alike = make_study(), make_study(aggregation=even)
    assert "weights" not in plain.tree["aggregation"]
    assert digest(plain) != digest(alike)
    a, b = Run(tmp_path / "a", plain).go(), Run(tmp_path / "b", alike).go()
    np.testing.assert_array_equal(a, b)
    assert weight_of_all(plain, NAMES[:3]) == weight_of_all(alike, NAMES[:3]) == 3.0


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"aggregation": {"weights": {NAMES[0]: 1.0}}}, "1 silos have a weight"),
        ({"aggregation": {"weights": {**WEIGHTS, NAMES[0]: 1e-9}}}, "lost in rounding"),
        ({"aggregation": {"weights": {**WEIGHTS, NAMES[0]: float("inf")}}}, "weights"),
        ({"aggregation": {"weights": {**WEIGHTS, NAMES[0]: 0.0}}}, "weights"),
        ({"aggregation": {"weights": {**WEIGHTS, NAMES[0]: "many"}}}, "weights"),
    ],
)
def test_impossible_weights_are_refused(other, what):
    with pytest.raises(ConfigError, match=what) as caught:
        make_study(**other)
    assert "aggregation.weights" in str(caught.value)


def test_weights_of_others_are_refused():
    study = make_study(aggregation={"weights": {f"other-{n}": 1.0 for n in range(len(NAMES))}})
    with pytest.raises(ConfigError, match="not of these silos: other-0"):
        check_names(study, NAMES, "--silo")


def test_an_experiment_has_the_plain_mean_as_a_row():
    keys = [arm.key for arm in arms(make_study(aggregation={"weights": WEIGHTS}))]
    assert "uniform" in keys
    assert "uniform" not in [arm.key for arm in arms(make_study())]
