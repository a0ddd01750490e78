"""The table of families in the documentation is what this build does."""

from __future__ import annotations

import pytest

from benchmarks.families import FAMILIES, PAGE, row, verdict

QUICK = ["BERT", "Llama 4"]
LONG = [
    "OPT",
    "Llama",
    "Mixtral",
    "Gemma 3",
    "MPT",
    "Mamba",
    "LFM2",
]  # test_packing has what is special in each


def rows() -> dict[str, str]:
    """The lines of the page's table by family."""
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index("| family |") :].partition("\n\n")[0]  # the page has others
    lines = table.splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


def test_the_page_has_every_family() -> None:
    assert list(rows()) == list(FAMILIES)
    assert not [line for line in rows().values() if "WRONG" in line]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.soak) for name in LONG)]
)
def test_a_verdict_of_the_page_still_holds(name: str) -> None:
    assert row(name, FAMILIES[name], verdict(FAMILIES[name])) == rows()[name]
