"""``securefedcollm server``, ``client``, ``authority``, ``status``: the roles of a real run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securefedcollm.errors import EvidenceError
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli.consortium import Home, home_of
from securefedcollm_cli.identity import PassphraseFile
from securefedcollm_cli.options import (
    Device,
    Json,
    States,
    StatesSize,
    StudyFile,
    Track,
    stop_on_sigterm,
)
from securefedcollm_cli.role_client import client
from securefedcollm_cli.role_options import Events, Models, Threads, Yes, asked
from securefedcollm_cli.role_serving import flare_engine, own_kits, serve
from securefedcollm_cli.role_words import confirm, print_entry, print_round, say_finished

if TYPE_CHECKING:
    from securefedcollm_cli.progress import Bars

__all__ = ["authority", "client", "server", "status"]


def server(
    config: StudyFile,
    public: Annotated[
        Path | None,
        typer.Option("--public", metavar="FILE", help="The study's public questions."),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="FILE", help="Test questions, to show accuracy [none]."),
    ] = None,
    models: Models = None,
    home: Home = None,
    wait: Annotated[
        float,
        typer.Option(min=1, help="Seconds to wait for silos that are not connected yet."),
    ] = 600.0,
    rejoin_wait: Annotated[
        float,
        typer.Option(
            "--rejoin-wait",
            min=0,
            help="Seconds to wait for silos that dropped out, when too few are left. Then the "
            "run stops, and the same command goes on with it.",
        ),
    ] = 3600.0,
    linger: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds to stay when the run is over, for silos that were away at its end: "
            "they get the last adapter when they come. The server names them, and the "
            "others may leave. The same command, started later, serves them too.",
        ),
    ] = 0.0,
    track: Track = None,
    threads: Threads = None,
    device: Device = "cpu",
    states: States = None,
    states_gb: StatesSize = 20.0,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Coordinate a signed study over the network, until it is finished.

    Waits for the silos, runs the rounds, distils, and delivers the adapter to every silo. You may
    stop it (Ctrl-C), kill it or reboot the machine at any moment: the same command goes on from the
    last durable round. Nothing is opened twice.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.continuing import beside
    from securefedcollm.federation.engines.flare.presence import Waits
    from securefedcollm.federation.hooks import Hooks
    from securefedcollm.federation.tracking import require_tracker
    from securefedcollm.study import load_study
    from securefedcollm.tuning.kept_states import keeping_states
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    require_tracker(track)
    place, study = home_of(home), load_study(config)
    passphrase = asked(passphrase_file)
    with (
        roles.take_part(study, config, place, "server", passphrase) as member,
        beside(member.run),
        keeping_states(states, int(states_gb * 1e9)),
        Bars(quiet=as_json) as bars,
    ):
        from securefedcollm.federation import cotuning

        kits = own_kits(member)  # before models are loaded
        cotuning.set_threads(threads)
        questions = roles.server_questions(study, public, test)
        workload = cotuning.ServerTuning(
            study,
            public=questions[0],
            test=questions[1],
            data=models,
            device=device,
            progress=bars.report,
        )
        minimum = study.minimum + (member.authority is not None)
        waits = Waits(minimum=minimum, patience=wait, rejoin=rejoin_wait)
        largest = roles.largest_reply(study, workload)
        extra = (member.authority.name,) if member.authority else ()
        with flare_engine(member, kits, waits, largest, bars, extra=extra) as engine:
            record = roles.coordinate(
                member,
                engine,
                workload,
                Hooks(
                    progress=bars.report,
                    on_round=partial(print_round, study.rounds, bars, as_json),
                    rejoined=engine.rejoined,
                    arrived=engine.arrived,
                ),
                linger=linger,
                track=track,
            )
            _say_late(roles.not_told(member), bars)
        _say_trained(member.run, record, as_json)


def _say_late(late: Sequence[str], bars: Bars) -> None:
    """``late``: silos that have not got the last adapter."""
    if late:
        bars.say(
            f"not reached when the run was over: {', '.join(late)}; the same command with "
            "--linger SECONDS waits for them, and delivers the last adapter"
        )


def _say_trained(run: Path, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "finished", "run": str(run)}))
    else:
        typer.echo(f"finished: {len(record['rounds'])} rounds; the adapters are in")
        typer.echo(f"  {record['adapters']}")
    report_of(run, as_json)


def report_of(run: Path, as_json: bool) -> None:
    """The server's own evidence, checked, and its report.

    Raises:
        EvidenceError: it does not hold.
    """
    from securefedcollm_audits.verification import table

    from securefedcollm_cli.audit import write_evidence

    verdict, page = write_evidence(run)
    if as_json:
        found = {"bundle": verdict.bundle, "report": page, "holds": verdict.holds}
        typer.echo(json.dumps({"event": "report", **found, "passed": verdict.passed}))
    else:
        typer.echo(f"evidence: {printable(verdict.bundle)}, {printable(table.sentence(verdict))}")
        typer.echo(f"report: {printable(page)}")
    if not verdict.holds:
        raise EvidenceError(
            f"{verdict.bundle}: the run is finished, but {table.sentence(verdict)}",
            hint=f"`securefedcollm audit verify {verdict.bundle}` names the entries",
        )


def authority(
    config: StudyFile,
    home: Home = None,
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Hold the decryption key of a signed study with `key_model: authority`, until it is finished.

    Run it on a machine that neither the server nor a silo controls, such as an auditor's. It makes
    a fresh key for every round and opens one sum a round, of enough silos that signed it. It sees
    no data.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    with (
        roles.take_part(study, config, place, "authority", asked(passphrase_file)) as member,
        Bars(quiet=as_json) as bars,
    ):
        session = roles.authority_session(
            member, on_entry=lambda entry: print_entry(entry, study, bars, as_json)
        )
        kit = installed(place, member.name)
        bars.say(f"study {study.study}, sha256:{member.study.digest.hex()}, signed by all")
        bars.say(f"opens {study.sums} sums, each of at least {study.quorum} silos")
        confirm(yes)
        serve(session, member, kit, roles.LARGEST_TO_AUTHORITY, bars, idle=session.drop_overdue)
    say_finished(member.run, as_json)


def status(home: Home = None, as_json: Json = False) -> None:
    """Show the runs in this home: rounds, survivors, bytes, ε. Safe while one is running."""
    from securefedcollm.federation.status import runs_of

    place = home_of(home)
    runs = runs_of(place)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
        return
    if not runs:
        typer.echo(f"no study has been run in {place}")
        return
    for run in runs:
        for line in run.sentences():
            typer.echo(printable(line, MOST_MESSAGE))
