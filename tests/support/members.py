"""Homes of participants in a signed study, without a network."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import yaml

from securefedcollm.federation import roles
from securefedcollm.study import Study, load_study
from securefedcollm.study.identity import create_identity, open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path
from tests.support.arithmetic import make_study


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


SILOS = ("silo-1", "silo-2", "silo-3")


def study(**changes):
    local = {"steps": 5, "batch_size": 8, "learning_rate": 0.1}
    usual = {"study": "roles", "rounds": 2, "silos": {"count": 3}, "local": local}
    return make_study(**usual | changes)


def enter(path, home, role, passphrase=lambda: ""):
    return roles.take_part(load_study(path), path, home, role, passphrase)


def enter_all(stack, path, homes):
    """Every participant, by its name or, but for silos, by its role."""
    return {
        name: stack.enter_context(enter(path, home, "silo" if name in SILOS else name))
        for name, home in homes.items()
    }


def by_authority(changes):
    return changes.get("aggregation", {}).get("key_model") == "authority"


@contextlib.contextmanager
def members_of(tmp_path, **changes):
    homes = make_identities(tmp_path, SILOS, authority=by_authority(changes))
    path = write_signed(study(**changes), homes, tmp_path / "study.yaml")
    with contextlib.ExitStack() as stack:
        yield enter_all(stack, path, homes)


def kept(member):
    path = member.run / roles.ADAPTER / "theta.npy"
    return np.load(path) if path.exists() else None
