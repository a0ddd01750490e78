"""docs/deploy.md: the rehearsal, typed as written, by a newcomer in an empty directory."""

from __future__ import annotations

import os
import re
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
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(path.read_text() for path in tmp_path.glob("silo-*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs[-3000:]
    assert done.stdout.count("evidence verified offline") == 6
    assert "rounds     2 of 2 finished" in done.stdout
    assert "survivors  silo-1, silo-2, silo-3 (last round)" in done.stdout
    assert "Traceback" not in done.stderr + logs
