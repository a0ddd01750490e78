"""How far a run went and what kind it was, by whichever logs are there: simulated, and for real."""

from __future__ import annotations

import contextlib
import json

import msgspec
import pytest
from securefedcollm_audits.report.page import to_html
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification import table
from securefedcollm_audits.verification.expected import expectation
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle, pack, read_members
from securefedcollm.evidence.entries import canonical
from securefedcollm.federation import roles
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study
from tests.support.arithmetic import ArithmeticServer
from tests.support.forge import doctor
from tests.support.members import make_identities, write_signed
from tests.support.report_page import Reader
from tests.support.runs import RecordedSilo, recorded_study

SILOS = ("silo-1", "silo-2", "silo-3")


@pytest.fixture(scope="module")
def real_bundles(tmp_path_factory):
    """The bundles that each participant of a signed study makes at its own home."""
    directory = tmp_path_factory.mktemp("real")
    study = recorded_study(study="real", rounds=3, silos={"count": 3})
    homes = make_identities(directory, SILOS)
    path = write_signed(study, homes, directory / "study.yaml")
    with contextlib.ExitStack() as stack:
        members = {
            name: stack.enter_context(
                roles.take_part(
                    load_study(path), path, home, "server" if name == "server" else "silo", str
                )
            )
            for name, home in homes.items()
        }

        def party(name, progress):
            work = RecordedSilo(name, members[name].study)
            return roles.silo_session(members[name], work, progress=progress, threads=1)

        with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
            roles.coordinate(members["server"], engine, ArithmeticServer())
        found = {}
        for name, member in members.items():
            found[name] = directory / f"{name}.zip"
            found[name].write_bytes(make_bundle(member.run))
    return found


def text_of(path):
    return Reader(to_html(*make_report(path))).text


def test_a_silo_s_own_bundle_says_what_it_helped_to_finish(real_bundles):
    verdict = verify(real_bundles["silo-2"])
    assert verdict.holds
    assert (verdict.rounds_done, verdict.rounds) == (3, 3)
    said = "silo-2 helped to open the sums of 3 of 3 rounds; no log of the server is here"
    assert said in table.text(verdict)
    text = text_of(real_bundles["silo-2"])
    assert said in text
    assert "What silo-2 gave to the secure sums of 3 of 3 rounds is (ε = " in text
    assert "0 finished of 3" not in text
    assert "3 of 3 rounds finished" in table.text(verify(real_bundles["server"]))


def test_only_what_the_silo_s_log_shows_is_counted(record_bundle, silo_bundle, tmp_path):
    """It left before the last sum was opened; its sums beyond the study's count for nothing."""
    own = tmp_path / "own.zip"
    own.write_bytes(make_bundle(silo_bundle.parent, ["silo-4"]))  # lost in round 2
    assert verify(own).rounds_done == 1
    own.write_bytes(make_bundle(record_bundle.parent, ["silo-1"]))
    assert verify(own).rounds_done == 2

    def beyond(f):
        f.what("silo-1", "unmasked", -1)["round"] = 2**53 - 1

    assert verify(doctor(own, tmp_path / "beyond.zip", beyond)).rounds_done == 1


def test_joint_steps_count_as_rounds_once_the_last_is_open(joint_bundle, tmp_path):
    own = tmp_path / "own.zip"
    own.write_bytes(make_bundle(joint_bundle.parent, ["silo-1"]))
    assert verify(own).rounds_done == 2  # of four sums


def test_the_authority_s_own_bundle_says_what_it_opened(authority_bundle, tmp_path):
    own = tmp_path / "own.zip"
    own.write_bytes(make_bundle(authority_bundle.parent, ["authority"]))
    verdict = verify(own)
    assert verdict.rounds_done == 2
    assert "the sums of 2 of 2 rounds opened, by the authority's log" in table.text(verdict)


def test_a_real_run_and_a_simulation_are_told_apart(real_bundles, record_bundle, tmp_path):
    report, case = make_report(real_bundles["server"])
    assert report.header.kind == "REAL RUN"
    assert (report.header.server, report.header.silos) == ("hub", list(SILOS))
    text = Reader(to_html(report, case)).text
    assert "REAL RUN All participants named in the study signed it" in text
    assert "server: hub; 3 silos: silo-1, silo-2, silo-3" in text
    assert "SIMULATION" not in text
    text = text_of(record_bundle)
    assert "SIMULATION The study names no participants and nobody signed it" in text
    assert "REAL RUN" not in text


def test_a_study_that_somebody_did_not_sign_is_no_real_run(real_bundles, tmp_path):
    """Adversary: whoever puts five organisations on a roster and signs for one."""
    members = read_members(real_bundles["silo-1"])
    del members["manifest.json"]
    envelope = json.loads(members["study.signatures.json"])
    envelope["signatures"].pop()
    members["study.signatures.json"] = canonical(envelope)
    path = tmp_path / "unsigned.zip"
    path.write_bytes(pack(members))
    assert make_report(path)[0].header.kind == "NOT ESTABLISHED"
    assert "see study-signed in section 6" in text_of(path)


def test_a_made_up_consortium_is_no_real_run_to_who_knows_better(real_bundles):
    """Adversary: whoever makes keys for three hospitals, signs for all and runs the study."""
    bundle = real_bundles["server"]
    keys = verify(bundle).keys
    own = expectation(None, [f"silo-1={keys['silo-1']}"])
    report, case = make_report(bundle, expected=own)
    assert report.header.kind == "REAL RUN"
    known = "compared it with their own knowledge: 1 key as named; the rest was not"
    assert known in Reader(to_html(report, case)).text
    report, case = make_report(bundle, expected=expectation(None, [f"silo-1={keys['silo-2']}"]))
    assert report.header.kind == "NOT ESTABLISHED"
    text = Reader(to_html(report, case)).text
    assert "REAL RUN" not in text
    assert "see expected in section 6" in text
    assert "evidence does NOT hold" in text


def test_the_parts_of_a_real_run_are_merged(real_bundles, tmp_path):
    path = tmp_path / "merged.zip"
    path.write_bytes(merge(list(real_bundles.values())))
    report, _ = make_report(path)
    assert report.verdict.holds
    assert report.header.whole
    assert report.header.kind == "REAL RUN"
    status = {result.name: result.status for result in report.verdict.results}
    names = ("study-signed", "witnesses", "transcripts", "attempts", "artefacts", "budget")
    assert {name: status[name] for name in names} == dict.fromkeys(names, "pass")


def test_the_run_s_dates_are_those_of_its_logs(record_bundle, audited_bundle):
    report, case = make_report(record_bundle)
    times = sorted(entry.time for log in case.logs.values() for entry in log)
    assert report.header.began == times[0].replace("T", " ").rstrip("Z")
    assert report.header.ended == times[-1].replace("T", " ").rstrip("Z")
    # An audit that came later is no part of the run.
    assert make_report(audited_bundle)[0].header.ended == report.header.ended
    assert msgspec.json.decode(msgspec.json.encode(report))["header"]["kind"] == "SIMULATION"
