"""FLARE's own processes, as children of a participant's: they end with it, however it ends.

Run as a module it is the child's first code: ``… .processes server|client WORKSPACE NAME ORG``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from securefedcollm.errors import TransportError

log = logging.getLogger(__name__)

DOOR: Final = "SECUREFEDCOLLM_DOOR"
"""Environment variable: the socket of the participant's own process."""

_PR_SET_PDEATHSIG: Final = 1
_ENTRY: Final = {
    "server": "nvflare.private.fed.app.server.server_train",
    "client": "nvflare.private.fed.app.client.client_train",
}


class FlareProcess:
    """A FLARE server or client process in ``workspace``; its output goes to ``flare.log`` there.

    Must be created, and outlived, by the main thread: it dies with the thread that made it.
    """

    def __init__(
        self, role: str, workspace: Path, *, name: str, org: str, env: Mapping[str, str]
    ) -> None:
        self.workspace = workspace
        self._log = workspace / "flare.log"
        with self._log.open("ab") as output:
            os.fchmod(output.fileno(), 0o600)
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", __name__, role, str(workspace), name, org],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=workspace,
                env={**os.environ, **env},
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def require_running(self) -> None:
        """Raises: TransportError if it has ended, with where to look."""
        if not self.running:
            raise TransportError(
                f"FLARE's process has ended (code {self._process.returncode})",
                hint=f"the reason is at the end of {self._log}; is the port in use already?",
            )

    def stop(self) -> None:
        """End it and everything that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def __enter__(self) -> FlareProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main(role: str, workspace: str, name: str, org: str) -> None:
    """Become FLARE's process."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we had asked
        return
    import runpy

    arguments = ["-m", workspace, "-s", f"fed_{role}.json", "--set", "secure_train=true"]
    arguments += [f"org={org}", "config_folder="]
    if role == "client":
        arguments.insert(5, f"uid={name}")
    sys.argv = [_ENTRY[role], *arguments]
    runpy.run_module(_ENTRY[role], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
