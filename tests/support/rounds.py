"""Runs of the round loops over the embedded engine, with arithmetic in place of training.

A test stands between coordinator and silos by wrapping the engine, which carries every frame:
``Run(directory, study, wrap=lambda engine: Cut(engine, ("silo-2",), 3))``.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.messages import BeginRound, decode_reply, encode
from securefedcollm.federation.plan import authority_of, quantiser
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest
from tests.support.arithmetic import (
    AUTHORITY_KEY,
    NAMES,
    ROSTER,
    SIZE,
    ArithmeticServer,
    make_silo,
    parties,
    server_record,
    update_of,
)

CHARGED_ONCE = [(0, 0, "settled"), (1, 0, "settled"), (2, 0, "settled")]


class Run:
    """One coordinator's life over an engine; made again on the same directory, it resumes."""

    def __init__(
        self,
        directory,
        study,
        *,
        workers=0,
        resume=False,
        wrap=lambda e: e,
        server=None,
        **silo,
    ):
        self.study = study
        self.store = RunStore(directory, digest(study), resume=resume)
        self.server = server or ArithmeticServer()
        factory = partial(make_silo, study=study, directory=directory / "silos", **silo)
        self.engine = EmbeddedEngine(parties(study), factory, workers=workers, progress=silent)
        self.coordinator = Coordinator(
            study=study,
            roster=ROSTER,
            engine=wrap(self.engine),
            workload=self.server,
            store=self.store,
            evidence=server_record(directory),
            authority=authority_of(study, AUTHORITY_KEY.public),
        )

    def go(self):
        try:
            self.coordinator.run()
            self.coordinator.end()
        finally:
            self.engine.close()
        return self.server.theta


def expected_theta(study, survivors=NAMES):
    """What plain arithmetic says, with the quantiser's own rounding.

    ``survivors``: the same in all rounds, or a list of those of every round; none if it was lost.
    """
    quantise = quantiser(study, SIZE)
    theta = np.zeros(SIZE, dtype=np.float32)
    rounds = survivors if isinstance(survivors, list) else [survivors] * study.rounds
    for round_, names in enumerate(rounds):
        if names:
            total = sum(quantise.encode(update_of(n, round_, theta)).integers for n in names)
            theta = theta + quantise.decode(total, len(names))
        theta = theta * np.float32(0.5)
    return theta


def spent(directory, study):
    return {name: spent_by(directory / "silos", name) for name in NAMES}


def spent_by(silos, name):
    with Ledger(silos / name / "ledger.sqlite", name) as ledger:
        return [(e.key.round, e.key.attempt, e.state) for e in ledger.entries()]


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


def begin(round_=0, attempt=0, model=0.0, run=b"r" * 16) -> bytes:
    adapter = np.full(SIZE, model, dtype="<f4").tobytes()
    return encode(BeginRound(run, round_, attempt, b"l" * 32, adapter))


def reply_to(silo, frame):
    return decode_reply(silo.step(frame), "silo-1")
