"""A silo that is gone is waited for, as long as nothing goes on without it."""

from __future__ import annotations

import time

import pytest

from securefedcollm.errors import QuorumError, RemoteProtocolError, TransportError
from securefedcollm.federation import coordinator, roles
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.engines.flare.engine import FlareEngine
from securefedcollm.federation.messages import BeginRound, Deliver, Witness, decode_request
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.ledger import Ledger

from .arithmetic import ArithmeticServer, ArithmeticSilo
from .test_delivery import kept, members_of
from .test_roles import SILOS


class Losing:
    """An engine that does not reach the first silo for requests of one kind, while it is gone."""

    def __init__(self, engine, kind, round_=1):
        self.engine, self.kind, self.round, self.gone = engine, kind, round_, True
        self.asked: list[tuple[frozenset, int]] = []

    def exchange(self, frames, timeout):
        request = decode_request(next(iter(frames.values())))
        late = getattr(request, "round", self.round) == self.round
        if not (self.gone and isinstance(request, self.kind) and late and SILOS[0] in frames):
            return self.engine.exchange(frames, timeout)
        rest = {name: frame for name, frame in frames.items() if name != SILOS[0]}
        found = self.engine.exchange(rest, timeout) if rest else {}
        return found | {SILOS[0]: Failure("is not connected")}

    def rejoined(self, silos, count, most):
        self.asked.append((frozenset(silos), count))
        self.gone = False
        return True


def go(members, wrap, rejoined=None):
    def party(name, progress):
        return roles.silo_session(members[name], ArithmeticSilo(name), progress=silent, threads=1)

    with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
        losing = wrap(engine)
        record = roles.coordinate(
            members["server"],
            losing,
            ArithmeticServer(),
            silent,
            lambda done: None,
            rejoined or losing.rejoined,
        )
    return losing, record


@pytest.mark.parametrize("kind", [BeginRound, Witness])
def test_the_run_goes_on_when_the_silo_is_back(tmp_path, kind):
    """Gone in training, or while silos vouch. All three are needed; each pays once a round."""
    with members_of(tmp_path) as members:
        losing, record = go(members, lambda engine: Losing(engine, kind))
        assert losing.asked == [(frozenset({SILOS[0]}), 1)]
        assert [r["survivors"] for r in record["rounds"]] == [list(SILOS)] * 2
        for name in SILOS:
            assert kept(members[name]) is not None
            with Ledger(members[name].home / roles.LEDGER, name) as ledger:
                entries = [(e.key.round, e.key.attempt, e.state) for e in ledger.entries()]
            assert entries == [(0, 0, "settled"), (1, 0, "settled")]


@pytest.mark.parametrize("back", [True, False])
def test_who_is_gone_at_the_end_is_waited_for_a_little(tmp_path, back):
    """The others are enough. If it is back in time it gets the adapter as well."""
    few = {"count": 3, "colluders": 0, "minimum": 2}
    gone = (BeginRound, Witness, Deliver)
    rejoined = None if back else (lambda silos, count, most: False)
    with members_of(tmp_path, silos=few) as members:
        losing, record = go(members, lambda engine: Losing(engine, gone), rejoined)
        assert [len(r["survivors"]) for r in record["rounds"]] == [3, 2]
        assert losing.asked == ([(frozenset({SILOS[0]}), 1)] if back else [])
        assert roles.newest_adapter(members[SILOS[0]].run) == (2 if back else 0)
        assert roles.newest_adapter(members[SILOS[1]].run) == 2


def test_who_does_not_come_back_ends_the_run(tmp_path):
    with (
        members_of(tmp_path) as members,
        pytest.raises(QuorumError, match="silo-1: is not connected"),
    ):
        go(members, lambda engine: Losing(engine, BeginRound), lambda silos, count, most: False)


def test_who_comes_and_goes_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """Adversary: a silo, against the others' patience: they answer 64 attempts at a sum."""
    monkeypatch.setattr(coordinator, "MAX_REJOINS", 4)
    waits = []
    with (
        members_of(tmp_path) as members,
        pytest.raises(QuorumError, match="silo-1: is not connected"),
    ):
        go(
            members,
            lambda engine: Losing(engine, BeginRound),
            lambda silos, count, most: waits.append(silos) is None,
        )
    assert len(waits) == 4


def test_who_refuses_is_not_waited_for(tmp_path, monkeypatch):
    """It is there, and would refuse again."""

    def refuse(*_):
        raise RemoteProtocolError("not today", peer="server")

    with members_of(tmp_path) as members:
        first = roles.silo_session

        def session(member, *rest, **more):
            made = first(member, *rest, **more)
            if member.name == SILOS[0]:
                made._begin = refuse
            return made

        monkeypatch.setattr(roles, "silo_session", session)
        asked = []
        with pytest.raises(QuorumError, match="silo-1: server: not today"):
            go(members, lambda engine: Losing(engine, ()), lambda *about: asked.append(about))
        assert asked == []


@pytest.fixture
def engine(monkeypatch):
    """A FLARE engine without FLARE: who is connected is what the test says."""
    made = FlareEngine.__new__(FlareEngine)
    made._closed, made._began, made._patience, made._rejoin = False, True, 600.0, 1.5
    made._silos, made._minimum, made._progress = SILOS, 2, silent
    made.said, made.there = [], lambda: {SILOS[1]}
    made._say = made.said.append
    monkeypatch.setattr(FlareEngine, "_require_open", lambda self: None)
    monkeypatch.setattr(FlareEngine, "_connected", lambda self: self.there())
    monkeypatch.setattr("securefedcollm.federation.engines.flare.engine._LATER", 0.1)
    return made


def test_a_job_waits_for_the_minimum_as_long_as_it_was_told_to(engine):
    with pytest.raises(TransportError, match="1 silos are connected, 2 are needed"):
        engine._wait_for(frozenset())
    assert engine.said == ["waiting up to 2 s for silo-1, silo-3 to come back"]
    assert not engine.rejoined({SILOS[0]}, 1)
    engine._rejoin, start = 60.0, time.monotonic()
    engine.there = lambda: set(SILOS) if time.monotonic() > start + 0.5 else {SILOS[1]}
    assert engine._wait_for(frozenset()) == set(SILOS)
    assert engine.rejoined({SILOS[0]}, 1)


def test_who_is_not_needed_is_not_waited_for_long(engine):
    engine.there = lambda: set(SILOS[:2])
    assert engine._wait_for(frozenset(SILOS)) == set(SILOS[:2])
    assert engine.said == []
