"""``securefedcollm consortium …`` and ``join``: who may connect to whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from securefedcollm.errors import ConfigError
from securefedcollm_cli.identity import PassphraseFile, read_passphrase
from securefedcollm_cli.options import Json, stop_on_sigterm

app = typer.Typer(
    no_args_is_help=True,
    help="The consortium's certificate authority: kept offline by one person, used rarely.",
)

Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="This participant's directory: keys, ledger, runs [SECUREFEDCOLLM_HOME, else the "
        "user's data directory].",
    ),
]


def home_of(given: Path | None) -> Path:
    """The participant's directory."""
    import platformdirs

    if given is None:
        given = Path(
            os.environ.get("SECUREFEDCOLLM_HOME") or platformdirs.user_data_dir("securefedcollm")
        )
    return given.absolute()


@app.command()
def init(
    name: Annotated[str, typer.Option("--name", help="The consortium's name, e.g. oncology-net.")],
    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            help="Address at which the silos will reach the server.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="A new directory for the authority.")
    ] = Path("consortium"),
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Make the certificate authority, on a machine that is neither the server nor online.

    Its key is kept encrypted under a passphrase. Give the participants consortium.yaml, and tell
    them its fingerprint by another channel.
    """
    from securefedcollm.federation.engines.flare.kit import create_consortium
    from securefedcollm.federation.engines.flare.papers import PROFILE

    stop_on_sigterm()
    host, _, port = server.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ConfigError(
            f"{server!r} is no address", where="--server", hint="e.g. fl.example.org:8002"
        )
    passphrase = read_passphrase(passphrase_file, confirm=True)
    profile = create_consortium(out, name, host, int(port), passphrase)
    if as_json:
        typer.echo(json.dumps({"profile": str(out / PROFILE), "fingerprint": profile.fingerprint}))
        return
    typer.echo(f"authority    {out} (its key is encrypted; keep it offline)")
    typer.echo(f"profile      {out / PROFILE}: send it to every participant")
    typer.echo(f"fingerprint  {profile.fingerprint}")
    typer.echo("Tell every participant the fingerprint by another channel, e.g. by telephone.")


@app.command()
def approve(
    requests: Annotated[
        list[Path], typer.Argument(metavar="REQUEST…", help="Request files from `join`.")
    ],
    authority: Annotated[
        Path, typer.Option("--ca", metavar="DIR", help="The directory that `init` made.")
    ] = Path("consortium"),
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to put the answers [DIR of --ca/signed]."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Sign participants' certificate requests.

    Shows the name on each request, and asks: make sure that this participant sent it. Neither a
    request nor its answer holds anything secret.
    """
    from securefedcollm.federation.engines.flare.kit import approve_request
    from securefedcollm.federation.engines.flare.papers import read_request

    stop_on_sigterm()
    for request in requests:
        typer.echo(read_request(request).sentence, err=True)
    if not (yes or typer.confirm("Are these the senders?", default=False, err=True)):
        raise ConfigError("nothing was signed", hint="--yes signs without asking")
    passphrase = read_passphrase(passphrase_file)
    place = out or authority / "signed"
    signed = [approve_request(authority, request, passphrase, place) for request in requests]
    if as_json:
        typer.echo(json.dumps({"signed": [str(path) for path in signed]}))
        return
    for path in signed:
        typer.echo(f"signed  {path}: send it back to whoever asked")


def join(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="The consortium.yaml that you were sent.")
    ],
    name: Annotated[
        str, typer.Option("--name", help="Your organisation's name on the roster, e.g. hospital-a.")
    ],
    role: Annotated[
        Literal["silo", "server", "authority"], typer.Option(help="The role that you will run.")
    ] = "silo",
    signed: Annotated[
        list[Path] | None,
        typer.Option(
            "--signed",
            metavar="FILE",
            help="The answer(s) to your request: installs the start-up kit (repeatable).",
        ),
    ] = None,
    home: Home = None,
    passphrase_file: PassphraseFile = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--no-passphrase",
            help="Store the identity unencrypted: everybody who reads the file can sign as you.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Join a consortium: make your keys and a certificate request; later install the answer.

    Run it twice. The first time it makes your signing identity and a request; send the request to
    the keeper of the consortium's authority. The private keys never leave this machine. When the
    signed answer is back, run it again with --signed FILE. That installs a kit, which runs our
    relay and nothing else that a server might send.
    """
    from securefedcollm.federation.engines.flare.papers import read_profile

    stop_on_sigterm()
    place, consortium = home_of(home), read_profile(profile)
    if signed:
        from securefedcollm.federation.engines.flare.kit import install_kits

        kits = install_kits(place, consortium, signed, name)
        facts: dict[str, Any] = {"installed": [str(kit.workspace) for kit in kits]}
    else:
        facts = _ask(place, consortium, name, role, passphrase_file, plain)
    facts |= {"home": str(place), "fingerprint": consortium.fingerprint}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for path in facts.get("requests", []):
        typer.echo(f"request      {path}: send it to the consortium's authority")
    for path in facts.get("installed", []):
        typer.echo(f"installed    {path}")
    typer.echo(f"fingerprint  {consortium.fingerprint}")
    if not signed:
        typer.echo("Compare the fingerprint with what you were told by another channel.")
        typer.echo("For the study's roster:")
        typer.echo(f"  {facts['roster_line']}")
    else:
        typer.echo(f"Once everybody has signed the study: securefedcollm {_command(role)} STUDY …")


def _ask(
    home: Path, consortium: Any, name: str, role: str, passphrase_file: Path | None, plain: bool
) -> dict[str, Any]:
    from securefedcollm.federation.engines.flare.kit import request_certificate
    from securefedcollm.federation.engines.flare.papers import check_participant
    from securefedcollm.federation.roles import IDENTITY
    from securefedcollm.study.identity import create_identity, read_identity

    check_participant(name, role, consortium, "--name")
    path = home / IDENTITY
    if path.exists():
        identity = read_identity(path)
        if identity.name != name:
            raise ConfigError(
                f"this home is {identity.name}'s", where=str(home), hint="choose another --home"
            )
    else:
        passphrase = None if plain else read_passphrase(passphrase_file, confirm=True)
        identity = create_identity(name, path, passphrase)
    requests = request_certificate(home, consortium, name, role)
    line = f"- {{name: {name}, role: {role}, key: {identity.public}}}"
    return {
        "requests": [str(request) for request in requests],
        "identity": str(path),
        "roster_line": line,
    }


def _command(role: str) -> str:
    return "client" if role == "silo" else role
