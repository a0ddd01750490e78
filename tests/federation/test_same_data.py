"""A run goes on with the records that it began with, or is refused."""

from __future__ import annotations

import contextlib
import re
import sqlite3

import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation import roles
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.hooks import Hooks
from securefedcollm.federation.messages import BeginRound, decode_request
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import sha256
from securefedcollm.privacy.ledger import Ledger
from tests.support.arithmetic import ArithmeticServer, ArithmeticSilo
from tests.support.members import SILOS, members_of


class Killed(Exception):
    pass


class UntilRound2:
    """An engine that is killed when silos have trained for round 2, before anything is summed."""

    def __init__(self, engine):
        self.engine = engine

    def exchange(self, frames, timeout):
        request = decode_request(next(iter(frames.values())))
        replies = self.engine.exchange(frames, timeout)
        if isinstance(request, BeginRound) and request.round == 1:
            raise Killed
        return replies


def with_one_word_changed(name):
    silo = ArithmeticSilo(name)
    silo.dataset = sha256(f"{name}, one word changed".encode()).hex()
    return silo


def begin(members, private=True):
    told = []

    def party(name, progress):
        return session(members[name], ArithmeticSilo(name, private))

    with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
        engine = UntilRound2(engine)
        with pytest.raises(Killed):
            roles.coordinate(
                members["server"], engine, ArithmeticServer(), Hooks(on_round=told.append)
            )
    assert len(told) == 1


def session(member, workload):
    return roles.silo_session(member, workload, progress=silent, threads=1)


def charges(member):
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        return ledger.entries()


def fingerprints(error):
    return re.search(r"fingerprint ([0-9a-f]{32}), it began with ([0-9a-f]{32})", str(error))


@pytest.mark.parametrize("private", [True, False])
def test_other_records_are_refused_with_both_fingerprints(tmp_path, private):
    changes = {} if private else {"privacy": None}
    with members_of(tmp_path, **changes) as members:
        begin(members, private)
        member = members["silo-1"]
        before = charges(member)
        assert len(before) == (2 if private else 0)
        with pytest.raises(ConfigError, match="silo-1: these are not the records") as caught:
            session(member, with_one_word_changed("silo-1"))
        mine, began = fingerprints(caught.value).groups()
        assert mine != began
        for dataset in (ArithmeticSilo("silo-1").dataset, with_one_word_changed("x").dataset):
            assert dataset[:16] not in str(caught.value)  # who reads a screen can try no guesses
        assert charges(member) == before


def test_a_run_that_an_older_version_began_is_known_by_its_charges(tmp_path):
    with members_of(tmp_path) as members:
        begin(members)
        member = members["silo-1"]
        place = member.run / "silos" / "silo-1" / "silo.sqlite"
        with contextlib.closing(sqlite3.connect(place)) as db, db:
            gone = db.execute("DELETE FROM journal WHERE substr(key, 1, 5) = CAST('data:' AS BLOB)")
            assert gone.rowcount == 1
        with pytest.raises(ConfigError, match="these are not the records") as caught:
            session(member, with_one_word_changed("silo-1"))
        assert fingerprints(caught.value)
        session(member, ArithmeticSilo("silo-1"))


def test_the_same_records_go_on_and_pay_once(tmp_path):
    with members_of(tmp_path) as members:
        begin(members)

        def party(name, progress):
            return session(members[name], ArithmeticSilo(name))

        with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
            roles.coordinate(members["server"], engine, ArithmeticServer())
        for name in SILOS:
            entries = [(e.key.round, e.key.attempt, e.state) for e in charges(members[name])]
            assert entries == [(0, 0, "settled"), (1, 0, "settled")]
            bundle = tmp_path / f"{name}.zip"
            bundle.write_bytes(make_bundle(members[name].run))
            assert verify(bundle).failed == []


def test_records_may_change_until_the_run_begins(tmp_path):
    with members_of(tmp_path) as members:
        session(members["silo-1"], ArithmeticSilo("silo-1"))
        session(members["silo-1"], with_one_word_changed("silo-1"))


def test_a_session_that_was_opened_before_the_other_began_takes_no_part(tmp_path):
    """Two processes, one home: the second to begin is the one that is refused."""
    with members_of(tmp_path) as members:
        late = session(members["silo-1"], with_one_word_changed("silo-1"))
        begin(members)
        with pytest.raises(ConfigError, match="these are not the records"):
            late._enter(_next(members), b"m" * 32)


def _next(members):
    store = RunStore(members["server"].run, members["server"].study.digest, resume=True)
    return BeginRound(store.run_id, 1, 1, b"l" * 32, memoryview(b""))
