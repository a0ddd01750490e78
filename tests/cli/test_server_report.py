"""What ``server`` leaves behind when a run is finished: its evidence, checked, and a report."""

from __future__ import annotations

import json
import shutil

import pytest
from securefedcollm_cli.roles import report_of

from securefedcollm.errors import EvidenceError
from tests.support.report_page import Reader, results_of


@pytest.fixture
def server_run(record_bundle, tmp_path):
    """The server's own directory of a finished run: no silo's log is in it."""
    run = tmp_path / "run"
    shutil.copytree(record_bundle.parent, run, ignore=shutil.ignore_patterns("silos", "*.zip"))
    results_of(record_bundle, run / "results.json")
    return run


def test_the_server_writes_its_report_beside_the_results(server_run, capsys):
    report_of(server_run, as_json=False)
    said = capsys.readouterr().out
    assert f"evidence: {server_run / 'evidence.zip'}, evidence verified offline: " in said
    assert f"report: {server_run / 'report.html'}" in said
    text = Reader((server_run / "report.html").read_text()).text
    assert "2 of 2 rounds finished" in text
    assert "FedAvg 70.0" in text
    report_of(server_run, as_json=True)  # once more, by a server that is started again
    found = json.loads(capsys.readouterr().out)
    assert (found["event"], found["holds"]) == ("report", True)


def test_a_run_of_an_earlier_version_has_a_report_too(server_run, capsys):
    file = server_run / "results.json"
    record = json.loads(file.read_text())
    for absent in ("table", "groups"):
        record.pop(absent, None)
    file.write_text(json.dumps(record))
    report_of(server_run, as_json=False)
    assert "it was given no test questions" in (server_run / "report.html").read_text()


def test_evidence_that_does_not_hold_is_one_line_and_the_page_says_so(server_run, capsys):
    (server_run / "server" / "sbom.json").write_text("{}")
    with pytest.raises(EvidenceError) as caught:
        report_of(server_run, as_json=False)
    assert "the run is finished, but evidence does NOT hold" in str(caught.value)
    assert "audit verify" in str(caught.value.hint)
    assert "evidence does NOT hold" in (server_run / "report.html").read_text()
