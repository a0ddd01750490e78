"""``securefedcollm shelf …``: members ask each other's documents over the network."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm.errors import ConfigError, TransportError
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli.consortium import Home, home_of
from securefedcollm_cli.identity import PassphraseFile
from securefedcollm_cli.options import StudyFile, stop_on_sigterm
from securefedcollm_cli.role_options import Events, Yes, asked
from securefedcollm_cli.role_serving import say_what_is_lacking, serve
from securefedcollm_cli.role_words import print_entry

if TYPE_CHECKING:
    from securefedcollm.federation.engines.flare.engine import FlareEngine
    from securefedcollm.federation.questions.relay import Relay
    from securefedcollm.federation.roles import Member, ShelfTerms
    from securefedcollm_cli.progress import Bars

app = typer.Typer(
    no_args_is_help=True,
    help="Answer other members' private questions over the network, and carry them (server).",
)


@app.command("serve")
def serve_shelf(
    config: StudyFile,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            metavar="INDEX",
            help="Your shelf: a file of `index build`. Left out, this member only asks.",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            min=0,
            help="Your own limit: the most questions of one asker that this shelf answers, in all "
            "runs and studies together [the study's `retrieval.questions`].",
        ),
    ] = None,
    home: Home = None,
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Take part in the questions of a signed study, as a silo, until you stop it.

    Shows what members may ask and what their questions reveal, and asks whether you agree. Then it
    answers from your shelf what the server brings, and `securefedcollm ask --home DIR` on this
    machine asks the others in your name. It loads no model. You may kill it at any moment: the
    same command goes on, and no question is answered twice.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.door import Door
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.federation.questions.counter import Counter, open_for_questions
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    with roles.take_part(study, config, place, "silo", asked(passphrase_file)) as member:
        largest = roles.largest_call(member)
        kit = installed(place, member.name)
        own = None if index is None else roles.open_shelf(member, index, questions)
        if own is not None:
            _show_terms(own.terms, as_json)
            _confirm(yes)
        with Bars(quiet=as_json) as bars:
            counter = Counter()
            port = roles.question_port(
                member,
                counter,
                None if own is None else own.stock,
                lambda entry: print_entry(entry, study, bars, as_json),
            )
            with Door(counter.visit) as door:
                open_for_questions(member.run, door.path)
                serve(port, member, kit, largest, bars)


@app.command("relay")
def relay(
    config: StudyFile,
    home: Home = None,
    wait: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds to wait for all silos at first. Later ones are let in as they come.",
        ),
    ] = 60.0,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Carry the questions of a signed study between its members, as the server, until you stop it.

    The server sees who asks whom, when and how often. It cannot read a question, a score or a
    passage, nor alter one unnoticed. `securefedcollm ask --home DIR` on this machine asks in the
    server's name. It loads no model. You may kill it at any moment: the same command goes on. A
    question that was on its way is lost then, and counts.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.door import Door
    from securefedcollm.federation.questions.counter import Counter, open_for_questions
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    with (
        roles.take_part(study, config, place, "server", asked(passphrase_file)) as member,
        Bars(quiet=as_json) as bars,
    ):
        largest = roles.largest_call(member)
        counter = Counter()
        port = roles.question_port(
            member, counter, None, lambda entry: print_entry(entry, study, bars, as_json)
        )
        with _engine(member, place, wait, largest, bars) as engine, Door(counter.visit) as door:
            open_for_questions(member.run, door.path)
            _carry(roles.question_relay(member, engine, port), engine, bars)


def _engine(member: Member, place: Path, wait: float, largest: int, bars: Bars) -> FlareEngine:
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.federation.engines.flare.presence import Waits
    from securefedcollm.federation.engines.flare.ready import require_free_port

    kits = Kits(installed(place, member.name), installed(place, member.name, lead=True))
    require_free_port(kits.server.workspace)
    silos = member.roster.names
    engine = FlareEngine(
        silos,
        kits=kits,
        waits=Waits(minimum=1, patience=wait, rejoin=1.0),
        sign=roles.sign_for(member),
        session=roles.session_of(member),
        progress=bars.report,
        say=bars.say,
        largest=dict.fromkeys(silos, largest),
    )
    say_what_is_lacking(bars)
    bars.say(f"waiting for {', '.join(silos)}")
    return engine


def _carry(relay: Relay, engine: FlareEngine, bars: Bars) -> None:
    """Until somebody stops it. That nobody is connected is no reason to end.

    Raises:
        TransportError: FLARE's server has ended.
    """
    try:
        engine.begin_job(frozenset(relay.silos))
    except TransportError as error:
        engine.require_running()
        bars.say(error.message)
    relay.run_until(lambda: not engine.running)
    engine.require_running()


def _show_terms(terms: ShelfTerms, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "terms", **asdict(terms)}))
        return
    for key, value in _reading(terms).items():
        # Adversary: the study's author, who chose the names.
        typer.echo(printable(f"{key:<9} {value}", MOST_MESSAGE), err=True)


def _reading(terms: ShelfTerms) -> dict[str, str]:
    spent = ", ".join(f"{asker} {count}" for asker, count in terms.spent.items() if count)
    shown = {
        "study": f"{terms.study}, sha256:{terms.digest}, signed by all",
        "server": f"{terms.server} carries the questions, and may ask itself",
        "shelf": f"{terms.passages:,} passages of {terms.documents:,}; {terms.index[:16]}…",
        "may ask": ", ".join(terms.askers),
        "limit": f"{terms.questions:,} questions of each, in all runs and studies together",
        "asked": spent or "nobody has asked this shelf yet",
        "together": f"{terms.together} of them may collude, and have {terms.pooled:,} questions; "
        f"{terms.telling:,} tell all embeddings (dimension {terms.dimension})",
        "reveals": f"a question tells a score of every passage, and {terms.fetched} whole passages "
        "that the asker chooses",
    }
    if terms.reads_all:
        shown["WARNING"] = (
            f"{terms.pooled:,} questions tell all embeddings on this shelf, and so much of every "
            "text; --questions lowers the limit of each asker"
        )
    return shown


def _confirm(yes: bool) -> None:
    if yes or typer.confirm("Answer their questions?", default=False, err=True):
        return
    raise ConfigError("not agreed; nothing was answered", hint="--yes agrees without asking")
