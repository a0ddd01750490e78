"""Parcels: frames in pieces over a carrier that loses, repeats and restarts."""

from __future__ import annotations

import contextlib
import random
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from securefedcollm.errors import CryptoError, StateError, TransportError
from securefedcollm.federation.engines import door as door_module
from securefedcollm.federation.engines import link as link_module
from securefedcollm.federation.engines import requests as requests_module
from securefedcollm.federation.engines.door import Door, Wire, knock
from securefedcollm.federation.engines.link import (
    Pulled,
    SiloInbox,
    Unknown,
    answer_calls,
    deliver,
    result_of,
)
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.engines.requests import (
    HEADER_BYTES,
    Followed,
    Parcel,
    check_header,
    new_session,
    sign_request,
)
from securefedcollm.primitives import SigningKey

SESSION = b"s" * 16
SERVER, STUDY = SigningKey(b"k" * 32), b"d" * 32


def signed(parcel: Parcel, frame: bytes, key: SigningKey = SERVER) -> bytes:
    return sign_request(key, STUDY, "silo-1", parcel, frame) + frame


def bring(link, parcel: Parcel, frame: bytes, deadline: float, **more) -> bytes:
    header = sign_request(SERVER, STUDY, "silo-1", parcel, frame)
    return deliver(link, parcel, frame, deadline, header=header, **more)


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
def silo(tmp_path):
    """Start inboxes that work in a thread each: ``silo(port) -> inbox``. All are of one home."""
    stop, threads = threading.Event(), []

    def start(port, limit=1000):
        check = partial(check_header, SERVER.public, STUDY, "silo-1")
        inbox = SiloInbox(port, limit, check, Followed(tmp_path / "followed"))
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
    assert bring(silo(port), Parcel(SESSION, 1), frame, soon()) == frame[::-1]
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
        reply = bring(Lossy(inbox, seed), Parcel(SESSION, number), frame, soon())
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
    assert bring(Restarted(), Parcel(SESSION, 0), frame, soon()) == frame[::-1]
    assert second.frames == [frame]


def test_a_request_that_another_has_superseded_is_unknown(silo):
    inbox = silo(Port())
    bring(inbox, Parcel(SESSION, 2), b"newer", soon())
    with pytest.raises(Unknown):
        inbox.push(Parcel(SESSION, 1), HEADER_BYTES + 5, 0, signed(Parcel(SESSION, 1), b"older"))
    with pytest.raises(Unknown):
        inbox.pull(Parcel(SESSION, 1), 0, 0.0)
    # A coordinator that was restarted numbers from the start, in a session of its own.
    assert bring(inbox, Parcel(b"t" * 16, 0), b"again", soon()) == b"niaga"


def test_a_reply_that_is_not_there_yet_is_waited_for_but_not_for_ever(silo):
    inbox = silo(Port(seconds=0.6))
    assert bring(inbox, Parcel(SESSION, 0), b"slow", soon()) == b"wols"
    with pytest.raises(TransportError, match="no reply in time"):
        bring(inbox, Parcel(SESSION, 1), b"slow", time.monotonic() + 0.2)


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


@pytest.mark.parametrize("total", [0, -1, HEADER_BYTES + 101, 1 << 60])
def test_a_frame_that_cannot_make_sense_is_refused_before_it_is_held(silo, total):
    """Adversary: a server that fills the silo's memory."""
    with pytest.raises(TransportError, match="100 are the most"):
        silo(Port(), limit=100).push(Parcel(SESSION, 0), total, 0, b"x")


def test_chunks_out_of_place_change_nothing(silo):
    port = Port()
    inbox = silo(port)
    parcel, frame = Parcel(SESSION, 0), b"0123456789abcdefghij"
    raw, there, total = signed(parcel, frame), HEADER_BYTES + 10, HEADER_BYTES + 20
    assert inbox.push(parcel, total, 100, b"early") == 0
    assert inbox.push(parcel, total, 0, raw[:there]) == there
    assert inbox.push(parcel, total + 10, there, b"0123456789") == there  # of another length
    assert inbox.push(parcel, total, 0, b"x" * there) == there
    assert inbox.push(parcel, total, there, raw[there:] + b"more than was announced") == total
    assert inbox.pull(parcel, 0, 5.0).total == 20
    assert port.frames == [frame]


@pytest.mark.parametrize(
    "pulled",
    [Pulled(1 << 40, b"x"), Pulled(50, b""), Pulled(50, b"x"), Pulled(3, b"four")],
    ids=["absurd", "breaks off", "drips", "too much"],
)
def test_a_silo_that_announces_what_it_does_not_send_is_a_dropout(pulled):
    class Liar:
        def push(self, parcel, total, offset, chunk):
            return total

        def pull(self, *call):
            return pulled

    with pytest.raises(TransportError, match="too large, or breaks off"):
        deliver(Liar(), Parcel(SESSION, 0), b"hello", soon(), grace=0.0)


def test_a_reply_beyond_what_the_study_can_bring_is_not_waited_for():
    """Adversary: a silo that announces 2 GiB, for which there would be five hours."""
    seconds = []

    class Boaster:
        def push(self, parcel, total, offset, chunk):
            return total

        def pull(self, parcel, offset, patience):
            seconds.append(patience)
            return Pulled(1001, bytes(link_module.CHUNK))

    for limit, said in ((1000, "too large"), (1001, "too large, or breaks off")):
        with pytest.raises(TransportError, match=said):
            deliver(Boaster(), Parcel(SESSION, 0), b"hello", soon(), limit=limit, grace=0.0)
    assert len(seconds) == 1 + 101  # at once; after the last piece, which is one byte


def test_a_silo_whose_reply_takes_for_ever_is_a_dropout(monkeypatch):
    piece = link_module.CHUNK
    monkeypatch.setattr(link_module, "SLOWEST", 100 * piece)  # ten pieces may take 0.1 s

    class Slow:
        def push(self, parcel, total, offset, chunk):
            return total

        def pull(self, parcel, offset, patience):
            time.sleep(0.04)
            return Pulled(10 * piece, bytes(piece))

    with pytest.raises(TransportError, match="no reply in time"):
        deliver(Slow(), Parcel(SESSION, 0), b"hello", time.monotonic() + 0.02, grace=0.0)


def test_a_silo_that_never_takes_a_request_is_a_dropout():
    class Stuck:
        def push(self, *call):
            return 0

        def pull(self, *call):
            raise AssertionError

    with pytest.raises(TransportError, match="did not take"):
        deliver(Stuck(), Parcel(SESSION, 0), b"hello", time.monotonic() + 0.1, grace=0.0)


def test_a_request_that_the_server_of_the_study_did_not_sign_changes_nothing(silo):
    """Adversary: who holds the server's place in the carrier, but not its identity."""
    thief = SigningKey(b"t" * 32)
    port = Port()
    inbox = silo(port)
    waiting = Parcel(SESSION, 1)
    assert bring(inbox, waiting, b"please train", soon()) == b"niart esaelp"
    parcel, frame = Parcel(SESSION, 3), b"please train"
    right = signed(parcel, frame)
    others = [
        signed(parcel, frame, thief),
        sign_request(SERVER, b"e" * 32, "silo-1", parcel, frame) + frame,
        sign_request(SERVER, STUDY, "silo-2", parcel, frame) + frame,
        signed(Parcel(SESSION, 4), frame),
        signed(Parcel(b"t" * 16, 3), frame),
        right[:-1],  # the length is signed
        right + b"!",
        bytes(200),
    ]
    for forged in others:
        with pytest.raises(TransportError, match="did not sign"):
            inbox.push(parcel, len(forged), 0, forged)
        with pytest.raises(TransportError, match="did not sign"):  # nor is its beginning held
            inbox.push(parcel, len(forged), 0, forged[:20])
        with pytest.raises(TransportError, match="did not sign"):  # as the coordinator sees it
            deliver(inbox, parcel, forged, soon(), grace=0.0)
    # A pending reply is still there, and the right request is taken.
    assert inbox.pull(waiting, 0, 0.0).chunk == b"niart esae"
    assert bring(inbox, parcel, frame, soon()) == frame[::-1]
    assert port.frames == [b"please train"] * 2


def test_a_header_does_not_speak_for_another_frame():
    key = SERVER.public
    right = signed(Parcel(SESSION, 3), b"please train")[:HEADER_BYTES]
    assert len(check_header(key, STUDY, "silo-1", Parcel(SESSION, 3), 12, right)) == 32
    for parcel, length, header in (
        (Parcel(SESSION, 3), 13, right),
        (Parcel(SESSION, 3), 12, right[:-1] + b"x"),
        (Parcel(SESSION, 3), 12, b""),
    ):
        with pytest.raises(CryptoError):
            check_header(key, STUDY, "silo-1", parcel, length, header)


def test_a_frame_that_was_changed_on_the_way_is_not_worked_out_and_may_come_again(silo):
    """Adversary: the carrier, which has a lawful header and changes what follows it."""
    port = Port()
    inbox = silo(port)
    parcel, frame = Parcel(SESSION, 0), b"please train"
    raw = signed(parcel, frame)
    with pytest.raises(TransportError, match="another request than the server signed"):
        inbox.push(parcel, len(raw), 0, raw[:-1] + b"!")
    assert deliver(inbox, parcel, raw, soon()) == frame[::-1]
    assert port.frames == [frame]


def test_a_recorded_request_is_not_worked_out_again_even_after_a_restart(silo):
    """Adversary: the carrier, which has recorded what the server signed."""
    port, first = Port(), new_session()
    inbox = silo(port)
    old = [Parcel(first, number) for number in range(3)]
    for parcel in old:
        bring(inbox, parcel, b"train", soon())

    def replay(parcel):
        raw = signed(parcel, b"train")
        return inbox.push(parcel, len(raw), 0, raw)

    for _ in range(2):
        assert len(port.frames) == 3
        for parcel in old[:-1]:
            with pytest.raises(Unknown):
                replay(parcel)
        inbox = silo(port)  # restarted
    # The newest is taken again after a restart, since a lawful server has to have its reply.
    assert bring(inbox, old[-1], b"train", soon()) == b"niart"
    # A server that was restarted is followed; what was recorded of the session before is not.
    later = Parcel(new_session(), 0)
    assert bring(inbox, later, b"again", soon()) == b"niaga"
    for _ in range(2):
        with pytest.raises(TransportError, match="later session"):
            replay(old[-1])
        inbox = silo(port)  # restarted
    assert len(port.frames) == 5


def test_sessions_ascend_though_the_clock_is_set_back_or_the_memory_is_lost(tmp_path, monkeypatch):
    memory = tmp_path / "session"
    sessions = [new_session(memory)]
    monkeypatch.setattr(requests_module.time, "time_ns", lambda: 1_000_000)
    sessions += [new_session(memory), new_session(memory)]
    monkeypatch.undo()
    memory.write_text("damaged")
    time.sleep(0.01)
    sessions.append(new_session(memory))
    assert sessions == sorted(sessions)
    assert {len(session) for session in sessions} == {16}
    assert len({session[:8] for session in sessions}) == 4


def test_what_a_silo_followed_is_not_forgotten_when_the_file_is_damaged(tmp_path):
    path = tmp_path / "followed"
    Followed(path).begin(Parcel(SESSION, 7))
    assert Followed(path).newest == Parcel(SESSION, 7)
    Followed(path).begin(Parcel(SESSION, 3))  # older: no matter
    assert Followed(path).newest == Parcel(SESSION, 7)
    path.write_bytes(b"damaged")
    with pytest.raises(StateError, match="cannot be read"):
        Followed(path)


def test_nothing_is_worked_out_that_cannot_be_noted(silo, tmp_path, caplog):
    port = Port()
    inbox = silo(port)
    (tmp_path / "followed").mkdir()  # as if the disk were full
    assert bring(inbox, Parcel(SESSION, 0), b"train", soon()) == b""
    assert port.frames == []
    assert "cannot be written" in caplog.text


def test_requests_that_supersede_each_other_do_not_pile_up(silo):
    """Adversary: a server that sends frame after frame while the silo trains."""
    port = Port(seconds=0.3)
    inbox = silo(port)
    for number in range(20):
        parcel = Parcel(SESSION, number)
        inbox.push(parcel, HEADER_BYTES + 8, 0, signed(parcel, b"%08d" % number))
    assert inbox.pull(Parcel(SESSION, 19), 0, 5.0).chunk == b"00000019"[::-1]
    assert len(port.frames) <= 2


def test_a_silo_that_has_just_been_heard_of_is_not_given_up(silo):
    """Training takes longer than the grace, and then one call is lost."""
    inbox = silo(Port(seconds=0.5))

    class Hiccup:
        lost = 0

        def push(self, *call):
            return inbox.push(*call)

        def pull(self, parcel, offset, patience):
            pulled = inbox.pull(parcel, offset, 0.05)
            if pulled.total < 0 or self.lost:
                return pulled
            self.lost += 1
            raise TransportError("lost")

    assert bring(Hiccup(), Parcel(SESSION, 0), b"slow", soon(), grace=0.3) == b"wols"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (MemoryError("Unable to allocate 3 GiB"), "MemoryError (Unable to allocate 3 GiB)"),
        (sqlite3.OperationalError("disk is full"), "OperationalError (disk is full)"),
        (ValueError("Mrs Smith, 1954"), "ValueError"),
    ],
)
def test_what_ends_a_silo_is_told_in_a_line_without_a_record(tmp_path, caplog, cause, said):
    class Ill:
        def step(self, frame):
            raise cause

    caplog.set_level("INFO")
    check = partial(check_header, SERVER.public, STUDY, "silo-1")
    followed = Followed(tmp_path / "followed")
    inbox, parcel = SiloInbox(Ill(), 1000, check, followed), Parcel(SESSION, 0)
    raw = signed(parcel, b"train")
    inbox.push(parcel, len(raw), 0, raw)
    with pytest.raises(StateError) as caught:
        inbox.serve(lambda: False)
    assert caught.value.message.endswith(said)
    assert "start the same command again" in caught.value.hint
    assert caught.value.__cause__ is None
    assert caught.value.again is (type(cause) is not ValueError)  # a supervisor may try again
    assert "test_link.py" in caplog.text  # where it happened
    assert "Smith" not in caplog.text
    # Nothing is lost: restarted, the silo takes the same request again.
    port, stop = Port(), threading.Event()
    inbox = SiloInbox(port, 1000, check, Followed(tmp_path / "followed"))
    thread = threading.Thread(target=inbox.serve, args=(stop.is_set,))
    thread.start()
    assert bring(inbox, parcel, b"train", soon()) == b"niart"
    stop.set()
    thread.join()


# ---- what the time of a call tells ----


class Held:
    """Works until it is told to end."""

    def __init__(self, pace: Pace | None) -> None:
        self.pace, self.end = pace, threading.Event()
        self.frames: list[bytes] = []

    def step(self, frame: bytes) -> bytes:
        self.frames.append(frame)
        if self.pace is not None:
            self.pace.begin()
        assert self.end.wait(20)
        return frame[::-1]


TICK = 0.3
CALLS = {
    "pull": lambda inbox: inbox.pull(Parcel(SESSION, 1), 0, 0.0),
    "old pull": lambda inbox: inbox.pull(Parcel(SESSION, 0), 0, 0.0),
    "old push": lambda inbox: inbox.push(Parcel(SESSION, 0), HEADER_BYTES + 1, 0, b""),
    "forged push": lambda inbox: inbox.push(Parcel(SESSION, 2), HEADER_BYTES + 1, 0, b"x" * 97),
    "absurd push": lambda inbox: inbox.push(Parcel(SESSION, 2), 1 << 40, 0, b""),
    "nonsense": lambda inbox: link_module._answer(inbox, ["what"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_while_a_request_is_worked_out_a_call_ends_at_a_tick_or_with_the_reply(tmp_path, call):
    """Adversary: the server, which calls again and again to see how far the work on records is.

    Control: without a pace the same calls are answered at any moment of the work.
    """
    answered = {}
    for pace in (None, Pace(TICK)):
        port, stop = Held(pace), threading.Event()
        check = partial(check_header, SERVER.public, STUDY, "silo-1")
        inbox = SiloInbox(port, 100, check, Followed(tmp_path / f"followed-{pace is None}"), pace)
        thread = threading.Thread(target=inbox.serve, args=(stop.is_set,))
        raw = signed(Parcel(SESSION, 1), b"poll")
        inbox.push(Parcel(SESSION, 1), len(raw), 0, raw)
        thread.start()
        while not port.frames:
            time.sleep(0.001)
        began = time.monotonic()
        for _ in range(2):
            with contextlib.suppress(TransportError, Unknown):
                CALLS[call](inbox)
        answered[pace is not None] = time.monotonic() - began
        waiting = threading.Thread(target=lambda i=inbox: i.pull(Parcel(SESSION, 1), 0, 20.0))
        waiting.start()
        port.end.set()
        waiting.join(20)
        assert not waiting.is_alive()
        assert inbox.pull(Parcel(SESSION, 1), 0, 20.0).chunk == b"llop"
        stop.set()
        thread.join()
    assert answered[True] > 1.5 * TICK  # each waited for the next tick
    assert answered[False] < answered[True] / 2


def test_ticks_count_from_when_the_work_on_records_began(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    pace = Pace(0.5)
    assert [pace.after(at) for at in (99.0, 100.0, 100.4, 100.5, 101.9)] == [
        *(100.5, 100.5, 100.5, 101.0, 102.0)
    ]
    monkeypatch.setattr(time, "monotonic", lambda: 100.2)
    pace.begin()
    assert pace.after(100.4) == pytest.approx(100.7)
    # A slot of a training may last a day; carriers need to hear of the silo.
    assert Pace(86_400.0).after(125.2) == pytest.approx(130.2)


def test_a_request_supersedes_one_that_is_worked_out_under_a_pace(tmp_path):
    """And a call that waits for a tick does not keep the silo from ending."""
    pace = Pace(0.05)
    port, stop = Held(pace), threading.Event()
    check = partial(check_header, SERVER.public, STUDY, "silo-1")
    inbox = SiloInbox(port, 100, check, Followed(tmp_path / "followed"), pace)
    thread = threading.Thread(target=inbox.serve, args=(stop.is_set,))
    thread.start()
    with pytest.raises(TransportError, match="no reply in time"):
        bring(inbox, Parcel(SESSION, 0), b"abandoned", time.monotonic() + 0.2)
    threading.Timer(0.2, port.end.set).start()
    assert bring(inbox, Parcel(SESSION, 1), b"newer", soon()) == b"rewen"
    assert port.frames == [b"abandoned", b"newer"]
    stop.set()
    thread.join()


# ---- the door ----


def test_calls_through_the_door(silo):
    inbox = silo(Port())
    with Door(answer_calls(inbox)) as door:
        assert door.path.parent.stat().st_mode & 0o777 == 0o700
        with knock(str(door.path)) as wire:
            raw = signed(Parcel(SESSION, 0), b"abc")
            wire.send(["push", SESSION, 0, len(raw), 0, raw])
            assert result_of(wire.receive()) == [len(raw)]
            wire.send(["push", SESSION, 1, len(raw), 0, raw])
            with pytest.raises(TransportError, match="did not sign"):
                result_of(wire.receive())
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


KILLED = """
import os, signal
from securefedcollm.federation.engines.door import Door
print(Door(lambda wire: None).path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_door_stands_in_the_users_own_place_and_a_killed_ones_is_removed(tmp_path, monkeypatch):
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    said = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, check=False
    ).stdout
    left = Path(said.decode().strip())
    assert left.exists()
    with Door(lambda wire: None) as door, Door(lambda wire: None) as other:
        assert door.path.parent.parent == place == left.parent.parent
        assert not left.parent.exists()
        assert door.path.exists()
        assert other.path.exists()
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", ["x" * 100, "absent", "open"])
def test_a_place_that_is_no_good_for_a_door_is_passed_over(tmp_path, monkeypatch, name):
    """Too long for a socket, not there, or open to others, who could put a door of theirs there."""
    place = tmp_path / name
    if name != "absent":
        place.mkdir()
        place.chmod(0o777 if name == "open" else 0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    monkeypatch.setattr(door_module.tempfile, "gettempdir", lambda: str(place))
    with Door(lambda wire: None) as door, knock(str(door.path)):
        assert not place.exists() or not list(place.iterdir())


def test_whoever_comes_when_the_house_is_full_waits_and_hears_nothing():
    """Adversary: a server that parks calls and counts how fast more of them are turned away, to see
    how busy the silo is. Control: when a place is free, the visitor is heard."""
    met = threading.Event()

    def visit(wire):
        wire.receive()
        met.set()

    with Door(visit, visitors=1) as door, knock(str(door.path)):
        wait_until(lambda: len(door._wires) == 1)
        with knock(str(door.path)) as late:
            late.send(["attend"])
            time.sleep(0.2)
            assert not late.gone
            assert not met.is_set()
    with Door(visit, visitors=1) as door:
        with knock(str(door.path)):
            wait_until(lambda: len(door._wires) == 1)
        with knock(str(door.path)) as late:
            late.send(["attend"])
            assert met.wait(5)


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
