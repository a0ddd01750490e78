"""``securefedcollm server``, ``client``, ``authority``, ``status``: the roles of a real run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli.consortium import Home, home_of
from securefedcollm_cli.identity import PassphraseFile, read_passphrase
from securefedcollm_cli.options import Device, Json, StudyFile, Track, stop_on_sigterm

if TYPE_CHECKING:
    from securefedcollm.evidence.entries import Entry
    from securefedcollm.federation.authority import AuthoritySession
    from securefedcollm.federation.consent import Terms
    from securefedcollm.federation.engines import SiloPort
    from securefedcollm.federation.engines.flare.kit import Kit
    from securefedcollm.federation.engines.link import SiloInbox
    from securefedcollm.federation.roles import Member
    from securefedcollm.federation.silo import SiloSession
    from securefedcollm.study import Study
    from securefedcollm_cli.progress import Bars

    Session = SiloSession | AuthoritySession

Models = Annotated[
    Path | None,
    typer.Option("--models", metavar="DIR", help="Where the study's path: models are."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for training [every core of this machine].")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for unattended machines.")]
Events = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line as things happen.")
]


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
            help="Seconds to wait for silos that were there and are gone, when too few are left; "
            "then the run stops, and the same command goes on with it.",
        ),
    ] = 3600.0,
    linger: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds to stay when the run is over, for silos that were away at its end: they "
            "get the last adapter when they come. They are named, and the others may leave. The "
            "same command, started later, serves them too.",
        ),
    ] = 0.0,
    track: Track = None,
    threads: Threads = None,
    device: Device = "cpu",
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Coordinate a signed study over the network, until it is finished.

    Waits for the silos, runs the rounds, distils, and brings every silo the adapter. It may be
    stopped (Ctrl-C), killed or rebooted at any moment: the same command goes on from the last
    durable round. Nothing is opened twice.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits, Waits
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.federation.engines.flare.ready import require_free_port
    from securefedcollm.federation.hooks import Hooks
    from securefedcollm.federation.tracking import require_tracker
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    require_tracker(track)
    place, study = home_of(home), load_study(config)
    passphrase = _asked(passphrase_file)
    with (
        roles.take_part(study, config, place, "server", passphrase) as member,
        Bars(quiet=as_json) as bars,
    ):
        from securefedcollm.federation import cotuning

        kits = Kits(installed(place, member.name), installed(place, member.name, lead=True))
        require_free_port(kits.server.workspace)  # before models are loaded
        cotuning.set_threads(threads or _cores())
        questions = roles.server_questions(study, public, test)
        workload = cotuning.ServerTuning(
            study,
            public=questions[0],
            test=questions[1],
            data=models,
            device=device,
            progress=bars.report,
        )
        office = [member.authority.name] if member.authority else []
        parties = (*member.roster.names, *office)
        with FlareEngine(
            parties,
            kits=kits,
            waits=Waits(minimum=study.minimum + len(office), patience=wait, rejoin=rejoin_wait),
            sign=roles.sign_for(member),
            session=roles.session_of(member),
            progress=bars.report,
            say=bars.say,
            largest=dict.fromkeys(member.roster.names, roles.largest_reply(study, workload)),
        ) as engine:
            _say_what_is_lacking(bars)
            bars.say(f"waiting for {', '.join(parties)}")
            record = roles.coordinate(
                member,
                engine,
                workload,
                Hooks(
                    progress=bars.report,
                    on_round=partial(_print_round, study.rounds, bars, as_json),
                    rejoined=engine.rejoined,
                    arrived=engine.arrived,
                ),
                linger=linger,
                track=track,
            )
            if late := roles.not_told(member):
                bars.say(
                    f"not reached when the run was over: {', '.join(late)}; the same "
                    "command with --linger SECONDS waits for them, and brings the last adapter"
                )
        if as_json:
            typer.echo(json.dumps({"event": "finished", "run": str(member.run)}))
        else:
            typer.echo(f"finished: {len(record['rounds'])} rounds; the adapters are in")
            typer.echo(f"  {record['adapters']}")
        report_of(member.run, as_json)


def report_of(run: Path, as_json: bool) -> None:
    """The server's own evidence, checked, and its report.

    Raises:
        EvidenceError: it does not hold.
    """
    from securefedcollm_audits import table

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


def client(
    config: StudyFile,
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="Your private questions: stay here.")
    ],
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="FILE",
            help="Your held-out records: shows what every round's model makes of them, here and "
            "nowhere else [none].",
        ),
    ] = None,
    training_loss: Annotated[
        bool,
        typer.Option(
            "--training-loss",
            help="Also show what every round's model makes of your own records that take part, "
            "here and nowhere else. With --records skip, those that are left out do not count.",
        ),
    ] = False,
    models: Models = None,
    home: Home = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            min=0.0,
            metavar="EPSILON",
            help="Most ε that a record may spend in all studies together: a limit below the pinned "
            "budget; if nothing is pinned, the budget itself [what is pinned, else the study's].",
        ),
    ] = None,
    records: Annotated[
        Literal["refuse", "skip"],
        typer.Option(
            help="If some records cannot pay for this study: refuse it, or leave those records out."
        ),
    ] = "refuse",
    without_privacy: Annotated[
        bool,
        typer.Option(
            "--without-privacy",
            help="Take part in a study without differential privacy although these records have a "
            "privacy budget. No ε bounds what such a study reveals of them; --yes does not include "
            "this.",
        ),
    ] = False,
    threads: Threads = None,
    device: Device = "cpu",
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Take part in a signed study as a silo, until it is finished.

    Shows what you are about to agree to, and asks. Then it trains when the server asks, and sends
    nothing but masked or encrypted updates. The adapter that the newest round ended with is in
    `studies/…/adapters/slm` of your home: `model evaluate|generate|merge --run`. It may be stopped
    (Ctrl-C), killed or rebooted at any moment; the same command goes on, and pays for nothing
    twice.
    """
    from securefedcollm.federation import consent, roles
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.privacy.ledger import Budget
    from securefedcollm.study import load_study
    from securefedcollm_cli.heldout import HELD_OUT, TRAINING, HeldOut, Undisturbed
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    passphrase = _asked(passphrase_file)
    with roles.take_part(study, config, place, "silo", passphrase) as member:
        kit = installed(place, member.name)
        limit = None
        if budget is not None:
            if study.privacy is None:
                raise ConfigError(
                    "this study accounts for no ε",
                    where="--budget",
                    hint="without differential privacy nothing keeps to a budget: do not take part",
                )
            limit = Budget(budget, study.privacy.delta)
        threads = threads or _cores()
        with Bars(quiet=as_json) as bars:
            from securefedcollm.federation import cotuning

            cotuning.set_threads(threads)
            workload = roles.silo_workload(
                study, member.name, data, models, bars.report, device=device
            )
            if test is not None and (both := roles.trained_on(study, test, workload)):
                bars.say(f"WARNING: {both} records of {test} are training records too: no measure")
            of_file, whole = workload.records, workload.questions
            if records == "skip":
                workload = consent.without_spent(
                    member,
                    workload,
                    limit,
                    lambda kept: roles.workload_of(
                        study, member.name, kept, models, bars.report, device=device
                    ),
                )
        roles.require_begun_data(member, workload)
        terms = consent.terms(member, workload, limit, left_out=of_file - workload.records)
        _show_terms(terms, as_json)
        consent.require_protection(member, without_privacy)
        consent.require_budget(member, workload, limit)
        _confirm(yes)
        with Bars(quiet=as_json) as bars:
            session = roles.silo_session(
                member,
                workload,
                progress=bars.report,
                threads=threads,
                budget=limit,
                on_entry=lambda entry: _print_entry(entry, study, bars, as_json),
            )
            largest = roles.largest_frame(study, workload)
            measured = {HELD_OUT: test} if test is not None else {}
            measured |= {TRAINING: data} if training_loss else {}
            parts = {TRAINING: consent.taking_part(whole, workload.questions)}
            if not measured:
                _serve(session, member, kit, largest, bars)
            else:
                told = partial(_print_scores, study.rounds, bars, as_json)
                with HeldOut(member.run, measured, models, told, bars.say, parts) as held_out:
                    port = Undisturbed(session, held_out)
                    _serve(session, member, kit, largest, bars, idle=held_out.look, port=port)
                    held_out.finish()
    _say_where(member.run, study, as_json)
    _finished(member.run, as_json)


def authority(
    config: StudyFile,
    home: Home = None,
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Hold the decryption key of a signed study with `key_model: authority`, until it is finished.

    Run it where neither the server nor a silo has a say: at an auditor's. It makes a fresh key for
    every round and opens one sum a round, of enough silos that signed it; it sees no data.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    with (
        roles.take_part(study, config, place, "authority", _asked(passphrase_file)) as member,
        Bars(quiet=as_json) as bars,
    ):
        session = roles.authority_session(
            member, on_entry=lambda entry: _print_entry(entry, study, bars, as_json)
        )
        kit = installed(place, member.name)
        bars.say(f"study {study.study}, sha256:{member.study.digest.hex()}, signed by all")
        bars.say(f"opens {study.sums} sums, each of at least {study.quorum} silos")
        _confirm(yes)
        _serve(session, member, kit, roles.LARGEST_TO_AUTHORITY, bars, idle=session.drop_overdue)
    _finished(member.run, as_json)


def _serve(
    session: Session,
    member: Member,
    kit: Kit,
    limit: int,
    bars: Bars,
    idle: Callable[[], None] = lambda: None,
    port: SiloPort | None = None,
) -> None:
    """Answer the server, through FLARE's process, until the run is over.

    ``idle`` is called between requests, and several times a second while there are none. ``port``
    answers them, if it is not the session itself.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.door import Door
    from securefedcollm.federation.engines.flare.processes import DOOR, FlareProcess
    from securefedcollm.federation.engines.link import answer_calls

    inbox = roles.inbox_for(member, port or session, limit)
    leave = _Leaving(session, inbox)
    with (
        Door(answer_calls(inbox)) as door,
        FlareProcess(
            "client", kit.workspace, name=kit.name, org=kit.org, env={DOOR: str(door.path)}
        ) as flare,
    ):
        _say_what_is_lacking(bars)
        bars.say("waiting for the server")

        def stop() -> bool:
            idle()
            return not flare.running or leave.now

        inbox.serve(stop)
        if not session.over:
            flare.require_running()


def _say_what_is_lacking(bars: Bars) -> None:
    from securefedcollm.federation.engines.flare.sandbox import shortcoming

    if lacking := shortcoming():
        bars.say(f"WARNING: {lacking}; docs/deploy.md says what to do")


class _Leaving:
    """When to go: the run is over and the server has had the answer, or a minute to fetch it."""

    def __init__(self, session: Session, inbox: SiloInbox) -> None:
        self._session, self._inbox = session, inbox
        self._since: float | None = None

    @property
    def now(self) -> bool:
        if not self._session.over:
            return False
        self._since = self._since or time.monotonic()
        return not self._inbox.attended or time.monotonic() - self._since > 60


def _finished(run: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "finished", "run": str(run)}))
    else:
        typer.echo("finished. Where it stands: securefedcollm status; for an auditor:")
        typer.echo(f"  securefedcollm audit bundle {run}")


def _say_where(run: Path, study: Study, as_json: bool) -> None:
    """Where a silo has the result.

    Adversary: a server that ends a run before its time, or keeps the last adapter to itself.
    """
    from securefedcollm.federation.roles import ADAPTER, newest_adapter

    newest, rounds = newest_adapter(run), study.rounds
    if as_json:
        typer.echo(json.dumps({"event": "adapter", "round": newest, "place": str(run / ADAPTER)}))
    elif newest:
        typer.echo(f"the adapter of round {newest} of {rounds}; with it securefedcollm model")
        typer.echo(f"  evaluate|generate|merge --run {run}")
    if newest < rounds:
        why = f"the server brought no adapter that round {rounds} ended with"
        if newest and study.keep and study.keep.patience:
            why += "; that the study's patience ended the run shows in the server's evidence alone"
        typer.echo(f"WARNING: {why}", err=True)


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


def _asked(passphrase_file: Path | None) -> Callable[[], str]:
    return lambda: read_passphrase(passphrase_file)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _show_terms(terms: Terms, as_json: bool) -> None:
    """Show what taking part means."""
    if as_json:
        figures = {k: None if v == float("inf") else v for k, v in asdict(terms).items()}
        typer.echo(json.dumps({"event": "terms", **figures}))
    else:
        for key, value in _reading(terms).items():
            # Adversary: the study's author, who chose the names.
            typer.echo(printable(f"{key:<9} {value}", MOST_MESSAGE), err=True)


def _confirm(yes: bool) -> None:
    if yes or typer.confirm("Take part?", default=False, err=True):
        return
    raise ConfigError("not agreed; nothing was sent", hint="--yes agrees without asking")


def _reading(terms: Terms) -> dict[str, str]:
    left_out = f", without {terms.left_out:,} that cannot pay" if terms.left_out else ""
    shown = {
        "study": f"{terms.study}, sha256:{terms.digest}, signed by all",
        "server": terms.server,
        "silos": ", ".join(terms.silos),
        "model": f"{terms.models['slm']}, sha256:{terms.base[:16]}… (checked here)",
        "data": f"{terms.records:,} records{left_out}; they stay on this machine",
    }
    if terms.epsilon is None:
        shown["privacy"] = "none: the tuned adapter may reveal records"
        shown["budget"] = "nothing is accounted for"
        if terms.budget is not None:
            shown["budget"] = (
                f"ε = {terms.budget:g} (δ = {terms.budget_delta:g}) is pinned for every record; "
                "this study does not keep to it, and needs --without-privacy"
            )
        return shown
    from securefedcollm.privacy.shown import up

    assert terms.spent is not None
    assert terms.after is not None
    assert terms.median is not None
    whose = "subject" if terms.unit == "subject" else "record"
    shown["privacy"] = (
        f"this study may spend ε = {terms.epsilon:g} (δ = {terms.delta:g}) per {terms.unit}"
    )
    shown["budget"] = (
        f"the {whose} that has spent most has spent ε = {up(terms.spent)} of {terms.budget:g} "
        f"(δ = {terms.budget_delta:g}); with this study it would be {up(terms.after)}"
    )
    shown["others"] = (
        f"half of the {whose}s have spent ε = {up(terms.median)} or less; "
        f"{terms.untouched:,} nothing yet"
    )
    if terms.unattributed:
        shown["older"] = (
            f"{terms.unattributed} charges of this ledger name no records, and no file known here; "
            "they are not in these figures"
        )
    return shown


def _print_round(rounds: int, bars: Bars, as_json: bool, record: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "round", **record}))
        return
    from securefedcollm.federation.status import round_sentence

    bars.say(round_sentence(record, rounds))


def _print_scores(
    rounds: int, bars: Bars, as_json: bool, which: str, round_: int, scores: dict[str, Any]
) -> None:
    """What the silo's own records say, for its operator alone."""
    if as_json:
        typer.echo(json.dumps({"event": which, "round": round_, **scores}))
        return
    whole = scores["all"]
    when = f"after round {round_} of {rounds}" if round_ else "of the base model"
    bars.say(
        f"your {which} records: loss {-whole['gold_log_prob']:.4f}, accuracy "
        f"{whole['accuracy']:.4f} {when} ({whole['count']} records)"
    )


def _print_entry(entry: Entry, study: Any, bars: Bars, as_json: bool) -> None:
    """What the silo's evidence log has just been told, for its operator."""
    from securefedcollm.federation.status import told

    if as_json:
        import msgspec

        what = msgspec.to_builtins(entry.what)
        typer.echo(json.dumps({"event": what.pop("kind"), "time": entry.time, **what}))
        return
    line = told(entry, study)
    if line:
        bars.say(line)
