"""The hashes of what `make` installs: `locks.py write` makes them, `locks.py check` compares.

Adversary: whoever can change a file on the way from a package index, or in a mirror of it, after
the hashes were written. pip compares every file with them before it unpacks or builds it.

Two files, since pip builds what comes as source, and that needs hashed tools too: the tools first.
torch is in neither: its builds for CPU and for CUDA have one version and different files, and come
from different places. What follows torch alone (CUDA's libraries) is not covered with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("2_34", "2_28", "2_27", "2_17", "2_12", "2_5")
OLD_PLATFORMS = ("manylinux2014", "manylinux2010", "manylinux1")
TOOLS = {
    *("editables", "hatchling", "packaging", "pathspec", "pluggy", "setuptools", "tomlkit"),
    "trove-classifiers",
}
SOURCES = {"pyhocon"}  # published without a wheel
FREE = re.compile(r"(securefedcollm|pip|torch|triton|atheris|(nvidia|cuda)-.*)")
"""What may be installed without a hash: ourselves, pip, torch and its own, the optional fuzzer."""

Hashes = dict[str, set[str]]  # by "name==version"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name → version, of constraints.txt without torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs if name != "torch"}


def read(name: str) -> Hashes:
    text = (ROOT / name).read_text()
    found = re.findall(r"^(\S+==\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    return {pin: set(re.findall(r"sha256:(\w+)", hashes)) for pin, hashes in found}


def published(pip: Path, python: str, names: dict[str, str]) -> Hashes:
    """What pip would install for this Python on Linux x86-64. Only metadata is downloaded."""
    with tempfile.TemporaryDirectory() as scratch:
        report, wanted = Path(scratch) / "report.json", Path(scratch) / "wanted.txt"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in names.items()))
        command = [str(pip), "install", "--quiet", "--dry-run", "--no-deps"]
        command += ["--ignore-installed", "--report", str(report), "--requirement", str(wanted)]
        if not names.keys() <= SOURCES:
            places = [f"manylinux_{platform}_x86_64" for platform in PLATFORMS]
            places += [f"{platform}_x86_64" for platform in OLD_PLATFORMS]
            command += ["--only-binary=:all:", "--python-version", python, "--target", scratch]
            command += [word for place in places for word in ("--platform", place)]
        subprocess.run(command, check=True)
        items = json.loads(report.read_text())["install"]
    return {
        f"{normal(item['metadata']['name'])}=={item['metadata']['version']}": {
            item["download_info"]["archive_info"]["hashes"]["sha256"]
        }
        for item in items
    }


def write() -> None:
    found: Hashes = {}
    wheels = {name: version for name, version in pins().items() if name not in SOURCES}
    sources = {name: version for name, version in pins().items() if name in SOURCES}
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        pip = Path(scratch) / "bin" / "pip"
        for python, names in [*((python, wheels) for python in PYTHONS), (PYTHONS[0], sources)]:
            print(f"asking for {len(names)} packages for Python {python}")
            for pin, hashes in published(pip, python, names).items():
                found.setdefault(pin, set()).update(hashes)
    for name, tools in (("hashes-build.txt", True), ("hashes.txt", False)):
        lines = [
            " \\\n".join([pin, *(f"    --hash=sha256:{one}" for one in sorted(found[pin]))])
            for pin in sorted(found)
            if (pin.split("==")[0] in TOOLS) == tools
        ]
        head = f"# Made by `make lock`: Linux x86-64, CPython {', '.join(PYTHONS)}.\n"
        (ROOT / name).write_text(head + "\n".join(lines) + "\n")


def check() -> None:
    """The hashes are those of constraints.txt, and nothing else is installed."""
    locked = {*read("hashes-build.txt"), *read("hashes.txt")}
    pinned = {f"{name}=={version}" for name, version in pins().items()}
    wrong = [f"{pin} has a pin and no hash: run `make lock`" for pin in sorted(pinned - locked)]
    wrong += [f"{pin} has a hash and no pin: run `make lock`" for pin in sorted(locked - pinned)]
    for found in distributions():
        name = normal(found.name)
        if not FREE.fullmatch(name) and f"{name}=={found.version}" not in locked:
            wrong.append(
                f"{name}=={found.version} is installed without a hash: pin it in constraints.txt "
                "and run `make lock`, or remove it"
            )
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]]()
