"""Budgets belong to records: no study, file or unit opens a fresh account for them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from securefedcollm.errors import (
    BudgetExceeded,
    ConfigError,
    EvidenceError,
    LocalProtocolError,
    StateError,
)
from securefedcollm.privacy import standing as standing_room
from securefedcollm.privacy.accounting import calibrate
from securefedcollm.privacy.charges import grouped, halved
from securefedcollm.privacy.events import DiscreteGaussian, Gaussian, PoissonGaussian
from securefedcollm.privacy.identities import Content
from securefedcollm.privacy.ledger import Budget, Ledger

BUDGET = (8.0, 1e-5)
SUPPORT = Path(__file__).parents[1] / "support"
OLD = Path(__file__).parent / "ledger-before-records.sql"
WORDS = [f"record {i}" for i in range(20)]


def plan(epsilon=8.0, delta=1e-5):
    """What a study of this claim releases: its whole budget in one go."""
    return [PoissonGaussian(0.05, calibrate(epsilon, delta, 0.05, 60), 60)]


EIGHT = plan()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path, "north") as opened:
        yield opened


def whom(ledger, words, subject=None, also=()):
    contents = [
        (hashlib.sha256(word.encode()).digest(), subject(word) if subject else None)
        for word in words
    ]
    return ledger.identify(contents, column="patient" if subject else None, also=also)


def spend(ledger, words, events=EIGHT, budget=BUDGET, unit="record", study="first", **more):
    """As a silo does: the whole run is foreseen, then reserved and released."""
    subject, limit = more.pop("subject", None), more.pop("limit", None)
    records = whom(ledger, words, subject)
    dataset = more.pop("dataset", hashlib.sha256("".join(words).encode()).hexdigest())
    about = {"records": records, "study": study, "limit": limit}
    ledger.foresee(dataset, unit, events, 1, budget, **about)
    made = ledger.reserve(dataset, unit, f"run of {study}", 0, 0, events, budget, **about)
    ledger.release(made)
    return made


def refused(ledger, words, **more):
    before = ledger.rows()
    with pytest.raises(BudgetExceeded) as caught:
        spend(ledger, words, study="second", **more)
    assert ledger.rows() == before
    assert re.search(r"[0-9.]+ is left", caught.value.message)
    assert caught.value.hint
    return caught.value


# --- the ways round -----------------------------------------------------------------------------


def patient(word):
    return word[-1]


SIXTEENTH = [DiscreteGaussian(2.0**22, 2**18, 100, 1)]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "of 8 is spent"),
        ({"events": plan(16.0), "budget": (16.0, 1e-5)}, "asks for ε = 16; .* pinned at ε = 8"),
        ({"events": plan(8.0, 1e-4), "budget": (8.0, 1e-4)}, "asks for δ = 0.0001; .* pinned"),
        ({"events": plan(8.0, 1e-7), "budget": (8.0, 1e-7)}, "of 8 is spent at δ = 1e-05"),
        ({"unit": "subject", "subject": patient}, "seen from one record"),
        ({"unit": "silo", "events": SIXTEENTH}, "seen from one record"),
        ({"dataset": "of another task"}, "of 8 is spent"),
        ({"words": WORDS[::-1]}, "of 8 is spent"),
        ({"words": [*WORDS, "new"]}, "20 of 21 records cannot pay"),
        ({"words": WORDS[:1]}, "of 8 is spent"),
        ({"words": [*WORDS, "new"], "budget": (16.0, 1e-5)}, "asks for ε = 16; .* pinned at ε = 8"),
        ({"limit": Budget(16.0, 1e-5)}, "this silo allows ε = 16"),
        ({"budget": (0.5, 1e-5), "events": plan(0.5)}, "of 8 is spent"),
    ],
)
def test_after_the_budget_is_spent_every_way_round_is_refused(ledger, more, says):
    """Adversary: the author of the next study."""
    spend(ledger, WORDS)
    more = dict(more)
    error = refused(ledger, more.pop("words", WORDS), **more)
    assert re.search(says, error.message), error.message


def test_what_is_said_to_be_spent_is_of_the_record_that_spent_most(ledger):
    """Adversary: nobody; a file with one more record is another file, and forgets the first study.

    The control: by the file alone, both studies have spent the same.
    """
    spend(ledger, WORDS, plan(3.0))
    first = ledger.most_spent(ledger.entries()[0])
    spend(ledger, [*WORDS, "new"], plan(3.0), study="second")
    newest = ledger.entries()[-1]
    assert ledger.spent(*newest.key[:2], 1e-5).claim == first
    said = ledger.most_spent(newest).epsilon
    assert said == ledger.standing(ledger.stored(newest.about.records)).worst
    assert first.epsilon * 1.2 < said <= 2 * first.epsilon
    spend(ledger, ["quite", "others"], plan(3.0), study="third")
    assert ledger.most_spent(ledger.entries()[-1]) == first
    ledger.pin(3.5, 1e-5)  # the owner spends less from now on; what is spent stays spent
    assert ledger.most_spent(newest).epsilon == said > 3.5


def test_other_records_have_their_own_budget(ledger):
    """The positive control of the test above."""
    spend(ledger, WORDS)
    spend(ledger, [f"other {word}" for word in WORDS], study="second")


def test_the_new_record_alone_may_be_used(ledger):
    spend(ledger, WORDS)
    error = refused(ledger, [*WORDS, "new", "newer"])
    assert "--records skip: the other 2 records can pay" in error.hint
    longer = whom(ledger, ["new", *WORDS, "newer"])
    paying = ledger.payers("d", "record", EIGHT, 1, BUDGET, records=longer, study="second")
    assert paying.tolist() == [True, *[False] * len(WORDS), True]
    spend(ledger, ["new", "newer"], study="second")
    assert refused(ledger, ["new"]).message


def test_a_record_a_day_brings_no_fresh_budget(ledger):
    """Each study may spend 2 of 8, on a file with one record more than the last one's."""
    words, budget = list(WORDS), (2.0, 1e-5)
    ledger.pin(*BUDGET)

    def spend_daily():
        for day in range(100):
            spend(ledger, words, plan(2.0), budget, study=f"{day}")
            words.append(f"new on day {day}")

    with pytest.raises(BudgetExceeded, match=r"20 of \d+ records cannot pay"):
        spend_daily()
    day = len(words) - len(WORDS)
    assert 4 <= day < 24  # composition is better than adding ε up; it does not go on for ever
    standing = ledger.standing(whom(ledger, words))
    assert standing.worst <= 8.0
    assert (standing.accounts, standing.untouched) == (len(WORDS) + day, 1)
    assert 0.0 < standing.median <= standing.worst


def test_what_was_spent_in_different_files_adds_up_for_the_record_in_both(ledger):
    half = [Gaussian(1.2, 3)]
    spend(ledger, WORDS[:12], half)
    spend(ledger, WORDS[12:], half, study="other")
    error = refused(ledger, WORDS[11:13], events=half)
    assert "of 8 is spent" in error.message
    both = ledger.standing(whom(ledger, WORDS))
    one = ledger.standing(whom(ledger, WORDS[:12]))
    assert both == pytest.approx(one) or both.worst == one.worst


def test_a_study_keeps_to_its_own_claim_whatever_the_owner_pinned(ledger):
    """Adversary: a server that has trainings fail, each of which is charged."""
    ledger.pin(20.0, 1e-5)
    records, about = whom(ledger, WORDS), {"study": "s"}
    step, budget = plan(2.0), (2.0, 1e-5)
    ledger.release(
        ledger.reserve("d", "record", "run", 0, 0, step, budget, records=records, **about)
    )
    with pytest.raises(BudgetExceeded, match=r"of this study's own claim ε = .* of 2 is spent"):
        ledger.reserve("d", "record", "run", 0, 1, step, budget, records=records, **about)
    spend(ledger, WORDS, step, budget, study="another")


def test_many_patterns_are_read_in_seconds_and_never_below_what_was_spent(ledger, monkeypatch):
    """Adversary: whoever has a file studied in many overlapping parts: 2^6 patterns."""
    words = [f"{i}" for i in range(64)]
    ledger.pin(20.0, 1e-5)
    for bit in range(6):
        part = [word for i, word in enumerate(words) if i >> bit & 1]
        spend(ledger, part, [Gaussian(8.0 + bit)], study=f"{bit}")
    records, read = whom(ledger, words), []
    tight = standing_room.reading
    monkeypatch.setattr(standing_room, "reading", lambda account: read.append(1) or tight(account))
    quick = ledger.standing(records)
    assert len(read) <= 2 * 16
    monkeypatch.setattr(standing_room, "MOST_TIGHT", 64)
    exact = ledger.standing(records)
    assert len(read) > 64
    assert quick.worst == exact.worst
    assert exact.median <= quick.median <= 1.1 * exact.median
    assert (quick.accounts, quick.untouched) == (64, 1)


# --- the pinned budget --------------------------------------------------------------------------


def test_the_first_reservation_pins_and_a_study_may_ask_for_less(ledger):
    assert ledger.pinned is None
    spend(ledger, WORDS)
    assert ledger.pinned == Budget(8.0, 1e-5)
    spend(ledger, ["else"], plan(3.0), (3.0, 1e-5), study="small")
    spend(ledger, ["else"], plan(3.0, 1e-6), (3.0, 1e-6), study="smaller δ")
    assert ledger.pinned == Budget(8.0, 1e-5)
    assert [entry.budget for entry in ledger.entries()] == [Budget(8.0, 1e-5)] * 3


def test_an_operators_own_limit_pins_too(ledger):
    spend(ledger, WORDS, plan(1.0), (1.0, 1e-5), limit=Budget(3.0, 1e-5))
    assert ledger.pinned == Budget(3.0, 1e-5)
    with pytest.raises(BudgetExceeded, match="pinned at ε = 3"):
        spend(ledger, ["else"], study="second")


def test_pinning_by_hand(ledger, path):
    ledger.pin(16.0, 1e-6)
    ledger.pin(8.0, 1e-5)  # nothing is charged yet
    spend(ledger, WORDS, plan(3.0), (3.0, 1e-5))
    with pytest.raises(ConfigError, match="ε = 8 is pinned") as caught:
        ledger.pin(9.0, 1e-5)
    assert "--raise" in caught.value.hint
    with pytest.raises(ConfigError, match="charges were made at δ"):
        ledger.pin(8.0, 1e-6)
    ledger.pin(2.0, 1e-5)
    refused(ledger, WORDS, events=plan(1.0), budget=(1.0, 1e-5))
    ledger.pin(9.0, 1e-5, higher=True)
    spend(ledger, WORDS, plan(1.0), (1.0, 1e-5), study="second")
    with Ledger(path, "north") as again:
        assert again.pinned == Budget(9.0, 1e-5)
        again.verify()


# --- units on one account -----------------------------------------------------------------------


def test_a_clipped_group_counts_with_half_its_noise_for_one_of_its_records(ledger, tmp_path):
    """With and without one record a silo's clipped update moves by 2C, not by C."""
    silo = [DiscreteGaussian(2.0**19, 2**18, 100, 4)]
    spend(ledger, WORDS, silo, unit="silo")
    alone = ledger.standing(whom(ledger, WORDS)).worst
    spend(ledger, WORDS, [PoissonGaussian(0.01, 50.0, 1)], study="second")
    mixed = ledger.standing(whom(ledger, WORDS)).worst
    doubled = [DiscreteGaussian(2.0**19, 2**19, 100, 4)]
    with Ledger(tmp_path / "other.sqlite", "north") as other:
        spend(other, WORDS, doubled, (20.0, 1e-5), unit="silo")
        assert mixed >= other.standing(whom(other, WORDS)).worst > 1.5 * alone


def test_a_release_by_record_counts_k_times_for_a_subject_of_k_records(ledger):
    one = [Gaussian(20.0)]
    spend(ledger, WORDS, one)
    before = ledger.standing(whom(ledger, WORDS)).worst
    spend(ledger, WORDS, [Gaussian(40.0)], unit="subject", subject=patient, study="by patient")
    after = ledger.standing(whom(ledger, WORDS, patient))
    assert after.accounts == 10
    with Ledger(ledger._journal.path.with_name("other.sqlite"), "north") as other:
        spend(other, WORDS, [Gaussian(10.0), Gaussian(40.0)])
        expected = other.standing(whom(other, WORDS)).worst
    assert after.worst == pytest.approx(expected)
    assert after.worst > 1.5 * before


VISITS = [f"visit {v} of patient {p}" for p in range(10) for v in range(3)]
FIRSTS = [visit for visit in VISITS if visit.startswith("visit 0")]


def test_how_many_records_a_subject_had_in_another_file_is_not_guessed(ledger):
    """Adversary: the author of a study by subject on a file with one record of each subject, after
    one by record on a file with three. Theirs count three times, not once."""
    spend(ledger, VISITS, [Gaussian(20.0)])
    by_subject = {"unit": "subject", "subject": patient, "events": [Gaussian(40.0)]}
    with pytest.raises(BudgetExceeded, match="how many of them belong to one subject") as caught:
        spend(ledger, FIRSTS, study="second", **by_subject)
    assert caught.value.hint.startswith("use other data")
    with pytest.raises(BudgetExceeded, match="10 of 11 subjects cannot pay") as caught:
        spend(ledger, [*FIRSTS, "of patient X"], study="third", **by_subject)
    assert caught.value.hint == "--records skip: the other 1 subjects can pay"
    assert ledger.standing(whom(ledger, VISITS, patient)).worst < 8.0  # so far by record alone


@pytest.mark.parametrize("first", [VISITS, FIRSTS])
def test_it_is_known_where_the_subjects_of_all_its_records_are(ledger, tmp_path, first):
    """The control: the same file, or one that grew since."""

    def rows(words):
        digests = [hashlib.sha256(word.encode()).digest() for word in words]
        return [Content(d, patient(w), b"row " + d) for d, w in zip(digests, words, strict=True)]

    about = {"study": "second", "records": ledger.identify(rows(VISITS), column="patient")}
    before = ledger.identify(rows(first))
    ledger.reserve("x", "record", "r", 0, 0, [Gaussian(20.0)], BUDGET, records=before)
    ledger.reserve("y", "subject", "s", 0, 0, [Gaussian(40.0)], BUDGET, **about)
    with Ledger(tmp_path / "other.sqlite", "north") as other:
        spend(other, VISITS, [Gaussian(20.0 / 3), Gaussian(40.0)])
        expected = other.standing(whom(other, VISITS)).worst
    assert ledger.standing(about["records"]).worst == pytest.approx(expected)
    # The other way round: a study by record on a part of it, and on more than the ledger knows.
    third = {"study": "third", "events": [Gaussian(40.0)], "rounds": 1, "budget": BUDGET}
    ledger.foresee("z", "record", records=ledger.identify(rows(FIRSTS)), **third)
    with pytest.raises(BudgetExceeded, match="how many of them belong to one subject"):
        ledger.foresee("z", "record", records=ledger.identify(rows([*FIRSTS, "new"])), **third)


def test_a_record_that_was_there_twice_may_have_been_of_two_subjects(ledger):
    twice = whom(ledger, [*VISITS, VISITS[0]])
    ledger.reserve("x", "record", "r", 0, 0, [Gaussian(20.0)], BUDGET, records=twice)
    about = {"records": whom(ledger, VISITS, patient), "study": "second"}
    given = ("subject", [Gaussian(40.0)], 1, BUDGET)
    with pytest.raises(BudgetExceeded, match="how many of them belong to one subject"):
        ledger.foresee("y", *given, **about)
    same = about | {"records": whom(ledger, [*VISITS, VISITS[0]], patient)}
    ledger.foresee("y", *given, **same)


def test_how_a_release_is_seen_from_outside_its_unit():
    assert halved(Gaussian(2.0, 3)) == Gaussian(1.0, 3)
    assert halved(PoissonGaussian(0.1, 2.0, 3)) == PoissonGaussian(0.1, 1.0, 3)
    seen = halved(DiscreteGaussian(2.0**18, 2**10, 5, 3, 1, 2, 0.5))
    assert seen == DiscreteGaussian(2.0**18, 2**11, 5, 3, 1, 2, 0.5)
    by_subject = grouped(PoissonGaussian(0.1, 2.0, 3), 4, 4)
    assert by_subject == PoissonGaussian(1 - 0.9**4, 0.5, 3)
    assert grouped(PoissonGaussian(1.0, 2.0, 3), 4, 4).q == 1.0


def test_the_sampling_of_k_records_is_covered_by_one_draw_at_their_joint_rate():
    """P = Σ Bin(j; k, q) N(j, σ²) against N(0, σ²): its hockey-stick divergence, both ways, is at
    most that of (1 - q') N(0) + q' N(k) with q' = 1 - (1 - q)^k."""
    from math import comb

    k, q, sigma = 4, 0.1, 1.5
    x = np.linspace(-30, 40, 200_001)
    step = x[1] - x[0]

    def normal(mean):
        return np.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))

    true = sum(comb(k, j) * q**j * (1 - q) ** (k - j) * normal(j) for j in range(k + 1))
    rate = grouped(PoissonGaussian(q, sigma, 1), k, k).q
    bound, none = (1 - rate) * normal(0) + rate * normal(k), normal(0)
    for eps in (0.0, 0.1, 0.5, 1.0, 2.0):
        for of in (lambda p, e: p - e * none, lambda p, e: none - e * p):
            mine, theirs = (np.maximum(of(p, np.exp(eps)), 0).sum() * step for p in (true, bound))
            assert mine <= theirs + 1e-9


def test_subjects_pay_or_are_left_out_together(ledger):
    spend(ledger, ["a 1", "b 2"])
    records = whom(ledger, ["a 1", "b 1", "b 3", "c 3"], patient)
    paying = ledger.payers("d", "subject", EIGHT, 1, BUDGET, records=records, study="second")
    assert paying.tolist() == [False, False, True, True]


# --- one subject in many files ------------------------------------------------------------------

MONTHS = {
    month: [f"{month}, visit {v} of patient {p}" for p in range(10) for v in range(3)]
    for month in ("january", "february", "march")
}


def by_patient(study="first", **more):
    return {"unit": "subject", "subject": patient, "study": study} | more


def test_a_subject_has_one_budget_in_all_files(ledger):
    """Adversary: whoever keeps one file a month: no two share a record, all share the patients."""
    spend(ledger, MONTHS["january"], **by_patient())
    with pytest.raises(BudgetExceeded, match="of 8 is spent"):
        spend(ledger, MONTHS["february"], **by_patient("second"))
    every = ledger.standing(
        whom(ledger, [w for words in MONTHS.values() for w in words], patient), unit="subject"
    )
    assert (every.accounts, every.untouched) == (10, 0)
    assert 7.9 < every.worst <= 8.0
    (stored,) = map(ledger.stored, ledger.sets())
    assert ledger.standing(stored).accounts == 10
    ledger.verify()


def test_other_subjects_have_their_own_budget(ledger):
    """The positive control: the same visits, of patients with other names."""
    spend(ledger, MONTHS["january"], **by_patient())
    others = by_patient("second", subject=lambda word: f"other {patient(word)}")
    spend(ledger, MONTHS["february"], **others)
    mixed = [*MONTHS["march"], "february, visit 1 of patient 3"]
    records = whom(ledger, mixed, lambda w: patient(w) if w == mixed[-1] else f"new {patient(w)}")
    paying = ledger.payers("d", "subject", EIGHT, 1, BUDGET, records=records, study="third")
    assert paying.tolist() == [True] * 30 + [False]


def test_a_renamed_column_of_subjects_opens_no_account(ledger):
    """Adversary: whoever renames the header of each month's file."""
    spend(ledger, MONTHS["january"], **by_patient())
    contents = [(hashlib.sha256(w.encode()).digest(), patient(w)) for w in MONTHS["february"]]
    renamed = ledger.identify(contents, column="person")
    about = {"records": renamed, "study": "second"}
    with pytest.raises(BudgetExceeded, match="of 8 is spent"):
        ledger.foresee("d", "subject", EIGHT, 1, BUDGET, **about)


def test_a_set_of_a_version_that_did_not_know_subjects_goes_on(ledger):
    """Its run is resumed by this version; it is charged for the records that it knows."""
    for row in (b"", b"row of "):
        contents = [
            Content(hashlib.sha256(w.encode()).digest(), patient(w), row and row + w.encode())
            for w in MONTHS["january"]
        ]
        records, before = (ledger.identify(contents, column="patient") for _ in range(2))
        before.owners = None
        given = (f"data {row}", "subject", f"run {row}", 0, 0, plan(2.0), BUDGET)
        reserved = ledger.reserve(*given, records=before, study="first")
        assert ledger.reserve(*given, records=records, study="first") == reserved
        known = ledger.stored(before.digest)
        assert (known.owners, known.digest) == (None, before.digest)
        assert records.digests == {records.digest, before.digest, records.former}
    assert ledger.standing(records).untouched == 0
    ledger.verify()


# --- identities ---------------------------------------------------------------------------------


def test_the_key_is_private_made_once_and_not_in_the_ledger(ledger, path):
    records = whom(ledger, WORDS)
    spend(ledger, WORDS)
    key = path.with_suffix(".key").read_bytes()
    assert path.with_suffix(".key").stat().st_mode & 0o777 == 0o600
    with Ledger(path, "north") as again:
        assert whom(again, WORDS).digest == records.digest
    assert len(key) == 32
    for file in path.parent.glob("ledger.sqlite*"):
        assert key not in file.read_bytes()
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []
    with Ledger(path.with_name("elsewhere") / "ledger.sqlite", "north") as other:
        assert not set(whom(other, WORDS).rows) & set(records.rows)


@pytest.mark.parametrize("harm", ["lost", "another", "cut"])
def test_a_key_that_does_not_fit_the_ledger_is_refused(ledger, path, harm):
    """With another key every record would look new."""
    spend(ledger, WORDS)
    key = path.with_suffix(".key")
    if harm == "lost":
        key.unlink()
    else:
        key.write_bytes(os.urandom(32) if harm == "another" else key.read_bytes()[:31])
    with pytest.raises(StateError, match=r"ledger\.key") as caught:
        whom(ledger, WORDS)
    assert "restore" in caught.value.hint


def test_a_ledger_that_is_gone_is_not_begun_anew_beside_its_key(ledger, path):
    """Adversary: whoever removes a spent ledger."""
    spend(ledger, WORDS)
    ledger.close()
    spent = path.read_bytes()
    path.unlink()
    for _ in range(2):  # the refusal leaves no file behind that the next start would take
        with pytest.raises(StateError, match="is gone, and the key of its records") as caught:
            Ledger(path, "north")
        assert not path.exists()
    assert "restore the newest copy" in caught.value.hint
    path.write_bytes(spent)
    with Ledger(path, "north") as restored:
        refused(restored, WORDS)


def test_a_ledger_whose_key_was_made_but_never_used_goes_on(ledger, path):
    """The control: an operator looked at the terms and declined."""
    whom(ledger, WORDS)
    ledger.close()
    with Ledger(path, "north") as again:
        spend(again, WORDS)


def test_a_copy_without_the_wal_file_has_every_release(ledger, path, tmp_path):
    """Adversary: a crash, after which only the files that somebody knows of are copied."""
    spend(ledger, WORDS)
    place = tmp_path / "copied"
    place.mkdir()
    for name in ("ledger.sqlite", "ledger.key"):  # while the other is open: as after kill -9
        shutil.copy(path.with_name(name), place / name)
    with Ledger(place / "ledger.sqlite", "north") as copied:
        assert [entry.state for entry in copied.entries()] == ["released"]
        refused(copied, WORDS)


def test_records_known_by_their_words_alone_keep_their_charges(ledger):
    """A version that did not know rows yet charged them; the run goes on with this one."""

    def known(row):
        contents = [
            Content(hashlib.sha256(word.encode()).digest(), None, row and word.encode())
            for word in WORDS
        ]
        return ledger.identify(contents)

    given = ("data", "record", "run", 0, 0, EIGHT, BUDGET)
    before = ledger.reserve(*given, records=known(b""))
    assert ledger.reserve(*given, records=known(b"r")) == before
    ledger.release(before)
    with pytest.raises(BudgetExceeded, match="of 8 is spent"):
        ledger.foresee("new", "record", EIGHT, 1, BUDGET, records=known(b"r"), study="second")
    ledger.verify()


def test_a_ledger_behind_a_link_has_its_key_beside_the_file(ledger, path, tmp_path):
    spend(ledger, WORDS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.sqlite").symlink_to(path)
    with Ledger(tmp_path / "run" / "ledger.sqlite", "north") as linked:
        refused(linked, WORDS)
    assert not (tmp_path / "run" / "ledger.key").exists()


@pytest.mark.parametrize(
    "harm", ["UPDATE kept SET content = zeroblob(320)", "DELETE FROM kept", "shorter"]
)
def test_an_edited_set_of_records_is_found_out(ledger, path, harm):
    """Adversary: somebody who takes records out of what was charged."""
    spend(ledger, WORDS)
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="stays"):
        db.execute("DELETE FROM kept")
    for trigger in ("kept_keep", "kept_hold"):
        db.execute(f"DROP TRIGGER {trigger}")
    if harm == "shorter":
        db.execute("UPDATE kept SET content = substr(content, 1, 160)")
    else:
        db.execute(harm)
    db.commit()
    db.close()
    for use in (ledger.verify, lambda: spend(ledger, WORDS[:3], study="second")):
        with pytest.raises(EvidenceError, match="set of records of the privacy ledger"):
            use()


def test_a_reservation_is_of_the_same_records_after_a_crash(ledger):
    about = {"records": whom(ledger, WORDS)}
    first = ledger.reserve("d", "record", "run", 0, 0, EIGHT, BUDGET, **about)
    again = {"records": whom(ledger, WORDS[::-1])}
    assert ledger.reserve("d", "record", "run", 0, 0, EIGHT, BUDGET, **again) == first
    other = {"records": whom(ledger, WORDS[1:])}
    with pytest.raises(LocalProtocolError, match="reserved with other records"):
        ledger.reserve("d", "record", "run", 0, 0, EIGHT, BUDGET, **other)


# --- ledgers from before ------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """Written by the version before this one: two rounds on "aa…" by record, one on "bb…"."""
    path = tmp_path / "old" / "ledger.sqlite"
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.executescript(OLD.read_text())
    db.commit()
    db.close()
    return path


def test_an_old_ledger_opens_and_its_charges_count_for_the_file_that_they_name(old):
    with Ledger(old, "north") as ledger:
        assert len(ledger.rows()) == 8
        ledger.verify()
        assert ledger.pinned == Budget(8.0, 1e-5)
        records = whom(ledger, WORDS)
        spent = ledger.spent("a" * 64, "record", 1e-5).claim.epsilon
        assert ledger.standing(records, ["a" * 64]).worst == pytest.approx(spent)
        unknown = ledger.standing(records)
        assert (unknown.worst, unknown.untouched, unknown.unattributed) == (0.0, 20, 3)
        assert refused(ledger, WORDS, dataset="a" * 64).message


def test_what_an_old_ledger_charged_follows_the_records_of_its_file(old):
    """Once the file was seen the old charges are about its records, in every other file too."""
    small = [PoissonGaussian(0.05, 30.0, 1)]
    with Ledger(old, "north") as ledger:
        spend(ledger, WORDS, small, (8.0, 1e-5), dataset="a" * 64)
        spent = ledger.spent("a" * 64, "record", 1e-5).claim.epsilon
        standing = ledger.standing(whom(ledger, [*WORDS[:2], "new"]))
        assert standing.worst == pytest.approx(spent)
        assert (standing.untouched, standing.unattributed) == (1, 1)
        refused(ledger, [*WORDS, "new"])


def test_an_old_ledger_knows_a_file_by_its_other_fingerprints_too(old):
    with Ledger(old, "north") as ledger:
        records = whom(ledger, WORDS, patient, also=["a" * 64])
        assert ledger.standing(records, ["by patient"]).worst > 0
        ledger.verify()


# --- crashes and races --------------------------------------------------------------------------


def test_kill_9_before_every_statement_of_charges_to_records(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "ledger_crash.py"), str(tmp_path), "records"],
        capture_output=True,
        text=True,
        check=True,
    )
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert not lives[-1]["killed"]
    assert len(lives) > 12
    for life in lives:
        with Ledger(tmp_path / f"{life['k']}.db", "north") as ledger:
            ledger.verify()  # a row never names a set that is not there
            entries = ledger.entries()
            states = [None, "reserved", "released", "settled"]
            state = entries[0].state if entries else None
            assert states.index(state) >= min(len(life["told"]), 3)
            if entries:
                standing = ledger.standing(whom(ledger, WORDS))
                assert (standing.untouched, standing.accounts) == (0, len(WORDS))


@pytest.mark.soak
def test_two_processes_share_key_and_budget(tmp_path):
    """Two files that share one record: both processes charge it, from the very first key on."""
    others = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "ledger_race.py"), str(tmp_path), name, "records"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    grants = [int(process.communicate(timeout=120)[0]) for process in others]
    with Ledger(tmp_path / "ledger.db", "north") as ledger:
        ledger.verify()
        shared = ledger.standing(whom(ledger, ["shared"]))
        mine = ledger.standing(whom(ledger, ["a"]))
        assert len(ledger.entries()) == sum(grants)
        assert 7.0 < shared.worst <= 8.0
        assert mine.worst <= shared.worst


def test_a_ledger_copied_with_its_key_goes_on(ledger, path, tmp_path):
    spend(ledger, WORDS)
    ledger.close()
    place = tmp_path / "restored"
    place.mkdir()
    for name in ("ledger.sqlite", "ledger.key"):
        shutil.copy(path.with_name(name), place / name)
    with Ledger(place / "ledger.sqlite", "north") as restored:
        refused(restored, WORDS)
