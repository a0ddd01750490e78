"""``audit verify`` on questions to documents: who lied at which end, with every key in one hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from securefedcollm_audits.report.page import to_html
from securefedcollm_audits.report.report import _questions, make_report
from securefedcollm_audits.verification.case import Case
from securefedcollm_audits.verification.checks.questions import agree, counted
from securefedcollm_audits.verification.verdict import Faults
from securefedcollm_audits.verification.verify import QUESTIONS, verify

from securefedcollm.evidence.bundle import Bundle, make_bundle
from securefedcollm.evidence.entries import Asked, Counted
from securefedcollm.primitives import SigningKey
from securefedcollm.study.identity import open_identity, read_identity
from tests.support.asking import TEXTS, Members, rostered
from tests.support.forge import Forger, by_name, doctor
from tests.support.report_page import Reader

OTHER = "0" * 64


class Recorded(NamedTuple):
    """A bundle, everybody's keys, and what they came from."""

    bundle: Path
    keys: Mapping[str, SigningKey]
    members: Members
    run: Path


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Two questions of the server and one of silo-1."""
    directory = tmp_path_factory.mktemp("asked")
    members = Members(directory / "members")
    run = directory / "run"
    with members.questions(run) as questions:
        questions.ask("w1 w2")
        questions.ask("w9")
    with members.questions(run, "silo-1") as questions:
        questions.ask("w19 w20")
    homes = {"server": run / "server"} | {name: run / "silos" / name for name in TEXTS}
    keys = {
        name: open_identity(read_identity(home / "identity.json"), None)
        for name, home in homes.items()
    }
    bundle = directory / "evidence.zip"
    bundle.write_bytes(make_bundle(run))
    return Recorded(bundle, keys, members, run)


def test_an_honest_record_of_questions_passes(asked):
    bundle = asked.bundle
    verdict = verify(bundle)
    assert verdict.holds
    found = by_name(verdict)
    assert found["questions"].evidence == (
        "8 answers in the logs of 3 silos; the most for one asker is 2, of 3"
    )
    assert found["answers"].evidence == "8 answers the same at both ends"
    assert found["step-order"].status == "pass"


def test_the_silos_alone_are_not_blamed_for_logs_that_are_not_here(asked, tmp_path):
    bundle, keys, *_ = asked

    def without_the_server(f):
        for kind in ("logs/server.jsonl", "heads/server.json", "sbom.json", "artefacts.json"):
            f.members.pop(kind, None)
        return "sealed"

    verdict = verify(doctor(bundle, tmp_path / "cut.zip", without_the_server, keys))
    assert verdict.holds
    assert by_name(verdict)["answers"].evidence == "2 answers the same at both ends"


def copy(f, who, kind, **fields):
    """The first entry of a kind once more, changed."""
    made = json.loads(json.dumps(f.find(who, kind)))
    made["what"].update(fields)
    f.logs[who].append(made)


def made_up(f):
    what = f.what("silo-2", "counted")
    invented = dict(what["question"], signed=what["question"]["signed"][:64] + "1" * 160)
    copy(f, "silo-2", "counted", question=invented, number=3)


def beyond_the_limit(f):
    f.what("silo-2", "counted", 1)["number"] = 4


def one_number_twice(f):
    f.what("silo-2", "counted", 1)["number"] = 1


def in_anothers_name(f):
    f.what("silo-2", "counted")["asker"] = "silo-3"


def hidden_by_the_silo(f):
    for kind in ("counted", "served"):
        f.remove("silo-2", kind)


def hidden_by_the_asker(f):
    for kind in ("heard", "asked"):
        f.remove("silo-1", kind)


def other_scores(f):
    f.what("silo-3", "counted")["scores"] = OTHER


def other_passages(f):
    f.what("silo-3", "served")["blocks"] = OTHER


def passages_left_out(f):
    f.remove("silo-3", "served")


def an_answer_that_the_silo_did_not_sign(f):
    answers = f.what("server", "heard")["answers"]
    answers["silo-1"]["blocks"]["signature"] = answers["silo-2"]["blocks"]["signature"]


def an_answer_to_another_question(f):
    first, second = (f.what("server", "heard", nth)["answers"] for nth in (0, 1))
    first["silo-2"] = second["silo-2"]


def heard_twice(f):
    copy(f, "server", "heard")


FORGERIES = [
    ("questions", made_up, r"silo-2 has no question that server signed"),
    ("questions", beyond_the_limit, r"silo-2 answered question 4 of server, beyond 3"),
    ("questions", one_number_twice, r"silo-2 counts two questions of server as number 1"),
    ("questions", in_anothers_name, r"silo-2 has no question that silo-3 signed"),
    (
        "questions",
        lambda f: copy(f, "silo-2", "counted", number=3),
        r"silo-2 answered one .* twice",
    ),
    ("questions", lambda f: copy(f, "silo-2", "served"), r"silo-2 served passages without"),
    ("answers", hidden_by_the_silo, r"silo-2 signed this answer to server, and its own log"),
    ("answers", hidden_by_the_asker, r"silo-1 signed this question to silo-2, and its own log"),
    ("answers", other_scores, r"silo-3 signed other scores for server than its own log"),
    ("answers", other_passages, r"silo-3 signed other passages for server than its own log"),
    ("answers", passages_left_out, r"silo-3 signed other passages for server than its own log"),
    ("answers", an_answer_that_the_silo_did_not_sign, r"server has no answer that silo-1 signed"),
    ("answers", an_answer_to_another_question, r"server has no answer that silo-2 signed"),
    ("answers", heard_twice, r"server heard answers to what it did not ask, or twice"),
]


@pytest.mark.parametrize(("check", "edit", "fault"), FORGERIES)
def test_whoever_lies_about_a_question_is_named(asked, tmp_path, check, edit, fault):
    bundle, keys, *_ = asked
    found = by_name(verify(doctor(bundle, tmp_path / "forged.zip", edit, keys)))
    assert found[check].status == "fail"
    assert any(re.search(fault, said) for said in found[check].faults)
    assert found["heads"].status == "pass"  # signed anew: nothing but the content is wrong


def test_entries_of_another_run_accuse_nobody(asked, tmp_path):
    """Adversary: the server copies what silo-2 answered it in another run of the same study, with
    the same keys, into this run's log, so that silo-2 seems to hide an answer."""
    bundle, keys, *_ = asked
    members, other = asked.members, tmp_path / "other"
    for home in ("server", *(f"silos/{name}" for name in TEXTS)):
        (other / home).mkdir(parents=True)
        shutil.copy(asked.run / home / "identity.json", other / home)
    with members.questions(other, "silo-3", **{"silo-2": members.indexes["silo-2"]}) as questions:
        questions.ask("w1 w2")
    (tmp_path / "other.zip").write_bytes(make_bundle(other))
    foreign = Forger(tmp_path / "other.zip", keys).logs["silo-3"][1:]
    assert [entry["what"]["kind"] for entry in foreign] == ["asked", "heard"]

    def copied_in(f):
        for entry in foreign:
            made = json.loads(json.dumps(entry))
            if made["what"]["kind"] == "heard":
                made["what"]["asked"] = len(f.logs["silo-3"]) - 1
            f.logs["silo-3"].append(made)

    found = by_name(verify(doctor(bundle, tmp_path / "forged.zip", copied_in, keys)))
    (said,) = found["answers"].faults
    assert "silo-3 has no answer that silo-2 signed to this question" in said  # silo-3 is to blame


def test_every_check_of_questions_has_a_forgery():
    assert {name for name, *_ in FORGERIES} == {check.name for check in QUESTIONS}


def test_other_terms_than_the_others_are_found(asked, tmp_path):
    bundle, keys, *_ = asked

    def other_terms(f):
        f.what("silo-3", "counted")["terms"] = OTHER

    found = by_name(verify(doctor(bundle, tmp_path / "forged.zip", other_terms, keys)))
    (said,) = (said for said in found["questions"].faults if "terms" in said)
    # Nothing says whose are wrong. Before, the first log was right, and all others were blamed.
    assert re.match(r"silo-3#\d+ \(counted\): this and \S+#\d+ .* have different terms", said)
    assert "nothing says which of the two is right" in said


def test_a_log_that_comes_first_does_not_define_what_was_agreed(asked, tmp_path):
    bundle, keys, *_ = asked

    def first_differs(f):
        first = min(f.logs)
        assert first == "server"
        for nth in (0, 1):
            f.what(first, "asked", nth)["terms"] = OTHER

    found = by_name(verify(doctor(bundle, tmp_path / "forged.zip", first_differs, keys)))
    faults = [said for said in found["questions"].faults if "terms" in said]
    assert len(faults) == 1
    assert "server#" in faults[0]
    assert "different terms" in faults[0]


def test_the_report_says_who_asked_how_often(asked):
    report, case = make_report(asked[0])
    assert [(row.silo, row.asker, row.number, row.limit) for row in report.questions] == [
        ("silo-1", "server", 2, 3),
        ("silo-2", "server", 2, 3),
        ("silo-2", "silo-1", 1, 3),
        ("silo-3", "server", 2, 3),
        ("silo-3", "silo-1", 1, 3),
    ]
    reader = Reader(to_html(report, case))
    assert "Questions to documents" in reader.text
    assert {link[1:] for link in reader.links} <= set(reader.ids)


def found_by(check, study, logs):
    """What a check says about these logs."""
    case = Case(Bundle(study, None, logs, {}, {}, None, None))
    wrong = Faults()
    check(case, wrong)
    return wrong.found, _questions(case)


def test_a_second_name_of_the_server_gives_it_no_second_limit(tmp_path):
    """Adversary: a silo that answers the server twice as often, half of it under the name that the
    server has on the roster; both names have the same key, so all signatures hold."""
    study, logs = rostered(tmp_path, questions=2, asked=4)
    assert [p.name for p in study.roster if p.role == "server"] == ["hub"]
    faults, rows = found_by(counted, study, logs)
    assert len(faults) == 2
    assert all("beyond 2" in said for said in faults)
    assert [row.number for row in rows] == [4]

    def renamed(name):
        made = []
        for entry in logs["silo-1"]:
            what = entry.what
            if isinstance(what, Counted) and what.number > 2:
                what = msgspec.structs.replace(what, asker=name, number=what.number - 2)
            made.append(msgspec.structs.replace(entry, what=what))
        return logs | {"silo-1": made}

    for name in ("hub", "nobody"):
        faults, rows = found_by(counted, study, renamed(name))
        assert sum(f"answered '{name}', and no log is called that" in said for said in faults) == 2
    faults, rows = found_by(counted, study, renamed("server"))  # the same numbers twice
    assert any("counts two questions of server as number 1" in said for said in faults)
    ((asker, number),) = [
        (row.asker, row.number) for row in found_by(agree, study, renamed("hub"))[1]
    ]
    assert (asker, number) == ("server", 4)


def test_with_pins_whoever_has_other_terms_is_named(tmp_path):
    study, logs = rostered(tmp_path, questions=2, asked=1)
    faults, _ = found_by(counted, study, logs)
    assert faults == []

    def changed(entry):
        if not isinstance(entry.what, Asked):
            return entry
        return msgspec.structs.replace(entry, what=msgspec.structs.replace(entry.what, terms=OTHER))

    faults, _ = found_by(counted, study, logs | {"server": [changed(e) for e in logs["server"]]})
    (said,) = faults
    assert said.startswith("server#")
    assert "other terms (sizes, encoder or reduction) than were agreed" in said
