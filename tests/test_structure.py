"""The import graph: no import leads back to where it began, in the whole house."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import securefedcollm_audits
import securefedcollm_cli

import securefedcollm

HOUSE = (securefedcollm, securefedcollm_audits, securefedcollm_cli)


def modules() -> dict[str, Path]:
    """Every module of the house, by its full name."""
    found = {}
    for package in HOUSE:
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            parts = (root.name, *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """The modules of ``known`` that the file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from known & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            yield from known & names
            if names - known:  # a name that the module itself defines
                yield from known & {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first module once more at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_leads_back() -> None:
    """Those of types only, and those inside functions, included."""
    found = modules()
    assert len(found) > 200
    graph = {name: set(imported(path, set(found))) for name, path in found.items()}
    assert not circle(graph)


def test_a_circle_is_found_wherever_its_imports_are(tmp_path: Path) -> None:
    sources = {
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import thing\n",
        "b": "def use():\n    from p import c\n",
        "c": "import p.a\n",
        "d": "from p.a import thing\n",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    known = {f"p.{name}" for name in sources}
    graph = {f"p.{name}": set(imported(tmp_path / name, known)) for name in sources}
    assert set(circle(graph)) == {"p.a", "p.b", "p.c"}
    graph["p.c"].clear()
    assert not circle(graph)
