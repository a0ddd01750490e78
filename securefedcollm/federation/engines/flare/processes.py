"""FLARE's own processes, as children of a participant's: they end with it, however it ends.

:mod:`.child` is the first code in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

from securefedcollm.errors import ConfigError, StateError, TransportError

log = logging.getLogger(__name__)

DOOR: Final = "SECUREFEDCOLLM_DOOR"
"""Environment variable: the socket of the participant's own process."""

_PLACES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "VIRTUAL_ENV")
_WORDS: Final = ("LANG", "LC_ALL")
"""What FLARE's process gets of our environment: places and words."""
_PUT_ASIDE: Final = 64 << 20
"""Bytes of a log that is too long for a process to begin with."""
LARGEST_MESSAGE: Final = 16 << 20
"""Bytes of a message to FLARE's processes; a call carries 2 MiB."""
_LIMITS: Final = {"NVFLARE_STREAMING_MAX_BLOB_SIZE": str(LARGEST_MESSAGE)}
_CHILD: Final = "securefedcollm.federation.engines.flare.child"
_PR_SET_PDEATHSIG: Final = 1


def require_flare() -> None:
    """Raises: ConfigError saying how to install it, if FLARE is not there."""
    if importlib.util.find_spec("nvflare") is None:
        raise ConfigError(
            "NVIDIA FLARE is not installed",
            where="securefedcollm[flare]",
            hint="pip install 'securefedcollm[flare]'",
        )


class FlareProcess:
    """A FLARE server or client process in ``workspace``; it logs to ``flare.log`` beside it.

    Must be created, and outlived, by the main thread: it dies with the thread that made it.

    Adversary: whoever has taken FLARE's process over. What lies in the workspace may be a link to a
    file of this user's by now, so nothing there is opened, renamed or removed by ours.

    Raises:
        StateError: the log cannot be written.
    """

    def __init__(
        self, role: str, workspace: Path, *, name: str, org: str, env: Mapping[str, str]
    ) -> None:
        self.workspace = workspace
        self._log = workspace.parent / "flare.log"
        put_aside(self._log)
        with _appended(self._log) as output:
            self._process = subprocess.Popen(
                _command(role, str(workspace), name, org),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=workspace,
                env={**plain_environment(), **_LIMITS, **env},
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


def put_aside(log_file: Path) -> None:
    with contextlib.suppress(OSError):  # there is none
        if log_file.lstat().st_size > _PUT_ASIDE:
            log_file.replace(log_file.with_name(f"{log_file.name}.1"))


def _appended(log_file: Path) -> BinaryIO:
    try:
        output = log_file.open("ab")
        os.fchmod(output.fileno(), 0o600)
    except OSError as error:
        raise StateError(
            f"{log_file}: cannot be written ({error.strerror})",
            hint="free some space, and let it belong to the user who runs this",
        ) from None
    return output


def plain_environment() -> dict[str, str]:
    """The part of our environment that FLARE's process gets.

    Adversary: the server, whose job may name a variable and have its value sent back. A passphrase
    or a token must not be there to be named. And whoever has taken FLARE's process over: an empty
    or relative place would be one in the kit, from which the next would import before its wall.
    """
    environment = {name: os.environ[name] for name in _WORDS if name in os.environ}
    for name in _PLACES:
        places = re.split("[:;]", os.environ.get(name, ""))  # the loader takes either
        if absolute := [place for place in places if place.startswith("/")]:
            environment[name] = ":".join(absolute)
    return environment


def job_environment() -> dict[str, str]:
    """What the process of a job gets: where the door is, and no more."""
    return {**plain_environment(), **_LIMITS, DOOR: os.environ[DOOR]}


def _command(*words: str) -> list[str]:
    # -P: the directory that it runs in is no place to import from.
    return [sys.executable, "-P", "-u", "-m", _CHILD, str(os.getpid()), *words]


def job_command(role: str, name: str, words: list[str]) -> list[str]:
    """What starts the process of a job as a child of this one."""
    return _command("job", role, name, *words)


def end_with(parent: int) -> None:
    """From now on this process ends with ``parent``, which started it.

    It may have ended already: then no signal comes, but this process is another's child by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, name="parent", daemon=True).start()
