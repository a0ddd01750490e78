"""``audit verify`` on questions to records: who lied, with every participant's key in one hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from securefedcollm_audits.report.page import to_html
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.verify import POLLS, verify

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.primitives import SigningKey
from securefedcollm.study.identity import open_identity, read_identity
from tests.support.forge import by_name, doctor
from tests.support.polling import CHOICES, QUESTION, RECORDS, Voters

OTHER = "0" * 64


class Recorded(NamedTuple):
    bundle: Path
    keys: Mapping[str, SigningKey]


@pytest.fixture(scope="module")
def polled(tmp_path_factory):
    """Two questions of the server and one of silo-2."""
    directory = tmp_path_factory.mktemp("polled")
    voters, run = Voters(directory / "voters"), directory / "run"
    for asker, questions in (("server", (QUESTION, "w30 w31")), ("silo-2", (QUESTION,))):
        with voters.polls(run, asker) as polls:
            for question in questions:
                polls.ask(question, CHOICES)
    homes = {"server": run / "server"} | {name: run / "silos" / name for name in RECORDS}
    keys = {
        name: open_identity(read_identity(home / "identity.json"), None)
        for name, home in homes.items()
    }
    bundle = directory / "evidence.zip"
    bundle.write_bytes(make_bundle(run))
    return Recorded(bundle, keys)


def test_an_honest_record_passes_and_is_reported(polled):
    verdict = verify(polled.bundle)
    assert verdict.holds
    found = by_name(verdict)
    assert found["votes"].evidence == "12 votes of 4 silos, each charged and noised"
    assert found["tallies"].evidence == "3 questions, 12 votes the same at both ends"
    assert found["step-order"].status == "pass"
    assert found["second-accountant"].status != "fail"
    report, case = make_report(polled.bundle)
    rows = {(row.silo, row.asker): (row.asked, row.opened) for row in report.polls}
    assert rows == {(s, a): (n, n) for s in RECORDS for a, n in (("server", 2), ("silo-2", 1))}
    assert "Questions to records" in to_html(report, case)


def less_noise(f):
    f.what("silo-1", "voting")["events"][0]["share_sigma"] *= 2


def fewer_colluders(f):
    f.what("silo-1", "voting")["events"][0]["colluders"] = 0


def settled_for_more_silos(f):
    f.what("silo-1", "voted")["events"][0]["shares"] = 5


def votes_twice(f):
    f.logs["silo-1"].append(json.loads(json.dumps(f.find("silo-1", "voting"))))


def opened_what_never_left(f):
    f.remove("silo-1", "voting")


def another_question(f):
    signed = f.what("silo-1", "voting")["poll"]["signed"]
    f.what("silo-1", "voting")["poll"]["signed"] = signed[:64] + OTHER


def in_anothers_name(f):
    f.what("silo-1", "voting")["asker"] = "silo-3"


def other_sum(f):
    f.what("silo-1", "voting")["header"] = OTHER


def other_lists(f):
    f.what("silo-1", "voted")["survivors"] = ["silo-1", "silo-2", "silo-3"]


def hidden_by_the_asker(f):
    for kind in ("tallied", "polled"):
        f.remove("server", kind)


def hidden_by_the_silo(f):
    for kind in ("voted", "voting"):
        f.remove("silo-1", kind)


def too_few(f):
    what = f.what("server", "tallied")
    what["survivors"] = what["survivors"][:2]


def forged_agreement(f):
    agreements = f.what("server", "tallied")["agreements"]
    agreements["silo-1"] = agreements["silo-2"]


def asked_unsigned(f):
    f.what("server", "polled")["poll"]["signature"] = "0" * 128


def summed_twice(f):
    f.logs["server"].append(json.loads(json.dumps(f.find("server", "tallied"))))


FORGERIES = [
    ("votes", less_noise, "charges for other noise than the study's"),
    ("votes", fewer_colluders, "charges for other noise than the study's"),
    ("votes", settled_for_more_silos, "settles for other noise than there was"),
    ("votes", votes_twice, "votes twice"),
    ("votes", opened_what_never_left, "opens votes that never left"),
    ("votes", another_question, "server did not sign this question"),
    ("votes", in_anothers_name, "of another study, run or asker"),
    ("votes", other_sum, "the header is not that of the study, roster, question and noise"),
    ("votes", other_lists, "what was signed is not the digest of these lists"),
    ("tallies", hidden_by_the_asker, "its own log does not have it"),
    ("tallies", hidden_by_the_silo, "is in the sum, and its own log does not have it"),
    ("tallies", too_few, "a sum of too few silos"),
    ("tallies", forged_agreement, "the agreement of silo-1 does not verify"),
    ("tallies", asked_unsigned, "server did not sign this question"),
    ("tallies", summed_twice, "sums what was not asked, or twice"),
]


@pytest.mark.parametrize(
    ("check", "forge", "fault"), FORGERIES, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_forgery_is_found_and_its_place_named(polled, tmp_path, check, forge, fault):
    verdict = verify(doctor(polled.bundle, tmp_path / "forged.zip", forge, polled.keys))
    found = by_name(verdict)[check]
    assert found.status == "fail"
    assert any(fault in said for said in found.faults), found.faults


def test_every_check_of_polls_has_a_forgery():
    assert {name for name, *_ in FORGERIES} == {check.name for check in POLLS}
