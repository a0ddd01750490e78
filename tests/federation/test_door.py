"""The door of a silo: a socket through which jobs of the carrier call."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from securefedcollm.errors import TransportError
from securefedcollm.federation.engines import door as door_module
from securefedcollm.federation.engines.door import Door, Wire, knock
from securefedcollm.federation.engines.link import Unknown, answer_calls, result_of
from securefedcollm.federation.engines.requests import Parcel
from tests.support.parcels import SESSION, Port, inboxes, signed


@pytest.fixture
def silo(tmp_path):
    with inboxes(tmp_path / "followed") as start:
        yield start


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
