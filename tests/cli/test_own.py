"""docs/own.md: own data and models, simulated and for real."""

from __future__ import annotations

import json

import pytest
from securefedcollm_audits.verification.expected import expectation
from securefedcollm_audits.verification.verify import verify

from securefedcollm.federation.roles import newest_adapter
from tests.support.typed import type_page

SILOS = ("nord", "sued", "ost")

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """(directory, what was said) of the whole page."""
    directory = tmp_path_factory.mktemp("own")
    done = type_page("own.md", directory, timeout=1400)
    logs = "".join(path.read_text() for path in directory.glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs[-3000:]
    assert "Traceback" not in done.stderr + logs
    return directory, done.stdout


def test_the_page_on_own_data_and_models(typed):
    directory, said = typed
    assert said.count("evidence verified offline") == 7  # the last three of the real run
    assert said.count("the study is sound") == 1
    results = {
        name: json.loads((directory / "runs" / name / "results.json").read_text())
        for name in ("masks", "ckks", "alone")
    }
    assert all(len(result["rounds"]) == 2 for result in results.values())
    assert {row["model"] for row in results["alone"]["table"]} == {"slm"}
    for result in results.values():
        assert all(0 < silo["epsilon_spent"] <= 8 for silo in result["silos"])
    (plain,) = (json.loads(line) for line in said.splitlines() if line.startswith('{"accuracy"'))
    (ours,) = (
        row["accuracy"].values()
        for row in results["masks"]["table"]
        if (row["model"], row["method"]) == ("slm", "FedCoLLM")
    )
    assert plain == {"accuracy": pytest.approx(next(iter(ours)), abs=0), "count": 120}
    assert (directory / "course.svg").read_text().startswith("<svg")
    assert "<html" in (directory / "report.html").read_text()


def test_every_hospital_has_the_adapter_of_the_real_run_and_has_tried_it(typed):
    directory, said = typed
    (server,) = directory.glob("homes/server/studies/departments-*")
    weights = (server / "adapters" / "slm" / "adapter_model.safetensors").read_bytes()
    for silo in SILOS:
        (run,) = directory.glob(f"homes/{silo}/studies/departments-*")
        assert newest_adapter(run) == 2
        assert (run / "adapters" / "slm" / "adapter_model.safetensors").read_bytes() == weights
        lines = [json.loads(line) for line in (run / "held-out.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == [0, 1, 2]
        last = lines[2]["all"]
        assert last["count"] == 60
        assert (
            f"accuracy {last['accuracy']:.4f} after round 2 of 2"
            in (directory / f"{silo}.log").read_text()
        )
        log_prob = f"{last['gold_log_prob']:.4f}"  # `model evaluate`, typed afterwards
        assert any(line.startswith("│ all ") and log_prob in line for line in said.splitlines())


def test_the_evidence_of_all_hospitals_is_one_bundle_of_a_real_run(typed):
    directory, _ = typed
    verdict = verify(directory / "real.zip", expectation(directory / "real.yaml", []))
    assert verdict.holds
    assert sorted(verdict.participants) == sorted(["server", *SILOS])
    assert verdict.not_compared == []
    assert (verdict.rounds_done, verdict.rounds) == (2, 2)
    # The control: the study of the simulations, which nobody signed, is another.
    other = verify(directory / "real.zip", expectation(directory / "study.yaml", []))
    assert [result.name for result in other.failed] == ["expected"]
    page = (directory / "real.html").read_text()
    assert "<b>REAL RUN</b>" in page
    assert "the study is the one named" in page
    assert "<tr><th>Logs in this bundle</th><td>all" in page
    assert "<td>FedCoLLM</td>" in page
