"""The documentation: links, the pages that follow from the code, the notebook."""

from __future__ import annotations

import ast
import json
import re
import runpy
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import securefedcollm_audits
import yaml

import securefedcollm
from securefedcollm import aggregation, errors, retrieval

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "adr").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.ipynb")),
    ROOT / "audits" / "README.md",
]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")
NOTEBOOK = ROOT / "docs" / "first-run.ipynb"


def prose(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = unicodedata.normalize("NFC", re.sub(r"\]\([^)]*\)", "]", heading)).lower()
        found.add(re.sub(r"[^\w\- ]", "", text.strip()).replace(" ", "-"))
    return found


def broken(page: Path) -> list[str]:
    wrong = []
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(f"{path}: is not there")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{path}#{anchor}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(monkeypatch):
    page, ledger = ROOT / "docs" / "index.md", ROOT / "docs" / "privacy.md"
    lost = ROOT / "docs" / "adr" / "lost.md"
    lies = "[a](nowhere.md) [b](../privacy.md#the-ledgers) [c](../privacy.md#the-ledger)"
    monkeypatch.setattr(
        Path, "read_text", lambda p, **_: lies if p == lost else p.read_bytes().decode()
    )
    assert broken(lost) == [
        "nowhere.md: is not there",
        "../privacy.md#the-ledgers: no such heading",
    ]
    assert LINK.findall("[a](b.md#c) [d](#e) [f](https://g.h/i.md)") == [("b.md", "c"), ("", "e")]
    assert "the-ledger" in anchors(ledger)
    assert "the ledger" not in anchors(ledger)
    assert len(LINK.findall(prose(page))) > 10


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Reads the one tag of Python's that mkdocs.yml has, as text."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: tag)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    named = set(re.findall(r"'([\w/.-]+\.md)'", str(nav)))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES[4:-1]}
    there = {page.replace(".ipynb", ".md") for page in there}
    assert {page for page in named if not page.startswith(("reference/", "project/"))} == there
    made = {f"reference/{name}" for name in pages()["PAGES"]}
    assert {page for page in named if page.startswith("reference/")} == made


def pages() -> dict:
    """The script that makes the pages which follow from the code."""
    return runpy.run_path(str(ROOT / ".ci" / "pages.py"))


def test_every_command_and_option_is_on_its_page():
    script = pages()
    page = script["commands"]()
    sections = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    commands = dict(script["walk"](script["typer"].main.get_command(script["app"])))
    assert {" ".join(words) for words in commands} == sections.keys()
    assert len(commands) > 40
    for words, command in commands.items():
        text = " ".join(sections[" ".join(words)].split())
        for parameter in command.params:
            if parameter.hidden:
                continue
            assert " ".join(parameter.help.split()) in text
            if parameter.param_type_name == "option":
                assert all(f"{name}" in text for name in parameter.opts)


def test_every_error_is_on_its_page():
    page = pages()["failures"]()
    classes = [
        node.name
        for node in ast.parse(Path(errors.__file__).read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    rows = dict(re.findall(r"^`(\w+)` is a `\w+`: exit code (\d+)\n: +.+\.$", page, re.MULTILINE))
    assert rows.keys() == set(classes)
    assert {name for name, code in rows.items() if code == "75"} == {
        "QuorumError",
        "TransportError",
    }


def test_every_public_name_and_every_kind_of_entry_is_on_its_page():
    script = pages()
    text = "".join(script[page]() for page in ("api", "sums", "questions", "auditing"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"securefedcollm.{name}" for name in securefedcollm.__all__} - {
        "securefedcollm.__version__"
    }
    inner = {f"securefedcollm.aggregation.{name}" for name in aggregation.__all__}
    inner |= {f"securefedcollm.retrieval.{name}" for name in retrieval.__all__}
    inner |= {f"securefedcollm_audits.{name}" for name in securefedcollm_audits.__all__}
    assert shown == public | inner | {"securefedcollm.hf.SiloTrainer"}
    headings = set(re.findall(r"^### (\w+)$", script["evidence"](), re.MULTILINE))
    assert {"opened", "summed", "reserved", "audited", "decrypted"} <= headings
    assert len(headings) == 28


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_notebook_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in codes:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    said = capsys.readouterr().out
    assert names["plan"].options[0].verdict == "poor"  # as the text says
    assert all(0 < spent <= 8 for spent in names["run"].epsilon.values())
    assert names["verdict"].holds
    assert [result.name for result in names["broken"].failed] == ["archive"]
    assert "[ 4  6 13]" in said
    assert np.abs(names["total"] - sum(names["vectors"].values())).max() < 1e-6
