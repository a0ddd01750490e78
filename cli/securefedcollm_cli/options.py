"""Options that several commands share."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The study: a YAML file.")]
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
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where the models compute: cpu, cuda, cuda:1, mps."
    ),
]


def stop_on_sigterm() -> None:
    """A service manager stops this command as Ctrl-C does: in order, with everything closed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
