"""``securefedcollm compare``: several finished runs in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm_cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from securefedcollm.experiment.compare import Comparison
    from securefedcollm.experiment.compare_page import Line


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of finished runs, two or more."),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Also draw the scores over the rounds (.svg or .html)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs: scores, privacy, cost, and how their studies differ.

    A RUN is a directory that `simulate` made, or studies/… in a server's home. A server sees no
    silo's ledger, so for its runs the table shows the most that the study lets a silo spend.

    The numbers are the word of whoever made the runs; `audit verify` checks the evidence for ε. One
    run of each study says little about chance; `experiment` repeats seeds and gives intervals.

    `compare runs/a runs/b --plot course.svg`
    """
    from securefedcollm.experiment.compare import compare_runs
    from securefedcollm.experiment.compare_page import write_plot

    found = compare_runs(runs)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        _render(found, plot)


def _render(found: Comparison, plot: Path | None) -> None:
    from rich.console import Console

    from securefedcollm.experiment.compare_page import changes, results
    from securefedcollm.foreign import as_text

    console, names = Console(), [run.name for run in found.runs]
    _print_table(console, "Results", names, results(found))
    if found.differences:
        _print_table(console, "What differs between the studies", names, changes(found))
    else:
        console.print("The studies do not differ.")
    if plot is not None:
        console.print(as_text(f"  {plot}"), soft_wrap=True)


def _print_table(console: Console, title: str, names: Sequence[str], lines: Sequence[Line]) -> None:
    from rich.table import Table

    from securefedcollm.foreign import as_text

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(as_text(name), justify="right")
    for what, cells in lines:
        table.add_row(as_text(what), *map(as_text, cells))
    console.print(table)
