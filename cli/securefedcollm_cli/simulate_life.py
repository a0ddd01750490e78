"""``securefedcollm simulate`` of several studies, each from what the one before released."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import as_text
from securefedcollm_cli.audit import write_evidence

if TYPE_CHECKING:
    from rich.table import Table
    from securefedcollm_audits.verification.verdict import Verdict

    from securefedcollm.simulation.plan import SimulationPlan
    from securefedcollm.study import Study


def simulate_life(
    trees: Sequence[dict[str, Any]],
    plan: SimulationPlan,
    as_json: bool,
    keeping: AbstractContextManager[None],
) -> None:
    """Run, verify and show the studies ``trees``; exit code 1 if any evidence does not hold.

    ``keeping``: within it, states of public questions are kept.
    """
    from securefedcollm.federation.continuing import beside, earlier_bundles
    from securefedcollm.simulation.life import play
    from securefedcollm_cli.progress import Bars

    if plan.files is not None or plan.drops:
        raise ConfigError(
            "several studies share no silo's file and no dropout",
            where="--silo" if plan.files is not None else "--drop",
            hint="leave it out, or simulate one study at a time",
        )
    _require_room(plan, [str(tree["study"]) for tree in trees])
    verdicts: dict[str, Verdict] = {}

    def finished(study: Study, run: Path, results: dict[str, Any]) -> None:
        bars.report(0, 1, "verifying the evidence")
        with beside(run):
            verdicts[study.study], _ = write_evidence(run, earlier_bundles(study, plan.data))
        bars.report(1, 1, "verifying the evidence")

    with keeping, Bars(quiet=as_json) as bars:
        results = play(trees, plan, bars.report, bars.say, finished)
    holds = all(verdict.holds for verdict in verdicts.values())
    if as_json:
        evidence = [
            {"bundle": v.bundle, "holds": v.holds, "passed": v.passed} for v in verdicts.values()
        ]
        typer.echo(json.dumps({"studies": results, "evidence": evidence}, indent=2))
    else:
        _render(list(verdicts), results, list(verdicts.values()))
    if not holds:
        raise typer.Exit(1)


def _require_room(plan: SimulationPlan, names: Sequence[str]) -> None:
    """A life is replaced, or gone on with, as a whole; what is not of a life is never removed.

    Raises:
        ConfigError: with the fix.
    """
    if not plan.out.exists() or not any(plan.out.iterdir()) or plan.resume:
        return
    if not plan.overwrite:
        raise ConfigError(
            "there is a run in this directory already",
            where=str(plan.out),
            hint="continue it with --resume, replace it with --overwrite, or choose --out",
        )
    runs = [plan.out / name for name in names if (plan.out / name).is_dir()]
    if not runs or not all((run / "study.yaml").is_file() for run in runs):
        raise ConfigError(
            "holds other things than this life's runs; nothing is removed",
            where=str(plan.out),
            hint="choose another --out",
        )


def _render(names: list[str], results: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from securefedcollm_audits.verification import table

    console = Console()
    console.print()
    console.print(_accuracies(names, results))
    console.print()
    console.print(_budgets(names, results))
    console.print()
    for verdict in verdicts:
        console.print(as_text(f"  evidence   {verdict.bundle}"), soft_wrap=True)
        for failed in verdict.failed:
            console.print(f"  {failed.title}: not so", style="red", markup=False)
        style = "bold green" if verdict.holds else "bold red"
        console.print(table.sentence(verdict), style=style, markup=False, highlight=False)


def _accuracies(names: list[str], results: list[dict[str, Any]]) -> Table:
    """By study and model one row: what it knows of every group afterwards."""
    from rich.table import Table

    from securefedcollm.federation.results import main_method

    groups = list(dict.fromkeys(group for result in results for group in result["groups"]))
    shown = Table(title="Accuracy on the test questions after each study, %", title_justify="left")
    shown.add_column("model")
    shown.add_column("after")
    for group in groups:
        shown.add_column(as_text(group or "accuracy"), justify="right")
    for model in ("slm", "llm"):
        for number, (name, result) in enumerate(zip(names, results, strict=True)):
            main = main_method(row["method"] for row in result["table"])
            wanted = {main: name} if number else {"zero-shot": "nothing", main: name}
            for row in result["table"]:
                if row["model"] == model and row["method"] in wanted:
                    scores = [row["accuracy"].get(group) for group in groups]
                    cells = ["" if s is None else f"{100 * s:.1f}" for s in scores]
                    shown.add_row(model.upper(), as_text(wanted[row["method"]]), *cells)
        shown.add_section()
    return shown


def _budgets(names: list[str], results: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    shown = Table(title="ε of the record that has spent most, by silo", title_justify="left")
    shown.add_column("after")
    silos = list(dict.fromkeys(silo["name"] for result in results for silo in result["silos"]))
    for silo in silos:
        shown.add_column(as_text(silo), justify="right")
    for name, result in zip(names, results, strict=True):
        spent = {silo["name"]: silo["epsilon_spent"] for silo in result["silos"]}
        cells = ["" if spent.get(s) is None else f"{spent[s]:.2f}" for s in silos]
        shown.add_row(as_text(name), *cells)
    return shown
