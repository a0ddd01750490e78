"""Parcels: frames in pieces over a carrier that loses, repeats and restarts."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time

import pytest

from securefedcollm.errors import TransportError
from securefedcollm.federation.engines import link as link_module
from securefedcollm.federation.engines.link import (
    Door,
    Parcel,
    Pulled,
    SiloInbox,
    Unknown,
    Wire,
    answer_calls,
    deliver,
    knock,
    result_of,
)

SESSION = b"s" * 16


class Port:
    """Answers with the frame reversed, and counts."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.frames: list[bytes] = []
        self.seconds = seconds

    def step(self, frame: bytes) -> bytes:
        self.frames.append(frame)
        time.sleep(self.seconds)
        return frame[::-1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(link_module, "CHUNK", 10)


@pytest.fixture
def silo():
    """Start inboxes that work in a thread each: ``silo(port) -> inbox``."""
    stop, threads = threading.Event(), []

    def start(port, limit=1000):
        inbox = SiloInbox(port, limit)
        threads.append(threading.Thread(target=inbox.serve, args=(stop.is_set,)))
        threads[-1].start()
        return inbox

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def soon() -> float:
    return time.monotonic() + 10


def test_a_frame_crosses_in_chunks_and_its_reply_too(silo):
    port = Port()
    frame = bytes(range(57))
    assert deliver(silo(port), Parcel(SESSION, 1), frame, soon()) == frame[::-1]
    assert port.frames == [frame]


class Lossy:
    """Drops calls and answers, and repeats calls."""

    def __init__(self, inner, seed: int) -> None:
        self.inner = inner
        self.random = random.Random(seed)

    def push(self, *call):
        return self._call(self.inner.push, call)

    def pull(self, *call):
        return self._call(self.inner.pull, call)

    def _call(self, method, call):
        fate = self.random.random()
        if fate < 0.2:
            raise TransportError("lost on the way there")
        answer = method(*call)
        if fate < 0.4:
            raise TransportError("lost on the way back")
        return method(*call) if fate < 0.6 else answer


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_carrier_loses_or_repeats_a_request_is_worked_out_once(
    silo, seed, monkeypatch
):
    monkeypatch.setattr(link_module.time, "sleep", lambda seconds: None)
    port = Port()
    inbox = silo(port)
    frames = [bytes([n]) * 45 for n in range(4)]
    for number, frame in enumerate(frames):
        reply = deliver(Lossy(inbox, seed), Parcel(SESSION, number), frame, soon())
        assert reply == frame[::-1]
    assert port.frames == frames


def test_a_silo_that_was_restarted_gets_the_request_again(silo):
    first, second = Port(), Port()
    inboxes = [silo(first), silo(second)]

    class Restarted:
        """The first process dies after it has taken the request."""

        def push(self, *call):
            return inboxes[0].push(*call)

        def pull(self, *call):
            if len(inboxes) == 2:
                inboxes.pop(0)
            return inboxes[0].pull(*call)

    frame = b"please train" * 3
    assert deliver(Restarted(), Parcel(SESSION, 0), frame, soon()) == frame[::-1]
    assert second.frames == [frame]


def test_a_request_that_another_has_superseded_is_unknown(silo):
    inbox = silo(Port())
    deliver(inbox, Parcel(SESSION, 2), b"newer", soon())
    with pytest.raises(Unknown):
        inbox.push(Parcel(SESSION, 1), 5, 0, b"older")
    with pytest.raises(Unknown):
        inbox.pull(Parcel(SESSION, 1), 0, 0.0)
    # A coordinator that was restarted numbers from the start, in a session of its own.
    assert deliver(inbox, Parcel(b"t" * 16, 0), b"again", soon()) == b"niaga"


def test_a_reply_that_is_not_there_yet_is_waited_for_but_not_for_ever(silo):
    inbox = silo(Port(seconds=0.6))
    assert deliver(inbox, Parcel(SESSION, 0), b"slow", soon()) == b"wols"
    with pytest.raises(TransportError, match="no reply in time"):
        deliver(inbox, Parcel(SESSION, 1), b"slow", time.monotonic() + 0.2)


def test_a_silo_that_stays_away_is_given_up(silo, monkeypatch):
    monkeypatch.setattr(link_module.time, "sleep", lambda seconds: None)

    class Gone:
        calls = 0

        def push(self, *call):
            self.calls += 1
            raise TransportError("is not connected")

        pull = push

    gone = Gone()
    with pytest.raises(TransportError, match="not connected"):
        deliver(gone, Parcel(SESSION, 0), b"hello", soon(), grace=0.05)
    assert gone.calls > 1


@pytest.mark.parametrize("total", [0, -1, 101, 1 << 60])
def test_a_frame_that_cannot_make_sense_is_refused_before_it_is_held(silo, total):
    """Adversary: a server that fills the silo's memory."""
    with pytest.raises(TransportError, match="100 are the most"):
        silo(Port(), limit=100).push(Parcel(SESSION, 0), total, 0, b"x")


def test_chunks_out_of_place_change_nothing(silo):
    port = Port()
    inbox = silo(port)
    parcel = Parcel(SESSION, 0)
    assert inbox.push(parcel, 20, 5, b"early") == 0
    assert inbox.push(parcel, 20, 0, b"0123456789") == 10
    assert inbox.push(parcel, 30, 10, b"0123456789") == 10  # of another length than announced
    assert inbox.push(parcel, 20, 0, b"xxxxxxxxxx") == 10
    assert inbox.push(parcel, 20, 10, b"abcdefghijklmnop") == 20  # more than was announced
    assert inbox.pull(parcel, 0, 5.0).total == 20
    assert port.frames == [b"0123456789abcdefghij"]


@pytest.mark.parametrize(
    "pulled",
    [Pulled(1 << 40, b"x"), Pulled(50, b"")],
    ids=["absurd", "breaks off"],
)
def test_a_silo_that_announces_what_it_does_not_send_is_a_dropout(pulled):
    class Liar:
        def push(self, parcel, total, offset, chunk):
            return total

        def pull(self, *call):
            return pulled

    with pytest.raises(TransportError, match="too large, or breaks off"):
        deliver(Liar(), Parcel(SESSION, 0), b"hello", soon(), grace=0.0)


def test_a_silo_that_never_takes_a_request_is_a_dropout():
    class Stuck:
        def push(self, *call):
            return 0

        def pull(self, *call):
            raise AssertionError

    with pytest.raises(TransportError, match="did not take"):
        deliver(Stuck(), Parcel(SESSION, 0), b"hello", time.monotonic() + 0.1, grace=0.0)


# ---- the door ----


def test_calls_through_the_door(silo):
    inbox = silo(Port())
    with Door(answer_calls(inbox)) as door:
        assert door.path.parent.stat().st_mode & 0o777 == 0o700
        with knock(str(door.path)) as wire:
            wire.send(["push", SESSION, 0, 3, 0, b"abc"])
            assert result_of(wire.receive()) == [3]
            wire.send(["pull", SESSION, 0, 0, 5.0])
            assert result_of(wire.receive()) == [3, b"cba"]
            wire.send(["pull", SESSION, 7, 0, 0.0])
            with pytest.raises(Unknown):
                result_of(wire.receive())
            for nonsense in (["push", 1, 2], ["nothing"], {"a": 1}, 7, None):
                wire.send(nonsense)
                with pytest.raises(TransportError, match="no such call"):
                    result_of(wire.receive())
    assert not door.path.parent.exists()
    with pytest.raises(FileNotFoundError), knock(str(door.path)):
        pass


def test_the_silo_knows_whether_a_job_of_the_carrier_runs(silo):
    inbox = silo(Port())
    with Door(answer_calls(inbox)) as door:
        with knock(str(door.path)) as wire:
            wire.send(["attend"])
            wait_until(lambda: inbox.attended)
        wait_until(lambda: not inbox.attended)


def wait_until(happens) -> None:
    deadline = time.monotonic() + 5
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "raw", [struct.pack(">I", 1 << 31), struct.pack(">I", 3) + b"\xc1\xc1\xc1"]
)
def test_a_message_that_is_none_is_not_read(raw):
    ours, theirs = socket.socketpair()
    theirs.sendall(raw)
    with pytest.raises(TransportError):
        Wire(ours).receive()
    theirs.close()
    ours.close()


def test_the_end_of_the_other_side_is_told():
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack(">I", 10) + b"half")
    theirs.close()
    with pytest.raises(EOFError):
        Wire(ours).receive()
    ours.close()
