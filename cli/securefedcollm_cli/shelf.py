"""``securefedcollm shelf …``: members ask each other's documents, or records, over the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm.errors import ConfigError, TransportError
from securefedcollm_cli.consortium import Home, home_of
from securefedcollm_cli.identity import PassphraseFile
from securefedcollm_cli.options import StudyFile, stop_on_sigterm
from securefedcollm_cli.role_options import Events, Models, Yes, asked
from securefedcollm_cli.role_serving import flare_engine, own_kits, serve
from securefedcollm_cli.role_words import print_entry
from securefedcollm_cli.shelf_words import confirm, show_terms

if TYPE_CHECKING:
    from securefedcollm.federation.engines.flare.engine import FlareEngine
    from securefedcollm.federation.questions.answering import OwnRecords
    from securefedcollm.federation.questions.port import QuestionPort
    from securefedcollm.federation.questions.relay import Relay
    from securefedcollm.federation.questions.stock import Stock
    from securefedcollm.federation.roles import Member
    from securefedcollm.study import Study
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
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            metavar="FILE",
            help="With `retrieval.mode: answers`: your private records, which vote on questions. "
            "They stay on this machine. Left out, this member only asks.",
        ),
    ] = None,
    models: Models = None,
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

    With `retrieval.mode: answers` your records vote instead, with --records. They pay once for all
    the answers that each may give, when you agree. A record that cannot pay casts no vote, and
    nobody is told. It loads the study's encoder.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    _check_options(study, index, questions, records)
    with (
        roles.take_part(study, config, place, "silo", asked(passphrase_file)) as member,
        ExitStack() as files,
    ):
        largest = roles.largest_call(member)
        kit = installed(place, member.name)
        own: Stock | OwnRecords | None = None
        if records is not None:
            own = _records(member, records, models, yes, as_json, files)
        elif index is not None:
            shelf = roles.open_shelf(member, index, questions)
            show_terms(shelf.terms, as_json)
            confirm(yes)
            own = shelf.stock
        with Bars(quiet=as_json) as bars, _port(member, own, bars, as_json) as port:
            serve(port, member, kit, largest, bars)


def _check_options(
    study: Study, index: Path | None, questions: int | None, records: Path | None
) -> None:
    """Documents are on a shelf, and records are not.

    Adversary: a slip of the hand that puts records where members read them.
    """
    if study.retrieval is None:
        return  # whoever opens the port says so
    answers = study.retrieval.mode == "answers"
    wrong = {"--index": index, "--questions": questions} if answers else {"--records": records}
    for option, given in wrong.items():
        if given is not None:
            raise ConfigError(
                "this study asks records, which go on no shelf"
                if answers
                else "this study asks documents, which members read",
                where=option,
                hint="give --records FILE" if answers else "give --index; records go on no shelf",
            )


def _records(
    member: Member, file: Path, models: Path | None, yes: bool, as_json: bool, files: ExitStack
) -> OwnRecords:
    """The silo's records, once its operator has agreed to what they pay and answer."""
    from securefedcollm.federation import roles
    from securefedcollm.federation.dealing import read_records
    from securefedcollm_cli.progress import Bars

    booth = files.enter_context(roles.RecordBooth(member, read_records(member.study, file)))
    show_terms(booth.terms(), as_json)
    confirm(yes)
    with Bars(quiet=as_json) as bars:
        return booth.open(models, bars.report)


@contextmanager
def _port(
    member: Member, own: Stock | OwnRecords | None, bars: Bars, as_json: bool
) -> Iterator[QuestionPort]:
    """The member's side, and the door at which `ask` hands in questions."""
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.door import Door
    from securefedcollm.federation.questions.counter import Counter, open_for_questions

    counter = Counter()
    port = roles.question_port(
        member, counter, own, lambda entry: print_entry(entry, member.study, bars, as_json)
    )
    with Door(counter.visit) as door:
        open_for_questions(member.run, door.path)
        yield port


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

    The server sees who asks whom, when and how often. It cannot read a question to documents, a
    score or a passage, nor alter one unnoticed. Of a question to records it sees what silos and
    asker see: the question, and the noised sum of all votes. `securefedcollm ask --home DIR` on
    this machine asks in the server's name. It loads no model. You may kill it at any moment: the
    same command goes on. A question that was on its way is lost then, and counts.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.presence import Waits
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    with (
        roles.take_part(study, config, place, "server", asked(passphrase_file)) as member,
        Bars(quiet=as_json) as bars,
    ):
        largest = roles.largest_call(member)
        with _port(member, None, bars, as_json) as port:
            waits = Waits(minimum=1, patience=wait, rejoin=1.0)
            with flare_engine(member, own_kits(member), waits, largest, bars) as engine:
                _carry(roles.question_relay(member, engine, port), engine, bars)


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
