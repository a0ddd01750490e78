"""``securefedcollm client``: a silo of a real run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securefedcollm.errors import ConfigError
from securefedcollm_cli.consortium import Home, home_of
from securefedcollm_cli.identity import PassphraseFile
from securefedcollm_cli.options import Device, StudyFile, Unable, stop_on_sigterm
from securefedcollm_cli.role_options import Events, Models, Threads, Yes, asked
from securefedcollm_cli.role_serving import serve
from securefedcollm_cli.role_words import (
    confirm,
    print_entry,
    print_scores,
    say_finished,
    say_where,
    show_terms,
)

if TYPE_CHECKING:
    from securefedcollm.federation.engines.flare.kit import Kit
    from securefedcollm.federation.roles import Member
    from securefedcollm.federation.silo import SiloSession
    from securefedcollm.privacy.ledger import Budget
    from securefedcollm.study import Study
    from securefedcollm_cli.heldout import HeldOut
    from securefedcollm_cli.progress import Bars


def client(
    config: StudyFile,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Your private records. They stay on this machine."
        ),
    ],
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="FILE",
            help="Your held-out records. Every round's model is measured on them, and only "
            "this machine shows the result [none].",
        ),
    ] = None,
    training_loss: Annotated[
        bool,
        typer.Option(
            "--training-loss",
            help="Also measure every round's model on your own records that take part; only "
            "this machine shows the result. Records that --records skip leaves out do not "
            "count.",
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
            help="Largest ε that a record may spend in all studies together: a limit below the "
            "pinned budget or, if none is pinned, the budget itself [the pinned one, else "
            "the study's].",
        ),
    ] = None,
    records: Unable = "refuse",
    without_privacy: Annotated[
        bool,
        typer.Option(
            "--without-privacy",
            help="Take part in a study without differential privacy although these records "
            "have a privacy budget. No ε bounds what such a study reveals of them. --yes "
            "does not include this.",
        ),
    ] = False,
    threads: Threads = None,
    device: Device = "cpu",
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    as_json: Events = False,
) -> None:
    """Take part in a signed study as a silo, until it is finished.

    Shows the terms, and asks whether you agree. Then it trains when the server asks, and sends only
    masked or encrypted updates. The newest round's adapter is in `studies/…/adapters/slm` of your
    home; use it with `model evaluate|generate|merge --run`. You may stop it (Ctrl-C), kill it or
    reboot the machine at any moment: the same command goes on, and pays for nothing twice.
    """
    from securefedcollm.federation import consent, roles
    from securefedcollm.federation.continuing import beside
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.study import load_study
    from securefedcollm_cli.heldout import HELD_OUT, TRAINING, HeldOut
    from securefedcollm_cli.progress import Bars

    stop_on_sigterm()
    place, study = home_of(home), load_study(config)
    passphrase = asked(passphrase_file)
    with roles.take_part(study, config, place, "silo", passphrase) as member, beside(member.run):
        kit = installed(place, member.name)
        limit = _limit(study, budget)
        with Bars(quiet=as_json) as bars:
            from securefedcollm.federation import cotuning

            threads = cotuning.set_threads(threads)
            place_of: dict[str, Any] = {"models": models, "progress": bars.report, "device": device}
            workload = roles.silo_workload(study, member.name, data, **place_of)
            if test is not None:
                _warn_of_shared(roles.trained_on(study, test, workload), test, bars)
            of_file, whole = workload.records, workload.questions
            if records == "skip":
                fewer = partial(roles.workload_of, study, member.name, **place_of)
                workload = consent.without_spent(member, workload, limit, fewer)
        roles.require_begun_data(member, workload)
        terms = consent.terms(member, workload, limit, left_out=of_file - workload.records)
        show_terms(terms, as_json)
        consent.require_protection(member, without_privacy)
        consent.require_budget(member, workload, limit)
        confirm(yes)
        with Bars(quiet=as_json) as bars:
            session = roles.silo_session(
                member,
                workload,
                progress=bars.report,
                threads=threads,
                budget=limit,
                on_entry=lambda entry: print_entry(entry, study, bars, as_json),
            )
            largest = roles.largest_frame(study, workload)
            measured = {HELD_OUT: test} if test is not None else {}
            measured |= {TRAINING: data} if training_loss else {}
            parts = {TRAINING: consent.taking_part(whole, workload.questions)}
            if not measured:
                serve(session, member, kit, largest, bars)
            else:
                told = partial(print_scores, study.rounds, bars, as_json)
                with HeldOut(member.run, measured, models, told, bars.say, parts) as held_out:
                    _serve_watched(session, member, kit, largest, bars, held_out)
    say_where(member.run, study, as_json)
    say_finished(member.run, as_json)


def _warn_of_shared(records: int, test: Path, bars: Bars) -> None:
    if records:
        bars.say(
            f"WARNING: {records} records of {test} are training records too, so they measure "
            "nothing"
        )


def _serve_watched(
    session: SiloSession, member: Member, kit: Kit, largest: int, bars: Bars, held_out: HeldOut
) -> None:
    """Answer the server, and measure every round's model meanwhile."""
    from securefedcollm_cli.heldout import Undisturbed

    port = Undisturbed(session, held_out)
    serve(session, member, kit, largest, bars, idle=held_out.look, port=port)
    held_out.finish()


def _limit(study: Study, budget: float | None) -> Budget | None:
    """What ``--budget`` says.

    Raises:
        ConfigError: nothing is accounted for in this study.
    """
    from securefedcollm.privacy.ledger import Budget

    if budget is None:
        return None
    if study.privacy is None:
        raise ConfigError(
            "this study accounts for no ε",
            where="--budget",
            hint="without differential privacy nothing keeps to a budget: do not take part",
        )
    return Budget(budget, study.privacy.delta)
