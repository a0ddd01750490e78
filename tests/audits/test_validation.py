"""A run with a private validation: what an auditor recomputes of its counts, and what is found.

Adversary: a server that shows better counts than were opened, or asks silos about another model; an
operator who charges the counts to nobody, or for more noise than there was.
"""

from __future__ import annotations

import pytest
from securefedcollm_audits.report.page import to_html
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.verify import CHECKS, verify

from securefedcollm.evidence.bundle import make_bundle
from tests.support.forge import by_name, doctor
from tests.support.runs import RecordedRun, recorded_study
from tests.support.validated import VALIDATED, AskedRecordedSilo

BOTH = ["validated", "joint_validated"]


@pytest.mark.parametrize("base", BOTH)
def test_an_honest_run_passes_every_check(request, base):
    verdict = verify(request.getfixturevalue(f"{base}_bundle"))
    assert verdict.holds
    silent = {r.name for r in verdict.results if r.status != "pass"}
    of_others = {"study-signed", "ciphertexts", "authority", "released-sum", "audits"}
    assert silent == of_others | {"expected"}
    assert verdict.passed == len(CHECKS) - 4
    assert verdict.rounds_done == verdict.rounds
    assert "noised counts" in by_name(verdict)["mechanism"].evidence


def finished(nth, **changes):
    return lambda f: f.what("server", "finished", nth).update(**changes)


def without_counts(f):
    f.what("server", "finished", 1).pop("counts")


def without_score(f):
    f.what("server", "finished", 0).pop("score")


def one_more_right(f):
    f.what("server", "finished", 1)["counts"][0] += 1


def right_and_score(f):
    """Edited as consistently as the server alone can: the sum's hash is not its to change."""
    what = f.what("server", "finished", 1)
    right, wrong = what["counts"]
    what.update(counts=[right + wrong, 0], score=1.0)


def opened_for_others(f):
    f.what("silo-1", "unmasked", 1)["seeds_of"].pop()


def other_noise(f):
    """More noise is charged for than the header names, in every silo's validations."""
    for log in f.logs.values():
        for entry in log:
            for event in entry["what"].get("events", []):
                if event["kind"] == "rounded-gaussian" and event["values"] == 2:
                    event["share_sigma"] *= 2


def charged_nothing(f):
    """Every silo reserves no release at all for its validations."""
    for log in f.logs.values():
        for entry in log:
            if any(event.get("values") == 2 for event in entry["what"].get("events", [])):
                entry["what"]["events"] = []


def charged_to_the_tuned(f):
    accounts = {}
    for entry in f.logs["silo-1"]:
        if "account" in entry["what"]:
            accounts.setdefault(entry["what"]["round"], entry["what"]["account"])
    for entry in f.logs["silo-1"]:
        if "account" in entry["what"]:
            entry["what"]["account"] = accounts[0]


def total_left_out(f):
    """What the tuned records have spent, of which no later charge speaks."""
    f.what("silo-1", "settled", -2)["spent"] = None


def total_understated(f):
    f.what("silo-1", "settled", -1)["spent"]["epsilon"] = 1.0


def as_dpsgd(f):
    """The charge of the counts says that it was sampled."""
    for nth in range(3):
        events = f.what("silo-1", "reserved", 2 * nth + 1)["events"]
        events[0]["q"] = 0.5


def other_noises_share(f):
    """Each silo's own noise counts, and no other's."""
    for what in (f.what("silo-1", "reserved", 1), f.what("silo-1", "settled", 1)):
        what["events"][0]["shares"] = 4


FORGERIES = [
    ("step-order", "says other counts than its validation opened", one_more_right),
    ("step-order", "says other counts than its validation opened", right_and_score),
    ("step-order", "leaves out the counts of its validation", without_counts),
    ("step-order", "is not the accuracy that follows from its counts", finished(0, score=0.99)),
    ("step-order", "is not the accuracy that follows from its counts", without_score),
    ("one-sum", "round 1, validation was opened for others too", opened_for_others),
    ("mechanism", "charges for other noise than the round's header names", other_noise),
    ("mechanism", "is of 0 releases; the study's is one", charged_nothing),
    ("mechanism", "is not one pair of noised counts", as_dpsgd),
    ("mechanism", "counts other silos' noise", other_noises_share),
    ("ledger-order", "charges another data set or unit", charged_to_the_tuned),
    ("budget", "does not state the total ε spent", total_left_out),
    ("second-accountant", "claims ε = 1.0000; it is ≥", total_understated),
]


@pytest.mark.parametrize(("check", "says", "edit"), FORGERIES)
def test_a_forgery_is_found(validated_bundle, tmp_path, check, says, edit):
    verdict = verify(doctor(validated_bundle, tmp_path / "forged.zip", edit))
    assert says in by_name(verdict)[check].faults[0]


def test_noised_sums_that_nobody_is_charged_for_are_found(joint_validated_bundle, tmp_path):
    """The updates' sums as well as the counts."""

    def edit(f):
        for entry in f.logs["silo-1"]:
            if "events" in entry["what"]:
                entry["what"]["events"] = []

    verdict = verify(doctor(joint_validated_bundle, tmp_path / "forged.zip", edit))
    assert len(by_name(verdict)["mechanism"].faults) > 2
    assert "is of 0 releases" in by_name(verdict)["mechanism"].faults[0]


def test_counts_in_a_study_that_sets_nothing_aside_are_found(record_bundle, tmp_path):
    edit = finished(0, counts=[5, 5])
    verdict = verify(doctor(record_bundle, tmp_path / "forged.zip", edit))
    assert "the study sets no records aside" in by_name(verdict)["step-order"].faults[0]


def test_asking_about_another_model_than_the_round_ended_with_is_found(validated_bundle, tmp_path):
    def edit(f):
        f.what("server", "round", 1)["adapter"] = "ab" * 32

    verdict = verify(doctor(validated_bundle, tmp_path / "forged.zip", edit))
    assert "asks silos about another adapter" in " ".join(by_name(verdict)["models"].faults)


@pytest.mark.parametrize("base", BOTH)
def test_the_report_has_the_accuracy_of_every_round_with_its_interval(request, base):
    report, case = make_report(request.getfixturevalue(f"{base}_bundle"))
    rounds = {"validated": 3, "joint_validated": 2}[base]
    assert [row.round for row in report.private] == list(range(1, rounds + 1))
    for row in report.private:
        assert row.silos == 4
        assert abs(row.accuracy - 0.5) < 0.35
        assert 0.0 < row.margin < 0.4
        assert row.place.endswith("(finished)")
    page = to_html(report, case)
    assert "records that the silos set aside" in page
    assert f"{100 * report.private[0].accuracy:.1f}" in page
    # No record is in both parts, so no ε is the sum of both.
    assert all(row.claimed <= 8.0 for row in report.silos)
    assert report.epsilon <= 8.0


def test_a_run_that_the_counts_ended_passes(tmp_path):
    """Without noise all rounds are equal, and the first is the best."""
    study = recorded_study(
        **VALIDATED, rounds=4, privacy=None, keep={"metric": "private", "patience": 1}
    )
    (tmp_path / "run").mkdir()
    RecordedRun(tmp_path / "run", study, workload=AskedRecordedSilo).go()
    path = tmp_path / "evidence.zip"
    path.write_bytes(make_bundle(tmp_path / "run"))
    verdict = verify(path)
    assert verdict.holds
    assert (verdict.rounds_done, verdict.rounds) == (2, 4)
    forged = doctor(path, tmp_path / "forged.zip", one_more_right)
    assert "other counts" in by_name(verify(forged))["step-order"].faults[0]
