"""The software that ran: a digest of the source, and a bill of materials (CycloneDX 1.5).

These are the participant's own words. They let honest participants find out that they ran different
code. They do not prove what a dishonest one ran.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from securefedcollm.evidence.entries import canonical
from securefedcollm.primitives import sha256
from securefedcollm.version import __version__

_NAME = re.compile(r"^[A-Za-z0-9._-]+")


@lru_cache(maxsize=1)
def code_digest() -> bytes:
    """SHA-256 over (path, content) of every source file of the ``securefedcollm`` package."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    names = [path.relative_to(root).as_posix().encode() for path in files]
    return sha256(
        b"securefedcollm/code/v1\0",
        *(
            sha256(name) + sha256(path.read_bytes())
            for name, path in zip(names, files, strict=True)
        ),
    )


def bill_of_materials() -> bytes:
    """CycloneDX JSON (canonical, without time stamps) of this distribution and all it requires."""
    components = [_component(name, version) for name, version in sorted(_installed().items())]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": _component("securefedcollm", __version__)},
        "components": components,
    }
    return canonical(document)


def _installed() -> dict[str, str]:
    """Name → version of everything that is installed and required, directly or not."""
    found: dict[str, str] = {}
    queue = _requirements("securefedcollm")
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional or platform-specific requirement
        queue.extend(_requirements(name))
    return found


def _requirements(name: str) -> list[str]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    wanted = (line for line in lines if "extra ==" not in line)
    return [
        re.sub(r"[-_.]+", "-", match[0]).lower() for line in wanted if (match := _NAME.match(line))
    ]


def _component(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
    }
