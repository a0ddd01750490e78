"""Whole CKKS rounds under an authority's key: the plain sum, or none; every trap of that key."""

from __future__ import annotations

import copy
import pickle

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securefedcollm_audits.protocol.cohort import altered
from securefedcollm_audits.protocol.keyed_cohort import (
    AUTHORITY,
    KEY,
    NAME,
    Round,
    authority,
    cohort,
    decrypt,
    leaks,
    silo,
)

from securefedcollm.aggregation import (
    AUTHORITY_TRANSITIONS,
    Authority,
    Step,
    authority_side,
    coordinator_side,
    silo_side,
)
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.authority.coordinator import CkksAuthorityCoordinatorRound
from securefedcollm.aggregation.ckks.authority.silo import CkksAuthoritySiloRound
from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS, derive
from securefedcollm.aggregation.messages import sign
from securefedcollm.errors import (
    ConfigError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import SigningKey, sha256
from tests.support.cohort import FullJournal, at, attempt, dropped, edit, flipped

SIZE = 30720
LOST = "silo-002"
REPLIES = {
    Step.ADVERTISE: am.AuthorityKeys,
    Step.ENCRYPT: m.Sealed,
    Step.UPLOAD: am.CipherDelivery,
    Step.UNMASK: am.Opened,
    Step.NOTE: am.Noted,
}


@pytest.mark.parametrize(
    ("silos", "values", "bound"),
    [(3, 1, 1), (3, 4096, 2**31 - 1), (7, 4097, 2**15 - 1), (4, 70 * 4096 + 1, 1000)],
)
def test_precise_sums_are_exact(silos: int, values: int, bound: int) -> None:
    made = cohort(silos, values=values, bound=bound)
    made.vectors[made.names[0]][:] = bound  # one of them at its extreme throughout
    result = Round(made).play()
    np.testing.assert_array_equal(result.sum, made.plain_sum(made.names))
    assert result.survivors == made.names
    assert set(result.agreements) == set(made.names)
    assert (result.dropouts, result.excluded) == ((), {})
    assert result.word.survivors == made.names


def test_the_error_is_that_which_one_holder_s_ring_predicts() -> None:
    """One key error and one flooding, in place of one a silo."""
    made = cohort(10, values=8 * 4096, bound=2**15 - 1)
    ring, played = m.ring_of(made.header), Round(made)
    played.play()
    total = np.zeros((8, 4096), dtype=np.uint64)
    for delivery in played.deliveries.values():
        polynomials.accumulate(total, delivery.first, ring)
    polynomials.accumulate(total, played.opened.share, ring)
    from securefedcollm.aggregation.ckks.seal import Seal

    with Seal(ring) as seal:
        found = polynomials.centred(seal.coefficients(total), ring).reshape(-1)
    error = (found - (made.plain_sum(made.names) << ring.scale_bits)) / 2.0**ring.scale_bits
    assert error.std() == pytest.approx(ring.rms, rel=0.05)
    joint = derive("precise", silos=10, bound=2**15 - 1)
    assert ring.leak(10**6) < joint.leak(10**6) / 20


@pytest.mark.parametrize("step", [Step.ENCRYPT, Step.UPLOAD, Step.NOTE])
@pytest.mark.parametrize("way", ["request", "reply"])
def test_a_lost_silo_is_left_out_and_the_round_goes_on(step: Step, way: str) -> None:
    made = cohort(4)
    result = Round(made).play(**{way: at(step, LOST, dropped)})
    inside = made.names if step is Step.NOTE else tuple(n for n in made.names if n != LOST)
    assert result.survivors == inside
    assert LOST in result.excluded
    assert result.dropouts == ((LOST,) if step is Step.UPLOAD else ())
    np.testing.assert_array_equal(result.sum, made.plain_sum(inside))


@pytest.mark.parametrize("step", [Step.ENCRYPT, Step.UPLOAD])
def test_below_the_quorum_there_is_no_sum(step: Step) -> None:
    played = Round(cohort(4))

    def hook(now: Step, name: str, frame: bytes) -> bytes | None:
        return None if now is step and name in (LOST, "silo-003") else frame

    with pytest.raises(ProtocolError, match=rf"only 2 silos completed step {step.value}; 3 are"):
        played.play(reply=hook)
    assert played.coordinator.step is Step.FAILED
    assert played.opened is None


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.UNMASK])
def test_without_the_authority_there_is_no_sum_and_it_can_be_tried_again(step: Step) -> None:
    made = cohort(4)
    played = Round(made)
    with pytest.raises(ProtocolError, match=rf"the authority auditor is lost in step {step.value}"):
        played.play(reply=at(step, NAME, dropped))
    again = Round(made, header=attempt(made)).play()
    np.testing.assert_array_equal(again.sum, made.plain_sum(made.names))
    assert leaks(made, played) == []


def test_after_an_opening_the_same_silos_may_be_opened_again_and_no_others() -> None:
    """A server that lost the sum in a crash gets it again; one of other silos, never."""
    made = cohort(4)
    first, again = Round(made), Round(made, header=attempt(made))
    np.testing.assert_array_equal(first.play().sum, again.play().sum)
    fewer = Round(made, header=attempt(made, 2))
    with pytest.raises(ProtocolError, match="the authority auditor is lost in step unmask"):
        fewer.play(reply=at(Step.UPLOAD, LOST, dropped))
    assert "a second time" in fewer.refused[NAME]
    assert leaks(made, first, again, fewer) == []


def test_the_authority_opens_the_same_sum_a_few_times_and_no_more() -> None:
    """Adversary: a server that averages the flooding noise out over many attempts."""
    made = cohort(3, values=10)
    for number in range(MOST_OPENINGS):
        Round(made, header=attempt(made, number)).play()
    again = Round(made, header=attempt(made, MOST_OPENINGS))
    with pytest.raises(ProtocolError):
        again.play()
    assert again.opened is None
    assert again.refused == {
        NAME: "server: asks for another opening of a sum that was opened 3 times"
    }
    following = altered(made.header, round=made.header.round + 1)
    np.testing.assert_array_equal(
        Round(made, header=following).play().sum, made.plain_sum(made.names)
    )


def test_the_judge_of_the_attacks_sees_a_leak() -> None:
    """Positive control: an authority that decrypts what it is asked to, together with the server,
    opens a single vector. Hence the assumption that the two do not collude."""
    made = cohort(4)
    played = Round(made)
    request = played.request()
    ring, shape = m.ring_of(made.header), m.shape_of(made.header)
    single = polynomials.unpack(request.parts[0].second, ring, shape.groups)
    share = played.sides[NAME]._secrets.decrypt({1: single})
    vector = decrypt(made, played.deliveries["silo-001"].first, share)
    np.testing.assert_array_equal(vector, made.vectors["silo-001"])
    statement = am.Statement(made.header.digest, bytes(64), bytes(32), (1,), sha256(share))
    played.received[Step.UNMASK, NAME] = am.Opened(statement, share).encode()
    assert leaks(made, played) == ["a sum of fewer silos than a quorum", "the vector of silo-001"]


def test_without_the_key_a_sum_is_noise() -> None:
    """Adversary: the server and every silo, without the authority."""
    made = cohort(4, bound=2**15 - 1)
    for vector in made.vectors.values():
        vector %= 10
    played = Round(made)
    np.testing.assert_array_equal(played.play().sum, made.plain_sum(made.names))
    ring, total = m.ring_of(made.header), np.zeros((2, 4096), dtype=np.uint64)
    for delivery in played.deliveries.values():
        polynomials.accumulate(total, delivery.first, ring)
    blind = decrypt(made, polynomials.pack(total, ring), bytes(2 * SIZE))
    assert np.abs(blind - made.plain_sum(made.names)).mean() > 1e3 * 10


def test_the_authority_sees_neither_vector_nor_sum() -> None:
    """Adversary: a curious authority. All that it is sent is the second polynomials, which do not
    depend on the vectors, and digests."""
    made = cohort(3, values=4096)
    played = Round(made)
    request = played.request()
    frame = request.encode()
    for delivery in played.deliveries.values():
        assert delivery.first[:64] not in frame
    assert {type(part.first) for part in request.parts} == {bytes}
    assert all(len(part.first) == 32 for part in request.parts)


def test_the_sides_are_chosen_by_the_scheme_s_name() -> None:
    made = cohort(3, values=9)
    sides = {
        name: silo_side(
            "ckks-authority",
            header=made.header,
            roster=made.roster,
            name=name,
            signing_key=made.keys[name],
            vector=made.vectors[name],
            vector_id=sha256(made.vectors[name].tobytes()),
            journal=made.journals[name],
            authority=AUTHORITY,
        )
        for name in made.names
    }
    sides[NAME] = authority_side(
        header=made.header, roster=made.roster, signing_key=KEY, journal=made.journals[NAME]
    )
    server = coordinator_side(
        "ckks-authority", header=made.header, roster=made.roster, authority=AUTHORITY
    )
    more = True
    while more:
        for name, frame in server.requests().items():
            server.receive(name, sides[name].handle(frame))
        more = server.advance()
    np.testing.assert_array_equal(server.result.sum, made.plain_sum(made.names))
    with pytest.raises(LocalProtocolError, match="no authority is named"):
        coordinator_side("ckks-authority", header=made.header, roster=made.roster)


def test_both_tables_of_steps_begin_and_end_alike() -> None:
    step, seen = Step.ADVERTISE, []
    while step is not Step.DONE:
        seen.append(step)
        step = AUTHORITY_TRANSITIONS[step].following
    assert seen == list(AUTHORITY_TRANSITIONS)


# What silos, the authority and the network send ---------------------------------------------------


SILO_LIES = {
    "another key": (Step.ENCRYPT, lambda r: {"key": bytes(32)}, "encrypted under another key"),
    "another round": (Step.ENCRYPT, lambda r: {"header": bytes(32)}, "of another silo, round"),
    "another ciphertext": (
        Step.UPLOAD,
        lambda r: {"first": flipped(r.first)},
        "uploaded another ciphertext than it committed to",
    ),
    "no ciphertext": (
        Step.UPLOAD,
        lambda r: {"first": b"", "second": b""},
        "uploaded another ciphertext than it committed to",
    ),
    "another list": (
        Step.UPLOAD,
        lambda r: {"consent": altered(r.consent, transcript=bytes(32))},
        "sent a frame with a bad signature",
    ),
    "another statement": (
        Step.NOTE,
        lambda r: {"statement": bytes(32)},
        "noted another statement",
    ),
}


@pytest.mark.parametrize("lie", SILO_LIES)
def test_what_one_silo_sends_is_checked_and_the_others_go_on(lie: str) -> None:
    """Adversary: one silo, which signs what it says. It is named, and spoils nothing."""
    step, change, reason = SILO_LIES[lie]
    made = cohort(4)
    key = None if step is Step.UPLOAD else made.keys[LOST]
    result = Round(made).play(reply=at(step, LOST, edit(REPLIES[step], change, key)))
    inside = made.names if step is Step.NOTE else tuple(n for n in made.names if n != LOST)
    assert reason in result.excluded[LOST]
    assert set(result.excluded) == {LOST}
    np.testing.assert_array_equal(result.sum, made.plain_sum(inside))


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_ciphertext_of_no_polynomials_spoils_no_sum_although_it_was_committed_to(half) -> None:
    """Adversary: a silo whose last residues are not below q: part of it is added before that is
    seen, and taken off again."""
    made = cohort(4, values=20 * 4096)
    played = Round(made)
    secrets = played.sides[LOST]._secrets
    genuine = secrets.encrypt

    made_up: list[m.CipherUpload] = []

    def encrypt(joint: np.ndarray) -> m.CipherUpload:
        upload = genuine(joint)
        bad = getattr(upload, half)[:-8] + b"\xff" * 8
        made_up.append(msgspec.structs.replace(upload, **{half: bad}))
        return made_up[0]

    secrets.encrypt, secrets.take_upload = encrypt, made_up.pop
    result = played.play()
    assert "malformed polynomials" in result.excluded[LOST]
    rest = tuple(n for n in made.names if n != LOST)
    np.testing.assert_array_equal(result.sum, made.plain_sum(rest))


OFFICE_LIES = {
    "no keys": (
        Step.ADVERTISE,
        lambda r: {
            "parts": (b"",) * 4,
            "statement": sign(altered(r.statement, keys=(sha256(b""),) * 4), KEY),
        },
        "sent malformed polynomials",
    ),
    "other keys": (
        Step.ADVERTISE,
        lambda r: {"parts": r.parts[::-1]},
        "signed other keys than it sent",
    ),
    "old keys": (
        Step.ADVERTISE,
        lambda r: {"statement": sign(altered(r.statement, header=bytes(32)), KEY)},
        "another round or study",
    ),
    "another share": (Step.UNMASK, lambda r: {"share": r.share[::-1]}, "another share than it s"),
    "an unsigned word": (
        Step.UNMASK,
        lambda r: {"statement": altered(r.statement, share=bytes(32))},
        "sent a frame with a bad signature",
    ),
    "other survivors": (
        Step.UNMASK,
        lambda r: {"statement": sign(altered(r.statement, survivors=(1, 2, 3)), KEY)},
        "decrypted another sum",
    ),
    "no share": (
        Step.UNMASK,
        lambda r: {
            "share": b"",
            "statement": sign(altered(r.statement, share=sha256(b"")), KEY),
        },
        "sent malformed polynomials",
    ),
    "a wrong share": (
        Step.UNMASK,
        lambda r: {
            "share": r.share[SIZE:] + r.share[:SIZE],
            "statement": sign(
                altered(r.statement, share=sha256(r.share[SIZE:], r.share[:SIZE])), KEY
            ),
        },
        "the opened sum is out of bounds",
    ),
}


@pytest.mark.parametrize("lie", OFFICE_LIES)
def test_what_the_authority_sends_is_checked_and_there_is_no_sum(lie: str) -> None:
    """Adversary: an authority with a defect, or the network between it and the server."""
    step, change, reason = OFFICE_LIES[lie]
    played = Round(cohort(4))
    with pytest.raises(ProtocolError) as caught:
        played.play(reply=at(step, NAME, edit(REPLIES[step], change)))
    assert reason in caught.value.message
    assert played.coordinator.step is Step.FAILED


@given(
    step=st.sampled_from(tuple(REPLIES)),
    inbound=st.booleans(),
    how=st.sampled_from(["cut", "flip", "insert", "append", "drop", "swap"]),
    place=st.floats(0, 1, exclude_max=True),
    value=st.binary(min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_frame_altered_in_any_way_is_refused_or_was_never_needed(
    step, inbound, how, place, value
) -> None:
    """Adversary: the network. Either the sum is exact, or there is none and the error is ours."""
    made = cohort(4, values=20)
    victim = NAME if step in (Step.ADVERTISE, Step.UNMASK) else LOST

    def alter(frame: bytes) -> bytes | None:
        spot = int(place * len(frame))
        return {
            "cut": frame[:spot],
            "flip": flipped(frame, spot, value[0] % 8),
            "insert": frame[:spot] + value + frame[spot:],
            "append": frame + value,
            "drop": None,
            "swap": frame[::-1],
        }[how]

    played = Round(made)
    try:
        result = played.play(**{"request" if inbound else "reply": at(step, victim, alter)})
    except ProtocolError:
        assert played.coordinator.step is Step.FAILED
    else:
        np.testing.assert_array_equal(result.sum, made.plain_sum(result.survivors))
    assert leaks(made, played) == []


# What stays inside, and our own mistakes ----------------------------------------------------------


def test_secrets_are_dropped_not_shown_not_copied(capfd) -> None:
    made = cohort(3)
    played = Round(made).until(Step.UNMASK)
    for side in (played.sides[NAME], played.sides["silo-001"]):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                copied(side)
        assert repr(side._secrets).endswith("(<redacted>)")
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            pickle.dumps(side._secrets)
    assert repr(played.sides[NAME]) == "CkksAuthorityRound(step=unmask)"
    played.play()
    assert played.sides[NAME]._secrets is None
    assert played.sides["silo-001"]._secrets is None
    assert "redacted" in repr(played.opened)
    assert repr(played.deliveries["silo-001"]) == "CipherDelivery(61440 + 61440 bytes)"
    assert capfd.readouterr() == ("", "")


def test_a_journal_that_cannot_be_written_stops_the_answer() -> None:
    made = cohort(3)
    made.journals[NAME] = journal = FullJournal()
    played = Round(made)
    request = played.request()
    journal.full = True
    with pytest.raises(OSError, match="no space left"):
        played.sides[NAME].handle(request.encode())
    assert played.sides[NAME].step is Step.FAILED
    assert played.sides[NAME]._secrets is None


def test_what_does_not_belong_together_is_refused_before_anything_is_said() -> None:
    made = cohort(3, values=10)
    common = {
        "header": made.header,
        "roster": made.roster,
        "authority": AUTHORITY,
        "name": "silo-001",
        "signing_key": made.keys["silo-001"],
        "vector": made.vectors["silo-001"],
        "vector_id": bytes(32),
        "journal": made.journals["silo-001"],
    }
    for change in (
        {"signing_key": SigningKey.generate()},
        {"vector_id": b"short"},
        {"vector": np.zeros(11, dtype=np.int64)},
        {"vector": np.full(10, 1001)},
        {"authority": Authority("friend", made.keys["silo-002"].public)},
    ):
        with pytest.raises(LocalProtocolError):
            CkksAuthoritySiloRound(**common | change)
    named_as_silo = Authority("silo-002", KEY.public)
    with pytest.raises(LocalProtocolError, match="silo and the authority"):
        CkksAuthorityCoordinatorRound(
            header=made.header, roster=made.roster, authority=named_as_silo
        )
    with pytest.raises(ConfigError, match="is not a CKKS suite"):
        authority(made, altered(made.header, suite="other"))
    played = Round(made)
    with pytest.raises(LocalProtocolError, match="no result at step advertise"):
        _ = played.coordinator.result
    played.play()
    for call in (played.coordinator.requests, played.coordinator.advance):
        with pytest.raises(LocalProtocolError, match="this attempt is over"):
            call()
    with pytest.raises(LocalProtocolError, match="this attempt is over"):
        played.coordinator.receive(LOST, b"")


def test_a_late_or_second_frame_changes_nothing() -> None:
    made = cohort(4)
    played = Round(made).until(Step.ENCRYPT)
    server = played.coordinator
    frames = {n: played.sides[n].handle(f) for n, f in server.requests().items()}
    for name, frame in frames.items():
        server.receive(name, frame)
    for name in (LOST, NAME):
        with pytest.raises(RemoteProtocolError, match="a second or a late frame"):
            server.receive(name, frames.get(name, b""))
    server.advance()
    assert server.excluded == {}
    np.testing.assert_array_equal(played.play().sum, made.plain_sum(made.names))


def test_a_silo_without_memory_of_what_it_said_is_the_first_to_refuse() -> None:
    """Adversary: a server that restarts a silo's process within an attempt, for a second
    ciphertext, or a second list of commitments."""
    made = cohort(3)
    played = Round(made).until(Step.ENCRYPT)
    offer = next(iter(played.coordinator.requests().values()))
    played.sides["silo-001"].handle(offer)
    with pytest.raises(RemoteProtocolError, match="a second time"):
        silo(made, "silo-001").handle(offer)
    other = silo(made, "silo-001", attempt(made), made.vectors["silo-002"])
    later = Round(made, header=attempt(made)).until(Step.ENCRYPT)
    with pytest.raises(RemoteProtocolError, match="a second time"):  # another vector
        other.handle(next(iter(later.coordinator.requests().values())))
