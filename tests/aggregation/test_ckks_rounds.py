"""Whole CKKS rounds in memory: the opened sum is the plain sum, or there is none."""

from __future__ import annotations

import copy
import pickle

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import Cohort

from securefedcollm.aggregation import AbandonedError, Step, coordinator_side, silo_side
from securefedcollm.aggregation.ckks import messages as ckks_messages
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS
from securefedcollm.aggregation.ckks.threshold.silo import CkksSiloRound
from securefedcollm.errors import (
    ConfigError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import SigningKey, sha256
from tests.support.cohort import STEPS, FullJournal, Round, at, attempt, cohort, dropped, silo

BEFORE_THE_KEY = (Step.ADVERTISE, Step.SHARE)


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
    assert "sum" not in repr(result)


@pytest.mark.parametrize(("silos", "colluders"), [(4, 0), (7, 2), (8, 4)])
def test_members_are_in_as_many_committees_as_it_takes(silos: int, colluders: int) -> None:
    made = cohort(silos, values=3 * 4096, colluders=colluders)
    shape = ckks_messages.shape_of(made.header)
    assert (shape.committees, shape.seconds) == (colluders + 1, shape.groups * (colluders + 1))
    result = Round(made).play()
    np.testing.assert_array_equal(result.sum, made.plain_sum(made.names))
    # Whoever is missing: no committee is empty, and one at least has no colluder.
    members = tuple(range(2, silos + 1))
    found = {k: ckks_messages.committee(k, members, shape.committees) for k in members}
    assert set(found.values()) == set(range(shape.committees))
    for start in range(len(members) - colluders + 1):
        colluding = {found[k] for k in members[start : start + colluders]}
        assert set(found.values()) - colluding


def test_compact_sums_have_the_error_that_was_predicted_and_no_more() -> None:
    made = cohort(10, values=2 * 4096, bound=2**15 - 1, kind="compact")
    ring = ckks_messages.ring_of(made.header)
    error = Round(made).play().sum - made.plain_sum(made.names)
    assert not ring.exact
    rounding = 12**-0.5  # to an integer, at last
    assert error.std() == pytest.approx(np.hypot(ring.rms, rounding), rel=0.2)
    assert np.abs(error).max() <= ring.greatest_error + 0.5


def test_the_scheme_is_chosen_by_its_name() -> None:
    made = cohort(3, values=9)
    sides = {
        name: silo_side(
            "ckks",
            header=made.header,
            roster=made.roster,
            name=name,
            signing_key=made.keys[name],
            vector=made.vectors[name],
            vector_id=sha256(made.vectors[name].tobytes()),
            journal=made.journals[name],
        )
        for name in made.names
    }
    server = coordinator_side("ckks", header=made.header, roster=made.roster)
    more = True
    while more:
        for name, frame in server.requests().items():
            server.receive(name, sides[name].handle(frame))
        more = server.advance()
    np.testing.assert_array_equal(server.result.sum, made.plain_sum(made.names))
    assert {side.transcript.survivors for side in sides.values()} == {made.names}


def test_a_masking_header_makes_no_ckks_round() -> None:
    with pytest.raises(ConfigError, match="is not a CKKS suite"):
        silo(Cohort(silos=3), "silo-001")


# Dropouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["request", "reply"])
@pytest.mark.parametrize("step", BEFORE_THE_KEY)
def test_who_is_lost_before_the_key_is_made_is_not_missed(step: Step, way: str) -> None:
    made = cohort(5)
    result = Round(made).play(**{way: at(step, "silo-002", dropped)})
    assert result.survivors == ("silo-001", "silo-003", "silo-004", "silo-005")
    np.testing.assert_array_equal(result.sum, made.plain_sum(result.survivors))
    assert "silo-002" in result.excluded


@pytest.mark.parametrize("way", ["request", "reply"])
@pytest.mark.parametrize("step", [s for s in STEPS if s not in BEFORE_THE_KEY])
def test_who_is_lost_later_takes_the_attempt_along_and_the_others_repeat(
    step: Step, way: str
) -> None:
    made = cohort(5)
    first = Round(made)
    with pytest.raises(AbandonedError, match=f"silo-002 lost in step {step.value}") as caught:
        first.play(**{way: at(step, "silo-002", dropped)})
    assert set(caught.value.lost) == {"silo-002"}
    assert first.coordinator.step is Step.FAILED
    with pytest.raises(LocalProtocolError):
        _ = first.coordinator.result
    again = Round(made, header=attempt(made))
    rest = made.names[:1] + made.names[2:]
    if step is not Step.UNMASK:  # nothing was opened: whoever is left makes a new key
        result = again.play(request=at(Step.ADVERTISE, "silo-002", dropped))
        assert result.survivors == rest
    else:  # shares are out: with another membership the two sums' difference would be one vector
        with pytest.raises(AbandonedError):
            again.play(request=at(Step.ADVERTISE, "silo-002", dropped))
        assert set(again.refused) == set(rest)
        result = Round(made, header=attempt(made, 2)).play()
        assert result.survivors == made.names
    np.testing.assert_array_equal(result.sum, made.plain_sum(result.survivors))


@pytest.mark.parametrize("step", BEFORE_THE_KEY)
def test_below_the_quorum_a_round_fails_and_names_who_was_lost(step: Step) -> None:
    made = cohort(5)  # quorum 4
    lost = made.names[:2]
    with pytest.raises(ProtocolError, match=r"only 3 silos .* 4 are needed \(silo-001"):
        Round(made).play(reply=lambda s, n, f: None if s is step and n in lost else f)


def test_every_attempt_has_fresh_keys_and_another_common_polynomial() -> None:
    made = cohort(3, values=10)
    rounds = [Round(made, header=attempt(made, k)).until(Step.UPLOAD) for k in (0, 1)]
    parts = [r.received[Step.SHARE, "silo-001"] for r in rounds]
    assert parts[0][-30000:] != parts[1][-30000:]
    first, second = (polynomials.hash_to_ring(r.coordinator._header_digest, RING) for r in rounds)
    assert (first != second).mean() > 0.99


RING = ckks_messages.ring_of(cohort(3, values=10).header)


# Crashes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_silo_that_crashed_sits_the_attempt_out(step: Step) -> None:
    """Its secrets are gone. A new process at the same attempt must not make a second key, nor take
    the round up where it was; in the next attempt it is there again."""
    made = cohort(4)
    first = Round(made).until(step)
    first.silos["silo-003"] = silo(made, "silo-003")  # the same journal, everything else forgotten
    if step in BEFORE_THE_KEY:
        result = first.play()
        lost = () if step is Step.ADVERTISE else ("silo-003",)  # it had said nothing yet
        assert tuple(first.refused) == lost
        assert set(result.survivors) == set(made.names) - set(lost)
        return
    with pytest.raises(AbandonedError):
        first.play()
    assert tuple(first.refused) == ("silo-003",)
    with pytest.raises(RemoteProtocolError, match="asks a second time"):
        silo(made, "silo-003").handle(Round(made).coordinator.requests()["silo-003"])
    result = Round(made, header=attempt(made)).play()
    np.testing.assert_array_equal(result.sum, made.plain_sum(made.names))


def test_a_crashed_server_may_open_the_same_sum_again() -> None:
    made = cohort(4)
    first = Round(made).play()
    again = Round(made, header=attempt(made)).play()
    np.testing.assert_array_equal(first.sum, again.sum)


def test_the_same_sum_is_opened_a_few_times_and_no_more() -> None:
    """Adversary: a server that averages the flooding noise out over many attempts."""
    made = cohort(3, values=10)
    for number in range(MOST_OPENINGS):
        Round(made, header=attempt(made, number)).play()
    for number in (MOST_OPENINGS, 7):
        again = Round(made, header=attempt(made, number))
        with pytest.raises(ProtocolError):
            again.play()
        assert again.shares == []
        assert set(again.refused) == set(made.names)
        assert "a sum that was opened 3 times" in again.refused["silo-001"]
    following = msgspec.structs.replace(made.header, round=made.header.round + 1)
    np.testing.assert_array_equal(
        Round(made, header=following).play().sum, made.plain_sum(made.names)
    )


@pytest.mark.parametrize("step", STEPS)
def test_nothing_leaves_that_is_not_written_down_first(step: Step) -> None:
    made = cohort(3, values=10)
    made.journals["silo-001"] = journal = FullJournal()
    played = Round(made).until(step)
    request = played.coordinator.requests()["silo-001"]
    side = played.silos["silo-001"]
    journal.full = True
    with pytest.raises(OSError, match="no space left"):
        side.handle(request)
    assert side.step is Step.FAILED
    journal.full = False
    with pytest.raises(RemoteProtocolError, match="this attempt is over"):
        side.handle(request)


# What stays inside ------------------------------------------------------------------------------


def test_secrets_are_dropped_not_shown_not_copied(capfd) -> None:
    made = cohort(3)
    played = Round(made).until(Step.UNMASK)
    side = played.silos["silo-001"]
    assert repr(side) == "CkksSiloRound(silo='silo-001', step=unmask)"
    kept = side._secrets
    assert repr(kept.own) == "CkksSecrets(<redacted>)"
    assert repr(kept.shares) == "KeyShares(<redacted>)"
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        for secret in (side, kept.own, kept.shares):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                copied(secret)
    assert not kept.own._vector.size  # encrypted: no longer needed
    with pytest.raises(LocalProtocolError, match="no ciphertext to upload"):
        kept.own.take_upload()
    played.exchange()
    assert side._secrets is None
    assert side.step is Step.DONE
    upload = played.received[Step.UPLOAD, "silo-001"]
    decoded = msgspec.msgpack.decode(upload, type=ckks_messages.CipherUpload)
    assert repr(decoded) == "CipherUpload(61440 + 122880 bytes)"
    share = played.received[Step.UNMASK, "silo-001"]
    assert "redacted" in repr(msgspec.msgpack.decode(share, type=ckks_messages.Partial))
    # The library prints warnings where its other interface is used; results own stdout.
    assert capfd.readouterr() == ("", "")


def test_no_frame_holds_the_secret_key_or_the_vector() -> None:
    made = cohort(3, values=4096)
    played = Round(made).until(Step.UPLOAD)
    side = played.silos["silo-002"]
    ring, shares = ckks_messages.ring_of(made.header), side._secrets.shares
    shares._secrets[0][0].save(shares._seal._out.path)
    key = shares._seal._content(4096)
    assert len(np.unique(key)) > 4000
    vector = polynomials.encode(made.vectors["silo-002"], ring)
    while played.exchange():
        pass
    part = msgspec.msgpack.decode(
        played.received[Step.SHARE, "silo-002"], type=ckks_messages.KeyPart
    )
    upload = msgspec.msgpack.decode(
        played.received[Step.UPLOAD, "silo-002"], type=ckks_messages.CipherUpload
    )
    for data in (part.parts[0], upload.first, upload.second[: len(upload.first)]):
        sent = polynomials.unpack(data, ring, 1)[0]
        for secret in (key, vector[0]):
            assert (sent == secret).mean() < 0.01


# Our own mistakes -------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_refused_before_anything_is_said() -> None:
    made = cohort(3, values=10)
    common = {
        "header": made.header,
        "roster": made.roster,
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
        {"vector": np.zeros(10)},
    ):
        with pytest.raises(LocalProtocolError):
            CkksSiloRound(**common | change)
    played = Round(made)
    played.play()
    for call in (played.coordinator.requests, played.coordinator.advance):
        with pytest.raises(LocalProtocolError, match="this attempt is over"):
            call()
