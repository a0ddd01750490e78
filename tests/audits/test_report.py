"""The report of a bundle: what it says, that every link lands, and that nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from typing import get_args

import msgspec
import pytest
from securefedcollm_audits.report import words
from securefedcollm_audits.report.page import controls, to_html
from securefedcollm_audits.report.plots import MOST_LINES, participation_plot
from securefedcollm_audits.report.report import advantage, make_report
from securefedcollm_audits.verification.verify import CHECKS

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.privacy.accounting import Accountant
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.shown import down, up
from tests.support.bundles import bundle_of
from tests.support.forge import doctor
from tests.support.report_page import Reader, results_of
from tests.support.runs import NAMES, recorded_study


@pytest.fixture(scope="module")
def record(record_bundle):
    report, case = make_report(record_bundle)
    return report, to_html(report, case)


def test_every_link_lands_in_the_page_and_nothing_is_fetched(record):
    _, page = record
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link[0] for link in reader.links} == {"#"}
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert len(reader.links) > 50
    assert not re.search(r"<script|url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_it_says_what_the_bundle_says(record, record_bundle):
    report, page = record
    text = Reader(page).text
    spent = report.silos[0].claimed
    assert report.epsilon == spent
    assert f"(ε = {up(spent)}, δ = 1e-05) differentially private for one record of a silo" in text
    assert "evidence verified offline: 25 checks passed" in text
    for silo in report.silos:
        assert silo.low < silo.claimed < silo.high
        assert [c.round for c in silo.charges] == [1, 2]
        assert silo.charges[0].cumulative < silo.charges[1].cumulative
        assert silo.charges[1].cumulative == pytest.approx(silo.claimed, abs=2e-3)
        assert silo.place == f"{silo.name}#12 (settled)"
    assert [(r.round, r.survivors, r.agreements, r.witnesses) for r in report.rounds] == [
        (1, list(NAMES), 4, 4),
        (2, list(NAMES), 4, 4),
    ]
    for name in ("GDPR", "HIPAA", "EU AI Act", "SR 11-7", "NIST SP 800-226"):
        assert name in text
    assert "compliant" not in text.lower()
    assert json.loads(msgspec.json.encode(report))["registry"]["epsilon"] == spent


def test_client_level_privacy_names_adversaries_and_the_absent(silo_bundle):
    report, case = make_report(silo_bundle)
    by_name = {row.adversary: row.epsilons[1].epsilon for row in report.adversaries}
    assert (
        by_name["server"]
        < by_name["server+1 silo"]
        == pytest.approx(max(s.claimed for s in report.silos if s.claimed), abs=0.7)
    )
    assert "one silo's whole data set" in report.claim
    assert "together with any 1 of the other silos" in report.claim
    second = report.rounds[1]
    assert (len(second.survivors), second.dropouts) == (3, ["silo-4"])
    charges = report.silos[0].charges
    assert [charge.honest_shares for charge in charges] == [3, 2]  # of 4 and 3, one colludes
    assert report.silos[3].charges[1].state == "at the worst case"
    assert "missing" in Reader(to_html(report, case)).text


def test_joint_steps_are_named_and_bracketed(joint_bundle):
    report, case = make_report(joint_bundle)
    names = [f"round {r}, step {s}" for r in (1, 2) for s in (1, 2)]
    assert [row.name for row in report.rounds] == names
    assert [len(row.survivors) for row in report.rounds] == [4, 3, 4, 4]
    first = report.silos[0]
    assert first.low < first.claimed <= 8
    assert first.low < first.high < first.claimed  # the filter charges every step as the worst
    assert "round 2, step 1" in Reader(to_html(report, case)).text


def test_a_bundle_that_fails_has_a_page_that_says_so_and_is_escaped(record_bundle, tmp_path):
    """Adversary: whoever made the bundle, with markup in every text that is theirs to choose."""
    attack = "<script>alert(1)</script>"

    def inject(f):
        f.what("silo-1", "settled", -1)["spent"].update(accountant=attack, epsilon=0.5)
        f.what("silo-2", "opened")["version"] = attack

    report, case = make_report(doctor(record_bundle, tmp_path / "forged.zip", inject))
    page = to_html(report, case)
    assert "<script" not in page
    reader = Reader(page)
    assert "evidence does NOT hold: 2 of the checks failed" in reader.text
    assert "claims ε = 0.5000" in reader.text
    assert "e-silo-1-12" in reader.ids


def test_too_broken_for_a_report_is_one_line(record_bundle, tmp_path):
    forged = doctor(
        record_bundle,
        tmp_path / "forged.zip",
        lambda f: f.what("silo-1", "reserved").update(events=[]),
    )
    with pytest.raises(EvidenceError, match="too broken for a report"):
        make_report(forged)
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(EvidenceError, match="not a bundle"):
        make_report(tmp_path / "x.zip")


def test_parts_of_a_run_have_a_report_too(record_bundle, tmp_path):
    for only in (["server"], ["silo-1"]):
        (tmp_path / "part.zip").write_bytes(make_bundle(record_bundle.parent, only))
        report, case = make_report(tmp_path / "part.zip")
        reader = Reader(to_html(report, case))
        assert {link[1:] for link in reader.links} <= set(reader.ids)
        assert bool(report.rounds) == (only == ["server"])
        assert bool(report.silos) == (only == ["silo-1"])


def test_privacy_audits_stand_beside_the_claim(audited_bundle, record):
    report, case = make_report(audited_bundle)
    server, silo = report.audits
    assert (server.audit, server.other, server.bound) == ("inversion", True, None)
    assert server.held
    assert (silo.audit, silo.other, silo.claimed, silo.bound) == ("mechanism", False, 2.0, 1.0)
    assert silo.place == "silo-2#17 (audited)"
    reader = Reader(to_html(report, case))
    assert "95 % lower bound for this attack; not a guarantee" in reader.text
    assert "inversion : one DP-SGD step; at another setting of the same code" in reader.text
    assert "noise charged 1; noise measured 1.01" in reader.text
    assert "e-silo-2-17" in reader.ids
    assert "None was written into a log of this bundle" in Reader(record[1]).text


def test_accuracy_stands_beside_epsilon_if_the_run_s_results_are_given(record_bundle, tmp_path):
    path = results_of(record_bundle, tmp_path / "results.json")
    report, case = make_report(record_bundle, path)
    spent = [charge.cumulative for charge in report.silos[0].charges]
    assert [p.epsilon for p in report.utility.course] == [0.0, *spent]
    assert [p.accuracy["easy"] for p in report.utility.course] == [0.4, 0.5, 0.75]
    page = to_html(report, case)
    assert "<hard>" not in page
    text = Reader(page).text
    assert "No signature covers it" in text
    assert "FedAvg 70.0 –" in text
    assert 'aria-label="Accuracy of the small model by ε charged so far"' in page


def test_joint_steps_end_in_the_accuracy_of_their_round(joint_bundle, tmp_path):
    report, _ = make_report(joint_bundle, results_of(joint_bundle, tmp_path / "results.json"))
    ends = [charge.cumulative for charge in report.silos[0].charges][1::2]
    assert [p.epsilon for p in report.utility.course] == [0.0, *ends]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "0" * 32}, "is of another study or run"),
        ({"rounds": [{"evaluation": None}]}, "is not a run's results"),
        ({"table": [{"model": 3}]}, "is not a run's results"),
    ],
)
def test_results_of_something_else_are_refused(record_bundle, tmp_path, changes, message):
    path = results_of(record_bundle, tmp_path / "results.json", **changes)
    with pytest.raises(ConfigError, match=message):
        make_report(record_bundle, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_report(record_bundle, tmp_path / "nowhere.json")


def test_the_advantage_rests_on_many_deltas(record):
    report, _ = record
    found, one = dict(report.advantage), dict(advantage([(report.epsilon, report.delta)]))
    assert all(found[rate] <= one[rate] + 1e-9 for rate in found)
    assert found[0.05] < 0.7 * one[0.05]


def test_the_advantage_is_that_of_the_definition():
    """With δ = 0, ε = ln 3 and 10 % false alarms, at most 30 % are found; at 50 %, 5/6."""
    found = dict(advantage([(math.log(3.0), 0.0)]))
    assert found[0.1] == pytest.approx(0.3)
    assert found[0.5] == pytest.approx(5.0 / 6.0)
    assert found[1.0] == 1.0
    both = dict(advantage([(math.log(3.0), 0.0), (0.0, 0.05)]))
    assert both[0.5] == pytest.approx(0.55)


def test_the_control_tables_name_checks_that_exist():
    known = {check.name for check in CHECKS} | {"archive"}
    rows = [row for framework in controls()["frameworks"] for row in framework["rows"]]
    named = {name for row in rows for name in row["checks"]}
    assert named <= known
    assert known - named == set()  # every check is evidence for something


def hundred(report, spent=lambda i: 3.0 - i / 1000):
    """The report as if of a hundred silos; every 17th misses a sum."""
    names = [f"hospital-{i:03d}" for i in range(1, 101)]
    change = msgspec.structs.replace
    return change(
        report,
        silos=[
            change(report.silos[0], name=n, claimed=spent(i), high=spent(i) + 0.01)
            for i, n in enumerate(names)
        ],
        rounds=[
            change(
                row,
                survivors=[n for i, n in enumerate(names) if (i + row.round) % 17],
                dropouts=[n for i, n in enumerate(names) if not (i + row.round) % 17],
            )
            for row in report.rounds
        ],
        header=change(report.header, silos=names),
    )


def test_a_hundred_silos_make_one_ledger_and_two_short_tables(record_bundle, record):
    report, case = make_report(record_bundle)
    page = to_html(hundred(report), case)
    reader = Reader(page)
    assert page.count("<svg") == 3  # the attacker's curve, attendance, and the one that spent most
    assert record[1].count("<svg") == 6  # four silos have a plot each
    assert "That is the silo whose releases cost most. 99 further silos" in reader.text
    assert "88 further silos spent no more; section 5 has all." in reader.text
    assert page.count("<td>hospital-050</td>") == 1  # in section 5 alone
    assert page.count("<td>hospital-001</td>") == 2
    assert "outlined: not in the sum; the other 90 silos missed none" in reader.text


def test_attendance_of_many_shows_who_missed_most():
    names = [f"s{i:03d}" for i in range(60)]
    all_but = [set(names) - {n} for n in names[:40]] + [set(names) - {"s039"}]
    plot = participation_plot(names, all_but)
    assert plot.count("<text") == MOST_LINES + 1
    assert plot.index(">s039<") < plot.index(">s000<")
    assert "the other 36 silos missed 1 at most, each" in plot
    assert "the other" not in participation_plot(names[:MOST_LINES], all_but)


def test_short_names_are_explained_where_they_stand(record, silo_bundle):
    reader = Reader(record[1])
    assert "pld : privacy loss distributions" in reader.text
    assert "z: size of the noise over the largest influence of one unit" in reader.text
    assert "poisson-gaussian : DP-SGD inside the silo." in reader.text
    assert "takes part by chance, with probability q" in reader.text
    assert "Honest shares" not in reader.text  # no column is empty from top to bottom
    text = Reader(to_html(*make_report(silo_bundle))).text
    assert "Honest shares: parts of the noise that the adversary does not know" in text
    assert "rounded-gaussian : a secure sum of integers." in text
    for name in get_args(Accountant):
        assert name in words.ACCOUNTANTS


def test_epsilon_in_plain_words_is_the_definition_and_is_not_flattered():
    first, second, third = words.meaning("record", 8.0, 1e-5, 8.0)
    assert "the odds become at most 2,981 to 1, that is 99.97 %" in first
    assert "one in 100,000" in second
    assert "How strong: not strong." in third
    assert (
        "odds become at most 3.00 to 1, that is 75.00 %"
        in words.meaning("silo", math.log(3.0), 1e-6, 2.0)[0]
    )
    _, _, grade, agreed = words.meaning("record", 0.5, 1e-5, 8.0)
    assert "How strong: strong." in grade
    assert agreed.endswith("at most 2,981 to 1, 99.97 %: not strong.")
    assert "How strong: moderate." in words.meaning("record", 2.0, 1e-5, 2.0)[2]
    for huge in (50.0, 1e300, math.inf):
        assert (
            "more than a thousand million to 1, that is more than 99.99 %"
            in words.meaning("record", huge, 1e-300, huge)[0]
        )


def test_what_is_left_of_a_budget(record_bundle):
    report, case = make_report(record_bundle)
    silo = report.silos[0]
    assert silo.left == silo.limit - silo.claimed
    change = msgspec.structs.replace

    def said(**changes):
        page = to_html(change(report, silos=[change(silo, **changes)]), case)
        return page[page.index("<h3>Budgets") : page.index("“ε spent” is everything")]

    assert f">{down(silo.left)}<" in said()
    assert ">used up<" in said(left=0.0)
    assert ">used up<" in said(left=0.0004)
    assert ">0.500, nearly used up<" in said(left=0.5)
    assert ">not settled yet<" in said(left=None, claimed=None)


def test_epsilon_is_stated_at_the_delta_that_it_was_computed_for(tmp_path):
    """The silos pinned a larger δ than this study asks for: ε at the study's would be larger."""
    run = tmp_path / "run"
    for name in NAMES:
        home = run / "silos" / name
        home.mkdir(parents=True)
        with Ledger(home / "ledger.sqlite", name) as ledger:
            ledger.pin(8.0, 1e-3)
    study = recorded_study(rounds=1)
    assert study.privacy.delta == 1e-5
    report, _ = make_report(bundle_of(run, study))
    assert report.delta == report.registry["delta"] == 1e-3
    assert f"(ε = {up(report.epsilon)}, δ = 0.001)" in report.claim


def test_parts_without_a_silo_say_that_no_budget_is_shown(record_bundle, tmp_path):
    (tmp_path / "part.zip").write_bytes(make_bundle(record_bundle.parent, ["server"]))
    report, case = make_report(tmp_path / "part.zip")
    text = Reader(to_html(report, case)).text
    assert "what each has spent, and has left, is not shown" in text
    assert "No silo's charges are here: this is the agreed budget." in text
    assert "not shown: no log holds it" in text
    assert report.made[:2] == "20"


def test_names_of_participants_are_data(record_bundle, tmp_path):
    """Adversary: whoever names the organisations, in a study without a roster."""
    attack = '</td><img src="x">{{ 7 * 191 }}'

    def rename(f):
        for log in f.logs.values():
            log[0]["what"]["roster"][0]["name"] = attack

    report, case = make_report(doctor(record_bundle, tmp_path / "forged.zip", rename))
    assert attack in report.header.silos
    control = msgspec.structs.replace(report.header, logs=["\x1b[2J\u202e"])
    page = to_html(msgspec.structs.replace(report, header=control), case)
    assert "<img" not in page
    assert "1337" not in page
    assert "{{ 7 * 191 }}" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    Reader(page)
