"""Questions to documents with every role: what is found, counted, refused and written down."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import (
    ConfigError,
    DataError,
    EvidenceError,
    StateError,
)
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.entries import Asked, Counted, Entry, Heard, Served, What
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.files import alone
from securefedcollm.federation.questions.inquiry import Found, Inquiry
from securefedcollm.federation.questions.space import (
    Space,
    space_of,
    terms_of,
)
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import Index, Passage, PreparedShelf
from securefedcollm.retrieval.reduction import Vectors
from securefedcollm.simulation.asking import Questions
from securefedcollm.study import Study, digest, dump_study
from securefedcollm.tuning.recipe import Progress, silent
from tests.support.asking import SHELF, TEXTS, Members, desk_of, rostered
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


def test_the_best_passages_of_all_silos_are_found_with_their_place(members, tmp_path):
    with members.questions(tmp_path / "run") as questions:
        for silo, texts in TEXTS.items():
            found = questions.ask(texts[-1]).found
            best = found.hits[0]
            assert (best.silo, best.passage.text) == (silo, texts[-1])
            assert best.passage.id == f"{silo}.txt:{2 * len(texts) - 1}"
            assert best.score == pytest.approx(1.0, abs=1e-6)
            assert len(found.hits) == 2
            assert found.answered == list(TEXTS)
            assert (found.failed, found.suspect) == ({}, {})


def test_logs_tell_who_asked_and_nothing_of_the_question(members, tmp_path):
    run, words = tmp_path / "run", "w12 w13 w14"
    with members.questions(run) as questions:
        answered = questions.ask(words)
    assert answered.spent == dict.fromkeys(TEXTS, 1)
    _, asked, heard = entries(members.study, run / "server", "server")
    assert isinstance(asked, Asked)
    assert isinstance(heard, Heard)
    assert set(asked.questions) == set(heard.answers) == set(TEXTS)
    for name in TEXTS:
        _, counted, served = entries(members.study, run / "silos" / name, name)
        assert isinstance(counted, Counted)
        assert isinstance(served, Served)
        assert (counted.asker, counted.number) == ("server", 1)
        assert counted.index == Index.load(members.indexes[name]).fingerprint.hex()
        assert served.question == asked.questions[name]
    said = words.encode()
    for file in run.rglob("*"):
        assert file.is_dir() or not any(
            form in file.read_bytes() for form in (said, said.hex().encode())
        )


def ask_one(members: Members, index: Index, home: Path) -> Found:
    """What the asker finds at one silo with this index, and that silo's only."""
    ann, silo = SigningKey.generate(), SigningKey.generate()
    desk = desk_of(members, home, silo, ann.public)
    desk = replace(desk, shelf=PreparedShelf(index, desk.shelf.terms))
    conversation = desk.open("ann")
    inquiry = Inquiry(
        study=bytes(32),
        run=bytes(16),
        key=ann,
        silos={"silo-1": silo.public},
        terms=desk.shelf.terms,
        log=EvidenceLog(home / "ann.sqlite", study=bytes(32), owner="ann", key=ann),
        embed=members.space.embed,
    )
    (query,) = members.space.embed(["w1 w2 w3 w4"])
    return inquiry.ask(query, lambda _, frame: conversation.handle(frame))


def view(members: Members, home: Path, words: str) -> list[tuple[str, int]]:
    """What reached one silo or left it for a question: kind and length of each frame, in order."""
    seen: list[tuple[str, int]] = []

    def note(frame: bytes) -> None:
        kind, *_ = msgspec.msgpack.decode(frame)
        seen.append((kind, len(frame)))

    ann, silo = SigningKey.generate(), SigningKey.generate()
    conversation = desk_of(members, home, silo, ann.public).open("ann")

    def carry(_: str, frame: bytes) -> bytes:
        note(frame)
        answer = conversation.handle(frame)
        note(answer)
        return answer

    Inquiry(
        study=bytes(32),
        run=bytes(16),
        key=ann,
        silos={"silo-1": silo.public},
        terms=terms_of(members.study, members.space.digest),
        log=EvidenceLog(home / "ann.sqlite", study=bytes(32), owner="ann", key=ann),
        embed=members.space.embed,
    ).ask(members.space.embed([words])[0], carry)
    return seen


def test_a_silo_sees_the_same_of_a_question_that_it_can_answer_and_one_that_it_cannot(
    members, tmp_path
):
    useful = view(members, tmp_path / "useful", TEXTS["silo-1"][0])
    assert [kind for kind, _ in useful] == ["question", "scores", "selection", "blocks"]
    assert view(members, tmp_path / "useless", "w99 w98 w97") == useful


def test_a_silo_that_scores_its_passages_too_high_is_named_and_gains_nothing(members, tmp_path):
    honest = Index.load(members.indexes["silo-1"])
    found = ask_one(members, honest, tmp_path / "honest")
    assert found.suspect == {}
    assert found.hits[0].passage.text == "w1 w2 w3 w4"
    (query,) = members.space.embed(["w1 w2 w3 w4"])
    wrong = [Passage("advert", "w90 w91 w92"), Passage("noise", "w93")]
    lying = Index.build(wrong, [query, query], block_bytes=96, space=members.space.digest)
    found = ask_one(members, lying, tmp_path / "lying")
    assert "claimed a score of 1.000" in found.suspect["silo-1"]
    assert all(hit.score < 0.9 for hit in found.hits)


def test_a_passage_that_nobody_can_embed_is_shown_with_no_score(members, tmp_path):
    (query,) = members.space.embed(["w1 w2 w3 w4"])
    empty = Index.build(
        [Passage("blank", " ")], [query], block_bytes=96, space=members.space.digest
    )
    found = ask_one(members, empty, tmp_path / "home")
    assert [(hit.passage.id, hit.score) for hit in found.hits] == [("blank", 0.0)]
    assert found.suspect == {"silo-1": "sent a passage that the study's encoder cannot read"}


class Fragile(Space):
    """An encoder that fails on some texts, as one with fewer embeddings than tokens does."""

    def embed(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        if set(texts) & set(TEXTS["silo-2"]):
            raise ConfigError("a token without an embedding")
        made = super().embed(texts, progress)
        return np.full_like(made, np.nan) if set(texts) & set(TEXTS["silo-3"]) else made


def test_passages_that_break_the_encoder_cost_nobody_but_their_silo(members, tmp_path):
    """Adversary: a silo with a passage that the asker's encoder fails on."""
    sound = members.space
    members.space = Fragile(sound.encoder, sound.reduction)
    try:
        with members.questions(tmp_path / "run") as questions:
            found = questions.ask("w1 w2 w3 w4").found
    finally:
        members.space = sound
    assert found.answered == list(TEXTS)
    assert found.failed == {}
    assert set(found.suspect) == {"silo-2", "silo-3"}
    assert all("cannot read" in said for said in found.suspect.values())
    assert (found.hits[0].silo, found.hits[0].passage.text) == ("silo-1", "w1 w2 w3 w4")
    assert all(np.isfinite(hit.score) for hit in found.hits)


@pytest.mark.parametrize("kind", [Counted, Served])
def test_a_silo_that_cannot_write_stops_no_other(members, tmp_path, monkeypatch, kind):
    """Its own failure is its own; what the others answered is written down and found."""
    run = tmp_path / "run"
    with members.questions(run) as questions:
        write = EvidenceLog.append

        def full(log: EvidenceLog, what: What) -> Entry:
            if log.owner == "silo-2" and isinstance(what, kind):
                raise StateError("no space left")
            return write(log, what)

        monkeypatch.setattr(EvidenceLog, "append", full)
        found = questions.ask("w1 w2 w3 w4").found
    assert found.answered == ["silo-1", "silo-3"]
    assert "no space left" in found.failed["silo-2"]
    assert found.hits[0].passage.text == "w1 w2 w3 w4"
    heard = entries(members.study, run / "server", "server")[-1]
    assert isinstance(heard, Heard)
    assert set(heard.answers) == ({"silo-1", "silo-3"} if kind is Counted else set(TEXTS))
    (run / "evidence.zip").write_bytes(make_bundle(run))
    assert verify(run / "evidence.zip").holds


@pytest.mark.parametrize(
    ("retrieval", "what"),
    [
        ({"encoder": {"source": "path:slm", "layer": 1}}, "another encoder or reduction"),
        ({"dimension": 5}, "does not fit the study's terms"),
    ],
)
def test_an_index_of_another_space_is_refused_before_anything_is_written(
    members, tmp_path, retrieval, what
):
    other = small_study(members.data, retrieval=SHELF | retrieval)
    index = members.index("silo-1", space_of(other, members.data))
    try:
        with pytest.raises(ConfigError, match=rf"silo-1\.index: .*{what}"):
            members.questions(tmp_path / "run")
    finally:
        members.index("silo-1")
    assert index.exists()
    assert not (tmp_path / "run").exists()


def test_a_damaged_index_is_refused_with_its_place(members, tmp_path):
    raw = bytearray(members.indexes["silo-1"].read_bytes())
    raw[60] ^= 1
    hostile = tmp_path / "hostile.index"
    hostile.write_bytes(raw)
    with pytest.raises(DataError, match=r"hostile\.index: is damaged"):
        members.questions(tmp_path / "run", **{"silo-1": hostile})


@pytest.mark.parametrize(
    ("asker", "shelves", "what"),
    [
        ("nobody", ["silo-1"], "takes no part"),
        ("silo-1", ["silo-1"], "ask itself"),
        ("server", ["silo-9"], "no silo of the study"),
    ],
)
def test_only_members_ask_and_are_asked(members, tmp_path, asker, shelves, what):
    index = members.indexes["silo-1"]
    with pytest.raises(ConfigError, match=what):
        members.questions(tmp_path / "run", asker, **dict.fromkeys(shelves, index))


def test_a_directory_serves_one_study(members, tmp_path):
    with members.questions(tmp_path / "run"):
        pass
    study = members.study
    members.study = msgspec.structs.replace(study, study="another")
    try:
        with pytest.raises(ConfigError, match="another study"):
            members.questions(tmp_path / "run")
    finally:
        members.study = study


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is of another study"),
        (b"study: [", "study there cannot be read"),
        (b"", "study there cannot be read"),
        (b"\xff\xfe\x00", "study there cannot be read"),
    ],
)
def test_a_foreign_or_broken_study_is_refused_before_anything_is_counted(
    members, tmp_path, content, what
):
    run = tmp_path / "run"
    run.mkdir()
    other = msgspec.structs.replace(members.study, study="another")
    (run / "study.yaml").write_bytes(dump_study(other).encode() if content is None else content)
    with pytest.raises(ConfigError, match=what) as refused:
        members.questions(run)
    assert str(run) in str(refused.value)
    assert {path.name for path in run.iterdir()} == {"study.yaml", ".lock"}


def test_no_study_where_a_directory_has_its_name(members, tmp_path):
    (tmp_path / "run" / "study.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="study there cannot be read"):
        members.questions(tmp_path / "run")


def test_a_study_with_a_roster_is_refused_before_anything_is_spent(members, tmp_path):
    """Its participants' keys are elsewhere; the evidence would fail `membership`."""
    study, _ = rostered(tmp_path / "members", questions=2, asked=0)
    with pytest.raises(ConfigError, match=r"roster: .*keys of their own") as refused:
        Questions(
            study,
            shelves={"silo-1": members.indexes["silo-1"]},
            asker="server",
            directory=tmp_path / "run",
            space=members.space,
        )
    assert "without its roster" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_logs_of_another_run_are_not_gone_on_with(members, tmp_path):
    run = tmp_path / "run"
    with members.questions(run) as questions:
        questions.ask("w1 w2")
    shutil.rmtree(run / "server")
    with pytest.raises(EvidenceError, match=r"evidence\.sqlite: is of another run"):
        members.questions(run)


def test_one_asks_at_a_time_in_a_directory(members, tmp_path):
    """Two that both find an empty log would both begin it."""
    with (
        members.questions(tmp_path / "run"),
        pytest.raises(ConfigError, match="somebody else asks here at this moment"),
    ):
        members.questions(tmp_path / "run", "silo-1")
    with pytest.raises(ConfigError, match="takes no part"):
        members.questions(tmp_path / "run", "nobody")
    with members.questions(tmp_path / "run", "silo-1"):  # the lock is gone
        pass
    held = multiprocessing.get_context("spawn").Process(
        target=hold, args=(tmp_path / "run", tmp_path / "held")
    )
    held.start()
    try:
        for _ in range(600):
            if (tmp_path / "held").exists():
                break
            time.sleep(0.05)
        with pytest.raises(ConfigError, match="somebody else asks here"):
            members.questions(tmp_path / "run")
    finally:
        held.kill()
        held.join()
    with members.questions(tmp_path / "run"):  # also after a kill
        pass


def hold(run: Path, told: Path) -> None:
    """What another process does."""
    with alone(run, "not free", "wait"):
        told.touch()
        time.sleep(600)


def test_a_question_without_words_is_refused_before_it_is_sent(members, tmp_path):
    with (
        members.questions(tmp_path / "run") as questions,
        pytest.raises(ConfigError, match="no question"),
    ):
        questions.ask("  ")
    assert len(entries(members.study, tmp_path / "run" / "server", "server")) == 1
