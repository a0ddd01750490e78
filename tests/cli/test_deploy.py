"""docs/deploy.md: the rehearsal, typed as written, by a newcomer in an empty directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "deploy.md"

pytestmark = [pytest.mark.xdist_group("flare"), pytest.mark.timeout(900)]


def test_the_rehearsal_of_the_deployment_guide(tmp_path):
    script = "".join(re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S))
    with socket.socket() as probe:  # but for the port, which others may be using
        probe.bind(("127.0.0.1", 0))
        script = script.replace("8002", str(probe.getsockname()[1]))
    typist = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = typist.communicate(timeout=800)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(typist.pid, signal.SIGTERM)  # what it left in the background
    logs = "".join(path.read_text() for path in tmp_path.glob("silo-*.log"))
    assert typist.returncode == 0, said[-3000:] + errors[-3000:] + logs[-3000:]
    assert (
        said.count("evidence verified offline") == 8
    )  # 4 of one log; by the server, simulated, compared, merged
    (run,) = tmp_path.glob("server/studies/rehearsal-*")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    for page, logs_here in ((run / "report.html", "server"), (tmp_path / "report.html", "all")):
        text = page.read_text()
        assert "<b>REAL RUN</b>" in text
        assert f"<tr><th>Logs in this bundle</th><td>{logs_here}" in text
        assert "<td>FedCoLLM</td>" in text
    assert "rounds     2 of 2 finished" in said
    assert "survivors  silo-1, silo-2, silo-3 (last round)" in said
    assert "Traceback" not in errors + logs
    for silo in (1, 2, 3):  # each has the last round's model, and measured all on its own records
        (run,) = tmp_path.glob(f"silo-{silo}/studies/*/")
        log = (tmp_path / f"silo-{silo}.log").read_text()
        for which in ("held-out", "training"):
            rounds = [
                json.loads(line) for line in (run / f"{which}.jsonl").read_text().splitlines()
            ]
            assert [line["round"] for line in rounds] == [0, 1, 2]
            whole = rounds[2]["all"]
            said_ = f"loss {-whole['gold_log_prob']:.4f}, accuracy {whole['accuracy']:.4f}"
            assert f"your {which} records: {said_} after round 2 of 2" in log
