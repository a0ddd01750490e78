"""``audit …``: the commands, their output for people and machines, and their exit codes."""

from __future__ import annotations

import json
import shutil

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.aggregation import answering
from securefedcollm.aggregation.masking import silo
from securefedcollm.errors import ConfigError, EvidenceError, SecureFedCoLLMError
from securefedcollm.evidence.bundle import read_members
from securefedcollm.primitives import sha256
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study.identity import create_identity
from tests.support.forge import doctor
from tests.support.runs import ALL_KEYS


def call(*arguments):
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    return result.exit_code, result.stdout


def test_bundle_verify_and_compare(record_bundle, tmp_path):
    run, mine = record_bundle.parent, tmp_path / "mine.zip"
    code, out = call("bundle", run, "--out", mine, "--only", "server", "--only", "silo-3", "--json")
    assert (code, json.loads(out)) == (0, {"bundle": str(mine), "bytes": mine.stat().st_size})
    code, out = call("verify", mine)
    assert code == 0
    assert out.splitlines()[-1] == "evidence verified offline: 25 checks passed"
    assert "not compared: the study (--study FILE" in out
    assert f"key    silo-3       {ALL_KEYS['silo-3'].public.hex()}" in out
    assert "No silo had both kinds" in out
    code, out = call("verify", mine, "--json")
    assert (code, json.loads(out)["holds"]) == (0, True)
    assert len(json.loads(out)["results"]) == 31
    assert len(json.loads(out)["not_compared"]) == 2
    key = ALL_KEYS["silo-3"].public.hex()
    arguments = ("verify", mine, "--study", run / "study.yaml", "--key", f"silo-3={key}", "--json")
    code, out = call(*arguments)
    assert (code, len(json.loads(out)["not_compared"])) == (0, 1)
    code, out = call("verify", mine, "--key", f"silo-3={key[::-1]}")
    assert code == 1
    assert "checks failed (expected)" in out
    code, out = call("compare", mine, record_bundle)
    assert code == 0
    assert "common-logs" in out
    code, out = call("compare", mine, record_bundle, "--json")
    assert json.loads(out)["participants"] == ["server", "silo-3", "silo-1", "silo-2", "silo-4"]


def test_a_doctored_bundle_exits_with_1_and_names_the_entry(record_bundle, tmp_path):
    def understate(forger):
        forger.what("silo-1", "settled", -1)["spent"]["epsilon"] = 1.0

    forged = doctor(record_bundle, tmp_path / "forged.zip", understate)
    code, out = call("verify", forged)
    assert code == 1
    assert "evidence does NOT hold: 1 of the checks failed (second-accountant)" in out
    assert "silo-1#12 (settled)" in out


def test_report_writes_a_page_or_json_and_says_when_a_bundle_does_not_hold(
    record_bundle,
    tmp_path,
):
    page = tmp_path / "report.html"
    assert call("report", record_bundle, "--html", page) == (0, f"wrote {page}\n")
    assert page.read_text().startswith("<!doctype html>")
    code, out = call("report", record_bundle, "--json")
    assert code == 0
    assert json.loads(out)["epsilon"] == pytest.approx(2.89, abs=0.01)
    forged = doctor(
        record_bundle,
        tmp_path / "forged.zip",
        lambda f: f.what("silo-1", "settled", -1)["spent"].update(epsilon=1.0),
    )
    assert call("report", forged, "--html", page)[0] == 1
    assert "evidence does NOT hold" in page.read_text()
    with pytest.raises(ConfigError, match="--html: nothing to write"):
        call("report", record_bundle)


def test_a_report_compares_with_what_is_known_as_verify_does(record_bundle, tmp_path):
    """Adversary: an outsider who makes up a study, five hospitals and their keys."""
    own, page = record_bundle.parent / "study.yaml", tmp_path / "report.html"
    other = tmp_path / "other.yaml"
    other.write_text(own.read_text().replace("rounds: 2", "rounds: 3"))
    key = ALL_KEYS["silo-3"].public.hex()
    for known, fault in [
        ((), ""),
        (("--study", own, "--key", f"silo-3={key}"), ""),  # the control
        (("--study", other), "study.json: is study "),
        (("--key", f"silo-3={'ab' * 32}"), "silo-3: has the key "),
        (("--key", f"hospital-9={key}"), "hospital-9 takes no part"),
    ]:
        code, out = call("report", record_bundle, *known, "--html", page, "--json")
        verified, said = call("verify", record_bundle, *known, "--json")
        assert code == verified == (1 if fault else 0)
        of_verify, of_report = json.loads(said), json.loads(out)["verdict"]
        for name in ("results", "not_compared"):
            assert of_report[name] == of_verify[name]
        text = page.read_text()
        assert fault in text
        assert ("evidence does NOT hold: 1 of the checks failed (expected)" in text) == bool(fault)
        assert ("the study is the one named; 1 key as named" in text) == (len(known) == 4)
    with pytest.raises(ConfigError, match="--key: "):
        call("report", record_bundle, "--key", "silo-3=abc", "--html", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_bad_input_is_one_line(record_bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.zip: there is no such file"):
        call("verify", tmp_path / "nowhere.zip")
    with pytest.raises(ConfigError, match=r"is not a run directory"):
        call("bundle", tmp_path)
    with pytest.raises(ConfigError, match=r"no evidence log of silo-9"):
        call("bundle", record_bundle.parent, "--only", "silo-9")
    with pytest.raises(SecureFedCoLLMError, match=r"cannot be written"):
        call("bundle", record_bundle.parent, "--out", tmp_path / "none" / "x.zip")


def test_merge_joins_refuses_and_says_what_the_joined_logs_show(record_bundle, tmp_path):
    run, out = record_bundle.parent, tmp_path / "merged.zip"
    paths = [tmp_path / f"{name}.zip" for name in ("server", "silo-1", "silo-2")]
    for path in paths:
        call("bundle", run, "--only", path.stem, "--out", path)
    code, said = call("merge", *paths, "--out", out)
    assert code == 0
    assert f"wrote {out}" in said
    assert "  server, silo-1, silo-2\nthere is no log of silo-3, silo-4\n" in said
    assert said.splitlines()[-1] == "evidence verified offline: 25 checks passed"
    code, said = call("merge", *paths, "--out", out, "--json")
    assert (code, json.loads(said)["participants"]) == (0, ["server", "silo-1", "silo-2"])
    assert call("verify", out)[0] == 0

    before = out.read_bytes()
    lie = doctor(
        paths[1],
        tmp_path / "lie.zip",
        lambda f: f.what("silo-1", "opened").update(version="[/red]\x1b[2J"),
    )
    with pytest.raises(EvidenceError, match=r"silo-1 signed two different logs.*equivocation"):
        call("merge", *paths, lie, "--out", out)
    with pytest.raises(ConfigError, match="is one of the bundles to join"):
        call("merge", *paths, "--out", paths[0])
    assert out.read_bytes() == before  # nothing is written of what is refused

    def shown_another(forger):
        forger.what("silo-2", "witnessed")["root"] = "0" * 64

    lie = doctor(paths[2], tmp_path / "lie.zip", shown_another)
    code, said = call("merge", *paths[:2], lie, "--out", out)
    assert code == 1
    assert "was shown another server log" in said


def test_protocol_plays_attacks_and_says_what_was_learnt():
    code, out = call("protocol", "--case", "both_lists", "--case", "copied_keys", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["held"]
    assert [(o["case"], o["adversary"], o["learnt"]) for o in found["outcomes"]] == [
        ("both_lists", "server", []),
        ("copied_keys", "silo", []),
    ]
    code, out = call("protocol", "--case", "split_survivors")
    assert code == 0
    assert "1 of 1 attacks learnt nothing" in out
    with pytest.raises(ConfigError, match="there is no attack 'x'"):
        call("protocol", "--case", "x")


def test_builds_with_a_check_missing_are_caught(monkeypatch):
    monkeypatch.setattr(silo, "check_agreements", lambda *_: None)
    code, out = call("protocol", "--case", "split_survivors")
    assert code == 1
    assert "1 of 1 attacks were not stopped: split_survivors" in out
    monkeypatch.setattr(answering, "record_once", lambda *_: None)
    code, out = call("protocol", "--case", "second_attempt", "--json")
    assert code == 1
    (outcome,) = json.loads(out)["outcomes"]
    assert outcome["learnt"]


def test_a_privacy_audit_is_printed_and_written_down(silo_bundle, tmp_path):
    """The run's own study and noise; then the bundle has the finding."""
    run = tmp_path / "run"
    shutil.copytree(silo_bundle.parent, run)
    key = tmp_path / "silo-3.json"
    create_identity("silo-3", key, None, random=lambda n: sha256(b"silo-3")[:n])
    before = read_members(silo_bundle)["logs/silo-3.jsonl"].splitlines()
    arguments = ("mechanism", run / "study.yaml", "--trials", 4000, "--run", run)
    code, out = call(*arguments, "--owner", "silo-3", "--identity", key, "--json")
    found = json.loads(out)
    assert (code, found["held"], found["entry"]) == (0, True, f"silo-3#{len(before)} (audited)")
    assert found["caveat"] == "95 % lower bound for this attack; not a guarantee"
    assert found["bound"] < found["claimed"]
    call("bundle", run)
    _, out = call("verify", run / "evidence.zip", "--json")
    (result,) = [r for r in json.loads(out)["results"] if r["name"] == "audits"]
    assert (result["status"], result["evidence"]) == (
        "pass",
        "1 audit (mechanism): nothing was refuted",
    )
    with pytest.raises(ConfigError, match="there is no key of silo-9"):
        call(*arguments, "--owner", "silo-9")


def test_a_build_without_noise_fails_for_people_too(silo_bundle, monkeypatch):
    monkeypatch.setattr(NoiseSource, "add_discrete_gaussian", lambda self, values, sigma: None)
    code, out = call("mechanism", silo_bundle.parent / "study.yaml", "--trials", 4000)
    assert code == 1
    assert "FAIL: " in out
    assert "times the sensitivity; " in " ".join(out.split())


def test_an_audit_of_the_whole_run_says_what_it_would_notice(silo_bundle):
    arguments = ("whole-run", silo_bundle.parent / "study.yaml", "--trials", 4000)
    code, out = call(*arguments)
    assert code == 0
    assert "would notice a build whose noise is below 0." in " ".join(out.split())
    code, out = call(*arguments, "--json")
    found = json.loads(out)
    assert (code, found["audit"], found["held"]) == (0, "whole-run", True)
    assert found["power"].startswith("would notice a build whose noise is below 0.")
    assert found["bound"] < found["claimed"]


@pytest.mark.parametrize("command", ["mechanism", "whole-run", "one-run", "canaries", "inversion"])
def test_the_attacks_explain_themselves(command):
    code, out = call(command, "--help")
    assert code == 0
    assert "Exit code 0: not refuted; 1: refuted; 2: bad input." in " ".join(out.split())


def test_a_ledger_that_was_put_back_is_not_bundled(record_bundle, tmp_path):
    """Adversary: the operator of silo-1, who restores an empty ledger to spend its budget again."""
    run = tmp_path / "run"
    shutil.copytree(record_bundle.parent, run)
    for file in (run / "silos" / "silo-1").glob("ledger.sqlite*"):
        file.unlink()
    shutil.copy(run / "silos" / "silo-2" / "ledger.sqlite", run / "silos" / "silo-1")
    with pytest.raises(EvidenceError, match="ledger"):
        call("bundle", run)
