"""Homes of participants in a signed study, without a network."""

from __future__ import annotations

from pathlib import Path

import yaml

from securefedcollm.study import Study, load_study
from securefedcollm.study.identity import create_identity, open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path


def make_identities(directory: Path, silos, authority: bool = False) -> dict[str, Path]:
    """Role or silo's name → home, each with an identity; the server is called ``hub``."""
    homes = {name: directory / name for name in (*silos, "server")}
    if authority:
        homes["authority"] = directory / "authority"
    for name, home in homes.items():
        called = {"server": "hub", "authority": "auditor"}.get(name, name)
        create_identity(called, home / "identity.json", None)
    return homes


def write_signed(
    study: Study, homes: dict[str, Path], path: Path, unsigned=(), passphrase: str | None = None
) -> Path:
    """The study with these participants on its roster, signed by all but ``unsigned`` names."""
    identities = {name: read_identity(home / "identity.json") for name, home in homes.items()}
    tree = study.tree
    tree["roster"] = [
        {
            "name": identity.name,
            "role": name if name in {"server", "authority"} else "silo",
            "key": identity.public,
        }
        for name, identity in identities.items()
    ]
    path.write_text(yaml.safe_dump(tree))
    study = load_study(path)
    for identity in identities.values():
        if identity.name not in unsigned:
            sign_study(
                study, identity.name, open_identity(identity, passphrase), signatures_path(path)
            )
    return path
