"""The engine for one machine: its worker processes, their turns and their deaths."""

from __future__ import annotations

import os
import time
from threading import Thread

from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.workload import silent


class Echo:
    def step(self, frame):
        return frame


def echo(name, progress):
    return Echo()


def test_more_silos_than_a_worker_s_pipe_holds_do_not_block_each_other():
    """A worker that cannot get rid of a reply reads no frame: both sides would wait for ever."""
    names = [f"silo-{i}" for i in range(12)]
    frames = {name: name.encode() * 100_000 for name in names}  # far more than a pipe buffers
    found = {}

    def go():
        with EmbeddedEngine(names, echo, workers=2, progress=silent) as engine:
            found.update(engine.exchange(frames, 60.0))

    thread = Thread(target=go, daemon=True)
    thread.start()
    thread.join(90)
    assert found == frames


class Slow:
    """Its answer takes a while; one of them ends its process, one never answers."""

    def __init__(self, name):
        self.name = name

    def step(self, frame):
        if frame == b"die" and self.name == "silo-0":
            os._exit(1)
        time.sleep(600 if frame == b"hang" and self.name == "silo-1" else 0.4)
        return frame


def slow(name, progress):
    return Slow(name)


def in_turns(frame, timeout):
    """Six silos in two processes: the even ones in one, the odd ones in the other."""
    names = [f"silo-{i}" for i in range(6)]
    with EmbeddedEngine(names, slow, workers=2, progress=silent) as engine:
        found = engine.exchange(dict.fromkeys(names, frame), timeout)
        again = engine.exchange(dict.fromkeys(names, b"again"), timeout)
    return [[names.index(n) for n in names if isinstance(f[n], Failure)] for f in (found, again)]


def test_a_worker_that_dies_loses_its_own_silos_and_no_other():
    assert in_turns(b"die", 60.0) == [[0, 2, 4], [0, 2, 4]]


def test_each_silo_of_a_worker_has_the_whole_time_and_none_has_another_worker_s():
    assert in_turns(b"hang", 0.9) == [[1, 3, 5], [1, 3, 5]]
