"""Options that several commands share."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securefedcollm.study.learning import RowKind

if TYPE_CHECKING:
    from securefedcollm.study.config import Task

StudyFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="The study: a YAML file, or the name of one that comes with "
        "securefedcollm, such as quickstart.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the study, e.g. --set local.steps=20 (repeatable).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Where the study's data files and path: models are."
    ),
]
SiloFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--silo",
        metavar="NAME=FILE",
        help="A silo and its own records; give one for every silo (repeat). Then no records are "
        "dealt out.",
    ),
]
PublicFile = Annotated[
    Path | None,
    typer.Option("--public", metavar="FILE", help="With --silo: the server's public records."),
]
TestFile = Annotated[
    Path | None,
    typer.Option("--test", metavar="FILE", help="With --silo: the test records."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where the models compute: cpu, cuda, cuda:1, mps."
    ),
]
States = Annotated[
    Path | None,
    typer.Option(
        "--states",
        metavar="DIR",
        help="Keep in this directory what the frozen layers make of public and test questions, so "
        "that a large model reads each once, in all runs and after a kill.",
    ),
]
StatesSize = Annotated[
    float,
    typer.Option(
        "--states-gb",
        metavar="GB",
        min=0.001,
        help="Largest size of that directory; the least recently used states go first.",
    ),
]
Track = Annotated[
    Literal["tensorboard", "mlflow"] | None,
    typer.Option(
        "--track",
        help="Also send the server's measurements to a tracking tool after every round, and "
        "none of any silo's.",
    ),
]

Unable = Annotated[
    Literal["refuse", "skip"],
    typer.Option(
        "--records",
        help="What to do if some records cannot pay for this study: refuse it, or skip those "
        "records.",
    ),
]

TaskKind = Annotated[
    RowKind | None,
    typer.Option("--task", help="Kind of the file's rows [the study's task; multiple_choice]."),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="A label of a classification (repeat).")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="FIELD=NAME",
        help="The file's name for a column, e.g. --column text=note (repeat).",
    ),
]


def task_of(
    kind: RowKind | None,
    labels: Sequence[str] | None,
    columns: Sequence[str] | None,
    template: str | None = None,
    like: Task | None = None,
) -> Task:
    """The task that --task, --label, --column and --template describe, checked as a study's.

    Args:
        like: the task that supplies the options that are not given.
    """
    from securefedcollm.errors import ConfigError
    from securefedcollm.study.config import Data, Task
    from securefedcollm.study.learning_checks import LABELLED, check_rows

    like = like or Task(data=Data())
    if kind in {None, like.kind}:
        labels, template = labels or like.labels, template or like.template
    kind = kind or like.rows
    if (kind in LABELLED) != bool(labels):
        raise ConfigError(
            "a classification needs labels, and nothing else does",
            where="--label",
            hint="--task classification --label negative --label positive",
        )
    pairs = [column.partition("=") for column in columns or []]
    if bad := next((name for name, equals, _ in pairs if not equals), None):
        raise ConfigError(
            f"{bad!r} is not FIELD=NAME", where="--column", hint="e.g. --column text=note"
        )
    named = {field.strip(): name.strip() for field, _, name in pairs}
    if not pairs and kind == like.kind:
        named = like.columns
    task = Task(data=Data(), kind=kind, labels=list(labels or []), columns=named, template=template)
    check_rows(task)
    return task


def files_of(silos: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of every ``--silo NAME=FILE``.

    Raises:
        ConfigError: an option is no such pair.
    """
    from securefedcollm.errors import ConfigError

    pairs = [option.partition("=") for option in silos]
    for option, (name, _, file) in zip(silos, pairs, strict=True):
        if not name or not file:
            raise ConfigError(
                f"{option!r} is not NAME=FILE",
                where="--silo",
                hint="e.g. --silo clinic-1=notes.csv",
            )
    return [(name, Path(file)) for name, _, file in pairs]


def stop_on_sigterm() -> None:
    """Make SIGTERM from a service manager stop this command as Ctrl-C does: in order, with
    everything closed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
