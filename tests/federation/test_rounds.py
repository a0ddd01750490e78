"""The round loops over the embedded engine, with arithmetic in place of training."""

from __future__ import annotations

import re
import shutil
from functools import partial

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefedcollm.aggregation.upload import HEAD_BYTES
from securefedcollm.errors import ConfigError, ProtocolError, RemoteProtocolError, StateError
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
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

from .arithmetic import NAMES, ROSTER, SIZE, ArithmeticServer, make_silo, make_study, update_of

CHARGED_ONCE = [(0, 0, "settled"), (1, 0, "settled"), (2, 0, "settled")]


class Run:
    """One coordinator's life over an engine; made again on the same directory, it resumes."""

    def __init__(self, directory, study, *, workers=0, resume=False, wrap=lambda e: e, **silo):
        self.study = study
        self.store = RunStore(directory, digest(study), resume=resume)
        self.server = ArithmeticServer()
        factory = partial(make_silo, study=study, directory=directory / "silos", **silo)
        self.engine = EmbeddedEngine(NAMES, factory, workers=workers, progress=silent)
        self.coordinator = Coordinator(
            study=study,
            roster=ROSTER,
            engine=wrap(self.engine),
            workload=self.server,
            store=self.store,
            progress=silent,
        )

    def go(self):
        try:
            self.coordinator.run()
        finally:
            self.engine.close()
        return self.server.theta


def expected_theta(study, survivors=NAMES):
    """What plain arithmetic says, with the quantiser's own rounding."""
    quantise = quantiser(study, SIZE)
    theta = np.zeros(SIZE, dtype=np.float32)
    for round_ in range(study.rounds):
        total = sum(quantise.encode(update_of(n, round_, theta)).integers for n in survivors)
        theta = (theta + quantise.decode(total, len(survivors))) * np.float32(0.5)
    return theta


def spent(directory, study):
    return {name: spent_by(directory / "silos", name) for name in NAMES}


def spent_by(silos, name):
    with Ledger(silos / name / "ledger.sqlite", name) as ledger:
        return [(e.key.round, e.key.attempt, e.state) for e in ledger.entries()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_mean_is_that_of_plain_arithmetic_bit_for_bit(tmp_path, workers):
    study = make_study()
    theta = Run(tmp_path, study, workers=workers).go()
    np.testing.assert_array_equal(theta, expected_theta(study))
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, CHARGED_ONCE)


class Wiretap:
    """Sits where the server sits and keeps every byte that it receives."""

    def __init__(self, engine):
        self.engine = engine
        self.received: dict[str, list[bytes]] = {name: [] for name in NAMES}

    def exchange(self, frames, timeout):
        replies = self.engine.exchange(frames, timeout)
        for name, reply in replies.items():
            self.received[name].append(reply)
        return replies


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
                pieces = {p for p in pieces if len(set(p)) >= width // 4}  # not runs of zeros
                assert pieces
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


class Cut:
    """An engine that loses some silos from the k-th exchange on."""

    def __init__(self, engine, lost, at):
        self.engine, self.lost, self.left = engine, lost, at

    def exchange(self, frames, timeout):
        self.left -= 1
        gone = self.lost if self.left < 0 else ()
        alive = {n: f for n, f in frames.items() if n not in gone}
        return self.engine.exchange(alive, timeout) | {
            n: Failure("cut off") for n in frames if n in gone
        }


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
    with pytest.raises(ProtocolError, match=r"2 of 4 silos .* silo-1: round 1 .* not finite"):
        run.go()
    assert run.store.state.round == 0
    theta = Run(tmp_path, study, resume=True).go()  # mended: the run goes on
    np.testing.assert_array_equal(theta, expected_theta(study))


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is cleaned up."""


class Dies:
    """An engine under a coordinator that dies before or after its k-th exchange."""

    def __init__(self, engine, at, before):
        self.engine, self.left, self.before = engine, at, before

    def exchange(self, frames, timeout):
        self.left -= 1
        if self.left < 0 and self.before:
            raise Killed
        replies = self.engine.exchange(frames, timeout)
        if self.left < 0:
            raise Killed
        return replies


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
        ({"adapter": b"\xff" * 4 * SIZE}, "the global adapter is not finite"),
    ],
)
def test_a_silo_refuses_what_does_not_fit_its_own_study(tmp_path, change, message):
    """Adversary: the server. The refusal is a reply; nothing is trained, reserved or released."""
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path)
    begin = BeginRound(b"r" * 16, 0, 0, b"l" * 32, bytes(4 * SIZE))
    refusal = decode_reply(silo.step(encode(msgspec.structs.replace(begin, **change))), "silo-1")
    assert isinstance(refusal, Refused)
    assert re.search(message, refusal.message)
    assert spent_by(tmp_path, "silo-1") == []
    assert isinstance(decode_reply(silo.step(encode(begin)), "silo-1"), Trained)


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
    begin = encode(BeginRound(b"r" * 16, 1, 0, b"l" * 32, bytes(4 * SIZE)))
    assert isinstance(decode_reply(silo.step(begin), "silo-1"), Trained)
    assert isinstance(decode_reply(silo.step(begin), "silo-1"), Refused)
    older = encode(BeginRound(b"r" * 16, 0, 5, b"l" * 32, bytes(4 * SIZE)))
    assert isinstance(decode_reply(silo.step(older), "silo-1"), Refused)


def test_a_second_model_for_a_round_costs_a_second_time_and_a_lost_update_too(tmp_path):
    study = make_study()
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    for attempt, model in enumerate((0.0, 1.0, 0.0)):
        adapter = np.full(SIZE, model, dtype="<f4").tobytes()
        begin = BeginRound(b"r" * 16, 0, attempt, b"l" * 32, adapter)
        assert isinstance(decode_reply(silo.step(encode(begin)), "silo-1"), Trained)
    assert spent_by(tmp_path, "silo-1") == [(0, 0, "settled"), (0, 1, "settled")]
    for update in (tmp_path / "silo-1").glob("update-*"):
        update.unlink()
    begin = BeginRound(b"r" * 16, 0, 3, b"l" * 32, bytes(4 * SIZE))
    assert isinstance(decode_reply(silo.step(encode(begin)), "silo-1"), Trained)
    assert len(spent_by(tmp_path, "silo-1")) == 3


def test_a_budget_that_is_used_up_stops_the_training_and_says_what_is_left(tmp_path):
    study = make_study(privacy={"epsilon": 0.5, "delta": 1e-5})
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    begin = BeginRound(b"r" * 16, 0, 0, b"l" * 32, bytes(4 * SIZE))
    refusal = decode_reply(silo.step(encode(begin)), "silo-1")
    assert isinstance(refusal, Refused)
    assert refusal.kind == "BudgetExceeded"
    assert spent_by(tmp_path, "silo-1") == []
