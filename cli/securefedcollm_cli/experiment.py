"""``securefedcollm experiment``: all rows of the comparison, several seeds, paired intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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
    files_of,
)


def experiment(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, max=100, help="Number of seeds: the study's and the following ones."),
    ] = 3,
    noisy_silos: Annotated[
        int,
        typer.Option(
            "--noisy-silos",
            min=0,
            help="Number of silos whose answers are replaced at random, in an extra comparison.",
        ),
    ] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="ROW",
            help="Run this row and the study's own (repeat): fedavg, auxiliary, prompts, teacher, "
            "mutual-kl, standalone, zero-shot, centralized … [all rows]. With --resume the others "
            "can follow.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Directory [runs/STUDY-experiment]."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the experiment; finished rows stay.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an experiment that is there already.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that run the silos [one each]; 0: in this one."),
    ] = None,
    silo: SiloFiles = None,
    public: PublicFile = None,
    test: TestFile = None,
    device: Device = "cpu",
    states: States = None,
    states_gb: StatesSize = 20.0,
    as_json: Json = False,
) -> None:
    """Does co-tuning help? Run every row of the comparison under several seeds.

    SLM: zero-shot, standalone, FedAvg, FedAvg with the server's auxiliary set but no distillation,
    FedCoLLM. LLM: zero-shot, auxiliary set alone, FedCoLLM, centralized. Both: FedCoLLM with the
    paper's losses. Without models.llm: zero-shot, standalone, FedAvg and centralized of the one
    model, and each part of the study's `server` left out. All rows share seeds, data and questions;
    differences come with 95 % intervals.

    Writes table.json, table.md and plot.svg. How the silos' data differ is part of the study:
    `--set task.data.partition=dirichlet --set task.data.alpha=0.1 --set task.data.skew=8`.
    """
    from securefedcollm.experiment.experiment import Experiment
    from securefedcollm.federation.dealing import given_files
    from securefedcollm.simulation.plan import ExperimentPlan
    from securefedcollm.study import load_study
    from securefedcollm.tuning.kept_states import keeping_states
    from securefedcollm_cli.progress import Bars

    study = load_study(config, overrides or [])
    files = None
    if silo or public or test:
        files = given_files(study, files_of(silo or ()), public, test)
    directory = out or Path("runs") / f"{study.study}-experiment"
    plan = ExperimentPlan(
        out=directory,
        seeds=seeds,
        noisy=noisy_silos,
        data=data,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        device=device,
        files=files,
        only=tuple(only or ()),
    )
    with keeping_states(states, int(states_gb * 1e9)), Bars(quiet=as_json) as bars:
        table = Experiment(study, plan).run(bars.report, bars.say)
    if as_json:
        typer.echo(json.dumps(table, indent=2))
    else:
        _render(table, directory)


def _render(table: dict[str, Any], directory: Path) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    from securefedcollm.experiment.page import cells, heads
    from securefedcollm.experiment.rows import main_of
    from securefedcollm.foreign import as_text

    console = Console()
    best = main_of([(row["model"], row["method"]) for row in table["rows"]])
    for title, rows in (("rows", table["rows"]), ("differences", table["differences"])):
        perplexity = bool(table.get("generative")) and title == "rows"
        shown = Table(title=f"{title}, seeds {table['seeds']}", title_justify="left")
        for head in ("model", "method", *heads(table["groups"], perplexity=perplexity)):
            side: Literal["left", "right"] = "left" if head in {"model", "method"} else "right"
            shown.add_column(as_text(head), justify=side)
        for row in rows:
            less = f" − {row['less']}" if "less" in row else ""
            main = row.get("main", row["method"] == best)
            shown.add_row(
                row["model"].upper(),
                row["method"] + less,
                *cells(row, table["groups"], signed=bool(less), perplexity=perplexity),
                style="bold" if main else None,
            )
        console.print(shown)
    for note in table["notes"]:
        console.print(Padding(as_text(note, style="dim"), (0, 2)))
    for name in ("table.md", "table.json", "plot.svg"):
        console.print(as_text(f"  {directory / name}"), soft_wrap=True)
