"""A silo that is gone is waited for, as long as nothing goes on without it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import QuorumError, TransportError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation import roles, summing
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.engines.flare import presence
from securefedcollm.federation.engines.flare.presence import Presence, Waits
from securefedcollm.federation.hooks import Hooks, nobody_arrives
from securefedcollm.federation.messages import (
    BeginRound,
    Deliver,
    EndRun,
    Refused,
    Witness,
    decode_request,
    encode,
)
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.ledger import Ledger
from tests.support.arithmetic import ArithmeticServer, ArithmeticSilo
from tests.support.members import SILOS, kept, members_of


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


class Unwilling:
    """A silo that refuses requests of one kind; none, as long as ``refused`` is."""

    def __init__(self, session, refused=()):
        self.session, self.refused = session, refused

    @property
    def over(self):
        return self.session.over

    def step(self, frame):
        if isinstance(decode_request(frame), self.refused):
            return encode(Refused("RemoteProtocolError", "server: not today", ""))
        return self.session.step(frame)


def go(
    members,
    wrap,
    rejoined=None,
    sessions=None,
    arrived=nobody_arrives,
    refused=(),
    **more,
):
    """``refused``: the first silo refuses requests of this kind."""

    def party(name, progress):
        made = roles.silo_session(members[name], ArithmeticSilo(name), progress=silent, threads=1)
        made = Unwilling(made, refused if name == SILOS[0] else ())
        return made if sessions is None else sessions.setdefault(name, made)

    with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
        losing = wrap(engine)
        record = roles.coordinate(
            members["server"],
            losing,
            ArithmeticServer(),
            Hooks(rejoined=rejoined or losing.rejoined, arrived=arrived),
            **more,
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


FEW = {"count": 3, "colluders": 0, "minimum": 2}
GONE = (BeginRound, Witness, Deliver, EndRun)


@pytest.mark.parametrize("when", ["while it lingers", "after another start"])
def test_who_is_away_for_long_gets_the_adapter_from_a_server_that_lingers(tmp_path, when):
    """The others have been told by then, and are asked nothing more."""
    with members_of(tmp_path, silos=FEW) as members:
        wait, asked, sessions = lambda silos, count, most: False, [], {}

        def start(**more):
            return go(members, lambda engine: Losing(engine, GONE), wait, sessions, **more)

        if when == "after another start":
            start()
            assert roles.not_told(members["server"]) == [SILOS[0]]
            assert roles.newest_adapter(members[SILOS[0]].run) == 0  # the control
            sessions.pop(SILOS[0])
        losing = None

        def wrap(engine):
            nonlocal losing
            losing = Losing(engine, GONE)
            return losing

        def arrived(silos, most):
            asked.append((set(silos), most, [sessions[name].over for name in SILOS[1:]]))
            losing.gone, losing.exchange = False, only(losing.exchange, {SILOS[0]})
            return {SILOS[0]}

        _, record = go(members, wrap, wait, sessions, linger=60.0, arrived=arrived)
        ((silos, most, left),) = asked
        assert silos == {SILOS[0]}
        assert 59 < most <= 60
        assert left == [True, True]
        assert sessions[SILOS[0]].over
        assert roles.not_told(members["server"]) == []
        for name in SILOS:
            assert roles.newest_adapter(members[name].run) == 2
            np.testing.assert_array_equal(kept(members[name]), kept(members[SILOS[1]]))
        for name in ("server", SILOS[0]):
            bundle = tmp_path / f"{name}.zip"
            bundle.write_bytes(make_bundle(members[name].run))
            assert verify(bundle).failed == []
        assert go(members, wrap, wait, sessions, linger=60.0, arrived=arrived)[1] == record
        assert len(asked) == 1  # nobody is waited for any more


def only(exchange, silos):
    def asked(frames, timeout):
        assert set(frames) <= silos
        return exchange(frames, timeout)

    return asked


def test_who_comes_and_goes_or_does_not_come_holds_up_a_lingering_server_no_longer(
    tmp_path, monkeypatch
):
    """Adversary: a silo that connects and is gone again, for ever."""
    waits = []

    def arrived(silos, most):
        waits.append(most)
        time.sleep(0.02)
        return silos

    with members_of(tmp_path, silos=FEW) as members:
        wait, start = lambda silos, count, most: False, time.monotonic()
        about = {"rejoined": wait, "linger": 0.5}
        go(members, lambda engine: Losing(engine, GONE), **about, arrived=arrived)
        assert time.monotonic() - start < 30
        assert len(waits) > 1
        assert waits == sorted(waits, reverse=True)
        assert roles.not_told(members["server"]) == [SILOS[0]]
        nobody = []
        more = {"linger": 600.0, "arrived": lambda silos, most: nobody.append(most) or set()}
        go(members, lambda engine: Losing(engine, GONE), wait, **more)
        assert len(nobody) == 1
        assert roles.newest_adapter(members[SILOS[0]].run) == 0


def test_who_refuses_at_the_end_is_not_waited_for(tmp_path):
    """Adversary: a silo. It is there, and would refuse again."""
    sessions, waits = {}, []

    def arrived(silos, most):
        waits.append(set(silos))
        sessions[SILOS[0]].refused = EndRun
        losing[0].gone = False
        return silos

    losing = []
    with members_of(tmp_path, silos=FEW) as members:
        go(
            members,
            lambda engine: losing.append(Losing(engine, GONE)) or losing[0],
            lambda silos, count, most: False,
            sessions,
            linger=60.0,
            arrived=arrived,
        )
        assert waits == [{SILOS[0]}]
        assert roles.not_told(members["server"]) == [SILOS[0]]


def test_who_does_not_come_back_ends_the_run(tmp_path):
    with (
        members_of(tmp_path) as members,
        pytest.raises(QuorumError, match="silo-1: is not connected"),
    ):
        go(members, lambda engine: Losing(engine, BeginRound), lambda silos, count, most: False)


def test_who_comes_and_goes_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """Adversary: a silo, against the others' patience: they answer 64 attempts at a sum."""
    monkeypatch.setattr(summing, "MAX_REJOINS", 4)
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


def test_who_refuses_is_not_waited_for(tmp_path):
    """It is there, and would refuse again."""
    asked = []
    with (
        members_of(tmp_path) as members,
        pytest.raises(QuorumError, match="silo-1: server: not today"),
    ):
        go(
            members,
            lambda engine: Losing(engine, ()),
            lambda *about: asked.append(about),
            refused=BeginRound,
        )
    assert asked == []


class Door(Presence):
    """Who is connected is what the test says: ``there``."""

    def __init__(self):
        self.there, self.said, self.ended = (lambda: {SILOS[1]}), [], []
        super().__init__(
            SILOS,
            Waits(minimum=2, patience=600.0, rejoin=1.5),
            connected=lambda: self.there(),
            end_job=lambda: self.ended.append(True),
            progress=silent,
            say=self.said.append,
            began=True,
        )


@pytest.fixture
def door(monkeypatch):
    monkeypatch.setattr(presence, "LATER", 0.1)
    return Door()


def test_a_job_waits_for_the_minimum_as_long_as_it_was_told_to(door):
    with pytest.raises(TransportError, match="1 silos are connected, 2 are needed"):
        door.wait_for(frozenset())
    assert door.said == ["waiting up to 2 s for silo-1, silo-3 to come back"]
    assert not door.rejoined({SILOS[0]}, 1)
    door.waits, start = replace(door.waits, rejoin=60.0), time.monotonic()
    door.there = lambda: set(SILOS) if time.monotonic() > start + 0.5 else {SILOS[1]}
    assert door.wait_for(frozenset()) == set(SILOS)
    assert door.rejoined({SILOS[0]}, 1)


def test_who_is_not_needed_is_not_waited_for_long(door):
    door.there = lambda: set(SILOS[:2])
    assert door.wait_for(frozenset(SILOS)) == set(SILOS[:2])
    assert door.said == []


def test_a_lingering_server_is_there_for_the_late_alone(door):
    """Whoever was told may leave: one silo is enough for a job then, and no other is in it."""
    assert door.arrived({SILOS[0]}, 0.5) == set()
    assert door.said == ["waiting up to 0 s for silo-1 to come back and fetch the last adapter"]
    door.there = lambda: set(SILOS)
    assert door.arrived({SILOS[0]}, 600.0) == {SILOS[0]}
    assert "10 minutes" in door.said[-1]
    assert door.wait_for({SILOS[0]}) == {SILOS[0]}
    assert len(door.ended) == 2
