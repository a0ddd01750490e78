"""What a kit may do: run our relay, and nothing that a server sends.

Adversary: the server, which submits jobs, and its administrators. At a silo FLARE loads only
classes of the allow-list, refuses jobs that bring code and streams no logs; :mod:`.hardening`
takes its shell and other commands away. Its two processes speak TLS to each other as well, or any
process of the machine could join in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from securefedcollm.federation.files import write_durably

_RELAY: Final = "securefedcollm.federation.engines.flare.relay."
ALLOWED: Final = (
    _RELAY + "SiloRelay",
    _RELAY + "CoordinatorRelay",
    "nvflare.collab.runtime.executor.CollabExecutor",
    "nvflare.collab.runtime.controller.CollabController",
)
_NOBODY: Final = {
    "submit_job": "none",
    "clone_job": "none",
    "manage_job": "none",
    "download_job": "none",
    "view": "none",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
    "server-predeployed-flwr": "none",
}


def lock_down(kit: Path, kind: str, *, final: Path) -> None:
    """Write the local policy into a fresh kit, and remove what would start FLARE unhardened.

    FLARE's readme has the reader run ``start.sh``: a client without :mod:`.hardening`, which shows
    this machine's files to whoever asks.

    Args:
        kind: ``server`` or ``client``.
        final: where the kit will lie.
    """
    for script in (*(kit / "startup").glob("*.sh"), *kit.glob("readme*")):
        script.unlink()
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = list(ALLOWED)
    resources["allow_log_streaming"] = False
    keep = {"job_scheduler", "job_manager", "job_store", "process_launcher"}
    keep |= {"resource_manager", "resource_consumer"}
    resources["components"] = [c for c in resources["components"] if c["id"] in keep]
    if kind == "server":
        _server(resources, final)
    _write(local / "resources.json", resources)
    inside = {"scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}}
    _write(local / "comm_config.json", {"internal": inside})
    lead = {**_NOBODY, "submit_job": "any", "manage_job": "n:submitter", "view": "any"}
    permissions = {"project_admin": _NOBODY, "org_admin": _NOBODY, "lead": lead, "member": _NOBODY}
    _write(local / "authorization.json", {"format_version": "1.0", "permissions": permissions})
    log = json.loads((local / "log_config.json.default").read_text())
    # One file, which our process opened (flare.log); the others would be beside it in duplicate.
    log["loggers"]["root"] = {"level": "INFO", "handlers": ["consoleHandler"]}
    log["handlers"] = {"consoleHandler": log["handlers"]["consoleHandler"]}
    log["handlers"]["consoleHandler"]["formatter"] = "baseFormatter"
    _write(local / "log_config.json", log)


def _server(resources: dict[str, Any], final: Path) -> None:
    """Private places instead of a shared temporary folder; a short memory for lost silos."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(
        final / "snapshots"
    )
    for server in resources["servers"]:
        server["heart_beat_timeout"] = 30
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(final / "jobs")
        if component["id"] == "job_scheduler":
            component["args"]["max_jobs"] = 1


def _write(path: Path, tree: dict[str, Any]) -> None:
    write_durably(path, json.dumps(tree, indent=2).encode())
