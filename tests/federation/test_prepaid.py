"""What records pay before they answer: who pays, who cannot, and what nobody is told of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import Holdings
from securefedcollm.federation.questions import prepaid
from securefedcollm.federation.questions.polls import claim_of
from securefedcollm.federation.questions.prepaid import begin_answering, prepay, whole_claim
from securefedcollm.federation.questions.records import known_of
from securefedcollm.primitives import sha256
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.cohort import ledger_of
from securefedcollm.tuning.question import Question
from tests.support.polling import (
    CHOICES,
    COPIES,
    QUESTION,
    RECORDS,
    Voters,
    booth_of,
    record,
    spent,
    votes,
)


@pytest.fixture(scope="module")
def voters(tmp_path_factory: pytest.TempPathFactory) -> Voters:
    return Voters(tmp_path_factory.mktemp("voters"))


def test_a_start_before_any_answer_keeps_no_later_one_from_beginning(voters, tmp_path):
    """And each leaves a head that differs from the last one's."""
    with (
        Ledger(tmp_path / "ledger.sqlite", "silo-1") as own,
        Ledger(tmp_path / "answers.sqlite", "silo-1") as answers,
    ):
        heads = [begin_answering(own, voters.study, answers, "book") for _ in range(3)]
    assert len({*heads}) == 3


def test_other_records_and_a_new_count_of_answers_pay_anew(voters, tmp_path):
    """Adversary: an operator, or an accident: records of the same fingerprint, a lost ledger of
    answers, another noise. Each would have answers that nobody paid for."""
    with voters.polls(tmp_path / "run") as polls:
        known = booth_of(polls).shelf.known
    quiet = {"privacy": {"epsilon": 4.0, "delta": 1e-5}}
    study, fewer = (Voters(voters.data, quiet, epsilon=4.0, questions=n).study for n in (3, 2))
    with Ledger(tmp_path / "ledger.sqlite", "silo-1") as ledger:
        ledger.pin(20.0, 1e-5)
        first = np.arange(len(known)) < COPIES
        some, others = known.only(first), known.only(~first)
        where = (study, some, "ab" * 32, known.key)
        assert prepay(ledger, *where).all()
        assert prepay(ledger, *where).all()
        assert len(ledger.entries()) == 1
        for changed in (
            (study, others, "ab" * 32, known.key),
            (study, some, "ab" * 32, "another ledger of answers"),
            (fewer, some, "ab" * 32, known.key),
        ):
            before = len(ledger.entries())
            assert prepay(ledger, *changed).all()
            assert len(ledger.entries()) == before + 1


def spend_all(voters: Voters, ledgers: Path, of: Question) -> None:
    """Another study has charged this record of silo-1 with all that it has."""
    book = ledger_of(ledgers, "silo-1")
    assert book is not None
    book.parent.mkdir(parents=True)
    with Ledger(book, "silo-1") as ledger:
        holdings = Holdings(voters.study, [of])
        ledger.pin(*claim_of(voters.study))
        event, records = whole_claim(voters.study), ledger.identify(holdings.contents())
        place = (holdings.dataset, "record", "another", 0, 0)
        charge = ledger.reserve(*place, [event], claim_of(voters.study), records=records, study="a")
        ledger.release(charge)


def test_a_record_that_cannot_pay_casts_no_vote_and_the_silo_takes_part(voters, tmp_path):
    """A silo that stayed away would tell that some record of it was in an older study."""
    poor, *others = RECORDS["silo-1"]
    seen = {}
    for world, own in (("with", [poor, *others]), ("without", others)):
        ledgers = tmp_path / f"{world}-ledgers"
        spend_all(voters, ledgers, poor)
        with voters.having(silo_1=own).polls(tmp_path / world, ledgers=ledgers) as polls:
            booth = booth_of(polls)
            assert booth.shelf.paid.sum() == len(others)
            read, said = booth.read, []

            def watch(poll: Any, own=own, read=read, said=said) -> Any:
                def reading(retrieved: Any, similarities: Any) -> Any:
                    said.append([own[at] for at in np.flatnonzero(retrieved)])
                    return read(poll)(retrieved, similarities)

                return reading

            object.__setattr__(booth, "read", watch)
            opinion = polls.ask(QUESTION, CHOICES).opinion
            assert opinion.survivors == tuple(RECORDS)
            seen[world] = said
    assert seen["with"] == seen["without"]
    assert seen["without"] == [others[: 2 * COPIES - 1]]


def test_a_new_record_pays_for_itself_alone(voters, tmp_path):
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        assert booth_of(polls).shelf.paid.all()
    new = record("w9 w9", "w50")
    with voters.having(silo_1=[new, *RECORDS["silo-1"]]).polls(run) as polls:
        assert booth_of(polls).shelf.paid.all()
        assert votes(polls) == [2, 1, 0]
    charges, _ = spent(run)
    assert [count for _, _, count in charges] == [3 * COPIES, 1]


@pytest.mark.parametrize("kill", ["reserve", "release"])
def test_a_kill_while_paying_is_mended(voters, tmp_path, kill):
    with voters.polls(tmp_path / "run") as polls:
        known, dataset = booth_of(polls).shelf.known, "ab" * 32
    with Ledger(tmp_path / "ledger.sqlite", "silo-1") as ledger:
        where, real = (voters.study, known, dataset, known.key), ledger.release
        ledger.pin(*claim_of(voters.study))

        def killed(reservation: Any) -> None:
            if kill == "release":
                real(reservation)
            raise KeyboardInterrupt

        ledger.release = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            prepay(ledger, *where)
        ledger.release = real  # type: ignore[method-assign]
        assert prepay(ledger, *where).all()
        (entry,) = ledger.entries()
        assert entry.state in ("released", "settled")


def test_a_kill_of_a_version_with_other_noise_is_mended(voters, tmp_path):
    """What it had reserved stays charged as it was; the records pay for today's noise besides."""
    with voters.polls(tmp_path / "run") as polls:
        known, dataset = booth_of(polls).shelf.known, "ab" * 32
    quiet = {"privacy": {"epsilon": 4.0, "delta": 1e-5}}
    study, other = (Voters(voters.data, quiet, epsilon=4.0, questions=n).study for n in (3, 2))
    with Ledger(tmp_path / "ledger.sqlite", "silo-1") as ledger:
        ledger.pin(20.0, 1e-5)

        def killed(reservation: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "release", killed)
            patch.setattr(prepaid, "whole_claim", lambda study: whole_claim(other))
            with pytest.raises(KeyboardInterrupt):
                prepay(ledger, study, known, dataset, known.key)
        for _ in range(2):
            assert prepay(ledger, study, known, dataset, known.key).all()
        assert [entry.state for entry in ledger.entries()] == ["settled"] * 2


def test_records_that_share_an_identity_share_an_account(voters, tmp_path):
    """What docs/privacy.md says of them. In one file they pay together. A correction of a record
    that has paid is silent: its words have paid, and its row has not, so it never votes unpaid."""
    words = "w1 w2 w3", ("w50", "w51")
    before, after = (Question(*words, at, row=sha256(b"row %d" % at)) for at in (0, 1))
    old, new = [before], [after]
    paid = {}
    for case, files in {
        "alone": [new],
        "together": [[*old, *new]],
        "later": [old, [*old, *new]],
        "corrected": [old, new],
    }.items():
        place = tmp_path / case
        with (
            Ledger(place / "ledger.sqlite", "s") as ledger,
            Ledger(place / "a.sqlite", "s") as book,
        ):
            for file in files:
                known = known_of(voters.study, file, ledger, book)
                where = known.own, known.dataset, known.by_text.key
                paid[case] = prepay(ledger, voters.study, *where).tolist()
            charged = [e for e in ledger.entries() if len(ledger.stored(e.about.records))]
            assert len(charged) == 1
    assert paid == {
        "alone": [True],
        "together": [True, True],
        "later": [True, False],
        "corrected": [False],
    }


def test_a_silo_of_which_no_record_can_pay_votes_for_nothing_and_begins_again(voters, tmp_path):
    run, poor = tmp_path / "run", RECORDS["silo-1"][:1]
    spend_all(voters, tmp_path / "ledgers", poor[0])
    for _ in range(2):
        with voters.having(silo_1=poor).polls(run, ledgers=tmp_path / "ledgers") as polls:
            assert not booth_of(polls).shelf.paid.any()
            assert polls.ask(QUESTION, CHOICES).opinion.survivors == tuple(RECORDS)


def test_another_studys_prepayment_does_not_stand_in_for_this_one(voters, tmp_path):
    """Adversary: an operator who puts back a ledger from before these answers were paid for, which
    has the prepayment of another study."""
    run, ledgers = tmp_path / "run", tmp_path / "ledgers"
    other = Voters(voters.data, questions=1)
    with other.polls(tmp_path / "other", ledgers=ledgers):
        pass
    older = {file: file.read_bytes() for file in ledgers.rglob("*") if file.is_file()}
    for file in ledgers.rglob("ledger.sqlite"):
        with Ledger(file, file.parent.name) as ledger:
            ledger.pin(80.0, 1e-5, higher=True)
    with voters.polls(run, ledgers=ledgers) as polls:
        votes(polls)
    for file, content in older.items():
        file.write_bytes(content)
        for rest in (f"{file}-wal", f"{file}-shm"):
            Path(rest).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="and that is gone, or an older copy"):
        voters.polls(run, ledgers=ledgers)
