"""The sampler: its tables exactly, its ties by hand, its output statistically with fixed keys."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from securefedcollm.errors import ConfigError
from securefedcollm.primitives import Keystream
from securefedcollm.privacy import discrete_gaussian as dg

SIGMAS = [4.0, 40.0, 1000.0, 2.0**15, 2.0**20]
SAMPLES = 2_000_000


def draw(sigma: float, count: int = SAMPLES, key: int = 7) -> np.ndarray:
    return dg.sample(Keystream(bytes([key]) * 32), sigma, count)


def cdf(x: np.ndarray, sigma: float) -> np.ndarray:
    """P[X <= x] of the discrete Gaussian: summed outright where that is possible, and else by
    Euler-Maclaurin, Φ((x + 1/2)/σ) with its first correction (error below σ^-4)."""
    if sigma <= 100:
        support = np.arange(-int(40 * sigma), int(40 * sigma) + 1)
        weights = np.exp(-(support**2) / (2.0 * sigma**2))
        return np.cumsum(weights)[np.asarray(x) + int(40 * sigma)] / weights.sum()
    t = (np.asarray(x) + 0.5) / sigma
    return stats.norm.cdf(t) + t * stats.norm.pdf(t) / (24.0 * sigma**2)


def p_value(samples: np.ndarray, claimed: float) -> float:
    """χ² of ``samples`` against the discrete Gaussian of σ = ``claimed``."""
    edges = np.unique(np.floor(claimed * stats.norm.ppf(np.linspace(0.0005, 0.9995, 101))))
    edges = edges.astype(np.int64)
    expected = np.diff(np.concatenate([[0.0], cdf(edges, claimed), [1.0]])) * len(samples)
    found = np.bincount(np.searchsorted(edges, samples), minlength=len(expected))
    assert expected.min() > 20
    return float(stats.chisquare(found, expected).pvalue)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_chi_square(sigma):
    assert p_value(draw(sigma), sigma) > 1e-3


@pytest.mark.parametrize("sigma", SIGMAS)
def test_chi_square_would_notice_half_a_percent_of_sigma(sigma):
    assert p_value(draw(sigma * 1.005), sigma) < 1e-6


@pytest.mark.parametrize("sigma", SIGMAS)
def test_kolmogorov_smirnov(sigma):
    """For a lattice distribution the KS test is conservative: its true p-value is no smaller."""
    samples = np.sort(draw(sigma, key=8))
    values = np.unique(samples)
    empirical = np.searchsorted(samples, values, side="right") / len(samples)
    distance = np.abs(empirical - cdf(values, sigma)).max()
    assert stats.kstwo.sf(distance, len(samples)) > 1e-3


@pytest.mark.parametrize("sigma", [1000.0, 2.0**15, 2.0**20, 2.0**46])
def test_low_bits_are_uniform(sigma):
    """Six low bits: far inside a bucket, where the staircase must leave no trace."""
    counts = np.bincount(draw(sigma, key=9) & 63, minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [2.0**15, 2.0**46])
def test_position_in_the_bucket_follows_the_slope(sigma):
    """Within a bucket, values nearer to 0 are likelier: without the acceptance test they are not.

    Taken over buckets at 1σ..3σ the nearer half holds 1/2 + E[slope]/8 of the mass; the test knows
    the exact share from the CDF.
    """
    table = dg.build(sigma)
    width = 1 << table.width_bits
    samples = np.abs(draw(sigma, 4_000_000, key=10))
    samples = samples[(samples >= width * int(sigma / width)) & (samples < 3 * sigma)]
    near = int(((samples & (width - 1)) < width // 2).sum())
    starts = np.arange(width * int(sigma / width), int(3 * sigma), width, dtype=np.int64)
    ends = np.minimum(starts + width, int(3 * sigma))
    middles = np.minimum(starts + width // 2, ends)
    share = (cdf(middles - 1, sigma) - cdf(starts - 1, sigma)).sum() / (
        cdf(ends - 1, sigma) - cdf(starts - 1, sigma)
    ).sum()
    assert stats.binomtest(near, len(samples), share).pvalue > 1e-3
    assert stats.binomtest(near, len(samples), 0.5).pvalue < 1e-6


@pytest.mark.parametrize("sigma", [0.5, 4.0, 777.7, 2.0**15, 2.0**46])
def test_table_is_the_exact_distribution(sigma):
    """P[bucket] · exp(-(x² - m²)/2σ²) ∝ exp(-x²/2σ²) needs P[bucket] ∝ exp(-m²/2σ²): checked on
    the integers of the alias table, to 2^-100 of total variation."""
    table = dg.build(sigma)
    mass = [0] * 2048
    for column, (threshold, other) in enumerate(zip(table.keep_exact, table.alias, strict=True)):
        assert 0 <= threshold <= 1 << 117
        mass[column] += threshold
        mass[int(other)] += (1 << 117) - threshold
    assert sum(mass) == 2048 << 117
    with mpmath.workprec(300):
        near = [int(m) for m in table.nearest]
        weights = [
            mpmath.exp(-mpmath.mpf(m * m) / (2 * mpmath.mpf(sigma) ** 2)) if m <= table.limit else 0
            for m in near
        ]
        total = mpmath.fsum(weights)
        gap = mpmath.fsum(
            abs(mpmath.mpf(found) / (2048 << 117) - weight / total)
            for found, weight in zip(mass, weights, strict=True)
        )
        assert gap / 2 < mpmath.mpf(2) ** -100


@pytest.mark.parametrize("sigma", [4.0, 777.7, 2.0**15, 2.0**46])
def test_squeeze_never_keeps_what_the_exact_test_would_not(sigma):
    table = dg.build(sigma)
    width = 1 << table.width_bits
    with mpmath.workprec(300):
        for bucket in range(0, 2048, 37):
            base, near = int(table.base[bucket]), int(table.nearest[bucket])
            far = max(abs(base), abs(base + width - 1))
            if far > table.limit:
                assert table.squeeze[bucket] == 0
                continue
            lowest = mpmath.exp(-mpmath.mpf(far * far - near * near) / (2 * mpmath.mpf(sigma) ** 2))
            scaled = lowest * mpmath.mpf(2) ** (64 - table.shift)
            assert scaled - 3 < int(table.squeeze[bucket]) <= scaled


class Scripted(Keystream):
    """A stream whose words the test writes."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(32))
        self.script = list(words)

    def words(self, count: int) -> np.ndarray:
        taken, self.script = self.script[:count], self.script[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)


def test_alias_ties_are_resolved_with_64_more_bits():
    table = dg.build(2.0**15)
    column = next(i for i in range(2048) if table.keep_exact[i] % 2**64 > 0 and table.alias[i] != i)
    leading, rest = int(table.keep[column]), table.keep_exact[column] % 2**64
    word = np.array([(leading << 11) | column], dtype=np.uint64)
    for extra, expected in ((rest - 1, column), (rest, int(table.alias[column]))):
        stream = Scripted(extra)
        assert dg._buckets(stream, table, word, dg._Scratch())[0] == expected
        assert stream.script == []


@pytest.mark.parametrize("sigma", [2.0**15, 2.0**46])
def test_acceptance_ties_are_resolved_with_128_more_bits(sigma):
    table = dg.build(sigma)
    bucket = np.array([1100])
    x = table.base[bucket] + (1 << table.width_bits) // 2
    bits = 64 - table.shift
    with mpmath.workprec(400):
        m = int(table.nearest[1100])
        probability = mpmath.exp(-mpmath.mpf(int(x[0]) ** 2 - m * m) / (2 * mpmath.mpf(sigma) ** 2))
        threshold = int(mpmath.floor(probability * mpmath.mpf(2) ** (bits + 128)))
    leading, extra = threshold >> 128, threshold % 2**128
    for drawn, expected in ((extra - 1, True), (extra, False)):
        stream = Scripted(drawn >> 64, drawn % 2**64)
        uniform = np.array([leading], dtype=np.uint64)
        assert bool(dg._decide(stream, table, x, bucket, uniform)[0]) is expected
        assert stream.script == []


def test_clear_cases_draw_nothing_more():
    table = dg.build(2.0**20)
    bucket = np.array([1100, 1100])
    x = table.base[bucket] + (1 << table.width_bits) - 1
    uniform = np.array([0, (1 << (64 - table.shift)) - 1], dtype=np.uint64)
    assert dg._decide(Scripted(), table, x, bucket, uniform).tolist() == [True, False]


def test_nothing_beyond_thirteen_sigma():
    table = dg.build(4.0)
    assert table.limit == 52
    bucket = np.array([1024 + 52, 1024 + 53, 1024 - 53])
    x = table.base[bucket]
    zeros = np.zeros(3, dtype=np.uint64)
    assert dg._decide(Scripted(), table, x, bucket, zeros).tolist() == [True, False, False]


@pytest.mark.parametrize("count", [0, 1, 5, (1 << 14) + 3])
def test_any_count(count):
    samples = draw(40.0, count)
    assert samples.shape == (count,)
    assert samples.dtype == np.int64


def test_same_key_same_draws_other_key_others():
    assert (draw(1000.0, 100) == draw(1000.0, 100)).all()
    assert (draw(1000.0, 100) != draw(1000.0, 100, key=8)).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 2.0**48])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ConfigError, match="σ"):
        dg.build(sigma)
