"""The one FLARE job: it brings no code and no arguments, and every silo knows it by heart."""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from pathlib import Path
from typing import Any, Final

_RELAY: Final = "securefedcollm.federation.engines.flare.relay"

_SERVER: Final = {
    "format_version": 2,
    "workflows": [
        {
            "id": "controller",
            "path": "nvflare.collab.runtime.controller.CollabController",
            "args": {"server_obj_id": "coordinator", "collab_obj_ids": [], "props": {}},
        }
    ],
    "components": [{"id": "coordinator", "path": f"{_RELAY}.CoordinatorRelay", "args": {}}],
}
_CLIENT: Final = {
    "format_version": 2,
    "executors": [
        {
            "tasks": ["*"],
            "executor": {
                "path": "nvflare.collab.runtime.executor.CollabExecutor",
                "args": {"client_obj_id": "silo", "collab_obj_ids": [], "props": {}},
            },
        }
    ],
    "components": [{"id": "silo", "path": f"{_RELAY}.SiloRelay", "args": {}}],
}
APP: Final = {
    "config/config_fed_server.json": json.dumps(_SERVER).encode(),
    "config/config_fed_client.json": json.dumps(_CLIENT).encode(),
}
"""Path in the app → content."""

_SIGNATURES: Final = (".__nvfl_sig.json", ".__nvfl_submitter.crt")
"""FLARE signs every folder of an app, in files of these names. Nothing depends on them here."""
_LARGEST: Final = 64 << 10
"""Bytes of an app on the wire; ours takes about 3 000, signatures and all."""


def write_job(folder: Path, silos: list[str]) -> None:
    """A FLARE job that names our two relays, which every participant has installed."""
    meta = {
        "name": "securefedcollm",
        "resource_spec": {},
        "min_clients": len(silos),
        "deploy_map": {"app": ["server", *silos]},
    }
    write_app(folder / "app")
    (folder / "meta.json").write_text(json.dumps(meta))


def write_app(folder: Path) -> None:
    """What runs at the server and at every silo."""
    for name, content in APP.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def is_job(job: Any) -> bool:
    """Whether ``job`` is a lower-case UUID, as FLARE's server makes them."""
    try:
        return isinstance(job, str) and str(uuid.UUID(job)) == job
    except ValueError:
        return False


def fault_of(job: Any, app: Any) -> str:
    """What is wrong with a job that a server sent, or nothing. Nothing of it is unpacked.

    Adversary: the server.
    """
    if not is_job(job):
        return f"{str(job)[:80]!r} is no job's number"
    if not isinstance(app, bytes) or len(app) > _LARGEST:
        return "it is larger than the app of securefedcollm"
    try:
        with zipfile.ZipFile(io.BytesIO(app)) as archive:
            for member in archive.infolist():
                fault = _fault_in(archive, member)
                if fault:
                    return fault
            missing = set(APP) - set(archive.namelist())
    except Exception:  # of a dozen kinds, from zlib to struct
        return "it is no ZIP file"
    return f"it lacks {sorted(missing)}" if missing else ""


def _fault_in(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    name = member.filename.removeprefix("./")
    if member.is_dir() and name in {"config/"}:
        return ""
    if name.removeprefix("config/") in _SIGNATURES:
        return ""
    if name not in APP:
        return f"it brings a file {name[:80]!r}"
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return f"its {name} is packed in a way that may take any memory to unpack"
    with archive.open(member) as content:
        same = content.read(len(APP[name]) + 1) == APP[name]
    return "" if same else f"its {name} is not that of this version of securefedcollm"
