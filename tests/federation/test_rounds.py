"""The round loops over the embedded engine, with arithmetic in place of training."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from securefedcollm.aggregation.upload import HEAD_BYTES
from securefedcollm.errors import ConfigError, ProtocolError, StateError
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.messages import Aggregated, decode_reply
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
    found = {}
    for name in NAMES:
        with Ledger(directory / "silos" / name / "ledger.sqlite", name) as ledger:
            found[name] = [(e.key.round, e.key.attempt, e.state) for e in ledger.entries()]
    return found


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
