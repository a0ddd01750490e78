"""``securefedcollm simulate``: every role of a study on this machine, and the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securefedcollm.foreign import as_text
from securefedcollm_cli.audit import write_evidence
from securefedcollm_cli.options import (
    DataDir,
    Device,
    Json,
    Overrides,
    PublicFile,
    SiloFiles,
    States,
    StatesSize,
    StudyFile,
    TestFile,
    Track,
    Unable,
    files_of,
)
from securefedcollm_cli.simulate_life import simulate_life

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from securefedcollm_audits.verification.verdict import Verdict


_BASELINES = ("standalone", "fedavg")
_MOST_ROWS = 24
"""Silos in the table that is printed; results.json has all."""


def simulate(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run directory [runs/STUDY].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the run directory.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is there already.")
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option(help="Also run FedAvg and standalone silos, for comparison (slower)."),
    ] = True,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that run the silos [one per core]; 0: in this one."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop",
            metavar="SILO@STEP",
            help="Make a silo drop out, e.g. 2@upload or 3@unmask:1 (in round 1 only).",
        ),
    ] = None,
    silo: SiloFiles = None,
    public: PublicFile = None,
    test: TestFile = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(
            "--ledgers",
            metavar="DIR",
            help="Keep the silos' privacy ledgers here, so that the budgets of their records go on "
            "from study to study [in the run directory].",
        ),
    ] = None,
    records: Unable = "refuse",
    track: Track = None,
    device: Device = "cpu",
    states: States = None,
    states_gb: StatesSize = 20.0,
    as_json: Json = False,
) -> None:
    """Run a whole study on this machine: server, silos, secure sums, distillation.

    Every silo has its own keys, data, state and privacy ledger under the run directory, and sends
    the server only the frames that a real silo would send. The identities are made for this run.

    CONFIG may hold several studies, with --- between them, such as `continual`. They run one after
    another, each from what the one before released, without baselines. --resume goes on in the
    middle of any of them.
    """
    from securefedcollm.federation.continuing import beside, earlier_bundles
    from securefedcollm.federation.dealing import given_files
    from securefedcollm.simulation.plan import SimulationPlan
    from securefedcollm.simulation.simulate import Simulation
    from securefedcollm.study import study_from_tree
    from securefedcollm.study.life import load_life
    from securefedcollm.tuning.kept_states import keeping_states
    from securefedcollm_cli.progress import Bars

    trees = load_life(config, overrides or [])
    study = study_from_tree(trees[0])
    files = None
    if silo or public or test:
        files = given_files(study, files_of(silo or ()), public, test)
    directory = out or Path("runs") / study.study
    plan = SimulationPlan(
        out=directory,
        data=data,
        resume=resume,
        overwrite=overwrite,
        baselines=_BASELINES if baselines else (),
        workers=workers,
        drops=drop or (),
        device=device,
        files=files,
        track=track,
        ledgers=ledgers,
        records=records,
    )
    keeping = keeping_states(states, int(states_gb * 1e9))
    if len(trees) > 1:
        simulate_life(trees, plan, as_json, keeping)
        return
    simulation = Simulation(study, plan)
    with keeping, Bars(quiet=as_json) as bars:
        results = simulation.run(bars.report, bars.say)
        bars.report(0, 1, "verifying the evidence")
        with beside(directory):
            verdict, page = write_evidence(directory, earlier_bundles(study, data))
        bars.report(1, 1, "verifying the evidence")
    if as_json:
        evidence = {name: getattr(verdict, name) for name in ("bundle", "holds", "passed")}
        evidence["report"] = page
        typer.echo(json.dumps(results | {"evidence": evidence}, indent=2))
    else:
        _render(results, verdict, page)
    if not verdict.holds:
        raise typer.Exit(1)


def _render(results: dict[str, Any], verdict: Verdict, page: str) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from securefedcollm_audits.verification import table

    console = Console()
    console.print()
    console.print(_accuracy_table(results))
    for note in results["notes"]:
        console.print(Padding(as_text(note, style="dim"), (0, 2)))
    console.print()
    console.print(_silo_table(results))
    others = results["silos"][0]["epsilon_other_accountants"]
    if others:
        said = ", ".join(f"{value:.2f} ({name})" for name, value in others.items())
        note = f"ε by accountants that are not the claim, without the ledger's reserve: {said}"
        console.print(Padding(f"[dim]{note}[/dim]", (0, 2)))
    _print_places(console, results["places"] | {"evidence": verdict.bundle, "report": page})
    console.print()
    for failed in verdict.failed:
        console.print(f"  {failed.title}: not so", style="red", markup=False)
        for fault in failed.faults:
            console.print(f"    {fault}", style="red", markup=False)
    style = "bold green" if verdict.holds else "bold red"
    console.print(table.sentence(verdict), style=style, markup=False, highlight=False)


def _accuracy_table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    from securefedcollm.federation.results import main_method
    from securefedcollm.federation.status import MOST_GROUPS

    groups = results["groups"]
    shown = groups if len(groups) <= MOST_GROUPS else []
    table = Table(title="Accuracy on the test questions, %", title_justify="left")
    table.add_column("model")
    table.add_column("method")
    for group in shown:
        table.add_column(as_text(group or "accuracy"), justify="right")
    if len(groups) > 1:
        table.add_column("mean" if shown else f"mean of {len(groups)} groups", justify="right")
    last = None
    best = main_method(row["method"] for row in results["table"])
    for row in results["table"]:
        if last not in (None, row["model"]):
            table.add_section()
        last = row["model"]
        scores = [row["accuracy"][group] for group in groups]
        cells = [f"{100 * s:.1f}" for s in scores if shown]
        if len(groups) > 1:
            cells.append(f"{100 * sum(scores) / len(scores):.1f}")
        style = "bold" if row["method"] == best else None
        table.add_row(row["model"].upper(), row["method"], *cells, style=style)
    return table


def _silo_table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    few = len(results["silos"]) <= _MOST_ROWS
    each = "each silo" if few else f"the {_MOST_ROWS} silos that spent most"
    table = Table(title=f"What it cost {each}", title_justify="left")
    for column in ("silo", "records", "ε spent", "of", "sent", "received"):
        table.add_column(column, justify="left" if column == "silo" else "right")
    for silo in _most_spent(results["silos"]):
        spent, budget = silo["epsilon_spent"], silo["epsilon_budget"]
        table.add_row(
            silo["name"],
            f"{silo['records']:,}",
            "no DP" if spent is None else f"{spent:.2f}",
            "" if budget is None else f"{budget:g} (δ = {silo['delta']:g})",
            _bytes(silo["bytes_up"]),
            _bytes(silo["bytes_down"]),
        )
    return table


def _most_spent(silos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All in their order, or of many those that spent most."""
    if len(silos) <= _MOST_ROWS:
        return silos
    return sorted(silos, key=lambda silo: -(silo["epsilon_spent"] or 0.0))[:_MOST_ROWS]


def _print_places(console: Console, places: dict[str, str]) -> None:
    console.print()
    for what, place in places.items():
        console.print(as_text(f"  {what:<10} {place}"), soft_wrap=True)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
