"""A page of the documentation, typed as written, by a newcomer in an empty directory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def type_page(name: str, directory: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """All of ``docs/NAME`` that stands in ``bash`` blocks, but for the port, which others may be
    using; what it left in the background is ended."""
    script = "".join(
        re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.M | re.S)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        script = script.replace("8002", str(probe.getsockname()[1]))
    command = ["bash", "-euo", "pipefail", "-c", script]
    environment = os.environ | {
        "REPO": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    typist = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = typist.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(typist.pid, signal.SIGTERM)
    return subprocess.CompletedProcess(command, typist.returncode, said, errors)
