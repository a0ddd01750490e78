"""``securefedcollm budget …``: plan, pin, show and report the privacy budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from securefedcollm.foreign import as_text, printable
from securefedcollm_cli.consortium import Home
from securefedcollm_cli.options import DataDir, Json, Overrides, StudyFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from securefedcollm.privacy.planner import JointChoice, Plan
    from securefedcollm.privacy.report import BudgetReport, Line
    from securefedcollm.study import Study

app = typer.Typer(no_args_is_help=True, help="Plan, pin, show and report the privacy budget.")

LedgerFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--ledger",
        metavar="FILE",
        help="A silo's ledger (repeatable) [every ledger.sqlite under runs/].",
    ),
]


@app.command()
def plan(
    config: StudyFile,
    overrides: Overrides = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option("--epsilon", help="Plan for this ε instead of the study's (repeatable)."),
    ] = None,
    values: Annotated[
        int | None,
        typer.Option(min=1, help="Number of values in an update [from the small model's shape]."),
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(min=1, help="Records (or subjects) of the smallest silo [from the study]."),
    ] = None,
    questions: Annotated[
        list[int] | None,
        typer.Option(
            "--questions",
            min=1,
            help="Plan answers of records instead of tuning: the noise on their votes if one "
            "record answers so many questions (repeatable).",
        ),
    ] = None,
    data: DataDir = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Also say what audits of this study proved, by this run's evidence logs "
            "(`audit … --run RUN` writes there).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how much noise a target ε costs, for every unit and placement, before anyone trains.

    Three figures show the gap. ε that is charged: at worst, with the fewest silos in every sum. ε
    if all silos stay in every sum (`hoped` in the JSON), by the same accountant. With --run, ε that
    an audit proved: what an attack found is a lower bound.

    With `--questions N` it plans questions to records (`retrieval.mode: answers`): the noise with
    which one record can answer N of them, and how large a lead of votes that noise reverses.
    """
    import msgspec

    from securefedcollm.federation.sizes import federation_of, plans_of
    from securefedcollm.privacy import planner
    from securefedcollm.study import load_study

    study = load_study(config, overrides or [])
    if questions:
        _plan_answers(study, questions, epsilon or (), as_json)
        return
    proved = [] if run is None else _proved(study, run)
    federation = federation_of(study, records=records, values=values, data=data)
    plans = plans_of(study, federation, epsilon or ())
    choices = {}
    if study.joint:
        sent = 8 / study.field.per_word
        choices = {
            made.epsilon: planner.joint_choices(federation, made.epsilon, made.delta, sent)
            for made in plans
        }
    if as_json:
        plain = msgspec.to_builtins(plans)
        for made in plain:
            made["joint_choices"] = msgspec.to_builtins(choices.get(made["epsilon"], ()))
            if run is not None:
                mine = study.privacy is not None and made["epsilon"] == study.privacy.epsilon
                made["audited"] = [row._asdict() for row in proved] if mine else []
        typer.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())
        return
    _print_plans(plans)
    for target, rows in choices.items():
        _print_choices(target, rows)
    if run is not None:
        _print_proved(study, run, proved)


class Proved(NamedTuple):
    """A lower bound on ε of the study, by one of its audits."""

    audit: str
    log: str
    """Of which participant."""
    bound: float
    claimed: float | None
    delta: float
    held: bool


def _proved(study: Study, run: Path) -> list[Proved]:
    """What audits of this very study proved, by the logs of ``run``; the largest bound first."""
    from securefedcollm.evidence.bundle import audits_of
    from securefedcollm.study import digest

    mine = digest(study).hex()
    found = [
        Proved(what.audit, owner, what.bound, what.claimed, what.delta, what.held)
        for owner, what in audits_of(run)
        if what.study == mine and what.bound is not None
    ]
    return sorted(found, key=lambda row: -row.bound)


def _print_proved(study: Study, run: Path, proved: Sequence[Proved]) -> None:
    typer.echo()
    if not proved:
        typer.echo(f"audited: no audit of this study is in the logs of {printable(str(run))}")
        return
    for row in proved:
        of = "" if row.claimed is None else f" of {row.claimed:.3f} claimed for what it attacked"
        said = f"audited: ε ≥ {row.bound:.3f}{of}, by `{row.audit}` in the log of {row.log}"
        refuted = "" if row.held else "; REFUTED"
        typer.echo(printable(f"{said} (95 %, δ = {row.delta:g}){refuted}"))


def _plan_answers(
    study: Study, questions: Sequence[int], epsilon: Sequence[float], as_json: bool
) -> None:
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from securefedcollm.federation.questions.planning import answer_plans

    plans = answer_plans(study, questions, epsilon)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(plans), indent=2).decode())
        return
    table = Table(title=f"{plans[0].silos} silos, all of which answer", title_justify="left")
    for column in ("\u03b5", "questions", "z", "noise, votes", "lead, 95 %", "lead, 99 %"):
        table.add_column(column, justify="right")
    for made in plans:
        figures = (made.sigma, made.lead_95, made.lead_99)
        table.add_row(
            f"{made.epsilon:g}",
            f"{made.questions:,}",
            f"{made.noise_multiplier:.4f}",
            *(f"{value:.1f}" for value in figures),
        )
    console = Console()
    console.print(table)
    console.print(
        "[dim]questions: those that retrieve one record; only they cost it anything. noise: "
        "standard deviation on each choice's votes. lead: of one choice over another, in votes, "
        "that survives the noise so often.[/dim]"
    )
    if plans[0].reader == "model":
        console.print(
            f"With `reader: model` a silo has one vote, so a lead is {plans[0].silos} at most: "
            "this is for many silos."
        )


@app.command("set")
def set_(
    epsilon: Annotated[float, typer.Option(help="ε of every record, all studies together.")],
    delta: Annotated[
        float | None, typer.Option(help="Its δ [the pinned one; the first time you must give it].")
    ] = None,
    higher: Annotated[
        bool,
        typer.Option(
            "--raise",
            help="Allow a larger ε after records were charged. They then have the weaker promise.",
        ),
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Pin the budget of this silo's records: a study may ask for less, never for more.

    If you pin none, the first study pins its own.
    """
    import json

    from securefedcollm.errors import ConfigError
    from securefedcollm.federation.roles import IDENTITY, LEDGER
    from securefedcollm.privacy.ledger import Ledger
    from securefedcollm.study.identity import read_identity
    from securefedcollm_cli.consortium import home_of

    place = home_of(home)
    owner = read_identity(place / IDENTITY).name
    with Ledger(place / LEDGER, owner) as ledger:
        before = ledger.pinned
        chosen = delta if delta is not None else before.delta if before else None
        if chosen is None:
            raise ConfigError(
                "no δ is pinned yet", where="--delta", hint="give one, say 1e-5; below 1/records"
            )
        ledger.pin(epsilon, chosen, higher=higher)
    if as_json:
        typer.echo(json.dumps({"owner": owner, "epsilon": epsilon, "delta": chosen}))
        return
    typer.echo(f"{owner}: every record may spend ε = {epsilon:g} at δ = {chosen:g} in all studies")
    if before is not None and before.epsilon != epsilon:
        typer.echo(f"it was ε = {before.epsilon:g}")


@app.command()
def show(ledger: LedgerFiles = None, as_json: Json = False) -> None:
    """Verify ledgers and show what the records of every file have spent and have left.

    Each set of records is a file's. The table shows ε of the record that has spent most, over all
    files and studies, then the median, and the number of records that have spent nothing.
    """
    import msgspec

    from securefedcollm.privacy.report import read_report

    reports = [read_report(path, details=as_json) for path in _ledgers(ledger)]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(reports), indent=2).decode())
        return
    _print_reports(reports)


@app.command()
def report(
    html: Annotated[Path, typer.Option("--html", metavar="OUT", help="The page to write.")],
    ledger: Annotated[Path, typer.Option("--ledger", metavar="FILE", help="A silo's ledger.")],
) -> None:
    """Write one silo's budget as a self-contained HTML page."""
    from securefedcollm.errors import StateError
    from securefedcollm.privacy.report import read_report
    from securefedcollm.privacy.report_html import to_html

    page = to_html(read_report(ledger))
    try:
        html.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StateError(
            f"{html}: cannot be written ({error.strerror or error})", hint="choose another path"
        ) from None
    typer.echo(f"wrote {html}")


_HOPES = {"local": "without the ledger's reserve", "distributed": "if all silos stay"}
"""When a plan costs the smaller ε."""


def _ledgers(given: list[Path] | None) -> list[Path]:
    from securefedcollm.errors import ConfigError

    found = given or sorted(Path("runs").glob("**/ledger.sqlite"))
    if not found:
        raise ConfigError(
            "no ledger under runs/", where="--ledger", hint="name the file: --ledger FILE"
        )
    return found


def _print_plans(plans: list[Plan]) -> None:
    from rich.console import Console
    from rich.table import Table

    from securefedcollm.privacy.shown import up

    console = Console()
    fed = plans[0].federation
    console.print(
        f"{fed.silos} silos of at least {fed.records:,} {fed.unit}s, {fed.values:,} values "
        f"an update; a sum has the noise of {fed.least_survivors}, {fed.colluders} may collude"
    )
    for made in plans:
        table = Table(title=f"ε = {made.epsilon:g}, δ = {made.delta:g}", title_justify="left")
        table.add_column("unit/noise", no_wrap=True)
        for column in ("z", "releases", "noise/signal", "in the run"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        colours = {"workable": "green", "poor": "yellow", "hopeless": "red"}
        for option in made.options:
            table.add_row(
                option.name + ("" if option.offered else "*"),
                f"{option.noise_multiplier:.4f}",
                f"{option.releases}",
                f"{option.noise_to_signal:.3g}",
                f"{option.run_noise_to_signal:.3g}",
                f"[{colours[option.verdict]}]{option.verdict}[/]",
            )
        console.print()
        console.print(table)
        for option in made.options:
            hoped = f"{up(option.hoped)} {_HOPES[option.noise]}"
            said = f"{option.name}: charged ε = {up(option.epsilon)}, {hoped}"
            console.print(f"  [dim]{said}; {option.remark}[/dim]")
        console.print(f"  {made.advice}")
    console.print()
    console.print(
        "[dim]z: noise multiplier. noise/signal: norm of the noise in the mean, divided by the "
        "clip norm, which is the largest possible signal. Real signal is smaller. The second ε is "
        "no promise: it holds if nobody chose anything by what was released.[/dim]"
    )
    if not all(option.offered for made in plans for option in made.options):
        console.print("[dim]*: for comparison; this study cannot ask for it.[/dim]")


def _print_choices(epsilon: float, choices: Sequence[JointChoice]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"Joint DP-SGD with as many gradients, ε = {epsilon:g}"
    table = Table(title=title, title_justify="left")
    for column in ("steps", "batch", "rate", "z", "sent, MB", "noise/signal in the run"):
        table.add_column(column, justify="right" if column[:5] != "noise" else "left")
    most = max(choice.run_noise_to_signal for choice in choices)
    for choice in choices:
        ratio = choice.run_noise_to_signal
        table.add_row(
            str(choice.steps),
            f"{choice.batch_size:,}",
            f"{choice.sampling_rate:.4f}",
            f"{choice.noise_multiplier:.4f}",
            f"{choice.megabytes:.1f}",
            f"{ratio:.3f} {'█' * max(1, round(16 * ratio / most))}",
        )
    console = Console()
    console.print()
    console.print(table)
    console.print(
        "[dim]Fewer steps mean less noise and less to send, but also fewer corrections, which "
        "no ratio shows. Try the neighbours of the best on public data.[/dim]"
    )


def _print_reports(reports: list[BudgetReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    from securefedcollm.privacy.shown import down, up

    table = Table(title="Privacy budgets, hash chains verified", title_justify="left")
    for column in ("owner", "records", *_NUMBERS):
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    table.add_column("charges", no_wrap=True)
    for found in reports:
        # Adversary: whoever made a ledger that is looked at here.
        owner = as_text(found.owner)
        if not found.accounts:
            table.add_row(as_text(found.owner or found.ledger), "nothing reserved", *[""] * 6)
        for one in found.sets:
            standing = one.standing
            table.add_row(
                owner,
                as_text(one.records[:8]),
                f"{standing.accounts:,}",
                f"{standing.untouched:,}",
                up(standing.median),
                up(standing.worst),
                down(standing.left),
                ", ".join(f"{count} {state}" for state, count in one.entries.items()),
            )
        for account in found.accounts:
            if account.records_known:
                continue
            table.add_row(
                owner,
                as_text(f"file {account.dataset}"),
                *("", "", ""),
                up(account.spent.epsilon),
                down(account.left),
                _states(account.lines),
            )
    console: Console = Console()
    console.print(table)
    for found in reports:
        if found.pinned is not None:
            console.print(
                as_text(
                    f"{found.owner}: every record may spend ε = {found.pinned.epsilon:g} at "
                    f"δ = {found.pinned.delta:g}, all studies together"
                )
            )
        if found.unattributed:
            console.print(
                as_text(
                    f"{found.owner}: {found.unattributed} charges of an older version name a file "
                    "of which the records are not known yet; `client --data FILE` with that very "
                    "file makes them charges of its records. Until then they count for no other."
                )
            )


_NUMBERS = ("count", "unspent", "median ε", "most ε", "left")


def _states(lines: list[Line]) -> str:
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())
