"""``securefedcollm data …``: look at a silo's own records, on the silo's own machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli.options import Columns, DataDir, Json, Labels, Overrides, TaskKind, task_of

if TYPE_CHECKING:
    from securefedcollm.tuning.cleaning import Cleaning

app = typer.Typer(no_args_is_help=True, help="Check a silo's own data file. Nothing leaves it.")

_SHOWN = 5


@app.callback()
def group() -> None:
    """Keep ``check`` a sub-command while it is the only one."""


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Records: .jsonl, .csv, .parquet or .npz.")
    ],
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            metavar="CONFIG",
            help="The study: its task, labels, subject column, tokenizer and task.max_tokens.",
        ),
    ] = None,
    overrides: Overrides = None,
    data: DataDir = None,
    task: TaskKind = None,
    label: Labels = None,
    column: Columns = None,
    subject: Annotated[
        str | None,
        typer.Option(
            "--subject", metavar="COLUMN", help="The column that names the subject of a row."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find unusable and empty rows, duplicates, conflicts and rows that are too long in FILE.

    Of pictures: files that are missing or cannot be decoded, pictures of one colour, and the same
    picture under two names. Of recordings: the same, with silence in place of one colour, and those
    that are clipped or longer than task.max_seconds.

    Without `--study`, use `--task`, `--label` and `--column` to say what a row is; lengths are not
    checked then. The output names lines, never values. Exit code 1: tuning would refuse the file.
    """
    from securefedcollm.errors import ConfigError
    from securefedcollm.federation.dealing import layout_of
    from securefedcollm.study import load_study
    from securefedcollm.tuning.cleaning import check_file
    from securefedcollm.tuning.models import load_tokenizer
    from securefedcollm_cli.progress import Bars

    if study is None and overrides:
        raise ConfigError(
            "there is no study to change", where="--set", hint="give --study CONFIG as well"
        )
    if study is not None and (task or label or column or subject):
        raise ConfigError(
            "the study says what the rows are",
            where="--study",
            hint="leave --task, --label, --column and --subject out",
        )
    with Bars(quiet=as_json) as bars:
        if study is None:
            rows = layout_of(task_of(task, label, column))
            found = check_file(file, owner=subject, progress=bars.report, **rows)
        else:
            plan = load_study(study, overrides or [])
            slm, words = plan.models.slm, not plan.task.senses
            found = check_file(
                file,
                owner=plan.subject,
                tokenizer=load_tokenizer(slm.source, revision=slm.revision, base_dir=data or Path())
                if words
                else None,
                max_tokens=plan.task.max_tokens,
                max_seconds=plan.task.max_seconds,
                progress=bars.report,
                **layout_of(plan.task),
            )
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"stops_a_run": found.stops_a_run}, indent=2))
    else:
        _render(found)
    if found.stops_a_run:
        raise typer.Exit(1)


def _render(found: Cleaning) -> None:
    typer.echo(f"{found.rows:,} rows, {found.usable:,} usable")
    _list("cannot be used", [f"{place}: {why}" for place, why in found.unusable])
    for fix in found.fixes[:_SHOWN]:
        typer.echo(printable(f"  → {fix}", MOST_MESSAGE))
    _list("without an answer", found.unlabelled)
    _list("whose answer alone is longer than task.max_tokens (refused)", found.unfit)
    _list("longer than task.max_tokens or task.max_seconds (they will be cut)", found.shortened)
    _list("pictures of one colour, or silent recordings", found.constant)
    _list("recordings that are clipped: too loud for their scale", found.clipped)
    _list("duplicates: the same record", [" = ".join(group) for group in found.duplicates])
    _list(
        "conflicts: one question, different answers",
        [" ≠ ".join(group) for group in found.conflicts],
    )
    if found.stops_a_run:
        typer.secho("tuning would refuse this file", fg="red")
    elif any((found.duplicates, found.conflicts, found.shortened, found.constant, found.clipped)):
        typer.secho("usable, with the findings above", fg="yellow")
    else:
        typer.secho("nothing found", fg="green")


def _list(title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    typer.echo(f"{len(lines):,} × {title}")
    for line in lines[:_SHOWN]:
        typer.echo(printable(f"  {line}", MOST_MESSAGE))
    if len(lines) > _SHOWN:
        typer.echo(f"  … and {len(lines) - _SHOWN:,} more (--json lists all)")
