"""The roles of a real run, without a network between them."""

from __future__ import annotations

import contextlib
import json

import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError, CryptoError, DataError, QuorumError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation import roles, tracking
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.messages import Witness, Witnessed, decode_request, encode
from securefedcollm.federation.status import runs_of
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study
from securefedcollm.study.identity import create_identity
from securefedcollm.study.signing import require_signed, signatures_path
from tests.support.arithmetic import ArithmeticServer, ArithmeticSilo
from tests.support.members import SILOS, enter, enter_all, make_identities, study, write_signed
from tests.support.tracker import Memory


@pytest.fixture
def homes(tmp_path):
    return make_identities(tmp_path, SILOS)


@pytest.mark.parametrize("missing", ["silo-2", "hub"])
def test_a_study_that_somebody_has_not_signed_is_not_run(homes, tmp_path, missing):
    path = write_signed(study(), homes, tmp_path / "study.yaml", unsigned=[missing])
    with (
        pytest.raises(ConfigError, match=f"not signed yet by {missing}"),
        enter(path, homes["silo-1"], "silo"),
    ):
        pass


def test_a_study_that_was_changed_after_it_was_signed_is_not_run(homes, tmp_path):
    """Adversary: a server that hands out another study under the signatures of the agreed one."""
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    path.write_text(path.read_text().replace("epsilon: 8.0", "epsilon: 80.0"))
    with (
        pytest.raises(ConfigError, match="another version of the study"),
        enter(path, homes["silo-1"], "silo"),
    ):
        pass


def test_what_was_checked_is_what_is_kept(homes, tmp_path):
    """Adversary: whoever may exchange the files between their check and their copy."""
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    agreed = load_study(path)
    path.write_text(path.read_text().replace("epsilon: 8.0", "epsilon: 80.0"))
    with roles.take_part(agreed, path, homes["silo-1"], "silo", str) as member:
        kept = load_study(member.run / "study.yaml")
        assert kept.digest == agreed.digest
        require_signed(kept, signatures_path(member.run / "study.yaml"))


def test_a_signature_of_another_key_is_not_taken(homes, tmp_path):
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    envelope = json.loads(signatures_path(path).read_text())
    first, second = envelope["signatures"][:2]
    first["sig"], second["sig"] = second["sig"], first["sig"]
    signatures_path(path).write_text(json.dumps(envelope))
    with pytest.raises(CryptoError, match="does not verify"), enter(path, homes["silo-1"], "silo"):
        pass


@pytest.mark.parametrize("who", ["silo-1", "stranger"])
def test_only_who_is_on_the_roster_in_that_role_takes_part(homes, tmp_path, who):
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    home = tmp_path / who
    if who == "stranger":
        create_identity(who, home / "identity.json", None)
    with (
        pytest.raises(ConfigError, match=f"{who} is not on this study's roster as server"),
        enter(path, home, "server"),
    ):
        pass


def test_one_home_runs_a_study_once_at_a_time(homes, tmp_path):
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    with enter(path, homes["silo-1"], "silo"):
        with (
            pytest.raises(ConfigError, match="another process is running this study"),
            enter(path, homes["silo-1"], "silo"),
        ):
            pass
        with enter(path, homes["silo-2"], "silo"):
            pass
    with enter(path, homes["silo-1"], "silo"):
        pass  # the lock has gone with its holder


def test_an_encrypted_identity_needs_its_passphrase(homes, tmp_path):
    (homes["silo-1"] / "identity.json").unlink()
    create_identity("silo-1", homes["silo-1"] / "identity.json", "correct horse")
    path = write_signed(study(), homes, tmp_path / "study.yaml", passphrase="correct horse")
    with (
        pytest.raises(CryptoError, match="does not open"),
        enter(path, homes["silo-1"], "silo", lambda: "wrong horse"),
    ):
        pass
    with enter(path, homes["silo-1"], "silo", lambda: "correct horse") as member:
        assert member.name == "silo-1"


@pytest.mark.parametrize("scheme", ["masking", "authority"])
def test_a_run_leaves_at_every_home_what_status_and_auditors_need(tmp_path, scheme, monkeypatch):
    tool = Memory()
    monkeypatch.setattr(tracking, "TensorBoard", lambda directory: tool.open())
    changes = {}
    if scheme == "authority":
        changes = {"aggregation": {"scheme": "ckks", "key_model": "authority", "clip_norm": 20.0}}
    homes = make_identities(tmp_path, SILOS, authority=scheme == "authority")
    path = write_signed(study(**changes), homes, tmp_path / "study.yaml")
    told: dict[str, list[str]] = {name: [] for name in SILOS}
    parties = {}
    with contextlib.ExitStack() as stack:
        members = enter_all(stack, path, homes)

        def party(name, progress):
            if name == "auditor":
                session = roles.authority_session(members["authority"])
            else:
                session = roles.silo_session(
                    members[name],
                    ArithmeticSilo(name),
                    progress=progress,
                    threads=1,
                    on_entry=lambda entry: told[name].append(type(entry.what).__name__),
                )
            assert not session.over
            parties[name] = session
            return session

        names = [*SILOS, *(["auditor"] if scheme == "authority" else [])]
        server = members["server"]
        with EmbeddedEngine(names, party, workers=0, progress=silent) as engine:
            record = roles.coordinate(server, engine, ArithmeticServer(), track="tensorboard")
            again = roles.coordinate(server, engine, ArithmeticServer())
    for done, numbers in zip(record["rounds"], tool.rounds.values(), strict=True):
        assert numbers["accuracy/slm all"] == done["evaluation"]["slm/all"]
    assert record["finished"]
    assert len(record["rounds"]) == 2
    lines = (server.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["rounds"]
    (row,) = record["table"]
    assert row["model"] == "slm"
    assert row["accuracy"] == {"all": record["rounds"][-1]["evaluation"]["slm/all"]}
    assert record["groups"] == ["all"]
    assert again == record  # a server that is started once more has nothing left to do
    assert all(session.over for session in parties.values())
    assert told["silo-2"][:4] == ["Opened", "Round", "Reserved", "Released"]

    for name, home in homes.items():
        (status,) = runs_of(home)
        assert status.role == (name if name not in SILOS else "silo")
        assert (status.rounds_done, status.rounds) == (2, 2)
        assert status.problem is None
        if name == "server":
            assert status.name == "hub"
            assert set(status.bytes_up) >= set(SILOS)
            assert min(status.bytes_up.values()) > 0
        elif name == "authority":
            assert status.name == "auditor"
        else:
            assert status.survivors == list(SILOS)
            assert 0 < status.epsilon_spent <= 8
            assert "spent on these data" in "\n".join(status.sentences())
        (run,) = (home / "studies").iterdir()
        bundle = tmp_path / f"{name}.zip"
        bundle.write_bytes(make_bundle(run))
        verdict = verify(bundle)
        assert verdict.holds, [(c.title, c.faults) for c in verdict.failed]


class Unvouched:
    """An engine with another reply of two silos whenever they are asked to vouch, the first few
    times."""

    def __init__(self, engine, reply, times):
        self.engine, self.reply, self.left = engine, reply, times

    def exchange(self, frames, timeout):
        if not isinstance(decode_request(next(iter(frames.values()))), Witness) or not self.left:
            return self.engine.exchange(frames, timeout)
        self.left -= 1
        there = {name: frame for name, frame in frames.items() if name not in SILOS[:2]}
        others = {name: self.reply for name in frames if name not in there}
        return self.engine.exchange(there, timeout) | others


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Failure("away"), "silo-1: away"),
        (encode(Witnessed(size=5, cosignature=b"forged")), "what they signed is not its head"),
    ],
)
def test_silos_are_not_sent_home_before_a_quorum_vouches_for_the_evidence(tmp_path, reply, reason):
    """The models are there; the server says what is missing and may be started again."""
    homes = make_identities(tmp_path, SILOS)
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    sessions = {}
    with contextlib.ExitStack() as stack:
        members = enter_all(stack, path, homes)

        def party(name, progress):
            sessions[name] = roles.silo_session(
                members[name], ArithmeticSilo(name), progress=progress, threads=1
            )
            return sessions[name]

        server = members["server"]
        with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
            lossy = Unvouched(engine, reply, times=3)  # after each of two rounds, and at the end
            with pytest.raises(QuorumError, match=f"fewer than 3 silos vouch .*{reason}"):
                roles.coordinate(server, lossy, ArithmeticServer())
            assert not any(session.over for session in sessions.values())
            assert (server.run / "results.json").exists()
            record = roles.coordinate(server, lossy, ArithmeticServer())
    assert record["finished"]
    assert all(session.over for session in sessions.values())
    bundle = tmp_path / "server.zip"
    bundle.write_bytes(make_bundle(server.run))
    assert verify(bundle).failed == []


def test_status_names_what_it_cannot_read(homes, tmp_path):
    assert runs_of(homes["server"]) == []
    path = write_signed(study(), homes, tmp_path / "study.yaml")
    with enter(path, homes["server"], "server") as member:
        (member.run / "server").mkdir()
        (member.run / "server" / "state.json").write_text("{")
    (status,) = runs_of(homes["server"])
    assert status.rounds_done == 0
    assert status.problem
    (member.run / "study.yaml").write_text("rounds: [")
    (status,) = runs_of(homes["server"])
    assert "study.yaml" in status.problem


def test_server_questions_of_a_study_on_files_must_be_given(tmp_path):
    data = {"train": "a.jsonl", "test": "b.jsonl", "public": 10, "per_silo": 10}
    path = tmp_path / "public.jsonl"
    path.write_text('{"instruction": "do"}\n')
    for keys in (data, {}):  # of real participants nothing is dealt out
        with pytest.raises(ConfigError, match="public questions"):
            roles.server_questions(study(task={"data": keys}), None, None)
    task = {"data": {}, "kind": "instruction"}
    alone = study(task=task, distillation={"over": "answer", "batch_unlabelled": 4})
    with pytest.raises(DataError, match=r"public.jsonl: a public instruction without its response"):
        roles.server_questions(alone, path, None)
    public, _ = roles.server_questions(study(task=task, distillation={"over": "all"}), path, None)
    assert [question.prompt for question in public] == ["do"]
    alone = study(task={"data": data}, models={"slm": {"source": "builtin:slm"}})
    assert roles.server_questions(alone, None, None) == ([], [])
