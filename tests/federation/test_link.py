"""Parcels: frames in pieces over a carrier that loses, repeats and restarts."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from functools import partial

import pytest

from securefedcollm.errors import CryptoError, StateError, TransportError
from securefedcollm.federation.engines import link as link_module
from securefedcollm.federation.engines import requests as requests_module
from securefedcollm.federation.engines.link import Pulled, SiloInbox, Unknown, deliver
from securefedcollm.federation.engines.requests import (
    HEADER_BYTES,
    Followed,
    Parcel,
    check_header,
    new_session,
    sign_request,
)
from securefedcollm.primitives import SigningKey
from tests.support.parcels import SERVER, SESSION, STUDY, Port, bring, inboxes, signed, soon


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(link_module, "CHUNK", 10)


@pytest.fixture
def silo(tmp_path):
    with inboxes(tmp_path / "followed") as start:
        yield start


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
