"""What holds the house together, read from its source.

No import leads back to where it began. A function fits on a screen and takes no crowd. No test
module imports another: what two share is in :mod:`tests.support`. No test writes to what is private
to the code under test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import securefedcollm_audits
import securefedcollm_cli

import securefedcollm

TESTS = Path(__file__).parent
OF_FLARE = {"_send_to_endpoint", "_sync_client_jobs"}
"""Private to FLARE, not to us: our attackers that run it as it comes change these."""
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


LONGEST = 60
"""Lines of a function, its docstring included."""
ROOMS = ("experiment", "federation", "simulation", "tuning")
MOST_PARAMETERS = 8
"""``self`` is not one. More belong together somehow: in a frozen plan that says how."""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the file, with its place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.lineno} {node.name}", node


def too_long(path: Path, command_line: bool = False) -> list[str]:
    """Functions of more than :data:`LONGEST` lines.

    ``command_line``: a command's options stand in its signature, each with its help; those lines
    are what its user reads, and do not count.
    """
    found = []
    for place, node in functions(path):
        first = node.body[0].lineno if command_line else node.lineno
        if (node.end_lineno or 0) - first >= LONGEST:
            found.append(place)
    return found


def too_many_parameters(path: Path) -> list[str]:
    """Functions of more than :data:`MOST_PARAMETERS`."""
    found = []
    for place, node in functions(path):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if sum(each.arg not in {"self", "cls"} for each in named) > MOST_PARAMETERS:
            found.append(place)
    return found


def test_every_function_fits_on_a_screen() -> None:
    found = modules()
    assert not [
        place
        for name, path in found.items()
        for place in too_long(path, command_line=name.startswith("securefedcollm_cli."))
    ]


def test_no_function_of_the_loops_or_of_tuning_takes_a_crowd() -> None:
    """The public ``simulate`` and ``simulate_own`` are not among these: whoever calls them names
    what differs from the default, and would only have to learn the names of plans as well."""
    names = tuple(f"securefedcollm.{room}." for room in ROOMS)
    checked = [path for name, path in modules().items() if name.startswith(names)]
    assert len(checked) > 80
    assert not [place for path in checked for place in too_many_parameters(path)]


def test_long_functions_and_crowds_are_found(tmp_path: Path) -> None:
    source = tmp_path / "some.py"
    body = "\n".join(["    x = 1"] * (LONGEST - 3))
    source.write_text(f"class A:\n  def f(self,\n    a, b, c, d,\n    *, e, f, g, h):\n{body}\n")
    assert too_long(source) == too_many_parameters(source) == []
    source.write_text(f"def f(\n    a, b, c, d, /,\n    *, e, f, g, h, i):\n{body}\n    y = 2\n")
    assert too_long(source) == too_many_parameters(source) == [f"{source}:1 f"]
    assert too_long(source, command_line=True) == []


def imports_of_tests(source: str, package: str) -> set[str]:
    """The test modules, and conftests, that a module imports.

    Args:
        package: what the module is in, as ``tests.cli``.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            place = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*place, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            last = name.rpartition(".")[2]
            if name.startswith("tests.") and (last.startswith("test_") or last == "conftest"):
                found.add(name)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in OF_FLARE


def private_writes(source: str) -> list[str]:
    """The private attributes that a module sets or deletes, in whatever way, with their lines.

    A class of the module's own may set what is its own, as a subclass at a documented seam does.
    """
    found, tree = [], ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {
        node
        for owner in classes
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            names = [] if node in own else [node.attr]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            place = node.value
            while isinstance(place, ast.Subscript):
                place = place.value
            names = [place.attr] if isinstance(place, ast.Attribute) else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("setattr", "delattr", "patch", "patch.object", "__setattr__")):
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                names = [part for word in words for part in str(word).split(".")]
        found += [f"line {node.lineno}: {name}" for name in names if is_private(name)]
    return found


def test_no_test_module_imports_another() -> None:
    sources = sorted(TESTS.rglob("*.py"))
    assert len(sources) > 150
    for path in sources:
        package = ".".join(("tests", *path.relative_to(TESTS).parts[:-1]))
        assert not imports_of_tests(path.read_text(), package), path


def test_no_test_writes_to_what_is_private() -> None:
    for path in sorted(TESTS.rglob("*.py")):
        assert not private_writes(path.read_text()), path


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("from .test_rounds import Run", "tests.federation"),
        ("from . import test_joint", "tests.federation"),
        ("from ..federation.test_rounds import Run", "tests.evidence"),
        ("from ..cli.conftest import made", "tests.evidence"),
        ("from tests.cli import test_roles", "tests.cli"),
        ("def f():\n    import tests.cli.test_roles", "tests.cli"),
    ],
)
def test_an_import_of_a_test_module_is_found_however_it_is_written(line: str, package: str) -> None:
    assert imports_of_tests(line, package)
    assert not imports_of_tests("from tests.support.rounds import Run", package)


@pytest.mark.parametrize(
    "line",
    [
        "silo._evidence._header = None",
        "a, made._rejoin = 1, 2",
        "secrets._vector[17] = 3",
        "engine._local |= {}",
        "del side._secrets",
        "for silo._round in range(3): pass",
        "monkeypatch.setattr(roles, '_SLACK', 1)",
        "monkeypatch.setattr('securefedcollm.engine._LATER', 0.1)",
        "setattr(clone, '_secrets', copied)",
        "object.__setattr__(study, '_digest', b'')",
        "monkeypatch.delattr(roles, '_SLACK')",
        "with patch.object(silo, '_begin'): pass",
        "def shared(self): self._secrets = []",
    ],
)
def test_a_write_to_what_is_private_is_found_however_it_is_written(line: str) -> None:
    assert private_writes(line)


def test_what_is_no_write_to_what_is_private_is_let_through() -> None:
    looks = "getattr(silo, '_side')\nassert silo._side is None\nsilo.__dict__ = {}\n_own = 3\n"
    looks += "class Toy(AnsweringSide):\n  def __init__(self): self._secrets = ()\n"
    assert not private_writes(looks + "monkeypatch.setattr(roles, 'SLACK', '-')")
