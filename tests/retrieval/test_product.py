"""The encrypted matrix-vector product: right, and silent about everything else.

Each attack is also played against a silo without the protection that stops it, where it must
succeed.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm.errors import ConfigError, CryptoError
from securefedcollm.retrieval.product import Encrypted, Prepared, Protection, common
from securefedcollm.retrieval.terms import (
    BLOCK_BITS,
    BLOCK_FLOOD_BITS,
    DIGIT_SCALE,
    LEAST_HIDDEN,
    PRIME,
    SCORE_BITS,
    SCORE_FLOOD_BITS,
    Product,
    Terms,
)

SEED = bytes(range(32))
BARE = Protection(mask_bits=0, flooded=False)
NARROW = Protection(mask_bits=0)


def product(
    rows: int, columns: int, vectors: int, width: int, bits: int = BLOCK_BITS, entry: int = 2048
) -> Product:
    flood = BLOCK_FLOOD_BITS if bits == BLOCK_BITS else SCORE_FLOOD_BITS
    return Product(rows, columns, vectors, width, entry, entry**2, bits, flood)


def matrix(shape: Product, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    entries = rng.integers(-shape.entry, shape.entry, (shape.rows, shape.columns))
    return entries.astype(np.int16)


def raw(shape: Product, sent: dict[int, int]) -> np.ndarray:
    """A hostile question [1, groups + 1, N]: constants in place of ciphertexts, by group.

    The transform of a constant polynomial is that constant everywhere.
    """
    rows = np.zeros((1, shape.groups + 1, DEGREE), dtype=np.uint64)
    for group, constant in sent.items():
        rows[0, group] = constant
    return rows


def firsts(shape: Product, answer: bytes) -> np.ndarray:
    """The kept first coefficients of an answer to one vector, centred, in units of q: all that an
    asker with the key zero sees."""
    bits = shape.answer_bits
    pairs = np.frombuffer(answer, dtype=np.uint8).reshape(-1, bits // 4)
    words = np.zeros((len(pairs), 8), dtype=np.uint8)
    words[:, : bits // 4] = pairs
    joined = words.view("<u8").reshape(-1)
    values = np.stack([joined & np.uint64(2**bits - 1), joined >> np.uint64(bits)], axis=1)
    count = shape.parts * DEGREE
    found = values.reshape(-1)[count : count + shape.rows].astype(np.int64)
    return np.where(found >= 2 ** (bits - 1), found - 2**bits, found) * (PRIME / 2.0**bits)


def seconds(shape: Product, answer: bytes) -> np.ndarray:
    """c1 of a one-part answer, times q/p, rounded to residues [1, N]."""
    bits = shape.answer_bits
    digits = np.unpackbits(np.frombuffer(answer, np.uint8), bitorder="little").astype(np.int64)
    values = digits[: DEGREE * bits].reshape(DEGREE, bits) @ (1 << np.arange(bits))
    scaled = [int(value) * PRIME // 2**bits for value in values]
    return np.array([scaled], dtype=np.uint64)


@pytest.mark.parametrize(
    ("rows", "columns", "vectors", "width"),
    [(1, 1, 1, 1), (5000, 3, 1, 1), (37, 29, 3, 4), (300, 129, 14, 32), (2, 4097, 2, 4096)],
)
def test_products_are_exact_in_every_layout(rows, columns, vectors, width):
    shape = product(rows, columns, vectors, width)
    table = matrix(shape)
    chosen = np.random.default_rng(1).integers(0, columns, vectors)
    hot = np.zeros((vectors, columns), dtype=np.int64)
    hot[np.arange(vectors), chosen] = DIGIT_SCALE
    asked = Encrypted(shape, hot, SEED)
    assert len(asked.rows) == shape.query_bytes
    prepared = Prepared(shape, table)
    answer = prepared.answer(prepared.read(bytes(asked.rows)), SEED)
    assert len(answer) == shape.answer_bytes
    found = asked.decrypt(answer)
    # The least digit lies on the boundary of the residues modulo 2^24.
    error = (found - table[:, chosen].T.astype(np.int64) * 2**12 + 2**23) % 2**24 - 2**23
    assert np.abs(error).max() <= shape.greatest_error < 2**11
    assert ((((found + 2**11) >> 12) - table[:, chosen].T) % 2**12 == 0).all()


def test_a_matrix_of_which_whole_polynomials_are_zero():
    shape = product(30, 64, 2, 16)
    table = matrix(shape)
    table[:, 16:48] = 0
    for rows in (table, np.zeros_like(table), table[:0]):
        prepared = Prepared(shape, rows)
        hot = np.zeros((2, 64), dtype=np.int64)
        hot[[0, 1], [3, 20]] = DIGIT_SCALE
        asked = Encrypted(shape, hot, SEED)
        answer = prepared.answer(prepared.read(bytes(asked.rows)), SEED)
        found = asked.decrypt(answer) + 2**11 >> 12
        assert found[0].tolist() == (rows[:, 3].tolist() or [0] * 30)
        assert not found[1].any()


def test_another_key_decrypts_to_nothing():
    shape = product(4096, 2, 1, 1)
    asked = Encrypted(shape, np.array([[DIGIT_SCALE, 0]]), SEED)
    other = Encrypted(shape, np.array([[DIGIT_SCALE, 0]]), SEED)
    assert asked.rows != other.rows
    prepared = Prepared(shape, matrix(shape))
    answer = prepared.answer(prepared.read(bytes(asked.rows)), SEED)
    uniform = 2**BLOCK_BITS / np.sqrt(12)
    assert np.std(other.decrypt(answer)) == pytest.approx(uniform, rel=0.1)


def test_residues_of_a_question_look_uniform():
    shape = product(64, 64, 1, 8)
    asked = Encrypted(shape, np.full((1, 64), DIGIT_SCALE), SEED)
    residues = polynomials.unpack(bytes(asked.rows), shape.ring, shape.groups + 1)
    counts = np.histogram(residues, bins=16, range=(0, PRIME))[0]
    expected = residues.size / 16
    assert np.sum((counts - expected) ** 2 / expected) < 60  # chi squared, 15 degrees of freedom


@pytest.mark.parametrize("cut", [-1, 1])
def test_lengths_are_exact(cut):
    shape = product(8, 8, 1, 8)
    asked = Encrypted(shape, np.zeros((1, 8), np.int64), SEED)
    prepared = Prepared(shape, matrix(shape))
    rows = bytes(asked.rows)
    answer = prepared.answer(prepared.read(rows), SEED)
    for data, reader in ((rows, prepared.read), (answer, asked.decrypt)):
        with pytest.raises(CryptoError):
            reader(data[:cut] if cut < 0 else data + b"\0")


def test_a_residue_that_is_not_below_q_is_refused():
    shape = product(8, 8, 1, 8)
    prepared = Prepared(shape, matrix(shape))
    fine = np.full((shape.groups + 1, DEGREE), PRIME - 1, dtype=np.uint64)
    prepared.read(polynomials.pack(fine, shape.ring))
    fine[-1, 77] = PRIME
    with pytest.raises(CryptoError, match="below the modulus"):
        prepared.read(polynomials.pack(fine, shape.ring))


def bits_told(guessed: np.ndarray, truth: np.ndarray) -> float:
    """What a guess tells of each entry: the capacity of a Gaussian channel with its correlation."""
    return float(-0.5 * np.log2(max(1 - np.corrcoef(guessed, truth)[0, 1] ** 2, 2.0**-30)))


@pytest.mark.parametrize("protection", [BARE, Protection()])
@pytest.mark.parametrize("bits", [BLOCK_BITS, SCORE_BITS])
def test_an_answer_tells_an_asker_little_more_than_what_it_is_for(protection, bits):
    """Hostile selection: the digits of block 0 times 2^48 plus those of block 1 times 2^36. Hostile
    question: coordinates instead of digits. Its key is zero, so it reads the first polynomials."""
    shape = product(512, 2, 1, 1, bits)
    table = matrix(shape)
    prepared = Prepared(shape, table, protection)
    total = firsts(shape, prepared.answer(raw(shape, {0: 1 << 48, 1: 1 << 36}), SEED))
    first = np.rint(total / 2**48).astype(int)
    assert np.mean(np.abs(first - table[:, 0]) <= 1) > 0.99  # what it is told anyway
    second = total - first * 2.0**48
    plain = first == table[:, 0]  # where no noise carried over into the other entry
    found = bits_told(second[plain], table[plain, 1].astype(float))
    if protection is BARE:
        assert found > (9 if bits == BLOCK_BITS else 7)  # all of it, but what rounding to p takes
    else:
        assert 12 + found < shape.capacity + 0.6 < 16
    # The uniform digits of 12 bits are not Gaussian; hence the 0.6.


@pytest.mark.parametrize(
    ("protection", "high", "low"),
    [(NARROW, 56, 50), (Protection(), 56, 50), (Protection(), 50, 40), (Protection(), 46, 33)],
)
def test_a_malformed_key_row_reveals_no_second_polynomials(protection, high, low):
    """Hostile key row: 2^high + 2^low·X^−1 instead of −a·s + e. Kept coefficients then have two of
    u in them. Whoever knows u takes a·u off c1 and has Σ T·a: all of T from a few answers."""
    shape = product(2048, 4, 1, 2, SCORE_BITS)
    table = matrix(shape)
    prepared = Prepared(shape, table, protection)
    a, ring = common(shape, SEED), shape.ring
    key = np.zeros((1, DEGREE), dtype=np.int64)
    key[0, [0, -1]] = 1 << high, -(1 << low)
    laid = table.reshape(2048, 2, 2).swapaxes(0, 1).reshape(2, DEGREE).astype(np.int64)
    with Seal(ring) as seal:
        rows = raw(shape, {})
        rows[0, -1] = seal.transformed(polynomials.residues_of(key, ring))
        answer = prepared.answer(rows, SEED)
        told = firsts(shape, answer)
        even = np.rint(told / 2.0**high)
        odd = np.rint((told - even * 2.0**high) / 2.0**low)
        u = np.stack([even, odd], axis=1).reshape(1, DEGREE).astype(np.int64)
        terms = [
            (factor, seal.load(row[None]))
            for factor, row in zip(
                seal.factors(
                    seal.transformed(polynomials.residues_of(np.concatenate([laid, u]), ring))
                ),
                a,
                strict=True,
            )
        ]
        expected = seal.combinations(terms, np.zeros((1, DEGREE), np.uint64))
    found = polynomials.subtract(seconds(shape, answer), expected, ring)
    error = polynomials.centred(found, ring)
    if protection is NARROW:
        assert np.abs(error).max() < 2**42  # the rounding to 20 bits: u and T explain c1
    else:
        assert np.std(error.astype(float)) == pytest.approx(PRIME / np.sqrt(12), rel=0.1)


def test_a_layout_with_room_for_all_of_u_is_never_chosen():
    """The control: column packing of a full shelf has that room."""
    assert product(4096, 96, 1, 1, SCORE_BITS).hidden < 100
    assert Terms(documents=2**20, dimension=4096).scoring.width > 1


def test_two_answers_to_one_question_differ_everywhere():
    shape = product(256, 2, 1, 16)
    asked = Encrypted(shape, np.array([[DIGIT_SCALE, 0]]), SEED)
    prepared = Prepared(shape, matrix(shape))
    rows = prepared.read(bytes(asked.rows))
    one, two = (np.frombuffer(prepared.answer(rows, SEED), np.uint8) for _ in range(2))
    assert np.mean(one == two) < 0.02


@pytest.mark.parametrize("documents", [1, 100, 2048, 4097, 100_000, 2**20])
@pytest.mark.parametrize("dimension", [1, 96, 384])
def test_every_shelf_within_the_limits_has_room_for_its_noise(documents, dimension):
    terms = Terms(documents=documents, dimension=dimension)
    for shape in (terms.scoring, terms.fetching):
        assert shape.hidden >= LEAST_HIDDEN
        assert shape.parts * shape.kept >= shape.rows
        assert shape.groups * shape.width >= shape.columns
    assert terms.fetching.greatest_error < 2 ** (BLOCK_BITS - 13)
    # A score of 1 is 2^18 of 2^20: no sum wraps around, whatever an honest question is.
    assert 2**18 * 1.02 + terms.scoring.greatest_error < 2 ** (SCORE_BITS - 1)
    assert terms.scoring.capacity < 13
    assert terms.fetching.capacity < 15
    assert terms.scoring.advantage < 2**-15


def test_terms_out_of_range_are_refused():
    for wrong in (
        {"documents": 0},
        {"documents": 2**20 + 1},
        {"dimension": 4097},
        {"block_bytes": 100},
        {"block_bytes": 12_291},
        {"fetched": 15},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Terms(**({"documents": 10, "dimension": 8} | wrong))


def test_terms_that_differ_have_other_digests():
    base = Terms(documents=10, dimension=8)
    others = [
        msgspec.structs.replace(base, **{name: value})
        for name, value in (
            ("documents", 11),
            ("dimension", 9),
            ("block_bytes", 48),
            ("fetched", 3),
            ("space", b"x" * 32),
        )
    ]
    digests = [terms.digest for terms in (base, *others)]
    assert all(a != b for a, b in itertools.combinations(digests, 2))


def test_secrets_are_neither_shown_nor_copied():
    shape = product(8, 8, 1, 8)
    secret = Encrypted(shape, np.zeros((1, 8), np.int64), SEED)
    prepared = Prepared(shape, matrix(shape))
    assert repr(secret) == "Encrypted(<redacted>)"
    assert repr(prepared) == "Prepared(8 × 8)"
    for held in (secret, prepared):
        with pytest.raises(TypeError):
            pickle.dumps(held)


def test_randomness_comes_from_the_source_that_is_given():
    shape = product(8, 8, 1, 8)
    recorded = os.urandom(4096)

    def replay() -> object:
        at = iter(range(0, 4096, 32))
        return lambda n: recorded[next(at) :][:n]

    hot = np.zeros((1, 8), np.int64)
    one, two = (Encrypted(shape, hot, SEED, replay()) for _ in range(2))
    assert one.rows == two.rows
    prepared = Prepared(shape, matrix(shape))
    rows = prepared.read(bytes(one.rows))
    assert prepared.answer(rows, SEED, replay()) == prepared.answer(rows, SEED, replay())


def test_the_page_states_how_well_flooding_hides():
    """The small case and the worst one, by this code."""
    page = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text("utf-8")
    said = re.findall(r"2\^−([\d.]+) \((scores|blocks)\)", page)
    small = Terms(documents=2048, dimension=96)
    documents = [2048, 100_000, 2**19 + 1, 2**20 - DEGREE, 2**20]
    worst = [Terms(n, 1, size, k) for n in documents for size in (48, 768, 12_288) for k in (1, 14)]
    scores = [Terms(n, d) for n in documents for d in (1, 96, 1000, 2729, 4096)]
    assert [(float(bits), what) for bits, what in said] == [
        (bits(small.scoring), "scores"),
        (bits(small.fetching), "blocks"),
        (min(bits(terms.scoring) for terms in scores), "scores"),
        (min(bits(terms.fetching) for terms in worst), "blocks"),
    ]


def bits(exchange: Product) -> float:
    return round(-math.log2(exchange.advantage), 1)
