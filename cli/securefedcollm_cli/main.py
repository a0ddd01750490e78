"""``securefedcollm``: the root command. Sub-commands import what they need when they run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
from typing import Annotated, Final

import typer

from securefedcollm.errors import SecureFedCoLLMError, StateError
from securefedcollm.foreign import log_to_stderr
from securefedcollm.version import __version__
from securefedcollm_cli import (
    audit,
    budget,
    compare,
    consortium,
    data,
    experiment,
    identity,
    model,
    questions,
    roles,
    shelf,
    simulate,
    study,
)

AGAIN: Final = 75
"""Exit code EX_TEMPFAIL of sysexits.h: the process supervisor should start the command again."""

_MACHINE: Final = {
    errno.ENOSPC: "free some space; the run goes on when you start the command again",
    errno.EDQUOT: "free some of your quota; the run goes on when you start the command again",
    errno.EROFS: "choose a place on a writable disk",
    errno.EACCES: "let this user read and write there, or choose another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the disk reports a fault; see the system's log",
}
"""Faults of a machine, with their remedies."""

_SERVICES: Final = ("client", "server", "authority", "shelf")

app = typer.Typer(
    name="securefedcollm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Federated co-tuning of a server's LLM and its silos' SLMs with secure aggregation, "
    "differential privacy and evidence that anyone can check.\n\n"
    "Start with `securefedcollm simulate configs/quickstart.yaml`: four hospitals on this machine.",
)
app.command()(simulate.simulate)
app.command()(experiment.experiment)
app.command()(compare.compare)
app.command()(consortium.join)
app.command()(questions.ask)
app.command()(roles.server)
app.command()(roles.client)
app.command()(roles.authority)
app.command()(roles.status)
app.add_typer(study.app, name="study")
app.add_typer(identity.app, name="identity")
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(questions.app, name="index")
app.add_typer(shelf.app, name="shelf")
app.add_typer(budget.app, name="budget")
app.add_typer(audit.app, name="audit")
app.add_typer(consortium.app, name="consortium")


@app.callback(invoke_without_command=True)
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log events on stderr: ids and sizes.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.ERROR
    log_to_stderr(level, "%(levelname)s %(name)s: %(message)s")
    logging.getLogger("securefedcollm").setLevel(min(level, logging.WARNING))
    if version:
        typer.echo(f"securefedcollm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: an expected error becomes one line on stderr and exit code 2, or
    :data:`AGAIN` where the same command may succeed later."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # cp1252, say, which has no α
            stream.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as end:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        if not end.code and command in _SERVICES:
            _leave()
        raise
    except SecureFedCoLLMError as error:
        sys.exit(report(error))
    except OSError as error:  # of the machine, met where nobody looks for it
        if error.errno not in _MACHINE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(report(StateError(f"{place}{error.strerror}", hint=_MACHINE[error.errno])))
    except KeyboardInterrupt:
        typer.echo(
            "interrupted; the run goes on when you start the command again (`simulate`: with "
            "--resume)",
            err=True,
        )
        sys.exit(130)


def _leave() -> None:
    """End a role that has finished, without waiting for its libraries' cleanup.

    Threads of theirs may abort the process then (SIGABRT, seen in 4 of 41 clients), and a service
    manager would start it again.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    os._exit(0)


def report(error: SecureFedCoLLMError) -> int:
    """Print ``error`` for a person, or as JSON when ``--json`` was given. Returns the exit code."""
    if "--json" in sys.argv:
        typer.echo(
            json.dumps(
                {
                    "error": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                    "again": error.again,
                }
            )
        )
    hint = f" — {error.hint}" if error.hint else ""
    typer.echo(f"error: {error}{hint}", err=True)
    return AGAIN if error.again else 2
