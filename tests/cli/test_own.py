"""docs/own.md: own data and models, typed as written, by a newcomer in an empty directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_the_page_on_own_data_and_models(tmp_path):
    document = (ROOT / "docs" / "own.md").read_text()
    script = "".join(re.findall(r"^```bash\n(.*?)^```$", document, re.M | re.S))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "REPO": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr + (tmp_path / "ckks.log").read_text()
    assert done.stdout.count("evidence verified offline") == 4
    assert done.stdout.count("the study is sound") == 1
    results = {
        name: json.loads((tmp_path / "runs" / name / "results.json").read_text())
        for name in ("masks", "ckks", "alone")
    }
    assert all(len(result["rounds"]) == 2 for result in results.values())
    assert {row["model"] for row in results["alone"]["table"]} == {"slm"}
    for result in results.values():
        assert all(0 < silo["epsilon_spent"] <= 8 for silo in result["silos"])
    plain = json.loads(done.stdout.strip().splitlines()[-1])
    (ours,) = (
        row["accuracy"].values()
        for row in results["masks"]["table"]
        if (row["model"], row["method"]) == ("slm", "FedCoLLM")
    )
    assert plain == {"accuracy": pytest.approx(next(iter(ours)), abs=0), "count": 120}
    assert (tmp_path / "course.svg").read_text().startswith("<svg")
    assert "<html" in (tmp_path / "report.html").read_text()
