"""CKKS rings, polynomials and the bridge to SEAL, each on its own; the library's traps."""

from __future__ import annotations

import ast
import hashlib
import math
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.protocol.cohort import recorded

import securefedcollm
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import (
    DEGREE,
    ERROR_GREATEST,
    ERROR_VARIANCE,
    FLOOD_TAIL,
    LEAST_FLOOD_BITS,
    MOST_KEYS,
    PRIMES,
    CkksRing,
    Shape,
    derive,
)
from securefedcollm.aggregation.ckks.seal import Factor, Seal
from securefedcollm.aggregation.ckks.secrets import CkksSecrets, KeyShares
from securefedcollm.errors import ConfigError, CryptoError, LocalProtocolError, ProtocolError

SETS = ("precise", "compact")


def uniform(ring: CkksRing, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, ring.prime, (rows, DEGREE), dtype=np.uint64)


def secret_of(seal: Seal) -> Factor:
    (made,) = seal.factors(seal.transformed(polynomials.ternary(1, seal.ring, os.urandom)))
    return made


class Parties:
    """n silos that made a key together, without the protocol around it."""

    def __init__(self, ring: CkksRing, count: int, chunks: int = 1) -> None:
        self.ring, self.seal = ring, Seal(ring)
        self.shape = Shape(chunks, 1, chunks, 1)
        self.common = polynomials.hash_to_ring(b"parties", ring)
        holder = (ring, self.shape, self.common, 1, os.urandom)  # of one silo's keys: all share it
        self.silos = [KeyShares(*holder) for _ in range(count)]
        self.joint = np.zeros_like(self.common)
        for silo in self.silos:
            polynomials.accumulate(self.joint, *silo.key_parts(), ring)

    def encrypt(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        party = CkksSecrets(self.ring, self.shape, vector, self.common, os.urandom)
        upload = party.encrypt(self.joint[np.newaxis])
        rows = self.shape.chunks
        first = polynomials.unpack(upload.first, self.ring, rows)
        return first, polynomials.unpack(upload.second, self.ring, rows)

    def decrypt(self, first: np.ndarray, second: np.ndarray, without: int = 0) -> np.ndarray:
        """Coefficients, with no flooding noise and without the shares of the first few."""
        total, zeros = first, np.zeros_like(second)
        loaded = self.seal.load(second)
        for silo in self.silos[without:]:
            terms = [(silo._secrets[0][0], loaded)]
            total = polynomials.add(total, self.seal.products(terms, zeros), self.ring)
        return self.seal.coefficients(total)

    def noise(self, coefficients: np.ndarray, vector: np.ndarray) -> np.ndarray:
        signed = polynomials.centred(coefficients, self.ring).reshape(-1)[: len(vector)]
        return signed - (vector << self.ring.scale_bits)


# The proof --------------------------------------------------------------------------------------


@given(kind=st.sampled_from(SETS), silos=st.integers(3, 128), bits=st.integers(1, 31))
@settings(max_examples=200, deadline=None)
def test_no_derived_sum_wraps_even_if_every_term_is_at_its_extreme(kind, silos, bits) -> None:
    bound = 2**bits - 1
    try:
        ring = derive(kind, silos=silos, bound=bound)
    except ConfigError as error:
        where = error.where
        # It was refused for a reason: not even a scale of 2 (compact), or no exact sum (precise).
        noise = 21 * silos * (2 * DEGREE * silos + 1) + (silos * FLOOD_TAIL << LEAST_FLOOD_BITS)
        least = 2 * noise if kind == "precise" else 2
        assert 4 * (silos * bound * least + noise) > PRIMES[kind]
        assert where == "aggregation.value_bits"
        return
    noise = 21 * silos * (2 * DEGREE * silos + 1) + (silos * FLOOD_TAIL << ring.flood_bits)
    assert silos * (bound << ring.scale_bits) + noise < ring.prime // 2
    assert ring.exact == (kind == "precise" or 2 * noise < 1 << ring.scale_bits)
    # All silos at the bound, the noise against them: the sum comes back as it is.
    for sign in (1, -1):
        residue = np.full((1, DEGREE), sign * (silos * bound << ring.scale_bits) + sign * noise)
        decoded = polynomials.decode((residue % ring.prime).astype(np.uint64), ring, DEGREE, silos)
        assert np.abs(decoded - sign * silos * bound).max() <= ring.greatest_error + 0.5
        if ring.exact:
            assert (decoded == sign * silos * bound).all()


def test_what_the_compact_ring_cannot_hold_the_precise_one_may() -> None:
    with pytest.raises(ConfigError, match="the compact ring cannot hold a sum of 128") as caught:
        derive("compact", silos=128, bound=2**31 - 1)
    assert "ckks: precise" in caught.value.hint
    with pytest.raises(ConfigError, match="the precise ring cannot hold") as caught:
        derive("precise", silos=128, bound=2**31 - 1)
    assert "precise" not in caught.value.hint


@pytest.mark.parametrize("kind", ["precise", "compact"])
@pytest.mark.parametrize("bits", range(40, 63))
def test_a_sum_as_wide_as_the_modulus_is_refused_by_name(kind: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=f"the {kind} ring cannot hold a sum of 4"):
        derive(kind, silos=4, bound=2 ** (bits - 2))


def test_the_table_of_the_documentation_is_what_the_code_derives() -> None:
    text = (Path(__file__).parents[2] / "docs" / "ckks.md").read_text()
    form = r"^\| (authority )?`(\w+)`, (\d+) \| 2\^(\d+) \| 2\^([\d.]+) \| 2\^(\d+) \| (.*) \|$"
    rows = re.findall(form, text, re.M)
    assert len(rows) == 10
    for office, kind, silos, scale, noise, flood, rest in rows:
        holders = 1 if office else None
        ring = derive(kind, silos=int(silos), bound=2**15 - 1, holders=holders)
        rms, greatest, advantage = rest.split(" | ")
        assert (ring.scale_bits, ring.flood_bits) == (int(scale), int(flood))
        assert math.log2(ring.noise_rms) == pytest.approx(float(noise), abs=0.05)
        assert ring.rms == pytest.approx(float(rms), rel=0.05)
        assert ring.greatest_error == pytest.approx(float(greatest), rel=0.05)
        leak = ring.leak(10**6)
        if advantage == "none":
            assert leak == 1
        elif advantage.startswith("2^"):
            assert math.log2(leak) == pytest.approx(-float(advantage[3:]), abs=0.5)
        else:
            assert leak == pytest.approx(float(advantage), rel=0.05)


def test_without_the_proof_a_sum_wraps_and_nobody_notices() -> None:
    """The trap: three silos' 600s, each below the bound, come back as another sum."""
    ring = CkksRing("precise", silos=3, bound=1000, scale_bits=49, flood_bits=20, holders=3)
    one = polynomials.encode(np.full(DEGREE, 600), ring)
    total = polynomials.add(polynomials.add(one, one, ring), one, ring)
    assert (polynomials.decode(total, ring, DEGREE, 3) == 1800 - 2**11).all()
    assert derive("precise", silos=3, bound=1000).scale_bits < 49


def test_a_vector_that_is_out_of_bounds_or_no_int64_is_never_encrypted() -> None:
    ring = derive("precise", silos=3, bound=1000)
    for vector in (np.array([0, 1001]), np.array([-1001]), np.array([1.0]), np.zeros((1, 1), int)):
        with pytest.raises(LocalProtocolError) as caught:
            polynomials.check_vector(vector, ring)
        assert "1001" not in str(caught.value)


@pytest.mark.parametrize("place", [5, 11])
def test_an_opened_sum_that_honest_silos_cannot_make_is_refused(place: int) -> None:
    """Beyond n·bound; or, far smaller, where there is only padding."""
    ring = derive("precise", silos=3, bound=1000)
    residues = polynomials.encode(np.full(10, 1000), ring)
    residues[0, place] += np.uint64(1 << ring.scale_bits)
    with pytest.raises(ProtocolError, match="out of bounds"):
        polynomials.decode(residues, ring, 10, 1)


# Bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETS)
def test_polynomials_take_their_bits_and_have_one_spelling(kind) -> None:
    ring = derive(kind, silos=5, bound=1000)
    residues = uniform(ring, 3)
    residues[0, :2] = 0, ring.prime - 1
    data = polynomials.pack(residues, ring)
    assert len(data) == 3 * polynomials.polynomial_bytes(ring) == 3 * DEGREE * ring.value_bytes
    np.testing.assert_array_equal(polynomials.unpack(data, ring, 3), residues)
    # Every bit of the bytes is a bit of one residue: no two spellings of a polynomial.
    for place in range(0, len(data), 1009):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        try:
            other = polynomials.unpack(bytes(changed), ring, 3)
        except CryptoError:
            continue
        assert (other != residues).sum() == 1


@pytest.mark.parametrize("kind", SETS)
def test_what_is_no_polynomial_is_refused(kind) -> None:
    """Adversary: a peer that sends an empty vector, which SEAL's loader would take for a valid one;
    a cut or a longer one; residues that are not below q."""
    ring = derive(kind, silos=5, bound=1000)
    data = polynomials.pack(uniform(ring, 2), ring)
    for wrong in (b"", data[:-1], data + b"\0", data[: len(data) // 2]):
        with pytest.raises(CryptoError, match="are not 2 polynomials"):
            polynomials.unpack(wrong, ring, 2)
    with pytest.raises(CryptoError, match="not below the modulus"):
        polynomials.unpack(b"\xff" * len(data), ring, 2)
    top = np.full((1, DEGREE), ring.prime, dtype=np.uint64)
    with pytest.raises(CryptoError, match="not below the modulus"):
        polynomials.unpack(polynomials.pack(top, ring), ring, 1)


@pytest.mark.parametrize("kind", SETS)
def test_arithmetic_is_modulo_q(kind) -> None:
    ring = derive(kind, silos=5, bound=1000)
    a, b = uniform(ring, 2, 1), uniform(ring, 2, 2)
    wide = [[int(x) for x in array.reshape(-1)[:64]] for array in (a, b)]
    for result, sign in ((polynomials.add(a, b, ring), 1), (polynomials.subtract(a, b, ring), -1)):
        expected = [(x + sign * y) % ring.prime for x, y in zip(*wide, strict=True)]
        assert [int(x) for x in result.reshape(-1)[:64]] == expected


def test_the_common_polynomial_is_fixed_by_its_seed_and_uniform() -> None:
    ring = derive("compact", silos=5, bound=1000)
    first = polynomials.hash_to_ring(b"header", ring)
    np.testing.assert_array_equal(first, polynomials.hash_to_ring(b"header", ring))
    assert (first != polynomials.hash_to_ring(b"headeR", ring)).mean() > 0.99
    assert int(first.max()) < ring.prime
    mean, deviation = first.mean() / ring.prime, first.std() / ring.prime
    assert (mean, deviation) == (pytest.approx(0.5, abs=0.02), pytest.approx(12**-0.5, abs=0.01))
    # Pinned: silos of different versions must not disagree about the key.
    digest = hashlib.sha256(first.astype("<u8").tobytes()).hexdigest()
    assert digest == "3a76cbd68390d8668da0c1212c76bfabedf010e49edde5b6fefa1fba60001dc2"


@given(values=st.integers(1, 2**32), silos=st.integers(3, 128), colluders=st.integers(0, 40))
def test_every_chunk_has_a_key_and_a_group_and_traffic_is_least(values, silos, colluders) -> None:
    ring = CkksRing("precise", silos, 1000, 40, 20, silos)
    chunks, keys, groups, committees = ring.shape(values, colluders)
    assert committees == colluders + 1
    assert (chunks - 1) * DEGREE < values <= chunks * DEGREE
    assert 1 <= keys <= min(MOST_KEYS, chunks)
    assert (groups - 1) * keys < chunks <= groups * keys

    def traffic(k: int) -> float:
        return 2 * silos * k + (silos + colluders + 1) * chunks / k

    if keys < min(MOST_KEYS, chunks):
        assert traffic(keys) <= min(traffic(max(1, keys - 1)), traffic(keys + 1)) * 1.05


# Errors and flooding ----------------------------------------------------------------------------


def test_errors_are_the_centred_binomial_of_the_security_estimate() -> None:
    ring = derive("precise", silos=5, bound=1000)
    error = polynomials.centred(polynomials.errors(64, ring, os.urandom), ring).reshape(-1)
    assert np.abs(error).max() <= ERROR_GREATEST
    assert abs(error.mean()) < 5 * ERROR_VARIANCE**0.5 / 512
    assert error.var() == pytest.approx(ERROR_VARIANCE, rel=0.02)
    # Exactly: P(e = 0) = C(42, 21) / 2^42.
    assert (error == 0).mean() == pytest.approx(math.comb(42, 21) / 2**42, rel=0.03)
    first = polynomials.errors(1, ring, recorded("errors"))
    np.testing.assert_array_equal(first, polynomials.errors(1, ring, recorded("errors")))


@pytest.mark.parametrize("kind", SETS)
def test_secrets_are_uniform_ternary_and_come_from_the_source_that_was_given(kind) -> None:
    ring = derive(kind, silos=5, bound=1000)
    drawn = polynomials.ternary(64, ring, os.urandom)
    signed = polynomials.centred(drawn, ring).reshape(-1)
    found, counts = np.unique(signed, return_counts=True)
    np.testing.assert_array_equal(found, [-1, 0, 1])
    assert np.abs(counts / len(signed) - 1 / 3).max() < 5 * (2 / 9 / len(signed)) ** 0.5
    first = polynomials.ternary(3, ring, recorded("secrets"))
    np.testing.assert_array_equal(first, polynomials.ternary(3, ring, recorded("secrets")))
    assert (drawn[0] != drawn[1]).mean() > 0.6


@pytest.mark.parametrize("kind", SETS)
def test_a_product_is_that_of_polynomials_modulo_x_n_plus_1(kind) -> None:
    """Against the definition: x^5 times a polynomial shifts it, and what is shifted out comes back
    negated."""
    ring = derive(kind, silos=5, bound=1000)
    shift = np.zeros((1, DEGREE), dtype=np.uint64)
    shift[0, 5] = 1
    polynomial, zero = uniform(ring, 1), np.zeros((1, DEGREE), dtype=np.uint64)
    with Seal(ring) as seal:
        (factor,) = seal.factors(seal.transformed(shift))
        made = seal.products([(factor, seal.load(seal.transformed(polynomial)))], zero)
        found = seal.coefficients(made)
    expected = np.concatenate(
        [np.uint64(ring.prime) - polynomial[:, -5:], polynomial[:, :-5]], axis=1
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [20, 40])
def test_flooding_is_integer_gaussian_of_the_stated_width(bits: int) -> None:
    ring = CkksRing("precise", 5, 1000, 40, bits, 5)
    noise = polynomials.centred(polynomials.flooding(64, ring, os.urandom), ring).reshape(-1)
    scaled = noise / 2.0**bits
    assert abs(scaled.mean()) < 5 / 512
    assert scaled.std() == pytest.approx(1, abs=5 / 724)
    assert (scaled**4).mean() == pytest.approx(3, abs=5 * 96**0.5 / 512)
    assert np.abs(noise).max() <= FLOOD_TAIL << bits
    assert len(np.unique(noise & 1)) == 2  # to the last bit: nothing was rounded away


def test_flooding_comes_from_the_cryptographic_source_that_was_given() -> None:
    """Adversary: whoever could foresee a library's own generator takes the noise off again."""
    ring = derive("precise", silos=5, bound=1000)
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return recorded("flood")(count)

    first = polynomials.flooding(2, ring, source)
    assert asked == [32]
    np.testing.assert_array_equal(first, polynomials.flooding(2, ring, recorded("flood")))
    assert (first != polynomials.flooding(2, ring, recorded("other"))).mean() > 0.99


def test_more_decryptions_under_one_key_leak_more() -> None:
    ring = derive("precise", silos=10, bound=2**15 - 1)
    assert 0 < ring.leak(DEGREE) < ring.leak(10**6) < ring.leak(10**8) < 1
    assert ring.leak(4 * 10**6) == pytest.approx(2 * ring.leak(10**6), rel=0.01)
    narrow = msgspec.structs.replace(ring, flood_bits=ring.flood_bits - 3)
    assert narrow.leak(10**6) == pytest.approx(8 * ring.leak(10**6))


# SEAL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETS)
def test_the_decrypted_noise_is_what_the_error_law_says(kind) -> None:
    ring = derive(kind, silos=4, bound=1000)
    parties = Parties(ring, 4, chunks=4)
    rng = np.random.default_rng(5)
    vectors = rng.integers(-1000, 1001, (4, 4 * DEGREE))
    first = second = np.zeros((4, DEGREE), dtype=np.uint64)
    for vector in vectors:
        c0, c1 = parties.encrypt(vector)
        first, second = polynomials.add(first, c0, ring), polynomials.add(second, c1, ring)
    noise = parties.noise(parties.decrypt(first, second), vectors.sum(axis=0))
    assert noise.std() == pytest.approx(ring.noise_rms, rel=0.2)
    flood = 4.0**ring.flood_bits * ring.silos
    law = np.sqrt(ring.noise_rms**2 + flood) / 2.0**ring.scale_bits
    assert ring.rms == pytest.approx(law)


def test_a_share_hides_behind_noise_of_the_stated_width() -> None:
    """Adversary: who sees a share c1·s + noise, and would solve c1·s for s."""
    ring = derive("precise", silos=4, bound=1000)
    with Seal(ring) as seal:
        secret, c1 = secret_of(seal), seal.load(uniform(ring, 1))
        noise = polynomials.flooding(1, ring, os.urandom)
        bare = seal.products([(secret, c1)], np.zeros_like(noise))
        share = seal.products([(secret, c1)], noise)
        found = seal.coefficients(polynomials.subtract(share, bare, ring))
    np.testing.assert_array_equal(found, noise)


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 33])
def test_products_and_transforms_of_any_number_of_polynomials(rows: int) -> None:
    """Also where one is zero, which SEAL would refuse as a transparent ciphertext."""
    ring = derive("compact", silos=4, bound=1000)
    noise, factors = uniform(ring, rows), uniform(ring, rows, seed=9)
    noise[rows // 2] = factors[rows // 2] = 0
    with Seal(ring) as seal:
        secret = secret_of(seal)
        together = seal.products([(secret, seal.load(factors))], noise)
        bare = seal.products([(secret, seal.load(factors))], np.zeros_like(noise))
        for row in range(rows):
            alone = seal.products([(secret, seal.load(factors[[row]]))], noise[[row]])
            np.testing.assert_array_equal(together[[row]], alone)
        assert not bare[rows // 2].any()
        found = seal.coefficients(polynomials.subtract(together, bare, ring))
        np.testing.assert_array_equal(found, noise)


def test_a_flipped_bit_or_a_foreign_key_decrypts_to_garbage_without_an_error() -> None:
    """The trap: SEAL says nothing. Signed digests and key ids do (test_ckks_*_attacks)."""
    ring = derive("precise", silos=3, bound=1000)
    parties, others = Parties(ring, 3), Parties(ring, 3)
    vector = np.full(DEGREE, 7)
    c0, c1 = parties.encrypt(vector)
    right = parties.decrypt(c0, c1)
    assert (polynomials.decode(right, ring, DEGREE, 3) == 7).all()
    flipped = c0.copy()
    flipped[0, 9] ^= np.uint64(1 << 50)
    d0, d1 = others.encrypt(vector)
    mixed = polynomials.add(c0, d0, ring), polynomials.add(c1, d1, ring)
    for wrong in (parties.decrypt(flipped, c1), parties.decrypt(*mixed)):
        assert np.abs(parties.noise(wrong, vector)).mean() > 2**40


def test_without_one_share_the_rest_is_noise() -> None:
    """Adversary: all holders of the key but one, with shares that have no flooding noise.

    The update is of a usual size, far below the clip: beside it the error is enormous. And it is
    uniform modulo q, so an update of any size is as hidden.
    """
    ring = derive("precise", silos=5, bound=2**15 - 1)
    parties = Parties(ring, 5, chunks=8)
    vector = np.random.default_rng(0).integers(-10, 11, 8 * DEGREE)
    c0, c1 = parties.encrypt(vector)
    without = parties.decrypt(c0, c1, without=1)
    error = parties.noise(without, vector) / 2.0**ring.scale_bits
    assert np.abs(error).mean() > 1e3 * np.abs(vector).mean()
    counts = np.bincount((without.reshape(-1) >> np.uint64(56)).astype(int), minlength=16)
    expected = 8 * DEGREE / 16
    assert ((counts - expected) ** 2 / expected).sum() < 70  # χ², 15 degrees: p < 1e-8


def test_seal_has_one_prime_and_no_switching_keys() -> None:
    with Seal(derive("precise", silos=3, bound=1000)) as seal:
        assert not seal._context.using_keyswitching()
        assert seal._context.first_parms_id() == seal._context.last_parms_id()


def test_what_seal_refuses_is_an_error_of_ours(monkeypatch) -> None:
    monkeypatch.setitem(PRIMES, "precise", 2**60 - 93)  # prime, but not 1 modulo 2N
    with pytest.raises(CryptoError, match="SEAL refuses the ring"):
        Seal(CkksRing("precise", 3, 1000, 40, 20, 3))


def test_one_module_imports_tenseal() -> None:
    """All of SEAL's traps are behind one door."""
    root = Path(securefedcollm.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {path.name for name in names if name.split(".")[0] == "tenseal"}
    assert found == {"seal.py"}
