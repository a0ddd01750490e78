"""``audit one-run``, ``canaries`` and ``inversion``: real tuning of a small model, and weakened.

The claim is ε = 0.5, low enough that a few dozen canaries can refute it where it is false.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from securefedcollm_audits.privacy import inversion, new_tokens, one_run

from securefedcollm.aggregation.masking import masks
from securefedcollm.errors import ConfigError
from securefedcollm.primitives import sha256
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.noise import GridSum, NoiseSource, grid_step
from securefedcollm.tuning.question import Question
from tests.support.small import small_study

CANARIES = {"canaries": 100, "seed": 2}
BATCHES = {"batches": 8, "seed": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    small_study(directory)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and other tests run beside
    yield directory
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def reproducible_noise(monkeypatch):
    """Another key for every source, the same in every run of the tests."""
    count, begin = itertools.count(), NoiseSource.__init__

    def recorded(self, key=None):
        begin(self, key or sha256(f"model audits {next(count)}".encode()))

    monkeypatch.setattr(NoiseSource, "__init__", recorded)


def narrow(place):
    """With an adapter on the attacked matrices only: less to compute."""
    return small_study(place, adapter={"rank": 4, "targets": ["v_proj"]})


def noiseless(monkeypatch):
    monkeypatch.setattr(
        NoiseSource, "add_gaussian", lambda self, total, sigma: total * grid_step(sigma)
    )


@pytest.mark.parametrize("audit", [one_run.audit, new_tokens.audit])
def test_private_tuning_is_not_refuted(place, audit):
    finding = audit(small_study(place), data=place, **CANARIES)
    assert finding.held
    assert 0.0 <= finding.bound <= finding.claimed <= 0.5
    assert finding.claimed == pytest.approx(0.495, abs=0.006)  # of ε = 0.5 the ledger takes a part
    assert 0.3 < finding.figures["auc"] < 0.7
    assert finding.figures["canaries"] == 100


@pytest.mark.parametrize("audit", [one_run.audit, new_tokens.audit])
def test_a_build_without_noise_is_caught(place, monkeypatch, audit):
    noiseless(monkeypatch)
    finding = audit(small_study(place), data=place, **CANARIES)
    assert not finding.held
    assert finding.bound > 1.0 > 2 * finding.claimed
    assert finding.sentence.startswith("FAIL: ε is at least")
    assert finding.figures["auc"] > 0.8
    assert finding.figures["bound if the curve is Gaussian"] > finding.bound


def guessed(apart, noise_multiplier, count=500):
    """An attack whose scores in and out are normal and ``apart`` standard deviations apart."""
    draw = np.random.default_rng(3)
    present = draw.random(count) < 0.5
    scores = draw.normal(size=count) + apart * present
    events = (PoissonGaussian(0.0853, noise_multiplier, 60),)
    return one_run.Played(scores, present, events)


def test_it_says_how_much_missing_noise_it_would_at_best_notice(place):
    study = small_study(place)
    weak = one_run.judge(study, "one-run", guessed(0.25, 4.0), "made up")
    assert weak.claimed == pytest.approx(0.63, abs=0.01)
    assert weak.held
    factor = weak.figures["notices noise below"]
    assert 0.1 < factor < 0.7
    assert weak.power == (
        f"would at best notice a build whose noise is below {factor:g} of what is charged"
    )
    # The same attack on a build with as little noise is what it says.
    assert not one_run.judge(study, "one-run", guessed(0.25 / (0.9 * factor), 4.0), "made up").held
    # Scores that say more notice less missing noise; those that say nothing notice none.
    strong = one_run.judge(study, "one-run", guessed(0.5, 4.0), "made up")
    assert strong.figures["notices noise below"] > factor
    assert one_run.judge(study, "one-run", guessed(-1.0, 4.0), "made up").power == (
        "would notice no build by its noise, however little of it is left"
    )


def test_against_a_large_claim_few_canaries_notice_nothing_and_say_so(place):
    """500 canaries that are all guessed right prove ε ≥ 4.4."""
    found = one_run.judge(small_study(place), "one-run", guessed(3.0, 0.7824), "made up")
    assert found.claimed == pytest.approx(7.92, abs=0.01)
    assert found.figures["notices noise below"] == 0.0
    assert "would notice no build by its noise" in found.power


def test_a_rate_of_members_found_has_its_threshold_s_false_alarms_beside_it():
    """Clopper and Pearson's intervals of 50 of 100 found and 2 of 200 false alarms."""
    found = new_tokens.found_at(np.arange(188.0, 208.0).repeat(5), np.arange(200.0))
    low, high = binomtest(50, 100).proportion_ci(method="exact")
    assert found["tpr at 1 % fpr"] == 0.5
    assert found["tpr at this threshold, at least"] == pytest.approx(low)
    assert found["tpr at this threshold, at most"] == pytest.approx(high)
    low, high = binomtest(2, 200).proportion_ci(method="exact")
    assert found["fpr at this threshold, at least"] == pytest.approx(low)
    assert found["fpr at this threshold, at most"] == pytest.approx(high)


def test_a_build_without_the_clip_is_caught(place, monkeypatch):
    add = GridSum.add  # takes a gradient for one within the clip norm, whatever it is
    monkeypatch.setattr(GridSum, "add", lambda self, g, norms: add(self, g, np.zeros_like(norms)))
    assert not one_run.audit(small_study(place), data=place, **CANARIES).held


def test_a_study_without_privacy_claims_nothing_and_its_leak_is_shown(place):
    finding = one_run.audit(small_study(place, privacy=None), data=place, **CANARIES)
    assert (finding.held, finding.claimed, finding.power) == (True, None, "")
    assert finding.bound > 1.5


def test_a_canary_is_a_unit_of_its_own_where_subjects_are_the_units():
    questions = [Question(f"w{i} w1", ("w2", "w3"), 0, subject=f"p{i // 4}") for i in range(12)]
    made = one_run.random_questions(questions, 6, random.Random(1))
    assert len({question.subject for question in made}) == 6
    assert {question.subject for question in made}.isdisjoint(q.subject for q in questions)
    made = one_run.random_questions([Question("w1", ("w2",), 0)] * 2, 2, random.Random(1))
    assert [question.subject for question in made] == [None, None]


def test_what_cannot_be_attacked_this_way_is_refused(place):
    unit = {"unit": "silo", "noise": "distributed", "clip_norm": 4.0}
    privacy = {"epsilon": 8.0, "delta": 1e-5} | unit
    study = small_study(place, privacy=privacy, rounds=1)
    for audit in (one_run.audit, new_tokens.audit):
        with pytest.raises(ConfigError, match="nobody sees one silo's updates"):
            audit(study, data=place)
    with pytest.raises(ConfigError, match="4 canaries prove nothing"):
        one_run.audit(small_study(place), data=place, canaries=4)


def test_words_are_read_from_raw_updates_but_not_through_masks_and_noise(place):
    finding = inversion.audit(narrow(place), data=place, **BATCHES)
    figures = finding.figures
    assert finding.held
    assert figures["raw update"] > 0.95 > 0.3 > figures["raw update, by chance"]
    assert figures["opened sum"] > 0.9
    assert figures["masked upload"] < 0.4
    assert figures["noised sum"] < 0.45


def test_an_update_without_noise_is_read_and_caught(place, monkeypatch):
    noiseless(monkeypatch)
    finding = inversion.audit(narrow(place), data=place, **BATCHES)
    assert not finding.held
    assert "recovered from the noised sum" in finding.sentence


def test_an_upload_without_masks_is_read_and_caught(place, monkeypatch):
    monkeypatch.setattr(masks, "apply", lambda words, **of_keys: None)
    finding = inversion.audit(narrow(place), data=place, **BATCHES)
    assert not finding.held
    assert "recovered from the masked upload" in finding.sentence


def test_other_batches_are_the_control_of_an_inversion():
    """Scores that favour words which every batch has recover many, and prove nothing."""
    draw = np.random.default_rng(1)
    truth = draw.random((12, 200)) < 0.02
    truth[:, :20] = draw.random((12, 20)) < 0.9
    common = np.where(np.arange(200) < 20, 1.0, 0.0)
    looks = [inversion.Look(t, common + 1e-3 * draw.random(200), common) for t in truth]
    row = inversion.judge(looks, draw)
    assert row.recovered > 0.6
    assert row.p_value > inversion.ERROR
    telling = [inversion.Look(t, t + 1e-3 * draw.random(200), common) for t in truth]
    assert inversion.judge(telling, draw).p_value < inversion.ERROR / 2
