"""Questions to records with every role: who votes, who pays, and what never shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.poll_cohort import shown
from securefedcollm_audits.verification.verify import verify

from securefedcollm.aggregation import SUITE
from securefedcollm.aggregation.messages import UNSIGNED
from securefedcollm.errors import (
    ConfigError,
    DataError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.questions.polls import make_poll, poll_header, sum_header, votes_of
from securefedcollm.federation.questions.records import ModelReader, index_records, load_reader
from securefedcollm.federation.questions.voting import READY, count_labels
from securefedcollm.simulation.polling import Polls
from securefedcollm.study import digest
from securefedcollm.tuning.content import folded
from tests.support.polling import (
    CHOICES,
    COPIES,
    QUESTION,
    RECORDS,
    Voters,
    asked,
    booth_of,
    charged,
    record,
    votes,
)


@pytest.fixture(scope="module")
def voters(tmp_path_factory: pytest.TempPathFactory) -> Voters:
    return Voters(tmp_path_factory.mktemp("voters"))


def test_records_vote_and_only_the_retrieved_pay(voters, tmp_path):
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        assert votes(polls) == [2, 1, 0]
        # Two of three records of silo-1 are alike; of silo-3 one is, and has no vote.
        assert [charged(run, name) for name in RECORDS] == [[2], [1], [1], [0]]
        assert votes(polls, "w30 w31 w32") == [0, 1, 0]
        assert [charged(run, name) for name in RECORDS] == [[2, 0], [1, 1], [1, 0], [0, 0]]
    bundle = tmp_path / "evidence.zip"
    bundle.write_bytes(make_bundle(run))
    verdict = verify(bundle)
    assert verdict.holds, [row for row in verdict.results if row.status == "fail"]
    said = {row.name: row.evidence for row in verdict.results}
    assert said["votes"] == "8 votes of 4 silos, each charged and noised"
    assert said["tallies"] == "2 questions, 8 votes the same at both ends"
    assert "questions" not in said  # nobody asks documents


def test_votes_are_masked_between_all_silos_where_rounds_are_on_a_graph(tmp_path):
    on_graph = {"silos": {"count": 4, "minimum": 4}, "aggregation": {"graph": {"neighbours": 3}}}
    voters = Voters(tmp_path / "graph", on_graph)
    with voters.polls(tmp_path / "run") as polls:
        assert votes(polls) == [2, 1, 0]
        study, roster = polls._canvass.study, polls._canvass.roster
        header = sum_header(study, roster, bytes(32), votes_of(study, len(CHOICES)))
    assert header.suite == SUITE
    assert study.graph is not None
    bundle = tmp_path / "evidence.zip"
    bundle.write_bytes(make_bundle(tmp_path / "run"))
    verdict = verify(bundle)
    assert verdict.holds, [row for row in verdict.results if row.status == "fail"]


def seen(polls: Polls, question: str) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    """The votes, and what leaves silo-1 meanwhile: lengths of its frames, and its new entries."""
    log = booth_of(polls).evidence
    before, open_now, lengths = log.size, {}, []

    def carry(silo: str, frame: bytes) -> bytes:
        conversation = open_now.setdefault(silo, booth_of(polls, silo).open("server"))
        answer: bytes = conversation.handle(frame)
        if silo == "silo-1":
            lengths.append(len(answer))
        return answer

    tally = polls._canvass.ask(question, CHOICES, carry).tally
    entries = shown(log.entries[before:])
    return [round(vote / COPIES) for vote in tally.votes], lengths, entries


def test_nothing_shows_whether_a_silo_had_anything(voters, tmp_path, caplog):
    """Its frames have the same lengths, and its log the same entries, in four cases."""
    once = Voters(voters.data, questions=1)
    found = {}
    for case in ("retrieved", "nothing", "spent", "failing"):
        with once.polls(tmp_path / case) as polls:
            if case == "spent":
                votes(polls)
            if case == "failing":
                object.__setattr__(booth_of(polls), "read", _fail)
            question = "w90 w91 w92" if case == "nothing" else QUESTION
            with caplog.at_level(logging.ERROR):
                found[case] = seen(polls, question)
    _, lengths, entries = found["retrieved"]
    assert [what["kind"] for what in entries] == ["voting", "voted"]
    assert all(one[1:] == (lengths, entries) for one in found.values())
    assert [one[0] for one in found.values()] == [[2, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert "votes for nothing" in caplog.text
    assert "w1 w2 w3" not in caplog.text  # a record's words


def _fail(poll: Any) -> Any:
    def reading(*_: Any) -> Any:
        raise ValueError("w1 w2 w3")  # a record's words

    return reading


def test_a_poll_is_answered_once(voters, tmp_path):
    """Two sums of the same votes, with other noise each, would be two releases for one charge."""
    with voters.polls(tmp_path / "run") as polls:
        frame = asked(polls)
        first = booth_of(polls).open("server")
        assert first.handle(frame) == READY
        with pytest.raises(RemoteProtocolError, match="the same question twice"):
            booth_of(polls).open("server").handle(frame)
        first.close()
    with voters.polls(tmp_path / "run") as polls, pytest.raises(RemoteProtocolError, match="twice"):
        booth_of(polls).open("server").handle(frame)  # nor in another process


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda p: {"before": poll_header(bytes(32), p._canvass.run, p._canvass.key.public)},
            "in another study",
        ),
        (
            lambda p: {"before": poll_header(digest(p._study), bytes(16), p._canvass.key.public)},
            "in another study",
        ),
        (lambda p: {"choices": ("w50",)}, "not a well-formed poll"),
    ],
)
def test_what_is_no_poll_of_this_run_is_refused(voters, tmp_path, change, why):
    with voters.polls(tmp_path / "run") as polls:
        conversation = booth_of(polls).open("server")
        with pytest.raises(RemoteProtocolError, match=why):
            conversation.handle(asked(polls, **change(polls)))
        with pytest.raises(RemoteProtocolError, match="over"):
            conversation.handle(asked(polls))
        assert charged(tmp_path / "run", "silo-1") == []


def test_only_members_ask_and_sign(voters, tmp_path):
    with voters.polls(tmp_path / "run") as polls:
        booth = booth_of(polls)
        with pytest.raises(LocalProtocolError, match="may not ask here"):
            booth.open("mallory")
        canvass = polls._canvass
        poll = make_poll(canvass.study, canvass.run, canvass.key, QUESTION, CHOICES)
        unsigned = msgspec.structs.replace(poll, signature=UNSIGNED)
        with pytest.raises(RemoteProtocolError, match="did not sign"):
            booth.open("server").handle(unsigned.encode())
        with pytest.raises(RemoteProtocolError, match="in another study, run or name"):
            booth.open("silo-2").handle(poll.encode())


def test_a_question_that_breaks_the_encoder_is_refused_without_its_words(voters, tmp_path, caplog):
    with voters.polls(tmp_path / "run") as polls:
        booth, frame = booth_of(polls), asked(polls)

        def broken(text: str) -> Any:
            raise IndexError(text)

        with pytest.raises(RemoteProtocolError, match="cannot be embedded"):
            replace(booth, embed=broken).open("server").handle(frame)
        assert charged(tmp_path / "run", "silo-1") == []
        assert QUESTION not in caplog.text


def test_silos_that_are_asked_different_things_open_nothing(voters, tmp_path):
    """Else the sum would show what one of them said."""
    with voters.polls(tmp_path / "run") as polls:
        begun: dict[str, Any] = {}
        other = asked(polls)

        def carry(silo: str, frame: bytes) -> bytes:
            if silo not in begun:
                begun[silo] = booth_of(polls, silo).open("server")
                return begun[silo].handle(other if silo == "silo-1" else frame)
            return begun[silo].handle(frame)

        opinion = polls._canvass.ask(QUESTION, CHOICES, carry)
        assert opinion.survivors == (
            "silo-2",
            "silo-3",
            "silo-4",
        )  # the three that were asked the same
        assert "silo-1" in opinion.failed
        begun.clear()

        def differently(silo: str, frame: bytes) -> bytes:
            if silo not in begun:
                begun[silo] = booth_of(polls, silo).open("server")
                return begun[silo].handle(asked(polls))
            return begun[silo].handle(frame)

        with pytest.raises(ProtocolError):
            polls._canvass.ask(QUESTION, CHOICES, differently)


def test_a_sum_that_breaks_off_before_the_votes_leave_costs_nothing(voters, tmp_path):
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        frames = []

        def until(step: int) -> Callable[[str, bytes], bytes]:
            open_now: dict[str, Any] = {}
            frames.append(open_now)

            def carry(silo: str, frame: bytes) -> bytes:
                made = open_now.setdefault(silo, [booth_of(polls, silo).open("server"), 0])
                made[1] += 1
                if made[1] > step:
                    made[0].close()
                    raise ProtocolError("gone", hint="none")
                return made[0].handle(frame)

            return carry

        for step, expected in ((2, []), (4, [2])):  # poll, keys, shares, upload
            with pytest.raises(ProtocolError):
                polls._canvass.ask(QUESTION, CHOICES, until(step))
            assert charged(run, "silo-1") == expected


def test_one_poll_is_answered_once_whatever_becomes_of_the_file(voters, tmp_path):
    """Its header is that of one sum. A second sum would have other noise."""
    with voters.polls(tmp_path / "run") as polls:
        booth, frame = booth_of(polls), asked(polls)
        assert booth.open("server").handle(frame)
        changed = replace(booth, shelf=replace(booth.shelf, dataset="cd" * 32))
        with pytest.raises(RemoteProtocolError, match="the same question twice"):
            changed.open("server").handle(frame)


def test_a_silo_asks_as_one_of_the_colluders(voters, tmp_path):
    alone = Voters(voters.data, {"silos": {"count": 4, "colluders": 0}})
    with pytest.raises(ConfigError, match="allows for no colluder"):
        alone.polls(tmp_path / "run", "silo-1")
    with voters.polls(tmp_path / "run2", "silo-1") as polls:
        assert votes(polls) == [2, 1, 0]


@pytest.mark.parametrize(
    ("question", "choices", "where"),
    [
        ("", CHOICES, ""),
        (QUESTION, ("w50",), "choices"),
        (QUESTION, ("w50", "w50"), "choices"),
        (QUESTION, ("w50", " "), "choices"),
        (QUESTION, tuple(f"w{i}" for i in range(65)), "choices"),
    ],
)
def test_what_is_no_question_is_not_sent(voters, tmp_path, question, choices, where):
    with voters.polls(tmp_path / "run") as polls:
        with pytest.raises((ConfigError, DataError)) as refused:
            polls.ask(question, choices)
        assert where in str(refused.value)
        assert charged(tmp_path / "run", "silo-1") == []


def test_a_record_without_words_casts_no_vote_and_its_silo_takes_part(voters, tmp_path, caplog):
    """A silo that stayed away would tell that it has one."""
    with_one = voters.having(silo_1=[record(" ", "w50"), *RECORDS["silo-1"]])
    with caplog.at_level(logging.WARNING), with_one.polls(tmp_path / "run") as polls:
        assert booth_of(polls).shelf.paid.tolist() == [False] + [True] * 3 * COPIES
        assert votes(polls) == [2, 1, 0]
        assert polls.left_out == {"silo-1": 1}
    assert "silo-1: 1 of 16 records have no words" in caplog.text
    with pytest.raises(DataError, match="no record has words"):
        index_records(voters.space, [record(" ", "w2")])
    with pytest.raises(DataError, match="no records"):
        index_records(voters.space, [])


def test_choices_are_compared_as_the_ledger_compares_words():
    read = count_labels(["w50", "", "w\u00e9"], folded)

    class Asked:
        choices = (" w50 ", "we\u0301")

    all_of_them = np.ones(3, np.bool_)
    assert read(Asked())(all_of_them, np.zeros(3, np.int64)).tolist() == [1.0, 1.0]


def test_the_small_model_reads_and_answers_once(voters, tmp_path):
    """A distribution of the silo's own, whose noise is that of its diameter; nothing retrieved: the
    model answers all the same, and nothing of it is sent."""
    reading = Voters(voters.data, reader="model", fetched=1)
    with reading.polls(tmp_path / "run") as polls:
        assert polls.ask(QUESTION, CHOICES).opinion.survivors == tuple(RECORDS)
        assert charged(tmp_path / "run", "silo-1") == [2]
    model = load_reader(reading.study, reading.data, tmp_path / "none")
    assert model is not None
    asked, answers = [], type(model).answers

    class Counting:
        def encode(self, questions: Any) -> Any:
            asked.append(questions[0].prompt)
            return model.encode(questions)

        def answers(self, encoded: Any) -> Any:
            return answers(model, encoded)

    read = ModelReader(Counting(), RECORDS["silo-1"], 1)  # type: ignore[arg-type]

    class Asked:
        question, choices = QUESTION, CHOICES

    two = np.isin(np.arange(15), [0, 12])
    some = read(Asked())(two, np.arange(15))  # type: ignore[arg-type]
    none = read(Asked())(two & False, np.arange(15))  # type: ignore[arg-type]
    assert abs(float(some.sum()) - 1.0) < 1e-9
    assert none.tolist() == [0.0, 0.0, 0.0]
    assert asked == [f"w20 w21 w52\n{QUESTION}", QUESTION]


def test_a_record_moves_only_answers_that_it_pays_for(voters, tmp_path):
    """With and without one record, through the ledger: what others answer is the same, always."""
    once = Voters(voters.data, questions=1)
    added = record("w1 w2 w9", "w52", "w80")
    worlds = {"without": RECORDS["silo-1"], "with": [added, *RECORDS["silo-1"]]}
    asked = (QUESTION, "w1 w2 w9", "w1 w9 w2", QUESTION, "w20 w21", "w1 w2 w3")
    answered: dict[str, list[set[str]]] = {}
    for world, own in worlds.items():
        with once.having(silo_1=own).polls(tmp_path / world) as polls:
            booth, said = booth_of(polls), []

            def watch(poll: Any, own=own, said=said) -> Any:
                def reading(retrieved: Any, similarities: Any) -> Any:
                    said[-1] |= {
                        "|".join((own[at].prompt, *own[at].choices))
                        for at in np.flatnonzero(retrieved)
                    }
                    return np.zeros(len(poll.choices))

                return reading

            object.__setattr__(booth, "read", watch)
            for question in asked:
                said.append(set())
                votes(polls, question)
            answered[world] = said
    name = "|".join((added.prompt, *added.choices))
    assert [one - {name} for one in answered["with"]] == answered["without"]
    assert any(name in one for one in answered["with"])
    assert any(answered["without"])
