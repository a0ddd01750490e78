"""The pace of a silo: what the time of a call tells while records are worked on."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial

import pytest

from securefedcollm.errors import TransportError
from securefedcollm.federation.engines import link as link_module
from securefedcollm.federation.engines.link import SiloInbox, Unknown
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.engines.requests import HEADER_BYTES, Followed, Parcel, check_header
from tests.support.parcels import SERVER, SESSION, STUDY, bring, signed, soon


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(link_module, "CHUNK", 10)


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
