"""Noise sources: distribution, batches and their cap, and that nothing shows the key."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.privacy import noise as noise_module
from securefedcollm.privacy.events import CAP_SLACK, STEP_SLACK
from securefedcollm.privacy.noise import GridSum, NoiseSource, batch_cap, grid_step

KEY = bytes(range(32))


def test_gaussian_is_standard_normal():
    samples = NoiseSource(KEY).gaussian(500_000)
    assert samples.dtype == np.float64
    assert stats.kstest(samples, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 4 / math.sqrt(len(samples))


def test_sources_without_a_key_differ():
    assert (NoiseSource().gaussian(8) != NoiseSource().gaussian(8)).all()


def summed(units: np.ndarray, sigma: float, clip: float = 1.0) -> np.ndarray:
    """The integers of a :class:`GridSum` of ``units``, float64 [n, d]."""
    total = GridSum(units.shape[1], clip, sigma, most=len(units))
    total.add([units], np.linalg.norm(units, axis=1))
    return total.integers


def test_add_gaussian_adds_noise_of_sigma():
    total = np.linspace(-0.04, 0.04, 400_000)
    noisy = NoiseSource(KEY).add_gaussian(summed(total[None], 2.5, clip=1e3), 2.5)
    assert stats.kstest((noisy - total) / 2.5, "norm").pvalue > 1e-3


def test_the_sum_is_exact_in_every_order_and_grouping():
    """Adversary: looks for a unit in the rounding of the others. Float sums, with which the same
    check fails, depend on order and grouping."""
    rng = np.random.default_rng(4)
    units = rng.normal(size=(257, 40)) * 10.0 ** rng.integers(-9, 9, (257, 1))
    whole = summed(units, 0.8)
    order = rng.permutation(257)
    parts = GridSum(40, 1.0, 0.8, most=257)
    for chosen in np.array_split(order, 13):
        part = units[chosen]
        parts.add([part[:, :7], part[:, 7:]], np.linalg.norm(part, axis=1))
    np.testing.assert_array_equal(parts.integers, whole)
    # One unit more: its own integers and nothing else.
    more = np.concatenate([units[:100], rng.normal(size=(1, 40)), units[100:]])
    own = summed(more[100:101], 0.8)
    np.testing.assert_array_equal(summed(more, 0.8) - whole, own)
    assert np.linalg.norm(own * grid_step(0.8)) <= 1 + 2.0**-26
    assert (units.sum(0) != units[order].sum(0)).any()


def test_add_gaussian_reveals_only_the_grid_point_of_the_sum():
    """The output is a function of the integers and the noise alone, and always a grid point: the
    low bits carry nothing of the gradients (Mironov's attack)."""
    step = grid_step(3.0)
    rng = np.random.default_rng(3)
    points = rng.integers(-(2**40), 2**40, 5000)
    sums = [points * step, (points + rng.uniform(-0.4, 0.4, 5000)) * step]
    totals = [summed(total[None], 3.0, clip=10.0) for total in sums]
    np.testing.assert_array_equal(*totals)
    first, second = (NoiseSource(KEY).add_gaussian(total, 3.0) for total in totals)
    np.testing.assert_array_equal(first, second)
    grid = np.rint(first / step)
    np.testing.assert_array_equal(grid * step, first)
    assert (np.rint(NoiseSource(KEY).add_gaussian(totals[0] + 1, 3.0) / step) - grid == 1).all()


@pytest.mark.parametrize(
    "bad", [np.array([0.0, 1.0]), np.array([0, 2**62 + 1]), np.array([0, -(2**62) - 1])]
)
def test_add_gaussian_takes_nothing_but_such_a_sum(bad):
    with pytest.raises(LocalProtocolError, match="not made by GridSum"):
        NoiseSource(KEY).add_gaussian(bad, 1.0)


def test_more_units_than_a_sum_holds_are_refused_before_any_is_seen():
    GridSum(3, 1.0, 0.5, most=2**14)
    with pytest.raises(ConfigError, match=r"local.batch_size: .* too many for noise of 0.5") as e:
        GridSum(3, 1.0, 0.5, most=2**14 + 1)
    assert "at most 8192" in e.value.hint


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_add_gaussian_needs_noise(sigma):
    with pytest.raises(ConfigError):
        NoiseSource(KEY).add_gaussian(np.zeros(3, dtype=np.int64), sigma)
    with pytest.raises(ConfigError):
        GridSum(3, 1.0, sigma, most=1)


def test_poisson_batch_includes_each_record_independently():
    source, records, q, draws = NoiseSource(KEY), 200, 0.3, 5000
    included = np.zeros((draws, records), dtype=bool)
    for row in included:
        batch = source.poisson_batch(records, q)
        assert batch.dtype == np.int64
        assert (np.diff(batch) > 0).all()
        row[batch] = True
    # every record: binomial counts; batch sizes: binomial, not constant
    counts = included.sum(axis=0)
    z = (counts - draws * q) / math.sqrt(draws * q * (1 - q))
    assert stats.chi2.sf(float((z**2).sum()), records) > 1e-3
    sizes = included.sum(axis=1)
    assert abs(sizes.var() / (records * q * (1 - q)) - 1) < 0.1
    pairs = np.corrcoef(included[:, :20].T)[np.triu_indices(20, 1)]
    assert np.abs(pairs).max() < 5 / math.sqrt(draws)


def test_poisson_batch_edges():
    source = NoiseSource(KEY)
    assert source.poisson_batch(0, 0.5).tolist() == []
    assert source.poisson_batch(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert len(source.poisson_batch(100, 1e-9)) == 0
    big = source.poisson_batch(200_000, 0.5)
    assert big.max() > noise_module._CHUNK
    for bad in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ConfigError):
            source.poisson_batch(10, bad)
    with pytest.raises(ConfigError):
        source.poisson_batch(-1, 0.5)


@pytest.mark.parametrize(("n", "q"), [(8, 0.5), (60, 0.05), (400, 0.02), (500, 0.3)])
def test_cap_is_passed_with_probability_at_most_2_to_minus_100(n, q):
    cap, rate = batch_cap(n, q), Fraction(q)
    tail = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(cap + 1, n + 1))
    assert tail <= Fraction(1, 2**100)


def test_cap_stays_near_the_mean():
    n, q = 1_000_000, 0.001
    assert n * q < batch_cap(n, q) < n * q + 15 * math.sqrt(n * q)
    assert batch_cap(50, 1.0) == 50


def test_a_batch_over_the_cap_loses_random_records(monkeypatch):
    monkeypatch.setattr(noise_module, "batch_cap", lambda n, q: 10)
    source = NoiseSource(KEY)
    seen = set()
    for _ in range(60):
        batch = source.poisson_batch(40, 0.9)
        assert len(batch) == 10
        assert (np.diff(batch) > 0).all()
        seen |= set(batch.tolist())
    assert seen == set(range(40))


def test_the_key_never_shows():
    source = NoiseSource(KEY)
    assert repr(source) == "NoiseSource(<redacted>)"
    with pytest.raises(TypeError):
        pickle.dumps(source)
    with pytest.raises(TypeError):
        copy.deepcopy(source)
    assert not hasattr(source, "__dict__")


@pytest.mark.parametrize("sigma", [4, 32, 256])
def test_a_discrete_gaussian_is_as_near_a_rounded_one_as_the_slack_says(sigma):
    """Their total variation goes with 1/σ²: at most 1/(49·σ²) a value. Of 180 million values on the
    grid of 2^46 steps to a σ, together with what the sampler adds, that is below STEP_SLACK."""
    k = np.arange(-14 * sigma, 14 * sigma + 1)
    edges = [math.erf(x / (sigma * math.sqrt(2))) for x in np.append(k - 0.5, k[-1] + 0.5)]
    rounded = np.diff(edges) / 2
    discrete = np.exp(-(k**2) / (2 * sigma**2))
    discrete /= discrete.sum()
    apart = np.abs(rounded - discrete).sum() / 2
    assert 1 / 51 < apart * sigma**2 < 1 / 49
    each = 1 / (49 * 2.0**92) + 2.0**-115
    assert noise_module._MOST_VALUES * each + CAP_SLACK < STEP_SLACK


def test_more_values_than_the_slack_is_for_get_no_noise():
    with pytest.raises(ConfigError, match="at most 180000000 get noise at once"):
        GridSum(180_000_001, 1.0, 1.0, 1)
