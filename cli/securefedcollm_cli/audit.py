"""``securefedcollm audit …``: bundle a run's evidence, verify it offline, attack the protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefedcollm.foreign import as_text
from securefedcollm_cli import audit_privacy
from securefedcollm_cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table
    from securefedcollm_audits.protocol.outcome import Outcome
    from securefedcollm_audits.report.report import Report
    from securefedcollm_audits.verification.case import Case
    from securefedcollm_audits.verification.verdict import Verdict

app = typer.Typer(
    no_args_is_help=True,
    help="Bundle a run's evidence, verify it offline, and attack protocol and privacy.",
)
app.command("mechanism")(audit_privacy.mechanism)
app.command("whole-run")(audit_privacy.whole_run)
app.command("coupling")(audit_privacy.coupling)
app.command("one-run")(audit_privacy.one_run)
app.command("canaries")(audit_privacy.canaries)
app.command("inversion")(audit_privacy.inversion)

BundleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A bundle of `audit bundle`.")]
OwnStudy = Annotated[
    Path | None,
    typer.Option(
        "--study",
        metavar="FILE",
        help="Your own copy of the study that the participants agreed on.",
    ),
]
OwnKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="NAME=HEX",
        help="A participant's public key, as you have it from that participant (repeatable).",
    ),
]
EarlierBundles = Annotated[
    list[Path] | None,
    typer.Option(
        "--earlier",
        metavar="BUNDLE",
        help="Of a study that continues earlier runs: the bundle of one of them (repeat for each). "
        "It is verified too, and must have released what this study starts from.",
    ),
]


@app.command()
def bundle(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The bundle [RUN/evidence.zip].")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this participant's log (repeatable)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a run's evidence into one file: logs, signatures, study, hashes. No key, vector or data.

    A silo's log says how much noise its records need, and so roughly how many it has. Its owner
    decides who sees it.
    """
    path = out or run / "evidence.zip"
    size = write_bundle(run, path, only or [])
    if as_json:
        typer.echo(json.dumps({"bundle": str(path), "bytes": size}))
    else:
        typer.echo(f"wrote {path} ({size / 1000:.1f} kB); check it with `audit verify {path}`")


def write_bundle(run: Path, path: Path, only: list[str]) -> int:
    """Write the bundle of ``run`` to ``path``; returns its size in bytes."""
    from securefedcollm.evidence.bundle import make_bundle
    from securefedcollm.federation.files import write_durably

    content = make_bundle(run, only)
    write_durably(path, content)
    return len(content)


def write_evidence(run: Path, earlier: Sequence[Path] = ()) -> tuple[Verdict, str]:
    """Bundle the evidence of a finished run, check it as an outsider would, and write the report:
    ``evidence.zip`` and ``report.html`` in the run's directory. Returns the verdict, and the path
    of the page.

    Args:
        earlier: bundles of the runs that its study continues.
    """
    from securefedcollm_audits.report.report import make_report
    from securefedcollm_audits.verification.expected import expectation

    path, page = run / "evidence.zip", run / "report.html"
    write_bundle(run, path, [])
    found, case = make_report(path, run / "results.json", expectation(None, [], earlier))
    write_page(found, case, page)
    return found.verdict, str(page)


@app.command()
def verify(
    file: BundleFile,
    study: OwnStudy = None,
    key: OwnKeys = None,
    earlier: EarlierBundles = None,
    as_json: Json = False,
) -> None:
    """Check a bundle offline, without trusting anybody who made it.

    Anybody can make up participants and their keys. So name the study, or the keys, that you know
    from elsewhere. The last lines list what was not compared.

    Exit code 0: everything that the bundle covers holds; 1: something does not; 2: bad input.
    """
    from securefedcollm_audits.verification.expected import expectation
    from securefedcollm_audits.verification.verify import verify as check

    _report(check(file, expectation(study, key or [], earlier or [])), as_json)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="One silo's bundle of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another's, of the same run.")],
    as_json: Json = False,
) -> None:
    """Compare two bundles of one run: did the server tell both participants the same?

    The exit codes are those of `audit verify`.
    """
    from securefedcollm_audits.verification.compare import compare as held_together

    _report(held_together(first, second), as_json)


@app.command()
def merge(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE…", help="Bundles of one run, of participants who agree."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="MERGED", help="The bundle to write.")],
    as_json: Json = False,
) -> None:
    """Join several participants' bundles of one run into one, and verify it.

    Their logs then check each other. The command refuses bundles of different runs, and two
    different logs that one participant signed. Everybody who gets the joined bundle sees every
    silo's log in it.

    The exit codes are those of `audit verify` on the joined bundle; 2 means that the command
    refused and wrote nothing.
    """
    from securefedcollm_audits.verification import table
    from securefedcollm_audits.verification.merge import merge as joined
    from securefedcollm_audits.verification.verify import verify as check

    from securefedcollm.errors import ConfigError
    from securefedcollm.federation.files import write_durably

    if any(path.exists() and out.exists() and path.samefile(out) for path in bundles):
        raise ConfigError(
            "is one of the bundles to join, which are evidence",
            where=str(out),
            hint="give --out another name",
        )
    content = joined(bundles)
    write_durably(out, content)
    verdict = check(out)
    if as_json:
        typer.echo(json.dumps(table.plain(verdict) | {"bytes": len(content)}, indent=2))
    else:
        _print_merged(verdict, len(content))
    if not verdict.holds:
        raise typer.Exit(1)


@app.command()
def protocol(
    case: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="Play only this attack (repeatable)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Attack secure aggregation and private questions: malicious servers, silos and askers.

    They meet the real state machines. Exit code 0: nobody learnt anything beyond one agreed sum, or
    beyond what a question may tell; 1: an attack was not stopped. Even
    if all are stopped, that is no proof. But many of these attacks have worked against other
    systems.
    """
    from securefedcollm_audits.protocol import cases as attacks

    from securefedcollm_cli.progress import Bars

    with Bars(quiet=as_json) as bars:
        outcomes = attacks.run(
            attacks.named(case or []), lambda done, total: bars.report(done, total, "attacks")
        )
    broken = [name for name, outcome in outcomes.items() if not outcome.held]
    if as_json:
        rows = [
            {"case": name, "adversary": attacks.adversary(name), **asdict(outcome)}
            for name, outcome in outcomes.items()
        ]
        typer.echo(json.dumps({"held": not broken, "outcomes": rows}, indent=2))
    else:
        _print_attacks(outcomes, broken)
    if broken:
        raise typer.Exit(1)


@app.command()
def report(
    file: BundleFile,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="The page to write.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            metavar="FILE",
            help="The run's results.json: also show its accuracies. They are the word of "
            "whoever wrote the file, not evidence.",
        ),
    ] = None,
    study: OwnStudy = None,
    key: OwnKeys = None,
    earlier: EarlierBundles = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle and write a report on it, as one self-contained HTML page or as JSON.

    Its verdict, and its exit code, are those of `audit verify` with the same --study and --key. If
    a bundle does not hold, its page says so. With --earlier it also covers the runs before.
    """
    from securefedcollm_audits.report.report import make_report
    from securefedcollm_audits.verification.expected import expectation

    from securefedcollm.errors import ConfigError

    if html is None and not as_json:
        raise ConfigError("nothing to write", where="--html", hint="give --html OUT or --json")
    found, case = make_report(file, results, expectation(study, key or [], earlier or []))
    if html is not None:
        write_page(found, case, html)
    if as_json:
        import msgspec

        # through json, which spells everything beyond ASCII as an escape
        typer.echo(json.dumps(json.loads(msgspec.json.encode(found)), indent=2))
    else:
        typer.echo(f"wrote {html}")
    if not found.verdict.holds:
        raise typer.Exit(1)


def write_page(found: Report, case: Case, path: Path) -> None:
    """Write a report as HTML."""
    from securefedcollm_audits.report.page import to_html

    from securefedcollm.federation.files import write_durably

    write_durably(path, to_html(found, case).encode())


def _print_merged(verdict: Verdict, size: int) -> None:
    from rich.console import Console
    from securefedcollm_audits.verification import table

    console = Console()
    missing = [name for name in verdict.keys if name not in verdict.participants]
    lines = [
        f"wrote {verdict.bundle} ({size / 1000:.1f} kB) with the logs of",
        f"  {', '.join(verdict.participants)}",
        *([f"there is no log of {', '.join(missing)}"] if missing else []),
        *(f"{result.title}: not so ({'; '.join(result.faults)})" for result in verdict.failed),
    ]
    for line in lines:
        console.print(as_text(line), highlight=False, soft_wrap=True)
    style = "bold green" if verdict.holds else "bold red"
    console.print(as_text(table.sentence(verdict)), style=style, highlight=False)


def _print_attacks(outcomes: dict[str, Outcome], broken: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from securefedcollm_audits.protocol import cases as attacks

    table = Table(title="Attacks on the protocols", title_justify="left")
    for column in ("", "adversary", "attack", "stopped by", "learnt"):
        table.add_column(column, no_wrap=not column)
    for name, outcome in outcomes.items():
        table.add_row(
            "[green]held[/]" if outcome.held else "[bold red]BROKEN[/]",
            attacks.adversary(name),
            f"{escape(outcome.attack)}\n[dim]{name}[/dim]",
            escape(outcome.defence),
            escape("; ".join(outcome.learnt)) or "nothing",
        )
    console = Console()
    console.print(table)
    held = len(outcomes) - len(broken)
    if broken:
        text = f"{len(broken)} of {len(outcomes)} attacks were not stopped: {', '.join(broken)}"
        console.print(text, style="bold red")
    else:
        console.print(f"{held} of {held} attacks learnt nothing", style="bold green")


def _report(verdict: Verdict, as_json: bool) -> None:
    from securefedcollm_audits.verification import table

    if as_json:
        typer.echo(json.dumps(table.plain(verdict), indent=2))
    else:
        _print(verdict)
    if not verdict.holds:
        raise typer.Exit(1)


def _print(verdict: Verdict) -> None:
    from rich.console import Console
    from securefedcollm_audits.verification import table

    console = Console()
    for line in table.about(verdict):
        console.print(as_text(line), highlight=False, soft_wrap=True)
    console.print(checks_table(verdict))
    for line in table.silence(verdict):
        console.print(as_text(line), style="yellow", highlight=False, soft_wrap=True)
    style = "bold green" if verdict.holds else "bold red"
    console.print(as_text(table.sentence(verdict)), style=style, highlight=False)


def checks_table(verdict: Verdict) -> Table:
    """The checks: mark, what was checked, evidence or faults."""
    from rich.table import Table

    colours = {"pass": "green", "fail": "bold red", "not covered": "yellow"}
    shown = Table(title="Checks", title_justify="left")
    shown.add_column("", no_wrap=True)
    shown.add_column("check")
    shown.add_column("evidence")
    for result in verdict.results:
        # Adversary: whoever made the bundle, whose names and settings the evidence quotes.
        found = as_text(*(result.faults or [result.evidence]))
        mark = f"[{colours[result.status]}]{result.status}[/]"
        shown.add_row(mark, f"{result.title}\n[dim]{result.name}[/dim]", found)
    return shown
