"""Records that share one durable write: all of them or none, and nobody else's in between."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading

import pytest

from securefedcollm.errors import RemoteProtocolError, StateError
from securefedcollm.federation.silostore import SiloStore

KILLED = """
import os, signal, sys
from pathlib import Path
from securefedcollm.federation.silostore import SiloStore
store = SiloStore(Path(sys.argv[1]))
store.record(b"before", b"1")
with store.together():
    store.record(b"deal", b"2")
    store.begin_attempt(b"run", 0)
    assert store.recorded(b"deal") == b"2"
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_block_is_on_disk_at_its_end_and_not_before(tmp_path):
    store, reader = SiloStore(tmp_path), SiloStore(tmp_path)
    with store.together():
        assert store.record(b"deal", b"1") == b"1"
        assert store.begin_attempt(b"run", 0)
        assert store.recorded(b"deal") == b"1"
        assert reader.recorded(b"deal") is None
        assert reader.attempts(b"run", 0) is None
    assert reader.recorded(b"deal") == b"1"
    assert reader.attempts(b"run", 0) == 1


def test_a_kill_within_a_block_leaves_none_of_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    store = SiloStore(tmp_path)
    assert store.recorded(b"before") == b"1"
    assert store.recorded(b"deal") is None
    assert store.attempts(b"run", 0) is None


def test_what_was_recorded_stays_though_the_block_ends_in_a_refusal(tmp_path):
    """Adversary: a server whose bad frame makes a silo forget what it has been asked."""
    store = SiloStore(tmp_path)

    def asked():
        with store.together():
            store.record(b"deal", b"1")
            raise RemoteProtocolError("a bad frame", peer="server")

    with pytest.raises(RemoteProtocolError):
        asked()
    assert SiloStore(tmp_path).recorded(b"deal") == b"1"


def test_a_clone_waits_for_the_end_of_a_block_and_is_told_what_it_wrote(tmp_path):
    """Adversary: a server that talks to two processes of one silo at the same moment."""
    store, told = SiloStore(tmp_path), []
    begun = threading.Event()

    def clone():
        other = SiloStore(tmp_path)
        begun.set()
        told.append(other.record(b"deal", b"another"))
        other.close()

    with store.together():
        assert store.record(b"deal", b"the first") == b"the first"
        thread = threading.Thread(target=clone)
        thread.start()
        assert begun.wait(30)
        assert not told
    thread.join(30)
    assert told == [b"the first"]


def test_a_block_whose_record_was_lost_fails_even_if_somebody_dealt_with_that(tmp_path):
    """On a full disk nothing is answered: what an earlier record rests on is gone with it."""
    store = SiloStore(tmp_path)
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")

    def asked():
        with store.together():
            store.record(b"deal", b"1")
            with contextlib.suppress(StateError):
                store.record(b"upload", bytes(1 << 16))

    with pytest.raises(StateError, match="cannot be written"):
        asked()
    assert store.recorded(b"deal") is None
    with store.together():  # and the next one is whole
        store.record(b"deal", b"2")
    assert store.recorded(b"deal") == b"2"
