"""What ledgers hold of records that vote: what is paid, when, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from securefedcollm.errors import BudgetExceeded, ConfigError, EvidenceError
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger
from tests.support.polling import COPIES, QUESTION, Voters, booth_of, charged, spent, votes


@pytest.fixture(scope="module")
def voters(tmp_path_factory: pytest.TempPathFactory) -> Voters:
    return Voters(tmp_path_factory.mktemp("voters"))


def test_a_record_that_has_spent_its_budget_is_no_longer_retrieved(voters, tmp_path):
    once = Voters(voters.data, questions=1)
    with once.polls(tmp_path / "run") as polls:
        # Settled with the shares of four silos instead of three, and still too little for another.
        assert [votes(polls) for _ in range(2)] == [[2, 1, 0], [0, 0, 0]]
        assert votes(polls, "w30 w31 w32") == [0, 1, 0]  # another record has its own budget
    assert charged(tmp_path / "run", "silo-1") == [2, 0, 0]


def test_a_record_that_another_process_charged_just_now_is_not_retrieved(voters, tmp_path):
    """A refusal would tell that some record is spent, and so would the others' silence."""
    with voters.polls(tmp_path / "run") as polls:
        booth, tries = booth_of(polls), []
        ledger, known = booth.ledger, booth.shelf.known
        reserve = ledger.reserve

        def raced(*key: Any, **about: Any) -> Any:
            tries.append(len(about["records"]))
            if len(tries) == 1:
                first = known.only(np.arange(len(known)) < COPIES)
                other = ("ab" * 32, "record", "other", 0, 0, [Gaussian(0.2, 1)], (40.0, 1e-5))
                reserve(*other, records=first, study="aa")
            return reserve(*key, **about)

        object.__setattr__(ledger, "reserve", raced)
        assert votes(polls) == [1, 1, 0]
        assert tries == [2 * COPIES, COPIES]


def test_no_refusal_follows_from_a_record(voters, tmp_path):
    with voters.polls(tmp_path / "run") as polls:
        ledger, tries = booth_of(polls).ledger, []
        reserve = ledger.reserve

        def refusing(*key: Any, **about: Any) -> Any:
            tries.append(len(about["records"]))
            if len(about["records"]):
                raise BudgetExceeded("of a record", hint="none")
            return reserve(*key, **about)

        object.__setattr__(ledger, "reserve", refusing)
        assert votes(polls) == [1, 0, 0]
        assert tries == [2 * COPIES, 0]


def test_an_owner_who_pinned_less_is_asked_for_no_more(voters, tmp_path):
    with voters.polls(tmp_path / "run"):
        pass
    with Ledger(tmp_path / "run" / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        ledger.pin(1.0, 1e-5)
    with pytest.raises(BudgetExceeded, match="more than the owner of these records pinned"):
        voters.polls(tmp_path / "run")


def test_what_was_asked_shows_nowhere_but_in_noised_sums(voters, tmp_path):
    """Adversary: an asker who chooses which records pay, and then reads whether a study may tune on
    the file, which records it leaves out, or what ε the silo states. All of them read one ledger.

    Control: the ledger of the answers themselves, which nothing else reads, tells the questions
    apart.
    """
    seen = {}
    for what, question in (("retrieves", QUESTION), ("nothing", "w9 w9")):
        with voters.polls(tmp_path / what) as polls:
            votes(polls, question)
        seen[what] = spent(tmp_path / what)
    assert seen["retrieves"] == seen["nothing"]
    ((charge,), (worst,)) = seen["nothing"]
    assert charge[1:] == ("settled", 3 * COPIES)
    assert 0.9 * 40.0 < worst <= 40.0
    assert charged(tmp_path / "retrieves", "silo-1") != charged(tmp_path / "nothing", "silo-1")


def test_all_answers_are_paid_for_once(voters, tmp_path):
    for _ in range(2):
        with voters.polls(tmp_path / "run") as polls:
            votes(polls)
    ((charge,), _) = spent(tmp_path / "run")
    assert charge[0][0].count == voters.study.retrieval.questions


def test_a_ledger_without_what_was_paid_for_answers_is_refused(voters, tmp_path):
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        votes(polls)
    for file in (run / "silos" / "silo-1").glob("ledger.sqlite*"):
        file.unlink()
    with pytest.raises(ConfigError, match="and that is gone, or an older copy"):
        voters.polls(run)


def test_more_survivors_do_not_buy_more_answers(voters, tmp_path):
    """Four silos voted where three are enough. The silo's ledger was charged for three."""
    with voters.polls(tmp_path / "run") as polls:
        votes(polls)
        entry, *_ = [e for e in booth_of(polls).ledger.entries() if e.counted]
        assert entry.counted == entry.reserved
        assert entry.state == "settled"


def test_an_older_ledger_answers_nothing(voters, tmp_path):
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        votes(polls)
    home = run / "silos" / "silo-1"
    for file in home.glob("ledger.*"):
        file.unlink()
    with pytest.raises((ConfigError, EvidenceError)), voters.polls(run):
        pass


def test_tuning_and_answers_share_a_records_budget(voters, tmp_path):
    """What a record pays elsewhere is gone here too."""
    run = tmp_path / "run"
    with voters.polls(run) as polls:
        booth = booth_of(polls)
        shelf = booth.shelf
        booth.ledger.reserve(
            *(shelf.dataset, "record", "training", 0, 0, [Gaussian(0.2, 1)], (40.0, 1e-5)),
            records=shelf.known,
            study="aa",
        )
        assert votes(polls) == [1, 0, 0]
        assert votes(polls, "w30 w31 w32") == [0, 1, 0]
