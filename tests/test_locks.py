"""The check of `make check` that what is installed has a hash in the repository."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("constraints.txt", "hashes.txt", "hashes-build.txt")


@pytest.fixture
def locks(tmp_path: Path) -> dict[str, Any]:
    """The script, over a copy of the files."""
    (tmp_path / ".ci").mkdir()
    for name in (*FILES, ".ci/locks.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return runpy.run_path(str(tmp_path / ".ci" / "locks.py"))


def told(locks: dict[str, Any]) -> set[str]:
    try:
        locks["check"]()
    except SystemExit as stop:
        return {line.split(":")[0] for line in str(stop).splitlines()}
    return set()


def test_every_pin_has_a_hash_and_the_other_way_round(locks, tmp_path):
    before = told(locks)
    assert not {line for line in before if " has a " in line}
    file = tmp_path / "constraints.txt"
    file.write_text(file.read_text().replace("\nrich==", "\nrich==9"))
    new = told(locks) - before
    assert {line.split("==")[0] for line in new} == {"rich"}
    assert {line.split(" has ")[1] for line in new} == {"a pin and no hash", "a hash and no pin"}


def test_a_pin_whose_hash_is_spoilt_has_none(locks, tmp_path):
    before = told(locks)
    file = tmp_path / "hashes.txt"
    head, tail = file.read_text().split("msgspec==", 1)
    file.write_text(head + "msgspec==" + tail.replace("sha256:", "md5:", 1))
    assert {line.split("==")[0] for line in told(locks) - before} == {"msgspec"}


def test_what_is_installed_beside_is_named(locks, tmp_path, monkeypatch):
    """Adversary: whoever adds a dependency that nobody has pinned."""
    before = told(locks)
    for name in ("Left.Pad", "nvidia-cublas"):
        place = tmp_path / "site" / f"{name}-1.0.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert told(locks) - before == {"left-pad==1.0 is installed without a hash"}
