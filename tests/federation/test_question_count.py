"""A shelf counts questions: before it answers, for all runs and studies, over restarts.

Adversary: an asker that wants more answers than the study allows.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import (
    BudgetExceeded,
    EvidenceError,
    LocalProtocolError,
    RemoteProtocolError,
    StateError,
)
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.entries import Refused
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.quota import SUFFIX, StoredQuota
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import Asker, Header
from securefedcollm.study import Study, digest
from tests.support.asking import SHELF, TEXTS, Members, desk_of
from tests.support.small import small_study

NUMBER = bytes(16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def members(made: Members, tmp_path: Path) -> Members:
    return made.afresh(tmp_path / "shelves")


def entries(study: Study, home: Path, name: str) -> list[object]:
    log = EvidenceLog(home / "evidence.sqlite", study=digest(study), owner=name, key=None)
    log.close()
    return [entry.what for entry in log.entries]


def test_the_limit_holds_over_restarts_and_for_each_asker(members, tmp_path):
    run = tmp_path / "run"
    for number in (1, 2, 3):
        with members.questions(run) as questions:
            assert questions.ask("w1 w2").spent["silo-1"] == number
    with members.questions(run) as questions:
        refused = questions.ask("w1 w2")
    assert refused.found.answered == refused.found.hits == []
    assert set(refused.found.failed) == set(TEXTS)
    assert "all of its 3 questions" in refused.found.failed["silo-1"]
    assert refused.spent["silo-1"] == 3
    last = entries(members.study, run / "silos" / "silo-1", "silo-1")[-1]
    assert last == Refused(error="BudgetExceeded")
    with members.questions(run, "silo-2") as questions:
        other = questions.ask("w1 w2")
    assert other.spent == {"silo-1": 1, "silo-3": 1}
    assert other.found.answered == ["silo-1", "silo-3"]


def test_an_older_count_than_the_silos_own_evidence_is_refused(members, tmp_path):
    run = tmp_path / "run"
    with members.questions(run) as questions:
        questions.ask("w1 w2")
    for file in members.place.glob(f"silo-2.index{SUFFIX}*"):
        file.unlink()
    with pytest.raises(EvidenceError, match="counts 0 questions of server, and the evidence log 1"):
        members.questions(run)


def spend_all(members: Members, run: Path) -> None:
    """All three questions of the server."""
    with members.questions(run) as questions:
        for number in (1, 2, 3):
            assert questions.ask("w1 w2").spent["silo-1"] == number


def assert_spent(members: Members, run: Path, **shelves: Path) -> None:
    with members.questions(run, **shelves) as questions:
        refused = questions.ask("w1 w2")
    assert refused.found.answered == []
    assert set(refused.spent.values()) == {3}
    assert all("all of its 3 questions" in said for said in refused.found.failed.values())


def test_the_count_is_the_shelfs_and_no_other_run_has_fresh_questions(members, tmp_path):
    """Adversary: an asker that begins another run, replaces or copies one, or links to the index,
    until it knows every embedding."""
    run = tmp_path / "run"
    with members.questions(run):
        pass
    shutil.copytree(run, tmp_path / "copied")
    spend_all(members, run)
    assert_spent(members, tmp_path / "copied")
    assert_spent(members, tmp_path / "another")
    shutil.rmtree(run)
    assert_spent(members, run)
    link = tmp_path / "link.index"
    link.symlink_to(members.indexes["silo-1"])
    assert_spent(members, tmp_path / "linked", **{"silo-1": link})
    members.index("silo-1")  # built again
    assert_spent(members, tmp_path / "rebuilt")


def test_another_study_goes_on_counting_up_to_its_own_limit(members, tmp_path):
    spend_all(members, tmp_path / "run")
    members.study = small_study(members.data, study="another", retrieval=SHELF | {"questions": 4})
    with members.questions(tmp_path / "run-2") as questions:
        assert set(questions.ask("w1 w2").spent.values()) == {4}
        assert questions.ask("w1 w2").found.answered == []
    (tmp_path / "evidence.zip").write_bytes(make_bundle(tmp_path / "run-2"))
    assert verify(tmp_path / "evidence.zip").holds  # its first question is number 4


def test_a_run_does_not_go_on_with_an_index_that_counts_anew(members, tmp_path):
    spend_all(members, tmp_path / "run")
    with pytest.raises(EvidenceError, match="counts 0 questions of server, and the evidence log 3"):
        members.afresh(tmp_path / "copies").questions(tmp_path / "run")


class FullDisk:
    """A log that cannot be written."""

    size = 0

    def append(self, what: object) -> None:
        raise StateError("no space left")


def test_a_question_counts_before_its_answer_and_no_answer_leaves_without_evidence(
    members, tmp_path
):
    ann, silo = SigningKey.generate(), SigningKey.generate()
    desk = desk_of(members, tmp_path / "home", silo, ann.public)
    header = Header(bytes(32), bytes(16), ann.public, silo.public, desk.shelf.terms)
    (query,) = members.space.embed(["w1 w2"])
    frame = Asker(header=header, silo="silo-1", key=ann, query=query).ask()
    with pytest.raises(StateError):
        replace(desk, log=FullDisk()).open("ann").handle(frame)
    again = StoredQuota(tmp_path / "home" / "count.sqlite", 3)  # the process is started anew
    assert again.spent("ann") == 1
    with pytest.raises(RemoteProtocolError, match="this very question before"):
        replace(desk, quota=again).open("ann").handle(frame)
    assert again.spent("ann") == 1
    with pytest.raises(LocalProtocolError, match="may not ask"):
        desk.open("silo-1")


def test_two_processes_share_one_count(tmp_path):
    one, two = (StoredQuota(tmp_path / "count.sqlite", 2) for _ in range(2))
    assert one.take("ann", NUMBER) == 1
    assert two.take("ann", NUMBER) is None
    assert two.take("ann", b"another question") == 2
    for quota in (one, two):
        with pytest.raises(BudgetExceeded):
            quota.take("ann", b"a third question")
    assert one.take("bob", NUMBER) == 1
    (tmp_path / "broken").write_bytes(b"no database" * 100)
    with pytest.raises(StateError, match="count of questions"):
        StoredQuota(tmp_path / "broken", 2)
