"""``securefedcollm identity …``: a participant's long-lived signing key."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

import typer

from securefedcollm.errors import ConfigError
from securefedcollm_cli.options import Json

_LONGEST = 4096
"""Bytes of the line with the passphrase."""

app = typer.Typer(no_args_is_help=True, help="Make and show the key that signs for you.")

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Read the passphrase from the first line of FILE, which only you may read [else "
        "SECUREFEDCOLLM_PASSPHRASE, else a prompt].",
    ),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Your organisation's name, e.g. hospital-a.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to put it.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--no-passphrase",
            help="Store the key unencrypted: everybody who reads the file can sign as you.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an Ed25519 identity, encrypted with a passphrase. Only you can read its file."""
    from securefedcollm.study.identity import create_identity, default_path

    path = out or default_path(name)
    passphrase = None if plain else read_passphrase(passphrase_file, confirm=True)
    identity = create_identity(name, path, passphrase)
    _print(identity.name, identity.public, identity.encrypted, path, "silo", as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The identity's name, or the path of its file.")],
    role: Annotated[
        Literal["silo", "server", "authority"], typer.Option(help="The role for the roster line.")
    ] = "silo",
    line: Annotated[
        bool, typer.Option("--line", help="Print only the roster line: `>> study.yaml`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the public key and the roster line for the study. Never the private key."""
    from securefedcollm.study.identity import read_identity

    path = find(name)
    identity = read_identity(path)
    if line:
        typer.echo(f"  - {{name: {identity.name}, role: {role}, key: {identity.public}}}")
        return
    _print(identity.name, identity.public, identity.encrypted, path, role, as_json)


def find(name: str) -> Path:
    """The file of an identity given by name or path."""
    from securefedcollm.study.identity import default_path

    return Path(name) if "/" in name or name.endswith(".json") else default_path(name)


def read_passphrase(file: Path | None, *, confirm: bool = False) -> str:
    """From ``--passphrase-file``, the environment, or a prompt on the terminal."""
    if file is not None:
        return _first_line(file)
    if from_environment := os.environ.get("SECUREFEDCOLLM_PASSPHRASE"):
        return from_environment
    prompted: str = typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm)
    return prompted


def _first_line(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            about = os.fstat(opened.fileno())
            line = opened.readline(_LONGEST).decode("utf-8").splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        raise ConfigError(  # the cause would quote a byte of it
            "no passphrase can be read from it",
            where=str(file),
            hint="a text file (UTF-8) whose first line is the passphrase",
        ) from None
    # Adversary: another user of this machine. None is in root's group; systemd hands out its
    # credentials (LoadCredential=) readable for that group alone.
    others = stat.S_IROTH | (stat.S_IRGRP if about.st_gid else 0)
    if stat.S_ISREG(about.st_mode) and about.st_mode & others:
        raise ConfigError(
            f"others may read the passphrase (mode {stat.S_IMODE(about.st_mode):04o})",
            where=str(file),
            hint="chmod 600 it; if anybody could have read it, choose another passphrase",
        )
    return line


def _print(name: str, public: str, encrypted: bool, path: Path, role: str, as_json: bool) -> None:
    line = f"- {{name: {name}, role: {role}, key: {public}}}"
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "name": name,
                    "public": public,
                    "encrypted": encrypted,
                    "file": str(path),
                    "roster_line": line,
                }
            )
        )
        return
    typer.echo(f"identity  {name}")
    typer.echo(f"public    {public}")
    typer.echo(f"file      {path} ({'encrypted' if encrypted else 'NOT encrypted'})")
    typer.echo("for the study's roster:")
    typer.echo(f"  {line}")
