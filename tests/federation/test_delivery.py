"""The adapter reaches the silo, and only the one that the silo's own evidence vouches for."""

from __future__ import annotations

import contextlib
import json
from functools import partial

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.entries import Entry, Finished, Refused, decode_entry, encode_entry
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.merkle import Frontier, inclusion_proofs, verify_inclusion
from securefedcollm.evidence.note import parse_checkpoint, sign_checkpoint
from securefedcollm.federation import roles
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.messages import (
    BeginRound,
    Deliver,
    Delivered,
    EndRun,
    Shown,
    Witness,
    adapter_bytes,
    decode_reply,
    decode_request,
    encode,
)
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import sha256
from securefedcollm.study import digest
from tests.support.arithmetic import SIZE, ArithmeticServer, ArithmeticSilo
from tests.support.members import (
    SILOS,
    kept,
    members_of,
)

OTHER = adapter_bytes(np.full(SIZE, 0.5, dtype=np.float32))


class Hostile:
    """An engine that alters what is sent to the first silo, and hears all answers."""

    def __init__(self, engine, change):
        self.engine, self.change = engine, change
        self.answers: dict[str, list] = {name: [] for name in SILOS}

    def exchange(self, frames, timeout):
        victim, request = SILOS[0], None
        if victim in frames:
            request = self.change(decode_request(frames[victim]))
            frames = {**frames, victim: encode(request)}
        replies = self.engine.exchange(frames, timeout)
        for name, reply in replies.items():
            asked = decode_request(frames[name])
            if isinstance(asked, Deliver) and not isinstance(reply, Failure):
                self.answers[name].append(decode_reply(reply, name))
        return replies


def go(members, wrap, server=None):
    def party(name, progress):
        if name == "auditor":
            return roles.authority_session(members["authority"])
        return roles.silo_session(members[name], ArithmeticSilo(name), progress=progress, threads=1)

    names = [*SILOS, *(["auditor"] if "authority" in members else [])]
    with EmbeddedEngine(names, party, workers=0, progress=silent) as engine:
        hostile = Hostile(engine, wrap)
        server = server or ArithmeticServer()
        with contextlib.suppress(SecureFedCoLLMError):
            roles.coordinate(members["server"], hostile, server)
    return hostile, server


@pytest.mark.parametrize(
    ("scheme", "joint"),  # joint steps under threshold keys are slow, and no other code
    [
        *(("masking", False), ("masking", True)),
        *(("authority", False), ("authority", True), ("ckks", False)),
    ],
)
def test_every_silo_has_the_adapter_that_each_round_ended_with(tmp_path, scheme, joint):
    changes = {}
    if scheme != "masking":
        key_model = "authority" if scheme == "authority" else "threshold"
        changes["aggregation"] = {"scheme": "ckks", "key_model": key_model, "clip_norm": 20.0}
    if joint:
        privacy = {"epsilon": 8.0, "delta": 1e-5, "noise": "distributed"}
        local = {"steps": 2, "batch_size": 3, "sampling_rate": 0.1, "learning_rate": 0.1}
        changes |= {"privacy": privacy, "local": local}
    seen, sent = [], []
    with members_of(tmp_path, **changes) as members:

        def look(request):
            if isinstance(request, Deliver):
                seen.append(bytes(request.adapter))
            if not isinstance(request, Witness | EndRun):
                sent.append(len(encode(request)))
            return request

        hostile, server = go(members, look)
        assert len(seen) == 2  # one a round
        assert sha256(seen[0]) != sha256(seen[1])
        state = json.loads((members["server"].run / "server" / "state.json").read_text())
        assert sum(record["bytes_down"][SILOS[0]] for record in state["history"]) == sum(sent)
        for name in SILOS:
            assert all(isinstance(answer, Delivered) for answer in hostile.answers[name])
            np.testing.assert_array_equal(kept(members[name]), server.theta)
            assert roles.newest_adapter(members[name].run) == 2
            bundle = tmp_path / f"{name}.zip"
            bundle.write_bytes(make_bundle(members[name].run))
            assert verify(bundle).failed == []


def test_the_proof_beside_the_adapter_can_be_checked_by_others(tmp_path):
    with members_of(tmp_path) as members:
        _, server = go(members, lambda request: request)
        member = members[SILOS[0]]
        proof = json.loads((member.run / roles.ADAPTER / roles.PROOF).read_bytes())
        head = parse_checkpoint(proof["checkpoint"])
        head.verify(member.server)
        assert len(head.lines) == 1 + len(SILOS)
        entry = proof["entry"].encode()
        path = [bytes.fromhex(node) for node in proof["inclusion"]]
        verify_inclusion(entry, proof["index"], head.size, path, head.root)
        what = decode_entry(entry, "proof").what
        assert isinstance(what, Finished)
        assert what.adapter == sha256(adapter_bytes(server.theta)).hex()


def _log(members):
    server = members["server"]
    return EvidenceLog(
        server.run / "server" / "evidence.sqlite",
        study=digest(server.study),
        owner=SERVER,
        key=server.key,
    )


def another_adapter(request, members):
    return msgspec.structs.replace(request, adapter=OTHER)


def a_made_up_entry(request, members):
    """The log as it is, and an entry that is not in it."""
    entry = decode_entry(request.finished.entry, "test")
    what = msgspec.structs.replace(entry.what, adapter=sha256(OTHER).hex())
    raw = encode_entry(Entry(entry.seq, entry.time, entry.owner, what))
    shown = msgspec.structs.replace(request.finished, entry=raw)
    return msgspec.structs.replace(request, adapter=OTHER, finished=shown)


def another_log(request, members):
    """One that the server keeps for this silo alone, honestly signed by it."""
    made_up = a_made_up_entry(request, members)
    log = _log(members)
    leaves = [*log.leaves[:-1], made_up.finished.entry]
    tree = Frontier()
    for leaf in leaves:
        tree.append(leaf)
    head = sign_checkpoint(log.origin, members["server"].key, tree.size, tree.root)
    (path,) = inclusion_proofs(leaves, [len(leaves) - 1])
    shown = Shown(len(leaves) - 1, leaves[-1], path)
    return msgspec.structs.replace(made_up, checkpoint=head.note, finished=shown)


def too_few_cosignatures(request, members):
    """An honest head that the server let one silo only vouch for."""
    head = parse_checkpoint(request.checkpoint)
    return msgspec.structs.replace(
        request, checkpoint=msgspec.structs.replace(head, lines=head.lines[:2]).note
    )


def the_same_cosignature_twice(request, members):
    head = parse_checkpoint(request.checkpoint)
    lines = (*head.lines[:2], *[head.lines[1]] * 2)
    return msgspec.structs.replace(
        request, checkpoint=msgspec.structs.replace(head, lines=lines).note
    )


def another_run(request, members):
    return msgspec.structs.replace(request, run_id=b"r" * 16)


def another_layout(request, members):
    return msgspec.structs.replace(request, layout=b"x" * 32)


def the_start_of_a_round(request, members):
    """An entry of the log that names the adapter too, but ends no round."""
    log = _log(members)
    at = max(e.seq for e in log.entries if type(e.what).__name__ == "Summed")
    (path,) = inclusion_proofs(log.leaves, [at])
    return msgspec.structs.replace(request, finished=Shown(at, log.leaves[at], path))


@pytest.mark.parametrize(
    "attack",
    [
        another_adapter,
        a_made_up_entry,
        another_log,
        too_few_cosignatures,
        the_same_cosignature_twice,
        another_run,
        another_layout,
        the_start_of_a_round,
    ],
)
def test_a_silo_keeps_no_adapter_that_its_evidence_does_not_vouch_for(tmp_path, attack):
    """Adversary: the server. The other silos, who are served honestly, are the control."""
    with members_of(tmp_path) as members:

        def change(request):
            return attack(request, members) if isinstance(request, Deliver) else request

        hostile, server = go(members, change)
        victim = members[SILOS[0]]
        assert kept(victim) is None
        assert roles.newest_adapter(victim.run) == 0
        assert {type(answer).__name__ for answer in hostile.answers[SILOS[0]]} == {"Refused"}
        log = EvidenceLog(
            victim.run / "silos" / SILOS[0] / "evidence.sqlite",
            study=digest(victim.study),
            owner=SILOS[0],
            key=None,
        )
        assert any(isinstance(entry.what, Refused) for entry in log.entries)
        for name in SILOS[1:]:
            np.testing.assert_array_equal(kept(members[name]), server.theta)


def test_an_old_rounds_adapter_is_not_taken_for_the_newest(tmp_path):
    """Adversary: a server that proves what was true a round ago, by its true log."""
    first = []
    with members_of(tmp_path) as members:

        def change(request):
            if isinstance(request, Deliver):
                first.append(request)
                if len(first) >= 2:
                    log, at = _log(members), first[0].finished.index
                    (path,) = inclusion_proofs(log.leaves, [at])
                    old = msgspec.structs.replace(first[0].finished, inclusion=path)
                    return msgspec.structs.replace(request, adapter=first[0].adapter, finished=old)
            return request

        hostile, server = go(members, change)
        victim = members[SILOS[0]]
        assert [type(a).__name__ for a in hostile.answers[SILOS[0]]] == [
            "Delivered",
            "Refused",
            "Refused",
        ]
        assert "past round" in hostile.answers[SILOS[0]][1].message
        assert roles.newest_adapter(victim.run) == 1
        assert not np.array_equal(kept(victim), server.theta)
        assert roles.newest_adapter(members[SILOS[1]].run) == 2


def test_a_silo_that_did_not_vouch_is_asked_again_before_it_is_sent_home(tmp_path):
    """Its first answers were lost; at the end it vouches, and has the adapter."""
    lost = []

    class Lossy(Hostile):
        def exchange(self, frames, timeout):
            request = decode_request(next(iter(frames.values())))
            if isinstance(request, Witness) and SILOS[0] in frames and len(lost) < 2:
                lost.append(request)
                rest = {name: frame for name, frame in frames.items() if name != SILOS[0]}
                return super().exchange(rest, timeout) | {SILOS[0]: Failure("away")}
            return super().exchange(frames, timeout)

    with members_of(tmp_path, silos={"count": 3, "colluders": 0, "minimum": 2}) as members:
        party = partial(_silo, members)
        with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
            lossy, server = Lossy(engine, lambda request: request), ArithmeticServer()
            roles.coordinate(members["server"], lossy, server)
        assert len(lost) == 2
        assert len(lossy.answers[SILOS[0]]) == 1
        assert len(lossy.answers[SILOS[1]]) == 2
        for name in SILOS:
            np.testing.assert_array_equal(kept(members[name]), server.theta)


def _silo(members, name, progress):
    return roles.silo_session(members[name], ArithmeticSilo(name), progress=progress, threads=1)


def test_a_round_begins_with_what_the_last_one_ended_with(tmp_path):
    """Adversary: a server that has silos keep one adapter, and train on another."""
    begun = []
    with members_of(tmp_path) as members:

        def change(request):
            if isinstance(request, BeginRound) and request.round == 1:
                begun.append(request)
                return msgspec.structs.replace(request, adapter=OTHER)
            return request

        go(members, change)
        victim = members[SILOS[0]]
        assert begun
        assert roles.newest_adapter(victim.run) == 1
        log = EvidenceLog(
            victim.run / "silos" / SILOS[0] / "evidence.sqlite",
            study=digest(victim.study),
            owner=SILOS[0],
            key=None,
        )
        trained = [e.what.round for e in log.entries if type(e.what).__name__ == "Round"]
        assert trained == [0]  # the control: it began the first


def test_what_a_silo_makes_of_the_adapter_does_not_reach_the_server(tmp_path, monkeypatch):
    """The answer is one constant, whatever was kept; a full disk gives the constant refusal."""
    from securefedcollm.errors import StateError

    def full(*_):
        raise StateError("/secret/place: no space left")

    monkeypatch.setattr(ArithmeticSilo, "save", full)
    with members_of(tmp_path) as members:
        hostile, _ = go(members, lambda request: request)
        assert (members["server"].run / "results.json").exists()
    (answer,) = {encode(a) for found in hostile.answers.values() for a in found}
    assert b"secret" not in answer
    assert b"its own log says why" in answer
