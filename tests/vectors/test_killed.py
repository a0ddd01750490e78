"""Runs that earlier code began, killed while a sum was being opened, end with the code of today.

See :mod:`.killed` for how they were made. What keeps one run from having two sums of one round is
in the journals alone, so the names in them must not change between two versions.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle, pack, read_members
from securefedcollm.evidence.ledger import check_anchors
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.messages import BeginRound, decode_request
from securefedcollm.federation.plan import round_of
from securefedcollm.privacy.events import sum_kind
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import load_study
from tests.support.rounds import expected_theta
from tests.support.runs import NAMES, RecordedRun, silo_log

from .generate import HERE
from .killed import STUDIES, SUM

PER_ATTEMPT = {
    "masking": ("keys", "deal", "upload", "agree"),
    "joint": ("keys", "deal", "upload", "agree"),
    "ckks": ("keys", "deal", "seal", "upload", "agree"),
    "authority": ("seal", "upload"),
    "rounded": ("keys", "deal", "upload", "agree"),
}
"""What a silo writes down in every attempt before it says it. One sum had two attempts."""
PER_SUM = dict.fromkeys(STUDIES, ("vector", "open")) | {"authority": ("vector", "noted")}
"""What it writes down once a sum, whatever the attempt."""
KEPT = {"joint": "discrete-gaussian", "rounded": "rounded-gaussian"}
"""As what noised sums are charged, to the end: as they began."""


@pytest.fixture(params=STUDIES)
def kind(request):
    return request.param


@pytest.fixture
def killed(kind, tmp_path):
    with tarfile.open(HERE / f"killed-{kind}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


class Without:
    """An engine that does not reach one silo in the sum that was cut off."""

    def __init__(self, engine, name):
        self.engine, self.name, self.sum = engine, name, -1

    def exchange(self, frames, timeout):
        said = [decode_request(frame) for frame in frames.values()]
        self.sum = next((r.round for r in said if isinstance(r, BeginRound)), self.sum)
        gone = {self.name} & set(frames) if self.sum == SUM else set()
        here = {name: frame for name, frame in frames.items() if name not in gone}
        return self.engine.exchange(here, timeout) | dict.fromkeys(gone, Failure("away"))


def journal(home: Path) -> Counter[str]:
    """The kinds of what a silo wrote down before it said it, and how often."""
    with sqlite3.connect(home / "silo.sqlite") as db:
        keys = [bytes(key) for (key,) in db.execute("SELECT key FROM journal")]
    db.close()
    return Counter(key.partition(b":")[0].decode() for key in keys)


def resumed(directory: Path, **wrap) -> RecordedRun:
    state = json.loads((directory / "server" / "state.json").read_text())
    assert state["opening"]
    assert state["opened"] == []
    return RecordedRun(directory, load_study(directory / "study.yaml"), resume=True, **wrap)


def check_evidence(directory: Path) -> None:
    (directory / "evidence.zip").write_bytes(make_bundle(directory))
    assert verify(directory / "evidence.zip").failed == []
    for name in NAMES:
        with Ledger(directory / "silos" / name / "ledger.sqlite", name) as ledger:
            check_anchors(silo_log(directory, load_study(directory / "study.yaml"), name), ledger)


def test_a_run_of_earlier_code_is_resumed_to_its_end(kind, killed):
    run = resumed(killed)
    study = run.study
    theta = run.go()
    history = run.store.state.history
    assert [record["survivors"] for record in history] == [[*NAMES]] * study.rounds
    assert not any("lost" in record for record in history)
    if kind in {"masking", "ckks"}:  # the sums of the others have noise
        np.testing.assert_array_equal(theta, expected_theta(study))
    for name in NAMES:
        # What had been trained and charged before the kill was neither again.
        trained = run.engine._local[name].training.workload.trained
        assert trained == [round_of(study, sum_) for sum_ in range(SUM + 1, study.sums)]
        with Ledger(killed / "silos" / name / "ledger.sqlite", name) as ledger:
            spent = [(entry.key.round, entry.state) for entry in ledger.entries()]
            assert {sum_kind(entry.reserved) for entry in ledger.entries()} == {KEPT.get(kind)}
        # In joint DP-SGD the noise is shared out: an update that left in two attempts keeps its
        # charge, as nobody can tell here how many silos' shares are in either sum.
        kept = {SUM: "released"} if kind in KEPT else {}
        assert spent == [(sum_, kept.get(sum_, "settled")) for sum_ in range(study.sums)]
        # The second attempt found what the first one had written, by the same names.
        found = journal(killed / "silos" / name)
        assert {found[key] for key in PER_ATTEMPT[kind]} == {study.sums + 1}
        assert {found[key] for key in PER_SUM[kind]} == {study.sums}
    if kind == "authority":
        found = journal(killed / "authority")
        assert (found["keys"], found["partial"], found["open"]) == (
            *(study.sums + 1, study.sums + 1),
            study.sums,
        )
    check_evidence(killed)


def test_what_earlier_code_opened_is_opened_with_no_other_survivors(killed):
    """Adversary: a server that says it crashed, to have a second sum opened without one silo. The
    difference of the two would be that silo's own update."""
    run = resumed(killed, wrap=lambda engine: Without(engine, NAMES[-1]))
    run.go()
    lost = [record.get("lost", "") for record in run.store.state.history]
    assert "asks a second time for what was answered in this round" in "".join(lost)
    assert sum(map(bool, lost)) == 1
    check_evidence(killed)


def test_a_bundle_of_earlier_code_verifies_and_an_altered_one_does_not(tmp_path):
    bundle = HERE / "bundle-masking.zip"
    verdict = verify(bundle)
    assert verdict.holds
    silent = {result.name for result in verdict.results if result.status != "pass"}
    assert silent == {
        *("expected", "study-signed", "ciphertexts", "authority", "released-sum", "audits")
    }
    members = read_members(bundle)
    members["logs/silo-2.jsonl"] = members["logs/silo-2.jsonl"].replace(b'"round":1', b'"round":2')
    (tmp_path / "altered.zip").write_bytes(pack(members))
    assert not verify(tmp_path / "altered.zip").holds
