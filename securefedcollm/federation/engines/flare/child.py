"""The first code of FLARE's process, and of the process that FLARE starts for a job.

* ``… .child PARENT server|client WORKSPACE NAME ORG``
* ``… .child PARENT job server|client NAME WORD…``
"""

from __future__ import annotations

import logging
import resource
import runpy
import sys
from pathlib import Path
from typing import Final

from securefedcollm.errors import StateError
from securefedcollm.federation.engines.flare.processes import (
    LARGEST_MESSAGE,
    end_with,
    put_aside,
)
from securefedcollm.federation.engines.flare.sandbox import confine, shortcoming

log = logging.getLogger(__name__)

_LARGEST_FILE: Final = 256 << 20
"""Bytes of a file that FLARE writes. Adversary: whoever fills the disk by way of its logs."""
_ENTRY: Final = {
    "server": "nvflare.private.fed.app.server.server_train",
    "client": "nvflare.private.fed.app.client.client_train",
}
_JOB_ENTRY: Final = {
    "server": "nvflare.private.fed.app.server.runner_process",
    "client": "nvflare.private.fed.app.client.worker_process",
}


def main(parent: str, role: str, *words: str) -> None:
    """Become FLARE's process, or that of a job, as a child of ``parent``."""
    if role != "job":  # whose process inherits the wall
        _raise_wall(Path(words[0]))
    end_with(int(parent))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    if role == "job":
        _become_job(*words)
    else:
        _become_parent(role, *words)


def _raise_wall(kit: Path) -> None:
    """Call it before any import of FLARE and any thread starts: a thread would stay outside."""
    try:
        if lacking := shortcoming():
            log.warning("%s", lacking)
        confine(kit)
    except (OSError, StateError) as error:
        sys.exit(f"the wall around FLARE's process cannot be raised: {error}")


def _become_parent(role: str, workspace: str, name: str, org: str) -> None:
    put_aside(Path(workspace) / "audit.log")  # within the wall
    arguments = ["-m", workspace, "-s", f"fed_{role}.json", "--set", "secure_train=true"]
    arguments += [f"org={org}", "config_folder="]
    if role == "client":
        arguments.insert(5, f"uid={name}")
    _become(_ENTRY[role], arguments, role, name, job=False)


def _become_job(role: str, name: str, *words: str) -> None:
    _become(_JOB_ENTRY[role], list(words), role, name, job=True)


def _become(module: str, arguments: list[str], role: str, name: str, *, job: bool) -> None:
    from securefedcollm.federation.engines.flare.hardening import strip

    strip(role, name, job=job, largest=LARGEST_MESSAGE)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
