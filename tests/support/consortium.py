"""A consortium on this machine: participants with an identity and FLARE's kit each."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.engines.flare.kit import (
    approve_request,
    create_consortium,
    install_kits,
    request_certificate,
)
from securefedcollm.study.identity import create_identity

SILOS = ("silo-1", "silo-2", "silo-3")
PASSPHRASE = "correct horse battery"
MAIN = "from securefedcollm_cli.main import main; main()"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_homes(directory: Path, silos=SILOS, port: int | None = None) -> dict[str, Path]:
    """A consortium whose participants have joined: name → home."""
    profile = create_consortium(
        directory / "ca", "test", "localhost", port or free_port(), PASSPHRASE
    )
    homes = {}
    for name in (*silos, "server"):
        home = homes[name] = directory / name
        role = "server" if name == "server" else "silo"
        requests = request_certificate(home, profile, name, role)
        signed = [
            approve_request(directory / "ca", request, PASSPHRASE, directory / "signed")
            for request in requests
        ]
        install_kits(home, profile, signed, name)
        create_identity(name, home / "identity.json", None)
    return homes


def evidence_holds(homes: Mapping[str, Path], directory: Path) -> None:
    """Every participant's evidence of its only run, by itself."""
    for name, home in homes.items():
        (run,) = (home / "studies").iterdir()
        path = directory / f"{name}.zip"
        path.write_bytes(make_bundle(run))
        verdict = verify(path)
        assert verdict.holds, [(check.title, check.faults) for check in verdict.failed]


def play_roles(words: Mapping[str, Sequence[Any]], homes: Mapping[str, Path], models: Path) -> None:
    """Every participant's command as a process of its own, to its end; it says what it says in
    ``said.log`` of its home.

    Args:
        words: by participant, such as ``server STUDY`` or ``client STUDY --data FILE``.
    """
    with contextlib.ExitStack() as stack:
        started = {}
        for name, home in homes.items():
            more = ["--home", home, "--models", models]
            more += ["--yes", "--threads", "1"] if words[name][0] == "client" else []
            log = stack.enter_context((home / "said.log").open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-c", MAIN, *words[name], *more],
                stdout=log,
                stderr=log,
                env=os.environ,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started[name] = process
        for name, process in started.items():
            assert process.wait(400) == 0, (homes[name] / "said.log").read_text()[-3000:]
