"""The report says what the ledger says, escapes it, and needs nothing from the network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from securefedcollm.errors import EvidenceError, StateError
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    RoundedGaussian,
)
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.privacy.report import read_report
from securefedcollm.privacy.report_html import to_html
from securefedcollm.privacy.shown import down, up

BUDGET = (8.0, 1e-5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "<north>.db"
    with Ledger(path, "<b>north</b>") as ledger:
        for round_ in range(3):
            events = [PoissonGaussian(0.05, 1.0, 10)]
            made = ledger.reserve("a" * 64, "record", "run", round_, 0, events, BUDGET)
            ledger.release(made)
            if round_ < 2:
                ledger.settle(made, events)
        worst = [DiscreteGaussian(2.0**18, 2**18, 100, 6, 2)]
        ledger.release(ledger.reserve("b" * 64, "silo", "run", 0, 0, worst, BUDGET))
        ledger.void(ledger.reserve("b" * 64, "silo", "run", 1, 0, worst, BUDGET))
    return path


@pytest.fixture(scope="module")
def report(path):
    return read_report(path)


def test_it_adds_up(report, path):
    record, silo = report.accounts
    with Ledger(path, report.owner) as ledger:
        assert record.spent == ledger.spent("a" * 64, "record", 1e-5).claim
        assert report.head == ledger.head.digest.hex()
    assert record.left == pytest.approx(8.0 - record.spent.epsilon)
    assert record.lines[-1].cumulative == pytest.approx(record.spent.epsilon, abs=1e-3)
    assert [line.state for line in record.lines] == ["settled", "settled", "released"]
    courses = [line.cumulative for line in record.lines]
    assert courses == sorted(courses)
    assert [line.state for line in silo.lines] == ["released", "void"]
    assert silo.lines[0].cumulative == silo.lines[1].cumulative


def test_second_opinion_where_there_is_one(report):
    record, silo = report.accounts
    low, _, high = record.second_opinion
    assert low < record.spent.epsilon < high
    assert silo.second_opinion is None


def test_second_opinion_on_joint_steps_takes_their_survivors_as_fixed(tmp_path):
    """It is far below what is charged, because PLD charges every step as reserved."""
    worst = RoundedGaussian(0.6164 / 2**0.5 * 2**18, 2**18, 11_264, 3, 1, 60, 0.0427)
    with Ledger(tmp_path / "ledger.sqlite", "north") as ledger:
        made = ledger.reserve("a" * 64, "record", "run", 0, 0, [worst], BUDGET)
        ledger.release(made)
        ledger.settle(made, [msgspec.structs.replace(worst, shares=4)])
    (account,) = read_report(tmp_path / "ledger.sqlite").accounts
    low, estimate, high = account.second_opinion
    assert low < estimate < high < low + 0.05
    assert 1.4 * high < account.spent.epsilon < 8.0


def test_json_round_trip(report):
    decoded = msgspec.json.decode(msgspec.json.encode(report))
    assert decoded["accounts"][0]["spent"]["epsilon"] == report.accounts[0].spent.epsilon


class Checker(HTMLParser):
    VOID = frozenset({"meta"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_well_formed_self_contained_and_escaped(report):
    page = to_html(report)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links == []
    assert "<script" not in page
    assert "url(" not in page
    assert "<b>north" not in page
    assert "&lt;b&gt;north" in page
    text = " ".join(checker.text)
    assert f"ε = {up(report.accounts[0].spent.epsilon)}" in text
    assert "server+2 silos" in text
    assert "Metrics shown to others" in text


def test_shown_numbers_are_rounded_against_us():
    assert up(1.0001) == "1.001"
    assert down(1.9999) == "1.999"
    assert down(-0.1) == "0.000"
    assert up(float("inf")) == "∞"


def test_an_empty_ledger_and_no_ledger(tmp_path):
    Ledger(tmp_path / "empty.db", "north").close()
    page = to_html(read_report(tmp_path / "empty.db"))
    assert "The ledger is empty" in page
    with pytest.raises(StateError, match="no such ledger"):
        read_report(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "text.db").write_text("hello" * 1000)
    with pytest.raises(StateError, match="not a privacy ledger"):
        read_report(tmp_path / "text.db")


def test_a_doctored_ledger_gets_no_report(tmp_path):
    import sqlite3

    path = tmp_path / "ledger.db"
    with Ledger(path, "north") as ledger:
        ledger.reserve("a", "record", "run", 0, 0, [Gaussian(2.0)], BUDGET)
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER journal_keep")
    (body,) = db.execute("SELECT body FROM journal").fetchone()
    db.execute("UPDATE journal SET body = ?", (re.sub(rb"2", b"9", body, count=1),))
    db.commit()
    db.close()
    with pytest.raises(EvidenceError, match="row 1"):
        read_report(path)


def test_the_report_says_by_record_what_is_spent_across_files(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path, "north") as ledger:
        for study, words in (("one", "abc"), ("two", "cde")):
            records = ledger.identify([(word.encode(), None) for word in words])
            about = {"records": records, "study": study}
            ledger.reserve(study, "record", study, 0, 0, [Gaussian(3.0)], BUDGET, **about)
        ledger.reserve("old", "record", "r", 0, 0, [Gaussian(9.0)], BUDGET)
    found = read_report(path)
    assert found.pinned == Budget(*BUDGET)
    assert found.unattributed == 1
    one, two = (record_set.standing for record_set in found.sets)
    assert one.worst == two.worst > one.median == two.median > 0
    page = to_html(found)
    for said in ("By record", up(one.worst), up(one.median), "1 charges name no records"):
        assert said in page


def test_the_wheel_holds_every_template():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).parents[2]
    files = wheel.WheelBuilder(str(root)).recurse_included_files()
    packed = {Path(file.path).resolve() for file in files}
    rooms = [root / "securefedcollm", root / "audits" / "securefedcollm_audits"]
    templates = {path for room in rooms for path in room.glob("**/templates/*")}
    assert {"page.html", "budget.html", "compare.svg", "rounds.html"} <= {p.name for p in templates}
    assert {path.resolve() for path in templates} <= packed
