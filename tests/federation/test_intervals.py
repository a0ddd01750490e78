"""Bootstrap intervals: against the textbook where it has an answer, and the pairing."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.experiment.intervals import interval, resampled_means
from securefedcollm.experiment.rows import compare


def test_one_seed_gives_the_textbook_interval_of_a_mean():
    scores = (np.random.default_rng(0).random((1, 1, 800)) < 0.7).astype(float)
    found = interval(scores[0], resampled_means(scores)[0])
    half = 1.96 * scores.std() / np.sqrt(800)
    assert found.mean == scores.mean()
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)


def test_what_seeds_differ_by_widens_the_interval_and_cancels_in_a_pair():
    rng = np.random.default_rng(1)
    seeds = np.linspace(-0.2, 0.2, 10)[:, None]
    base = seeds + 0.02 * rng.standard_normal((10, 500))
    better = base + 0.03 + 0.001 * rng.standard_normal((10, 500))
    scores = np.stack([base, better])
    means = resampled_means(scores)
    alone, other = (interval(scores[i], means[i]) for i in (0, 1))
    spread = 2.262 * seeds.std(ddof=1) / np.sqrt(10)  # Student's t, 9 degrees of freedom
    assert alone.high - alone.low == pytest.approx(2 * spread, rel=0.05)
    assert alone.high > other.low  # by themselves they cannot be told apart
    pair = interval(better - base, means[1] - means[0])
    assert pair.excludes_zero
    assert pair.high - pair.low < 0.001
    assert not interval(base - base, means[0] - means[0]).excludes_zero


def test_three_seeds_give_the_interval_of_three_numbers():
    """A percentile bootstrap would end at the lowest and the highest of them."""
    scores = np.repeat([[0.5], [0.6], [0.76]], 200, axis=1)
    found = interval(scores, resampled_means(scores[None])[0])
    seeds = scores[:, 0]
    half = 4.303 * seeds.std(ddof=1) / np.sqrt(3)
    assert found.low == pytest.approx(seeds.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(seeds.mean() + half, abs=0.03 * half)
    assert found.low < 0.5
    assert found.high > 0.76


def test_questions_that_all_seeds_share_are_not_counted_once_a_seed():
    """Ten seeds that answer alike know no more than one."""
    one = (np.random.default_rng(2).random(400) < 0.5).astype(float)
    widths = []
    for seeds in (1, 10):
        scores = np.broadcast_to(one, (1, seeds, 400)).copy()
        found = interval(scores[0], resampled_means(scores)[0])
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_coverage():
    """19 of 20 intervals of a known mean hold it; with three seeds that differ much, nearly."""
    rng = np.random.default_rng(3)
    for seeds, spread in ((10, 0.05), (3, 0.0), (3, 0.08)):
        hits = 0
        for _ in range(100):
            rate = np.clip(0.6 + spread * rng.standard_normal((1, seeds, 1)), 0, 1)
            scores = (rng.random((1, seeds, 200)) < rate).astype(float)
            found = interval(scores[0], resampled_means(scores, resamples=500)[0])
            hits += found.low <= 0.6 <= found.high
        assert hits >= 88, (seeds, spread)


def test_the_differences_that_matter_are_marked_and_signed_right():
    names = [
        ("slm", "FedAvg + auxiliary"),
        ("slm", "FedCoLLM"),
        ("slm", "FedCoLLM, 1 noisy"),
        ("llm", "zero-shot"),
        ("llm", "FedCoLLM"),
    ]
    level = np.array([0.5, 0.6, 0.4, 0.1, 0.3])
    groups = ["a"] * 30 + ["b"] * 10
    scores = np.tile(level[:, None, None], (1, 3, 40))
    scores[:, :, 30:] += 0.2
    found = compare(names, {"accuracy": scores}, groups)
    assert found["groups"] == ["all", "a", "b"]
    assert found["rows"][1]["accuracy"]["b"]["mean"] == pytest.approx(0.8)
    assert found["rows"][1]["accuracy"]["all"]["mean"] == pytest.approx(0.65)
    seen = {
        (d["model"], d["method"], d["less"]): (d["main"], round(d["accuracy"]["all"]["mean"], 9))
        for d in found["differences"]
    }
    assert seen == {
        ("slm", "FedCoLLM", "FedAvg + auxiliary"): (True, 0.1),
        ("slm", "FedCoLLM, 1 noisy", "FedCoLLM"): (False, -0.2),
        ("llm", "FedCoLLM", "zero-shot"): (True, 0.2),
    }
