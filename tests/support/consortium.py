"""A consortium on this machine: participants with an identity and FLARE's kit each."""

from __future__ import annotations

import socket
from pathlib import Path

from securefedcollm.federation.engines.flare.kit import (
    approve_request,
    create_consortium,
    install_kits,
    request_certificate,
)
from securefedcollm.study.identity import create_identity

SILOS = ("silo-1", "silo-2", "silo-3")
PASSPHRASE = "correct horse battery"


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
