"""Packing, mask kernel, secret sharing, key schedule, header and frames, each on its own."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.protocol.cohort import Cohort, altered, recorded

from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader, check_roster
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.messages import Advertise, Roll, Survey, Unmask
from securefedcollm.aggregation.masking.parcels import DealerFaultError, Parcels
from securefedcollm.aggregation.masking.upload import words_digest
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode
from securefedcollm.errors import (
    ConfigError,
    CryptoError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import AgreementKey, Keystream, sha256


def parameters(values: int, bound: int, bits: int, silos: int = 5) -> RingParameters:
    return RingParameters(
        values=values,
        bound=bound,
        field_bits=bits,
        silos=silos,
        min_silos=3,
        threshold=silos,
        colluders=1,
    )


# Packing ----------------------------------------------------------------------------------------


@given(
    values=st.integers(1, 70),
    bits=st.sampled_from([10, 12, 13, 16, 21, 30, 32, 40, 64]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_sums_of_packed_vectors_unpack_to_the_sum(
    values: int, bits: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 5))
    bound = min((2**bits - 1) // 10, 2**40)
    shape = parameters(values, bound, bits)
    entries = st.lists(st.integers(-bound, bound), min_size=values, max_size=values)
    vectors = [np.array(data.draw(entries), dtype=np.int64) for _ in range(count)]
    total = np.zeros(shape.words, dtype=np.uint64)
    for vector in vectors:
        packed = np.empty(shape.words, dtype=np.uint64)
        packing.pack(vector, shape, packed)
        total += packed
    assert np.array_equal(packing.unpack(total, shape, count), np.sum(vectors, axis=0))


def test_packing_is_planar_and_offset() -> None:
    shape = parameters(values=5, bound=1, bits=16)  # four fields a word, two words
    packed = np.empty(shape.words, dtype=np.uint64)
    packing.pack(np.array([-1, 0, 1, 1, -1], dtype=np.int64), shape, packed)
    # Field 0 holds values 0, 1; field 1 values 2, 3; field 2 value 4 and nothing; all plus one.
    assert packed.tolist() == [0 | 2 << 16 | 0 << 32, 1 | 2 << 16]


def test_threads_change_nothing() -> None:
    shape = parameters(values=100_003, bound=1000, bits=16)
    vector = (Keystream(bytes(32)).words(shape.values) % np.uint64(2001)).astype(np.int64) - 1000
    one, three = np.empty(shape.words, dtype=np.uint64), np.empty(shape.words, dtype=np.uint64)
    packing.pack(vector, shape, one)
    packing.pack(vector.astype(np.int32), shape, three, threads=3)
    keys_ = [bytes([i]) * 32 for i in range(4)]
    masks.apply(one, add=keys_[:2], subtract=keys_[2:])
    masks.apply(three, add=keys_[:2], subtract=keys_[2:], threads=3)
    assert np.array_equal(one, three)
    big = np.resize(one, 600_001)
    assert words_digest(big) == words_digest(big, threads=3)
    pieces = [big.tobytes()[i : i + 2**20] for i in range(0, big.nbytes, 2**20)]
    assert words_digest(big) == sha256(*map(sha256, pieces))


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=np.int64),
        np.zeros(5, dtype=np.int16),
        np.zeros(5, dtype=np.uint64),
        np.array([101, 0, 0, 0, 0], dtype=np.int32),
        np.array([0, 0, np.iinfo(np.int32).min, 0, 0], dtype=np.int32),
        np.array([0, 0, 0, 0, np.iinfo(np.int32).max], dtype=np.int32),
        np.zeros((5, 1), dtype=np.int64),
        np.array([0, 0, 0, 0, 101], dtype=np.int64),
        np.array([-101, 0, 0, 0, 0], dtype=np.int64),
        np.array([0, np.iinfo(np.int64).min, 0, 0, 0], dtype=np.int64),
        np.array([0, np.iinfo(np.int64).max, 0, 0, 0], dtype=np.int64),
    ],
)
def test_what_would_wrap_is_not_packed(vector: np.ndarray) -> None:
    shape = parameters(values=5, bound=100, bits=16)
    with pytest.raises(LocalProtocolError):
        packing.pack(vector, shape, np.empty(shape.words, dtype=np.uint64))


@pytest.mark.parametrize(("bound", "bits", "held"), [(1000, 21, True), (2**40, 64, False)])
def test_a_sum_takes_half_the_memory_where_every_such_sum_fits(
    bound: int, bits: int, held: bool
) -> None:
    """Chunk after chunk: there are more words than one has, and not a whole number of chunks."""
    shape = parameters(values=100_003, bound=bound, bits=bits)
    draw = np.random.default_rng(0)
    vectors = draw.integers(-bound, bound, (2, shape.values), endpoint=True)
    total = np.zeros(shape.words, dtype=np.uint64)
    for vector in vectors:
        packed = np.empty(shape.words, dtype=np.uint64)
        packing.pack(vector, shape, packed)
        total += packed
    small, whole = (packing.unpack(total, shape, 2, narrow=narrow) for narrow in (True, False))
    assert small.dtype == (np.int32 if held else np.int64)
    assert whole.dtype == np.int64
    assert np.array_equal(small, whole)
    assert np.array_equal(whole, vectors.sum(0))
    total[-1] |= np.uint64(1 << 63)
    with pytest.raises(ProtocolError, match="out of bounds"):
        packing.unpack(total, shape, 2, narrow=True)


@pytest.mark.parametrize("bit", [15, 31, 47, 63])
def test_a_sum_out_of_bounds_is_not_unpacked(bit: int) -> None:
    shape = parameters(values=5, bound=100, bits=16)
    total = np.zeros(shape.words, dtype=np.uint64)
    total[1] = np.uint64(1 << bit)
    with pytest.raises(ProtocolError, match="out of bounds"):
        packing.unpack(total, shape, 2)


def test_bits_that_no_field_owns_are_not_ignored() -> None:
    shape = parameters(values=2, bound=100, bits=13)  # 4 × 13 = 52 bits of a word are owned
    for bit in (52, 63, 26):
        with pytest.raises(ProtocolError, match="out of bounds"):
            packing.unpack(np.array([1 << bit], dtype=np.uint64), shape, 2)


# Masks ------------------------------------------------------------------------------------------


@given(count=st.integers(1, 20_000), plus=st.integers(0, 3), minus=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_masks_are_the_keystreams_word_by_word(count: int, plus: int, minus: int) -> None:
    add = [bytes([1, i]) * 16 for i in range(plus)]
    subtract = [bytes([2, i]) * 16 for i in range(minus)]
    words = np.arange(count, dtype=np.uint64)
    masks.apply(words, add=add, subtract=subtract)
    expected = np.arange(count, dtype=np.uint64)
    for key in add:
        expected += Keystream(key).words(count)
    for key in subtract:
        expected -= Keystream(key).words(count)
    assert np.array_equal(words, expected)


# Shamir -----------------------------------------------------------------------------------------


def test_the_field_is_the_least_prime_above_2_256() -> None:
    def is_probable_prime(number: int) -> bool:  # Miller-Rabin with the first 20 primes
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71):
            power = pow(base, odd, number)
            if power not in (1, number - 1) and not any(
                (power := power * power % number) == number - 1 for _ in range(twos - 1)
            ):
                return False
        return True

    assert is_probable_prime(shamir.PRIME)
    assert not any(is_probable_prime(n) for n in range(2**256 + 1, shamir.PRIME))


@given(secret=st.binary(min_size=32, max_size=32), threshold=st.integers(2, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_threshold_of_shares_rebuilds(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    holders = data.draw(st.lists(st.integers(1, 128), min_size=threshold, max_size=12, unique=True))
    shares = dict(
        zip(holders, shamir.deal(secret, threshold, holders, recorded("deal")), strict=True)
    )
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert shamir.rebuild([shares[i] for i in chosen], shamir.weights(chosen)) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """t − 1 shares and any secret determine a polynomial: they say nothing about the secret."""
    holders = [1, 2, 3]
    shares = shamir.deal(b"\1" * 32, 3, holders, recorded("deal"))
    other = b"\2" * 32
    points = [0, 1, 2]
    values = [int.from_bytes(share, "big") for share in (b"\0" + other, *shares[:2])]
    third = 0  # Lagrange interpolation of (0, other), share 1, share 2 at x = 3
    for i, x in enumerate(points):
        weight = 1
        for k in points:
            if k != x:
                weight = weight * (3 - k) * pow(x - k, -1, shamir.PRIME) % shamir.PRIME
        third = (third + values[i] * weight) % shamir.PRIME
    forged = [*shares[:2], third.to_bytes(33, "big")]
    assert shamir.rebuild(forged, shamir.weights(holders)) == other


def test_shares_of_no_32_byte_secret_are_refused() -> None:
    huge = (shamir.PRIME - 1).to_bytes(33, "big")
    shares = shamir.deal(huge, 2, [1, 2], recorded("deal"))
    with pytest.raises(CryptoError, match="do not rebuild"):
        shamir.rebuild(shares, shamir.weights([1, 2]))


# Key schedule -----------------------------------------------------------------------------------


def test_both_ends_derive_the_same_keys_and_no_two_roles_share_one() -> None:
    a, b = AgreementKey(b"\1" * 32), AgreementKey(b"\2" * 32)
    header, digest = sha256(b"header"), sha256(b"transcript")
    pair = keys.pair_mask_key(a, b.public, header, digest, 1, 2)
    assert pair == keys.pair_mask_key(b, a.public, header, digest, 2, 1)
    box = keys.box_key(a, b.public, header, digest, 1, 2)
    assert box == keys.box_key(b, a.public, header, digest, 1, 2)
    others = {
        pair,
        box,
        keys.box_key(a, b.public, header, digest, 2, 1),
        keys.self_mask_key(b"\1" * 32, header, digest, 1),
        keys.pair_mask_key(a, b.public, header, sha256(b"other"), 1, 2),
        keys.pair_mask_key(a, b.public, sha256(b"other"), digest, 1, 2),
        keys.pair_mask_key(a, b.public, header, digest, 1, 3),
        a.agree(b.public),
    }
    assert len(others) == 8


# Parcels ----------------------------------------------------------------------------------------


def test_a_parcel_opens_at_its_holder_and_a_wrong_one_names_its_dealer() -> None:
    cohort = Cohort()
    secrets = {index: bytes([index] * 32) for index in (1, 2)}
    roll = {
        index: Advertise(bytes(32), index, UNSIGNED, bytes(32), AgreementKey(secret).public)
        for index, secret in secrets.items()
    }
    dealer, holder = (
        Parcels(
            header=cohort.header.digest,
            roster=cohort.roster,
            roll=roll,
            roll_digest=sha256(b"roll"),
            index=index,
            secret=secret,
        )
        for index, secret in secrets.items()
    )
    shares = b"s" * 33, b"k" * 33
    made = dealer.make(2, *shares)
    assert holder.open(made) == shares
    assert dealer.make(1, *shares).box == b""
    for wrong in (
        altered(made, box=made.box[::-1]),
        altered(made, key_share_commitment=bytes(32)),
        altered(dealer.make(1, *shares), box=made.box),
    ):
        with pytest.raises(DealerFaultError) as fault:
            holder.open(wrong)
        assert fault.value.dealer == 1
    assert repr(holder) == "Parcels(<redacted>)"
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        pickle.dumps(holder)


# Header and roster ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("silos", 2),
        ("silos", 10_001),
        ("values", 0),
        ("values", 2**32 + 1),
        ("bound", 0),
        ("bound", 2**60),
        ("field_bits", 13),
        ("field_bits", 65),
        ("threshold", 3),
        ("threshold", 6),
        ("min_silos", 2),
        ("min_silos", 6),
        ("colluders", 4),
    ],
)
def test_floors_are_in_the_parameters(field: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        altered(Cohort().header.parameters, **{field: value})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("study_digest", b""),
        ("run_id", bytes(15)),
        ("model_digest", bytes(33)),
        ("roster_root", b""),
        ("round", -1),
        ("attempt", 2**32),
    ],
)
def test_header_fields_have_their_sizes(field: str, value: object) -> None:
    with pytest.raises(ConfigError):
        altered(Cohort().header, **{field: value})


@pytest.mark.parametrize(
    "change",
    [
        {"study_digest": bytes(32)},
        {"run_id": b"\1" * 16},
        {"round": 9},
        {"attempt": 9},
        {"model_digest": bytes(32)},
        {"roster_root": bytes(32)},
        {"suite": "another"},
    ],
)
def test_every_header_field_changes_the_digest(change: dict[str, object]) -> None:
    header: RoundHeader = Cohort().header
    other = altered(header, **change)
    assert other.digest != header.digest
    assert header.differences(other) == list(change)


def test_scopes() -> None:
    header: RoundHeader = Cohort().header
    again, later = altered(header, attempt=1), altered(header, round=4)
    other_model = altered(header, model_digest=bytes(32))
    assert header.round_scope == again.round_scope == other_model.round_scope != later.round_scope
    assert header.attempt_scope == other_model.attempt_scope != again.attempt_scope


@pytest.mark.parametrize(
    "entries",
    [
        {"a": bytes(31)},
        {"": bytes(32)},
        {"server": bytes(32)},
        {"a\n": bytes(32)},
        {"a" * 65: bytes(32)},
        {"a": bytes(32), "b": bytes(32)},
    ],
)
def test_unusable_rosters_are_refused(entries: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError) as caught:
        Roster(entries)
    assert caught.value.hint


def test_a_roster_is_ordered_by_name_and_committed_to() -> None:
    roster = Roster({"b": b"\2" * 32, "a": b"\1" * 32})
    assert list(roster) == ["a", "b"]
    assert (roster.index("a"), roster.key(2), roster.name(2)) == (1, b"\2" * 32, "b")
    assert "a" in roster
    assert "c" not in roster
    assert roster.root != Roster({"a": b"\2" * 32, "b": b"\1" * 32}).root
    with pytest.raises(ConfigError):
        roster.index("c")
    with pytest.raises(LocalProtocolError):
        check_roster(Cohort().header, roster)


# Frames -----------------------------------------------------------------------------------------


def test_a_frame_has_one_spelling() -> None:
    frame = Survey((1, 2, 3), ()).encode()
    assert decode(Survey, frame, "server") == Survey((1, 2, 3), ())
    wide = frame.replace(b"\x93\x01", b"\x93\xcc\x01")  # the same numbers, spelt longer
    for bad in (wide.replace(b"\xa6survey", b"\xd9\x06survey"), frame + b"\0", frame[:-1], b""):
        with pytest.raises(RemoteProtocolError):
            decode(Survey, bad, "server")
    longer = frame.replace(b"\xa6survey", b"\xd9\x06survey")
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode(Survey, longer, "server")


def test_frames_are_bounded_before_they_are_decoded() -> None:
    with pytest.raises(RemoteProtocolError, match="more than"):
        decode(Roll, bytes(Roll.LIMIT + 1), "server")
    with pytest.raises(RemoteProtocolError, match="well-formed"):
        decode(Ask, b"\x91" * 500, "server")


def test_an_ask_with_impossible_parameters_is_malformed() -> None:
    frame = Ask(Cohort().header).encode()
    position = frame.rfind(b"\x97") + 1  # the parameters: seven numbers, values first
    with pytest.raises(RemoteProtocolError, match="well-formed"):
        decode(Ask, frame[:position] + b"\0" + frame[position + 1 :], "server")


def test_the_greatest_cohort_fits_the_frame_limits() -> None:
    from securefedcollm_audits.protocol.cohort import Puppet

    puppet = Puppet(Cohort(silos=128, values=4))
    names = puppet.cohort.names
    adverts = puppet.ask()
    deals = puppet.roll(names[:1], adverts.values())
    deal = deals[names[0]]
    delivery = puppet.delivery(names[1], dict.fromkeys(names, deal))
    statements, parcels = delivery.statements, delivery.parcels
    assert len(statements) == len(parcels) == 128
    assert len(delivery.encode()) < type(delivery).LIMIT
    assert len(deal.encode()) < type(deal).LIMIT
    assert len(Survey(tuple(range(1, 129)), ()).encode()) < Survey.LIMIT
    unmask = Unmask(bytes(32), 128, bytes(64), bytes(32), (bytes(33),) * 128)
    assert len(unmask.encode()) < Unmask.LIMIT
    assert "redacted" in repr(unmask)
