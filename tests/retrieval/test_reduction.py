"""The public map to fewer numbers, and its file where it is damaged or hostile."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefedcollm.errors import DataError
from securefedcollm.primitives import sha256
from securefedcollm.retrieval import Reduction
from securefedcollm.retrieval.terms import space_digest


def skewed(rows: int, seed: int = 0) -> np.ndarray:
    """Vectors that differ mostly in two of eight directions, around a common mean."""
    draw = np.random.default_rng(seed)
    return 5.0 + draw.normal(size=(rows, 8)) * np.array([4, 3, *[0.3] * 6])


def test_small_differences_count_and_the_dimension_is_kept():
    made = Reduction.fit(skewed(200), 4)
    assert made.dimensions == (8, 4)
    found = made.apply(skewed(50, seed=1))
    assert found.shape == (50, 4)
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0)
    spread = found.std(axis=0)
    plain = skewed(50, seed=1) - skewed(200).mean(0)
    plain = np.sort(plain.std(axis=0))[::-1][:4]
    assert spread.min() / spread.max() > plain.min() / plain.max()
    assert np.abs(found.mean(axis=0)).max() < 0.5


def test_the_same_texts_give_the_same_map_in_any_order():
    vectors = skewed(60)
    one, two = Reduction.fit(vectors, 3), Reduction.fit(vectors[::-1], 3)
    assert np.allclose(one.apply(vectors), two.apply(vectors))
    assert Reduction.fit(vectors, 3).digest == one.digest


@pytest.mark.parametrize(
    ("vectors", "dimension", "what"),
    [
        (skewed(4), 4, "4 texts of 8 numbers give no 4"),
        (skewed(20), 9, "20 texts of 8 numbers give no 9"),
        (np.ones((20, 8)), 2, "the same embedding"),
    ],
)
def test_too_little_text_is_refused(vectors, dimension, what):
    with pytest.raises(DataError, match=what):
        Reduction.fit(vectors, dimension)


def test_a_file_is_read_as_it_was_written():
    made = Reduction.fit(skewed(50), 3)
    again = Reduction.decode(made.encode(), "map")
    assert again.digest == made.digest
    assert np.array_equal(again.apply(skewed(5)), made.apply(skewed(5)))


def resealed(content: bytes) -> bytes:
    return content[:-32] + sha256(content[:-32])


RAW = Reduction.fit(skewed(50), 3).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not a reduction"),
        (b"SFCINDX1" + RAW[8:], "is not a reduction"),
        (RAW[:-1], "is cut"),
        (RAW + b"x", "is cut"),
        (RAW[:20] + b"\x01" + RAW[21:], "is damaged"),
        (resealed(RAW[:8] + struct.pack("<II", 2**31, 2**31) + RAW[16:]), "is cut"),
        (resealed(RAW[:8] + struct.pack("<II", 3, 8) + RAW[16:]), "is cut"),
        (resealed(RAW[:16] + struct.pack("<d", float("nan")) + RAW[24:]), "finite numbers"),
    ],
)
def test_a_hostile_file_is_refused_with_its_place(content, what):
    with pytest.raises(DataError, match=rf"map: .*{what}"):
        Reduction.decode(content, "map")


@given(st.binary(max_size=80))
def test_no_bytes_are_an_accident(content):
    for head in (b"", RAW[:16]):
        with pytest.raises(DataError):
            Reduction.decode(head + content, "map")


def test_a_space_is_named_by_all_that_makes_it():
    model, reduction = "a" * 64, bytes(32)
    spaces = {
        space_digest(model, None, reduction),
        space_digest("b" * 64, None, reduction),
        space_digest(model, 0, reduction),
        space_digest(model, None, bytes([1]) * 32),
    }
    assert len(spaces) == 4
