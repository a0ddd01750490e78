"""Homes of participants in a signed study, without a network."""

from __future__ import annotations

from pathlib import Path

import msgspec
import yaml

from securefedcollm.study import Study, load_study
from securefedcollm.study.identity import create_identity, open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path


def make_identities(directory: Path, silos) -> dict[str, Path]:
    """Name → home, each with an identity; ``server`` among them."""
    homes = {name: directory / name for name in (*silos, "server")}
    for name, home in homes.items():
        create_identity(name, home / "identity.json", None)
    return homes


def write_signed(
    study: Study, homes: dict[str, Path], path: Path, unsigned=(), passphrase: str | None = None
) -> Path:
    """The study with these participants on its roster, signed by all but ``unsigned``."""
    identities = {name: read_identity(home / "identity.json") for name, home in homes.items()}
    tree = msgspec.to_builtins(study)
    tree["roster"] = [
        {"name": name, "role": "server" if name == "server" else "silo", "key": identity.public}
        for name, identity in identities.items()
    ]
    path.write_text(yaml.safe_dump(tree))
    study = load_study(path)
    for name, identity in identities.items():
        if name not in unsigned:
            sign_study(study, name, open_identity(identity, passphrase), signatures_path(path))
    return path
