"""The quantiser's promise is an integer fact; it is tested in integers, not with tolerances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from securefedcollm.errors import ConfigError, LocalProtocolError, TrainingError
from securefedcollm.privacy.quantise import LARGEST_BOUND, Quantiser


def exact_norm_squared(integers: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in integers)


@settings(max_examples=150, deadline=None)
@given(
    vector=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(1, 300),
        elements=st.floats(-(2.0**40), 2.0**40, width=32),
    ),
    clip=st.sampled_from([1e-6, 0.1, 1.0, 37.5, 1e6]),
    bound=st.sampled_from([64, 2**12, 2**18, 2**23 + 1, LARGEST_BOUND]),
)
def test_norm_and_every_value_stay_within_the_bound(vector, clip, bound):
    quantiser = Quantiser(len(vector), clip, bound)
    encoded = quantiser.encode(vector)
    assert encoded.norm_squared == exact_norm_squared(encoded.integers) <= bound**2
    assert int(np.abs(encoded.integers).max()) <= bound
    assert np.array_equal(quantiser.encode_narrow(vector), encoded.integers)


@pytest.mark.parametrize("bound", [8, 100, 2**18, LARGEST_BOUND])
@pytest.mark.parametrize("values", [1, 2, 3, 15])
def test_adversarial_rounding_cannot_pass_the_bound(values, bound):
    """Vectors whose every value lies just above a half: all of them round away from zero."""
    quantiser = Quantiser(values, 1.0, bound)
    rounded_up = (np.floor(bound / math.sqrt(values)) - 0.499999) / quantiser.scale
    encoded = quantiser.encode(np.full(values, rounded_up))
    assert encoded.norm_squared == exact_norm_squared(encoded.integers) <= bound**2


def test_decode_inverts_encode_to_half_a_step():
    vector = np.linspace(-0.01, 0.01, 1000).astype(np.float32)
    quantiser = Quantiser(1000, 1.0, 2**18)
    encoded = quantiser.encode(vector)
    assert not encoded.clipped
    error = np.abs(quantiser.decode(encoded.integers, 1) - vector).max()
    assert error <= 0.5 / quantiser.scale + 1e-9


def test_a_long_vector_keeps_its_direction_and_gets_norm_c():
    vector = np.array([3.0, 4.0]) * 1e8
    quantiser = Quantiser(2, 2.0, 2**20)
    encoded = quantiser.encode(vector)
    assert encoded.clipped
    np.testing.assert_allclose(quantiser.decode(encoded.integers, 1), [1.2, 1.6], rtol=1e-5)


def test_mean_of_several():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(5, 200)).astype(np.float32) * 0.01
    quantiser = Quantiser(200, 1.0, 2**20)
    total = sum(quantiser.encode(v).integers for v in vectors)
    np.testing.assert_allclose(quantiser.decode(total, 5), vectors.mean(axis=0), atol=1e-6)


def test_encode_sum_clips_and_rounds_each_row_by_itself():
    rows = np.random.default_rng(2).normal(size=(7, 33))
    quantiser = Quantiser(33, 1.0, 2**12)
    expected = sum(quantiser.encode(row).integers for row in rows)
    np.testing.assert_array_equal(quantiser.encode_sum(rows), expected)
    one_less = quantiser.encode_sum(rows[1:])
    assert exact_norm_squared(expected - one_less) <= quantiser.bound**2
    np.testing.assert_array_equal(quantiser.encode_sum([]), np.zeros(33, dtype=np.int64))


def test_chunks_make_no_difference():
    """More values than one chunk holds, with the long part in the last one."""
    vector = np.zeros(100_001, dtype=np.float32)
    vector[-1] = 5.0
    encoded = Quantiser(len(vector), 1.0, 2**20).encode(vector)
    assert encoded.integers[:-1].any() == np.False_
    assert encoded.norm_squared == int(encoded.integers[-1]) ** 2 <= 2**40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    vector = np.zeros(40_000, dtype=np.float32)
    vector[39_999] = bad
    with pytest.raises(TrainingError, match="not finite") as caught:
        Quantiser(40_000, 1.0, 2**18).encode(vector)
    assert caught.value.hint


def test_too_few_integers_for_the_length_is_a_config_error_that_says_what_would_do():
    with pytest.raises(ConfigError, match="too few") as caught:
        Quantiser(10_000_000, 1.0, 1024)
    least = int(caught.value.hint.split("at least ")[1].split()[0])
    assert Quantiser(10_000_000, 1.0, least).bound == least


@pytest.mark.parametrize(
    "arguments", [(0, 1.0, 8), (1, 0.0, 8), (1, math.nan, 8), (1, 1.0, 0), (1, 1.0, 2**31)]
)
def test_impossible_arguments(arguments):
    with pytest.raises(ConfigError):
        Quantiser(*arguments)


def test_wrong_shapes_are_our_own_bug():
    quantiser = Quantiser(3, 1.0, 64)
    with pytest.raises(LocalProtocolError):
        quantiser.encode(np.zeros(4, dtype=np.float32))
    with pytest.raises(LocalProtocolError):
        quantiser.encode(np.zeros(3, dtype=np.int64))
    with pytest.raises(LocalProtocolError):
        quantiser.decode(np.zeros(4, dtype=np.int64), 1)
    with pytest.raises(LocalProtocolError):
        quantiser.decode(np.zeros(3, dtype=np.int64), 0)
