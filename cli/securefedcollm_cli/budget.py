"""``securefedcollm budget …``: what privacy will cost, what it has cost, and a report of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm_cli.options import DataDir, Json, Overrides, StudyFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from securefedcollm.privacy.planner import JointChoice, Plan
    from securefedcollm.privacy.report import BudgetReport, Line

app = typer.Typer(no_args_is_help=True, help="Plan, show and report the privacy budget.")

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
        int | None, typer.Option(min=1, help="Values in an update [from the small model's shape].")
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(min=1, help="Records (or subjects) of the smallest silo [from the study]."),
    ] = None,
    data: DataDir = None,
    as_json: Json = False,
) -> None:
    """Say what a target ε costs in noise, for every unit and placement, before anyone trains."""
    import msgspec

    from securefedcollm.errors import ConfigError
    from securefedcollm.privacy import planner
    from securefedcollm.study import load_study
    from securefedcollm_cli.sizes import unit_records, update_values

    study = load_study(config, overrides or [])
    if study.privacy is None and not epsilon:
        raise ConfigError(
            "the study has no differential privacy",
            where="privacy",
            hint="add a privacy section, or give --epsilon to see what it would cost",
        )
    adaptive = study.privacy.adaptive if study.privacy else None
    units, rate = records or unit_records(study), study.local.sampling_rate
    federation = planner.Federation(
        values=values or update_values(study, data),
        silos=study.silos.count,
        least_survivors=study.quorum,
        colluders=study.silos.colluders,
        records=units,
        rounds=study.rounds,
        steps=study.local.steps,
        # in joint DP-SGD the study gives the batch of all silos together
        batch_size=max(1, round(rate * units)) if rate else study.local.batch_size,
        unit="record" if study.subject is None else "subject",
        count_noise=adaptive.count_noise if adaptive else None,
    )
    delta = study.privacy.delta if study.privacy else min(1e-5, 0.1 / federation.records)
    targets = epsilon or [study.privacy.epsilon if study.privacy else 0.0]
    plans = [planner.plan(federation, target, delta, _offered) for target in targets]
    choices = {}
    if study.joint:
        sent = 8 / study.field.per_word
        choices = {t: planner.joint_choices(federation, t, delta, sent) for t in targets}
    if as_json:
        plain = msgspec.to_builtins(plans)
        for made in plain:
            made["joint_choices"] = msgspec.to_builtins(choices.get(made["epsilon"], ()))
        typer.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())
        return
    _print_plans(plans)
    for target, rows in choices.items():
        _print_choices(target, rows)


@app.command()
def show(ledger: LedgerFiles = None, as_json: Json = False) -> None:
    """Verify ledgers and say what every data set has spent and has left."""
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


def _offered(unit: str, noise: str) -> bool:
    """Whether a study can ask for this unit and placement."""
    from securefedcollm.study.config import PLACEMENTS

    return (unit, noise) in PLACEMENTS


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

    console = Console()
    fed = plans[0].federation
    console.print(
        f"{fed.silos} silos of at least {fed.records:,} {fed.unit}s, {fed.values:,} values "
        f"an update; a sum opens with {fed.least_survivors} survivors, {fed.colluders} may collude"
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
            console.print(f"  [dim]{option.name}: {option.remark}[/dim]")
        console.print(f"  {made.advice}")
    console.print()
    console.print(
        "[dim]z: noise multiplier. noise/signal: norm of the noise in the mean over the clip norm, "
        "that is over the largest signal possible; real signal is smaller.[/dim]"
    )
    if not all(option.offered for made in plans for option in made.options):
        console.print("[dim]*: for comparison; a study cannot ask for it yet.[/dim]")


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
        "[dim]Fewer steps: less noise and less to send, but fewer corrections on the way, which "
        "no ratio shows: try the neighbours of the best on public data.[/dim]"
    )


def _print_reports(reports: list[BudgetReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    from securefedcollm.privacy.shown import down, up

    table = Table(title="Privacy budgets, hash chains verified", title_justify="left")
    for column in ("owner", "data set", "unit", "ε spent", "of", "left", "δ", "entries"):
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for found in reports:
        if not found.accounts:
            table.add_row(found.owner or found.ledger, "nothing reserved", *[""] * 6)
        for account in found.accounts:
            table.add_row(
                found.owner,
                account.dataset[:12],
                account.unit,
                up(account.spent.epsilon),
                f"{account.budget.epsilon:g}",
                down(account.left),
                f"{account.spent.delta:g}",
                _states(account.lines),
            )
    console: Console = Console()
    console.print(table)


_NUMBERS = frozenset({"ε spent", "of", "left", "δ"})


def _states(lines: list[Line]) -> str:
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())
