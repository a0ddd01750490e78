"""The round loops over the embedded engine, with arithmetic in place of training."""

from __future__ import annotations

import logging
import re
import shutil

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefedcollm.aggregation.header import MOST_ATTEMPTS
from securefedcollm.aggregation.masking.upload import HEAD_BYTES, MAGIC
from securefedcollm.errors import ConfigError, ProtocolError, RemoteProtocolError, StateError
from securefedcollm.federation import summing
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
    EndRun,
    Refused,
    Trained,
    decode_reply,
    encode,
)
from securefedcollm.federation.plan import quantiser
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest
from tests.support.arithmetic import (
    KEYS,
    NAMES,
    SIZE,
    ArithmeticSilo,
    make_silo,
    make_study,
    update_of,
)
from tests.support.rounds import (
    CHARGED_ONCE,
    Cut,
    Dies,
    Killed,
    Run,
    Wiretap,
    begin,
    expected_theta,
    reply_to,
    spent,
    spent_by,
)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_mean_is_that_of_plain_arithmetic_bit_for_bit(tmp_path, workers):
    study = make_study()
    theta = Run(tmp_path, study, workers=workers).go()
    np.testing.assert_array_equal(theta, expected_theta(study))
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, CHARGED_ONCE)


def test_vectors_too_long_to_be_in_memory_together_are_asked_for_one_by_one(tmp_path, monkeypatch):
    """Of all weights of a model; one that gets lost is a dropout as ever."""
    study, taps = make_study(), []

    class Counted(Wiretap):
        def exchange(self, frames, timeout):
            replies = super().exchange(frames, timeout)
            together.append(sum(MAGIC in reply for reply in replies.values()))
            return replies

    def wrap(engine):
        taps.append(Counted(engine))
        return taps[-1]

    most = {}
    for limit in (summing.UPLOADS, 0):
        together: list[int] = []
        monkeypatch.setattr(summing, "UPLOADS", limit)
        theta = Run(tmp_path / str(limit), study, wrap=wrap).go()
        np.testing.assert_array_equal(theta, expected_theta(study))
        most[limit] = max(together)
    assert list(most.values()) == [len(NAMES), 1]


def test_an_update_that_is_scaled_down_is_told_to_its_silo_alone(tmp_path, caplog):
    """Else a clip norm that is too small looks like tuning that does not help."""
    caplog.set_level(logging.WARNING)
    study = make_study(aggregation={"clip_norm": 1.0})
    run = Run(tmp_path, study)
    theta = run.go()
    np.testing.assert_array_equal(theta, expected_theta(study))
    told = [text for text in caplog.messages if "scaled down" in text]
    assert len(told) == study.rounds * len(NAMES)
    norm = float(np.linalg.norm(update_of(NAMES[0], 0, np.zeros(SIZE))))
    assert f"{NAMES[0]}: round 1: the update is scaled down to {100 / norm:.0f} %" in told[0]
    assert "scaled down" not in (tmp_path / "server" / "state.json").read_text()


def test_the_server_receives_no_byte_of_an_unmasked_update(tmp_path):
    """Adversary: the server. Its bytes hold no update, quantised vector or packed vector, and what
    it gets for the same update twice has nothing in common."""
    study = make_study(rounds=1)
    taps = []

    def wrap(engine):
        taps.append(Wiretap(engine))
        return taps[-1]

    for place in ("a", "b"):  # the same updates under fresh masks
        Run(tmp_path / place, study, wrap=wrap).go()
    for name in NAMES:
        update = update_of(name, 0, np.zeros(SIZE, dtype=np.float32))
        integers = quantiser(study, SIZE).encode(update).integers
        offset = integers + study.field.bound
        packed = pack_by_hand(offset, study.field)
        seen = [b"".join(tap.received[name]) for tap in taps]
        for secret in (update, integers, offset, packed):
            for width in (8, 16):
                raw = secret.tobytes()
                pieces = {raw[i : i + width] for i in range(0, len(raw) - width, width)}
                # Not runs of zeros, nor a byte or two before one: a share's padding has those too.
                pieces = {p for p in pieces if len(set(p)) >= 4}
                assert pieces or width == 8
                assert not any(piece in blob for piece in pieces for blob in seen)
        words = [uploaded_words(tap.received[name], name, len(packed)) for tap in taps]
        assert len(words[0]) == len(words[1]) == len(packed)
        assert not set(words[0].tolist()) & set(words[1].tolist())
        assert not set(words[0].tolist()) & set(packed.tolist())


def pack_by_hand(offset, field):
    """Planar packing written from its description, to know what to look for."""
    count = -(-len(offset) // field.per_word)
    words = [0] * count
    for i, value in enumerate(offset.tolist()):
        words[i % count] |= value << (field.bits * (i // count))
    return np.array(words, dtype=np.uint64)


def uploaded_words(replies, name, count):
    """The masked words: the tail of the upload, which is the reply to exchange 3."""
    upload = decode_reply(replies[3], name)
    assert isinstance(upload, Aggregated)
    assert len(upload.frame) == HEAD_BYTES + 8 * count
    return np.frombuffer(upload.frame[-8 * count :], dtype="<u8")


@pytest.mark.parametrize("at", range(1, 5))
def test_one_dropout_before_the_upload_leaves_the_sum_of_the_others(tmp_path, at):
    """Exchange 0 trains, 1 to 5 aggregate; who is lost before the upload (3) is not in the sum."""
    study = make_study(rounds=1)
    run = Run(tmp_path, study, wrap=lambda e: Cut(e, ("silo-2",), at))
    theta = run.go()
    survivors = tuple(n for n in NAMES if n != "silo-2" or at > 3)
    np.testing.assert_array_equal(theta, expected_theta(study, survivors))
    assert run.store.state.history[0]["survivors"] == list(survivors)
    assert "silo-2" in run.store.state.history[0]["dropouts"]


def test_too_few_silos_fail_the_round_and_name_the_reason(tmp_path):
    study = make_study()
    run = Run(tmp_path, study, fails=("silo-1", "silo-3"))
    with pytest.raises(ProtocolError, match=r"2 of 4 silos .* silo-1: this silo cannot take part"):
        run.go()
    assert run.store.state.round == 0
    theta = Run(tmp_path, study, resume=True).go()  # mended: the run goes on
    np.testing.assert_array_equal(theta, expected_theta(study))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(12))
def test_killed_at_any_exchange_the_run_resumes_to_the_same_end(tmp_path, at, before):
    """Rounds 1 and 2 have six exchanges each. All processes die; each silo keeps its directory."""
    study = make_study()
    run = Run(tmp_path, study, wrap=lambda e: Dies(e, at, before))
    with pytest.raises(Killed):
        run.go()
    theta = Run(tmp_path, study, resume=True).go()
    np.testing.assert_array_equal(theta, expected_theta(study))
    # Every round was charged once: a finished update is released again, never trained again.
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, CHARGED_ONCE)


def test_a_round_whose_opening_was_cut_short_is_given_up_if_a_survivor_is_gone(tmp_path):
    """All four opened round 1, then the server died and silo-4 never came back: a sum of the other
    three would reveal silo-4's update. The round's updates are lost; the run goes on."""
    study = make_study()
    run = Run(tmp_path, study, wrap=lambda e: Dies(e, 5, before=False))
    with pytest.raises(Killed):
        run.go()
    again = Run(tmp_path, study, resume=True, wrap=lambda e: Cut(e, ("silo-4",), 0))
    again.go()
    first, *rest = again.store.state.history
    assert "lost" in first
    assert first["survivors"] == []
    assert [r["survivors"] for r in rest] == [["silo-1", "silo-2", "silo-3"]] * 2


def test_bad_state_is_refused_by_name(tmp_path):
    study = make_study(rounds=1)
    Run(tmp_path, study).go()
    with pytest.raises(ConfigError, match="there is a run in this directory already"):
        RunStore(tmp_path, digest(study), resume=False)
    with pytest.raises(ConfigError, match="belongs to another study"):
        RunStore(tmp_path, b"x" * 32, resume=True)
    (tmp_path / "server" / "state.json").write_text('{"run_id": 1')
    with pytest.raises(StateError, match=r"state.json: the run's state cannot be read"):
        RunStore(tmp_path, digest(study), resume=True)
    with pytest.raises(StateError, match="cannot be written"):
        RunStore(tmp_path / "server" / "state.json", digest(study), resume=False)


def test_a_silo_takes_part_in_one_run_of_a_study(tmp_path):
    """Adversary: a server that forgets the run, to get the same updates summed over fewer silos."""
    study = make_study()
    Run(tmp_path, study).go()
    shutil.rmtree(tmp_path / "server")
    with pytest.raises(ProtocolError, match="asked for a second run of a study"):
        Run(tmp_path, study).go()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": 3}, "asked for round 4 of a study of 3"),
        ({"round": -1}, "asked for round 0"),
        ({"attempt": -1}, "malformed request"),
        ({"run_id": b"short"}, "malformed request"),
        ({"layout": b"x" * 32}, "adapter layout .* is not this silo's"),
        ({"adapter": b"1234"}, "an adapter of 4 bytes, this layout has 404"),
        ({"adapter": b"\xff" * 4 * SIZE}, "values that are not finite or above adapter.max_abs"),
    ],
)
def test_a_silo_refuses_what_does_not_fit_its_own_study(tmp_path, change, message):
    """Adversary: the server. The refusal is a reply; nothing is trained, reserved or released."""
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    good = BeginRound(b"r" * 16, 0, 0, b"l" * 32, bytes(4 * SIZE))
    refusal = reply_to(silo, encode(msgspec.structs.replace(good, **change)))
    assert isinstance(refusal, Refused)
    assert re.search(message, refusal.message)
    assert spent_by(tmp_path, "silo-1") == []
    assert isinstance(reply_to(silo, encode(good)), Trained)


@given(frame=st.binary(max_size=200))
def test_garbage_is_refused_by_both_sides(tmp_path_factory, frame):
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path_factory.mktemp("s"))
    assert isinstance(decode_reply(silo.step(frame), "silo-1"), Refused)
    with pytest.raises(RemoteProtocolError, match="silo-1: "):
        decode_reply(b"\xc1" + frame, "silo-1")


def test_an_inner_frame_before_a_round_and_a_repeated_round_are_refused(tmp_path):
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    early = decode_reply(silo.step(encode(Aggregate(b"x"))), "silo-1")
    assert isinstance(early, Refused)
    assert isinstance(reply_to(silo, begin(1)), Trained)
    assert isinstance(reply_to(silo, begin(1)), Refused)
    assert isinstance(reply_to(silo, begin(0, attempt=5)), Refused)


@pytest.mark.parametrize("frame", [b"\xc1", "a second attempt", "the end"])
def test_an_attempt_that_is_over_leaves_no_secrets(tmp_path, frame):
    """Adversary: whoever gets hold of the silo's process when its part is done."""
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    reply_to(silo, begin(0))
    side = silo._side
    words = side._secrets.buffer.words
    assert words.any()
    reply_to(
        silo,
        {"a second attempt": begin(0, attempt=1), "the end": encode(EndRun(b"r" * 16))}.get(
            frame, frame
        ),
    )
    assert side._secrets is None
    assert not words.any()
    assert (silo._side is not None) == (frame == "a second attempt")


def test_a_server_cannot_burn_the_budget_on_models_and_rounds_that_it_never_sums(tmp_path):
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    assert isinstance(reply_to(silo, begin(1)), Trained)
    second = reply_to(silo, begin(1, attempt=1, model=1.0))
    assert "second global model for round 2" in second.message
    again = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)  # restarted
    assert "past round 1" in reply_to(again, begin(0, attempt=2)).message
    assert isinstance(reply_to(again, begin(1, attempt=3)), Trained)
    assert spent_by(tmp_path, "silo-1") == [(1, 0, "settled")]


def test_attempts_at_a_round_are_counted_across_restarts(tmp_path):
    """Adversary: a server that fills the silo's disk with attempts that it never finishes."""
    for number in range(MOST_ATTEMPTS):
        if number % 20 == 0:  # restarted
            silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
        assert isinstance(reply_to(silo, begin(attempt=number)), Trained)
    again = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    for attempt in (MOST_ATTEMPTS, 0):  # whatever number it gives
        refusal = reply_to(again, begin(attempt=attempt))
        assert refusal.message == "server: asked for more than 64 attempts at round 1"
    assert isinstance(reply_to(again, begin(round_=1)), Trained)


def test_an_attempt_out_of_range_costs_nothing(tmp_path):
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    assert isinstance(reply_to(silo, begin(attempt=2**32)), Refused)
    assert spent_by(tmp_path, "silo-1") == []


def test_two_studies_share_nothing_but_the_ledger(tmp_path):
    """Adversary: a server that runs two studies under one run id, for one update in two sums."""
    for seed in (1, 2):
        silo = make_silo("silo-1", silent, study=make_study(seed=seed), directory=tmp_path)
        assert isinstance(reply_to(silo, begin()), Trained)
        assert silo.training.workload.trained == [0]  # trained afresh, and charged
    assert spent_by(tmp_path, "silo-1") == [(0, 0, "settled")] * 2


def test_two_processes_of_one_silo_release_one_update(tmp_path):
    study = make_study()
    first, second = (make_silo("silo-1", silent, study=study, directory=tmp_path) for _ in range(2))

    def overtaken(adapter, round_, progress):  # the other process trains meanwhile
        assert isinstance(reply_to(first, begin()), Trained)
        return np.ones(SIZE, dtype=np.float32)

    second._workload.fit = overtaken
    assert isinstance(reply_to(second, begin(attempt=1)), Refused)
    assert spent_by(tmp_path, "silo-1") == [(0, 0, "settled")]


def test_an_update_that_was_released_and_lost_is_not_replaced(tmp_path):
    study = make_study()
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    assert isinstance(reply_to(silo, begin()), Trained)
    for update in (tmp_path / "silo-1").glob("update-*"):
        update.unlink()
    assert isinstance(reply_to(silo, begin(attempt=1)), Refused)
    assert isinstance(reply_to(silo, begin(round_=1)), Trained)
    assert spent_by(tmp_path, "silo-1") == [(0, 0, "settled"), (1, 0, "settled")]


def test_a_training_that_fails_is_charged_and_says_nothing(tmp_path):
    """Adversary: a server whose adapter makes certain records fail, and who asks again."""
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path, fails=("silo-1",))
    for attempt in range(2):
        refusal = reply_to(silo, begin(attempt=attempt))
        assert (refusal.kind, refusal.message) == ("Refused", "this silo cannot take part")
    assert spent_by(tmp_path, "silo-1") == [(0, 0, "settled"), (0, 1, "settled")]


def test_a_budget_that_is_used_up_stops_the_training_and_only_the_silo_knows_why(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    study = make_study(privacy={"epsilon": 0.5, "delta": 1e-5})
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    refusal = reply_to(silo, begin())
    assert isinstance(refusal, Refused)
    assert refusal.message == "this silo cannot take part"
    assert "ε" in caplog.text
    assert silo.training.workload.trained == []
    assert spent_by(tmp_path, "silo-1") == []


def test_a_run_that_the_budget_cannot_see_through_is_not_begun(tmp_path, caplog):
    """One round of this run would fit. The silo's own operator hears what is left and what would
    fit; the server hears nothing of either."""
    caplog.set_level(logging.WARNING)
    study = make_study(privacy={"epsilon": 3.0, "delta": 1e-5})
    (event,) = ArithmeticSilo("silo-1").events()
    with Ledger(tmp_path / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        ledger.reserve("d", "record", "run", 0, 0, [event], (3.0, 1e-5))  # fits
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    refusal = reply_to(silo, begin())
    assert (refusal.kind, refusal.message) == ("Refused", "this silo cannot take part")
    assert not re.search(r"ε|budget|left|\d", refusal.message + refusal.hint)
    assert "the 3 rounds of this run would bring it to" in caplog.text
    assert "3.000 is left" in caplog.text
    assert silo.training.workload.trained == []
    assert [key for key in spent_by(tmp_path, "silo-1") if key[2] != "reserved"] == []


def test_a_silo_s_own_budget_is_for_all_studies_on_its_data(tmp_path):
    """The second study would fit its own ε, but not what this silo has agreed to in all."""
    privacy = {"epsilon": 4.0, "delta": 1e-5}
    sessions = [
        make_silo(
            "silo-1",
            silent,
            study=make_study(seed=seed, privacy=privacy),
            directory=tmp_path,
            budget=(4.0, 1e-5),
        )
        for seed in (1, 2)
    ]
    for round_ in range(3):
        assert isinstance(reply_to(sessions[0], begin(round_)), Trained)
    assert isinstance(reply_to(sessions[1], begin()), Refused)
    assert sessions[1]._workload.trained == []


def test_a_frame_with_broken_text_does_not_stop_the_coordinator():
    """Adversary: a silo. (msgpack: refused, with a string that is not UTF-8.)"""
    frame = bytes.fromhex("94a7") + b"refused" + bytes.fromhex("a1ffa0a0")
    with pytest.raises(RemoteProtocolError, match="silo-1: a frame does not decode"):
        decode_reply(frame, "silo-1")


def test_the_roster_of_a_run_is_that_of_the_study(tmp_path):
    listed = [{"name": n, "role": "silo", "key": k.public.hex()} for n, k in KEYS.items()]
    listed[0]["key"] = "ab" * 32
    listed.append({"name": "server", "role": "server", "key": "cd" * 32})
    with pytest.raises(ConfigError, match="not those of the signed study"):
        make_silo("silo-1", silent, study=make_study(roster=listed), directory=tmp_path)
