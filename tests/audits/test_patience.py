"""A run that its study's patience ended: what an auditor believes of it, and what not.

Adversary: a server that ends a run when it likes, or goes on with it, or hands on another round's
adapters as the best; a silo that hides what it had spent by then.
"""

from __future__ import annotations

import json
import re

import pytest
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.verify import CHECKS, verify

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.entries import canonical
from securefedcollm.federation.messages import model_digest_of
from tests.support.forge import doctor, header_of
from tests.support.runs import NAMES


def by_name(verdict):
    return {result.name: result for result in verdict.results}


@pytest.mark.parametrize(("base", "rounds"), [("patience", (4, 5)), ("joint_patience", (2, 4))])
def test_an_honest_run_that_patience_ended_passes_every_check(request, base, rounds):
    bundle = request.getfixturevalue(f"{base}_bundle")
    verdict = verify(bundle)
    assert verdict.holds
    silent = {r.name for r in verdict.results if r.status != "pass"}
    of_others = {"study-signed", "ciphertexts", "authority", "released-sum", "audits"}
    assert silent == of_others | {"expected"}
    assert verdict.passed == len(CHECKS) - 4
    assert (verdict.rounds_done, verdict.rounds) == rounds
    assert verdict.progress.endswith("rounds finished, when its patience ended the run")
    found = by_name(verdict)
    best = {"patience": 8, "joint_patience": 7}[base]
    assert found["artefacts"].evidence.endswith(f"the best round's as server#{best} (finished)")
    claims = {"patience": 16, "joint_patience": 4}[
        base
    ]  # by DP-SGD what a round cost shows at once
    assert re.match(rf"{4} claims: at most ε = ", found["budget"].evidence), claims


def test_the_report_of_such_a_run_quotes_the_budget_and_not_the_reading(patience_bundle):
    """When to end was chosen on what was released: what was spent until then is no bound."""
    report, _ = make_report(patience_bundle)
    assert "at most (ε = 8, δ = 1e-05)" in report.claim
    assert report.epsilon is None
    assert {row.claimed < 8 for row in report.silos} == {True}


# --- Forgeries with everybody's keys: each is caught by its check --------------------------------


def scored(nth, score):
    """The nth finished round has another score."""
    return lambda f: f.what("server", "finished", nth).update(score=score)


def another_round_as_the_best(f):
    listed = json.loads(f.members["artefacts.json"])
    listed["adapters-best/slm/theta.npy"] = listed["slm/theta.npy"]
    f.members["artefacts.json"] = canonical(listed)


def no_best_round(f):
    listed = json.loads(f.members["artefacts.json"])
    f.members["artefacts.json"] = canonical({k: v for k, v in listed.items() if k[0] != "a"})


def total_left_out(f):
    f.what("silo-1", "settled", -1)["spent"] = None


def total_understated(f):
    f.what("silo-1", "settled", -1)["spent"]["epsilon"] = 1.0


def total_of_an_earlier_round(f):
    earlier = f.what("silo-1", "settled", -2)["spent"]
    f.what("silo-1", "settled", -1)["spent"] = earlier


FORGERIES = [
    (
        "patience",
        "step-order",
        scored(0, 0.3),
        r"server#13 \(round\): round 4 after the study's",
    ),
    ("joint_patience", "step-order", scored(0, -1.0), r"server#7 \(finished\): -1 is no loss"),
    ("record", "step-order", scored(0, 0.5), r"server#4 \(finished\): has a score, and the study"),
    (
        "patience",
        "artefacts",
        another_round_as_the_best,
        r"artefacts.json: adapters-best/slm/theta.npy is not what server#8 \(finished\) made",
    ),
    ("patience", "artefacts", no_best_round, r"adapters-best/slm/theta.npy is not what server#8"),
    ("patience", "artefacts", scored(3, 0.39), None),  # round 4 is the best now: not over
    ("patience", "budget", total_left_out, r"silo-1#\d+ \(settled\): may be the run's last, and d"),
    ("joint_patience", "budget", total_left_out, r"silo-1#\d+ \(settled\): may be the run's last"),
    ("patience", "second-accountant", total_understated, r"silo-1#\d+ .* claims ε = 1.0000; it is"),
    ("patience", "second-accountant", total_of_an_earlier_round, r"claims ε = \d.\d+; it is ≥ \d"),
]


@pytest.mark.parametrize(("base", "check", "edit", "place"), FORGERIES)
def test_a_forgery_is_caught_by_its_check(request, tmp_path, base, check, edit, place):
    honest = request.getfixturevalue(f"{base}_bundle")
    assert by_name(verify(honest))[check].status == "pass"
    verdict = verify(doctor(honest, tmp_path / "forged.zip", edit))
    result = by_name(verdict)[check]
    if place is None:
        assert result.status == "not covered"
        assert "patience" not in verdict.progress
        return
    assert not verdict.holds
    assert any(re.search(place, fault) for fault in result.faults), result.faults


# --- A run that was cut short --------------------------------------------------------------------


def cut_after(rounds):
    """Everybody's log ends with this round, as if the run had; the adapters are that round's."""

    def edit(f):
        ends = [e for e in f.logs["server"] if e["what"]["kind"] == "finished"]
        last = f.logs["server"].index(ends[rounds - 1]) + 1
        f.logs["server"] = f.logs["server"][:last]
        f.heads["server"] = f.heads["server"][:rounds]
        for name in NAMES:
            begins = [
                i
                for i, e in enumerate(f.logs[name])
                if e["what"]["kind"] == "round" and e["what"]["round"] == rounds
            ]
            f.logs[name] = f.logs[name][: begins[0]]
            f.heads[name] = [(f.logs[name][-1], [])]
        files = ends[rounds - 1]["what"]["files"]
        best = min(ends[:rounds], key=lambda e: e["what"]["score"])["what"]["files"]
        also = {f"adapters-best/{path}": digest for path, digest in best.items()}
        f.members["artefacts.json"] = canonical(files | also)

    return edit


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_run_that_was_cut_short_is_under_way_whatever_its_maker_calls_it(
    patience_bundle, tmp_path, rounds
):
    """All participants agree to the cut: nothing is refuted, and nothing is finished."""
    verdict = verify(doctor(patience_bundle, tmp_path / "cut.zip", cut_after(rounds)))
    assert verdict.failed == []
    assert verdict.progress == f"{rounds} of 5 rounds finished"
    found = by_name(verdict)["artefacts"]
    assert (found.status, found.evidence) == (
        "not covered",
        f"the run is under way: {rounds} of 5",
    )


def test_scores_are_fixed_once_silos_have_vouched_for_them(patience_bundle, tmp_path):
    """Adversary: the server alone, which cuts its log and rewrites a score so that patience had
    ended the run there. Silos' logs are theirs."""

    def edit(f):
        scored(0, 0.3)(f)
        f.logs["server"] = f.logs["server"][:13]
        f.heads["server"] = f.heads["server"][:3]
        f.seal(cascade=False)
        return "sealed"

    verdict = verify(doctor(patience_bundle, tmp_path / "forged.zip", edit))
    assert verdict.progress.endswith("when its patience ended the run")  # by its own log
    assert {"one-history", "transcripts"} <= {result.name for result in verdict.failed}


def test_a_round_after_the_end_that_the_server_hides_is_found(patience_bundle, tmp_path):
    """Adversary: a server whose log ends by patience, and which goes on with some silos."""

    def edit(f):
        what = f.what("silo-1", "round", -1) | {"round": 4}
        what["adapter"] = f.what("server", "finished", -1)["adapter"]
        parts = (bytes.fromhex(what[part]) for part in ("base", "layout", "adapter"))
        what["model"] = model_digest_of(*parts, b"").hex()
        what["header"] = header_of(f, what, 0)
        f.logs["silo-1"].append(f.logs["silo-1"][-1] | {"what": what})
        f.heads["silo-1"] = [(f.logs["silo-1"][-1], [])]

    (failed,) = verify(doctor(patience_bundle, tmp_path / "forged.zip", edit)).failed
    assert failed.name == "attempts"
    assert re.search(r"silo-1#\d+ \(round\): the server's log hides", failed.faults[0])


def test_one_silo_s_own_bundle_claims_no_early_end(patience_bundle, tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(make_bundle(patience_bundle.parent, ["silo-2"]))
    verdict = verify(path)
    assert verdict.holds
    assert "patience" not in verdict.progress
    assert by_name(verdict)["budget"].status == "pass"
