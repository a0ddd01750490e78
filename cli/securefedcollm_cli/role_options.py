"""Options that the roles of a real run share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from securefedcollm_cli.identity import read_passphrase

Models = Annotated[
    Path | None,
    typer.Option("--models", metavar="DIR", help="Where the study's path: models are."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads for training [every core, or OMP_NUM_THREADS]."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Agree without asking; for unattended machines.")]
Events = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line for each event.")
]


def asked(passphrase_file: Path | None) -> Callable[[], str]:
    return lambda: read_passphrase(passphrase_file)
