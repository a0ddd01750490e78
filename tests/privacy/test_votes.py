"""The noised sum of votes: its sensitivity, its noise, and what a hundred questions cost."""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.verification.second_accountant import bracket

from securefedcollm.errors import BudgetExceeded, ConfigError
from securefedcollm.privacy import accounts, admission
from securefedcollm.privacy import ledger as module
from securefedcollm.privacy.accounting import TIGHT_SHARE, claim, prv_bounds
from securefedcollm.privacy.accounts import Overlaps
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.identities import Records, read_records
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.report import read_report
from securefedcollm.privacy.votes import (
    MOST_CHOICES,
    Tally,
    Votes,
    VoteSetting,
    calibrate_votes,
    mistaken,
)

COUNTED = VoteSetting(field_bound=2**20, shares=3, colluders=1, votes=4, whole=False)
WHOLE = COUNTED._replace(votes=1, whole=True)
DELTA = 1e-5


def test_one_record_moves_counted_votes_by_one_vote_at_most():
    made = Votes(COUNTED, 3.0, 3)
    assert made.sensitivity == made.levels
    for counts in itertools.product(range(7), repeat=3):  # also beyond the most that count
        before = made.exact(np.array(counts, dtype=np.float64))
        for at in range(3):
            more = np.array(counts, dtype=np.float64)
            more[at] += 1.0
            moved = made.exact(more) - before
            assert int((moved * moved).sum()) <= made.sensitivity**2


def test_one_record_moves_a_whole_answer_by_the_diameter_at_most():
    made = Votes(WHOLE, 3.0, 4)
    drawn = np.random.default_rng(0).dirichlet(np.full(4, 0.05), size=400)
    points = [made.exact(one) for one in (*np.eye(4), np.zeros(4), *drawn)]
    furthest = max(int(((a - b) ** 2).sum()) for a, b in itertools.combinations(points, 2))
    assert furthest <= made.sensitivity**2
    # Control: a charge for a distance of 1, the norm of the vectors, would be too little.
    assert furthest > made.levels**2
    assert made.sensitivity == math.ceil(math.sqrt(2) * made.levels)


def test_content_that_is_no_number_counts_as_nothing():
    for setting in (COUNTED, WHOLE):
        made = Votes(setting, 3.0, 2)
        assert made.exact(np.array([np.nan, np.inf])).tolist() == [0, 0]
        assert made.exact(np.array([-3.0, 0.0])).tolist() == [0, 0]
    # Our own mistake: what is no distribution is not sent at all.
    assert Votes(WHOLE, 3.0, 2).exact(np.array([1.0, 1.0])).tolist() == [0, 0]


def test_the_sum_has_the_noise_that_is_charged():
    made = Votes(COUNTED, 3.0, 2)
    drawn = [made.protect(np.array([2.0, 0.0]), NoiseSource()) for _ in range(3000)]
    noise = np.array(drawn) - made.exact(np.array([2.0, 0.0]))
    assert abs(float(noise.std()) / made.share_sigma - 1.0) < 0.05
    # Two honest shares are certain, of which the charge counts all: z = 3 of the sensitivity.
    assert math.isclose(made.event().noise_multiplier, 3.0)
    assert made.read(np.array([6, -2]) * made.levels, 4).votes == [6.0, -2.0]
    assert math.isclose(made.read(np.zeros(2, np.int64), 4).sigma, 3.0 * math.sqrt(4 / 2))


@pytest.mark.parametrize("setting", [COUNTED, WHOLE], ids=["counted", "whole"])
def test_a_hundred_questions_to_one_record_by_a_second_accountant(setting):
    z = calibrate_votes(8.0, DELTA, 100, setting)
    made = Votes(setting, z, MOST_CHOICES)
    events = [msgspec.structs.replace(made.event(), count=100)]
    claimed = claim(events, TIGHT_SHARE * DELTA).epsilon
    assert 7.99 < claimed <= 8.0
    # prv-accountant shares no formula with the ledger; its mechanism is the continuous one.
    low, estimate, high = prv_bounds([Gaussian(made.event().noise_multiplier, 100)], DELTA)
    assert low < estimate < high <= 8.0
    assert low > 5.0  # not so much noise that the claim says nothing
    assert bracket(events, TIGHT_SHARE * DELTA).low <= claimed
    # Control: half the noise would not keep the claim.
    assert prv_bounds([Gaussian(z / 2, 100)], DELTA)[0] > 8.0


def test_one_noise_serves_any_number_of_choices():
    z = calibrate_votes(3.0, DELTA, 50, COUNTED)
    for choices in (2, 10, MOST_CHOICES):
        assert math.isclose(Votes(COUNTED, z, choices).event().noise_multiplier, z)
    different = {Votes(COUNTED, z, choices).identity for choices in (2, 3)}
    assert len(different) == 2


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        (COUNTED._replace(colluders=3), "silos.minimum"),
        (COUNTED._replace(field_bound=40), "aggregation.value_bits"),
    ],
)
def test_what_cannot_be_noised_is_refused_with_its_key(setting, where):
    with pytest.raises(ConfigError) as refused:
        Votes(setting, 3.0, 2)
    assert refused.value.where == where
    assert refused.value.hint


def test_a_tally_says_how_sure_it_is():
    clear, even = Tally([20.0, 1.0, -3.0], 2.0, 4), Tally([0.5, 0.0], 2.0, 4)
    assert clear.choice == 0
    assert clear.doubt < 1e-9
    assert 0.4 < even.doubt < 0.5
    assert clear.distribution[0] > 0.99
    assert math.isclose(float(even.distribution.sum()), 1.0)
    assert mistaken(0.0, 1.0) == 0.5
    # A reversed pair of equal noise: the difference has a deviation of √2·σ.
    draws = np.random.default_rng(0).normal(scale=3.0, size=(200_000, 2))
    assert abs(float((draws[:, 0] - draws[:, 1] > 4.0).mean()) - mistaken(4.0, 3.0)) < 0.005


def test_votes_are_mixed_with_a_model():
    prior, votes = np.array([0.7, 0.3]), Tally([0.0, 9.0], 1.0, 4)
    assert votes.mixed(prior, 0.0).tolist() == prior.tolist()
    assert int(votes.mixed(prior, 0.5).argmax()) == 1
    assert np.allclose(votes.mixed(prior, 1.0), votes.distribution)


def charge(ledger, records, number, *, individually=True, study="aa"):
    z = calibrate_votes(2.0, DELTA, 3, COUNTED)
    event = Votes(COUNTED, z, 2).event()
    about = {"records": records, "study": study, "individually": individually}
    reserved = ledger.reserve(
        "00" * 32, "record", f"poll {number}", 0, 0, [event], (2.0, DELTA), **about
    )
    ledger.release(reserved)
    return event


def some(known, *rows):
    chosen = np.isin(np.arange(len(known)), rows)
    return Records(known.rows[chosen], key=known.key)


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", "silo-1") as ledger:
        ledger.pin(2.0, DELTA)
        yield ledger, ledger.identify((bytes([n]) * 32, None) for n in range(4))


def test_only_the_records_that_a_question_retrieves_pay(book):
    ledger, known = book
    for number, rows in enumerate([(0, 1), (0, 2), (0,), (1,), ()]):
        event = charge(ledger, some(known, *rows), number)
    paying = ledger.payers(
        "00" * 32, "record", [event], 1, (2.0, DELTA), records=known, study="aa", individually=True
    )
    assert paying.tolist() == [False, True, True, True]  # three questions a record
    with pytest.raises(BudgetExceeded):
        charge(ledger, some(known, 0, 3), 9)
    for number in range(10, 16):  # a charge to no record is always admitted
        charge(ledger, some(known), number)


def test_accounts_that_were_charged_alike_are_weighed_once(book, monkeypatch):
    """Adversary: an asker who makes as many sets of records as it likes, so that later questions
    take longer. Control: by the sets themselves, there is an account for each."""
    ledger, known = book
    for number, rows in enumerate([(0, 1), (1, 2), (2, 3), (3, 0), (0,), (1,)]):
        event = charge(ledger, known.only(np.isin(np.arange(4), rows)), number)
    weighed, real = [], admission.decide

    def decide(asked, patterns, *rest):
        weighed.append(len(patterns.counts))
        return real(asked, patterns, *rest)

    monkeypatch.setattr(module, "decide", decide)
    about = {"records": known, "study": "aa", "individually": True}
    place = ("00" * 32, "record", [event], 1, (2.0, DELTA))
    paying = ledger.payers(*place, **about)
    assert paying.tolist() == [False, False, True, True]  # three, three, two and two questions
    assert {*weighed} == {2}
    with pytest.raises(BudgetExceeded):
        charge(ledger, known.only(np.isin(np.arange(4), (1, 3))), 8)
    weighed.clear()
    monkeypatch.setattr(Overlaps, "alike", lambda overlaps, entries, _: overlaps.patterns(entries))
    assert ledger.payers(*place, **about).tolist() == paying.tolist()
    assert {*weighed} == {4}
    monkeypatch.undo()
    charge(ledger, known.only(paying), 9)
    assert not ledger.payers(*place, **about).any()


def written(place, sets):
    """Bytes of every row of the journal, and of all that is kept beside it, after these charges."""
    with Ledger(place, "silo-1") as ledger:
        ledger.pin(2.0, DELTA)
        known = ledger.identify((bytes([n]) * 32, None) for n in range(40))
        for number, rows in enumerate(sets):
            charge(ledger, known.only(np.isin(np.arange(40), rows)), number)
        stored = [ledger.stored(entry.about.records) for entry in ledger.entries()]
        assert [len(known.within(one).nonzero()[0]) for one in stored] == [*map(len, sets)]
        assert [np.isin(known.rows, one.rows).nonzero()[0].tolist() for one in stored] == sets
    with contextlib.closing(sqlite3.connect(place)) as db:
        return [
            db.execute(f"SELECT length({column}) FROM {table} ORDER BY {order}").fetchall()
            for table, column, order in (("journal", "body", "seq"), ("kept", "content", "1"))
        ]


def test_as_much_is_written_whatever_was_retrieved_and_whether_or_not_it_was_before(
    tmp_path, monkeypatch
):
    """Adversary: an asker whose second question retrieves what the first one did, and one record
    more if it is there: then a set would be new, and written.

    Control: as ledgers kept sets before.
    """
    topic = [*range(20)]
    worlds = {"with": [topic, [*topic, 30], []], "without": [topic, topic, []]}
    sizes = {world: written(tmp_path / f"{world}.sqlite", sets) for world, sets in worlds.items()}
    assert sizes["with"] == sizes["without"]
    monkeypatch.setattr(Records, "may_be_marked", False)
    sizes = {world: written(tmp_path / f"{world}-old.sqlite", s) for world, s in worlds.items()}
    assert sizes["with"] != sizes["without"]


def test_sets_that_an_older_version_kept_count_beside_those_of_today(book, monkeypatch):
    ledger, known = book
    with monkeypatch.context() as older:
        older.setattr(Records, "may_be_marked", False)
        for number, rows in enumerate([(0, 1), (0,)]):
            charge(ledger, known.only(np.isin(np.arange(4), rows)), number)
    event = charge(ledger, known.only(np.isin(np.arange(4), (0, 2))), 2)
    with Ledger(ledger._journal.path, "silo-1") as again:
        place = ("00" * 32, "record", [event], 1, (2.0, DELTA))
        about = {"records": known, "study": "aa", "individually": True}
        assert again.payers(*place, **about).tolist() == [False, True, True, True]
        with pytest.raises(BudgetExceeded):
            charge(again, known.only(np.isin(np.arange(4), (0, 3))), 3)
        again.verify()


def test_a_set_of_marks_that_was_changed_is_no_set(book):
    ledger, known = book
    charge(ledger, known.only(np.arange(4) < 2), 0)
    digest = ledger.entries()[0].about.records
    content = ledger._journal.kept(digest)
    assert content is not None
    stored = ledger.stored(known.digest)
    assert read_records(content, digest, lambda name: stored) is not None
    for changed in (content[:-1] + b"\xff", content + b"\0", content[:40]):
        assert read_records(changed, digest, lambda name: stored) is None


def test_what_has_left_is_added_up_once(book, monkeypatch):
    """Adversary: an asker of many questions. Control: what has not left may be given back, so it is
    looked at anew every time; and then it counts no more."""
    ledger, known = book
    added, real = [], accounts._Profile.add
    monkeypatch.setattr(accounts._Profile, "add", lambda *a: added.append(a[1][0]) or real(*a))
    event = charge(ledger, known.only(np.arange(4) < 2), 0)
    place = ("00" * 32, "record", [event], 1, (2.0, DELTA))
    about = {"records": known, "study": "aa", "individually": True}

    def paying():
        added.clear()
        return ledger.payers(*place, **about).tolist(), len(added)

    assert paying() == ([True] * 4, 1)
    assert paying() == ([True] * 4, 0)
    left = known.only(np.arange(4) < 1)
    key = ("00" * 32, "record", "poll 1", 0, 0, [event], (2.0, DELTA))
    held = ledger.reserve(*key, records=left, study="aa", individually=True)
    charge(ledger, left, 2)
    assert paying() == ([False, True, True, True], 2)
    assert paying() == ([False, True, True, True], 2)
    ledger.void(held)
    assert paying() == ([True] * 4, 1)
    assert paying() == ([True] * 4, 0)


def admitted(ledger, records, event):
    """How many questions that retrieve these records the ledger admits, of 200."""
    about = {"records": records, "study": "aa", "individually": True}
    for number in range(200):
        key = ("00" * 32, "record", f"poll {number}", 0, 0)
        try:
            ledger.release(ledger.reserve(*key, [event], (8.0, DELTA), **about))
        except BudgetExceeded:
            return number
    return 200


def test_a_hundred_questions_to_one_record_through_its_ledger(tmp_path):
    event = Votes(COUNTED, calibrate_votes(8.0, DELTA, 100, COUNTED), 4).event()
    with Ledger(tmp_path / "ledger.sqlite", "silo-1") as ledger:
        known = ledger.identify((bytes([n]) * 32, None) for n in range(2))
        count = admitted(ledger, some(known, 0), event)
        counted = [one for entry in ledger.entries() for one in entry.counted]
    assert 100 <= count < 200
    assert sum(one.count for one in counted) == count
    low, estimate, _ = prv_bounds([Gaussian(event.noise_multiplier, count)], DELTA)
    assert 7.0 < low < estimate <= 8.0


def test_as_one_claim_of_all_records_three_questions_would_be_the_end(book):
    """The control: a study's claim that all of its charges share, as for tuning."""
    ledger, known = book
    for number in range(3):
        charge(ledger, some(known, number), number, individually=False)
    with pytest.raises(BudgetExceeded, match="of this study's own claim"):
        charge(ledger, some(known, 3), 3, individually=False)


def test_a_studys_claim_bounds_every_record_also_where_more_is_pinned(book):
    ledger, known = book
    ledger.pin(20.0, DELTA, higher=True)
    for number in range(3):
        charge(ledger, some(known, 0), number)
    with pytest.raises(BudgetExceeded):
        charge(ledger, some(known, 0), 3)
    charge(ledger, some(known, 0), 4, study="bb")  # another study has a claim of its own


def test_the_budgets_page_shows_a_files_answers_as_one_set(book, tmp_path):
    ledger, known = book
    for number, rows in enumerate([(0, 1), (0,), (2,), ()]):
        charge(ledger, some(known, *rows), number)
    (shown,) = read_report(tmp_path / "ledger.sqlite", details=False).sets
    assert (shown.standing.accounts, shown.standing.untouched) == (3, 0)
    assert shown.entries == {"released": 4}
    assert 0.0 < shown.standing.median < shown.standing.worst <= 2.0


@pytest.mark.parametrize(
    ("epsilon", "questions"),
    [(1.0, 3), (8.0, 100), pytest.param(40.0, 1000, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("choices", [2, MOST_CHOICES])
def test_a_record_can_give_as_many_answers_as_were_prepaid_and_no_more(epsilon, questions, choices):
    """Whatever the questions look like: two choices have less slack than the 64 that z is for."""
    setting = VoteSetting(field_bound=2**40, shares=3, colluders=1, votes=256, whole=False)
    z = calibrate_votes(epsilon, 1e-5, questions, setting)
    event = Votes(setting, z, choices).event()
    terms = Terms(event, epsilon)
    for count, fits in ((questions, True), (questions + 1, False)):
        whole = [msgspec.structs.replace(event, count=count)]
        assert (filter_within(whole, 1e-5, epsilon, terms) <= epsilon) == fits
