"""``securefedcollm audit mechanism|whole-run|coupling|…``: attacks that measure privacy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securefedcollm_cli.options import DataDir, Device, Json, Overrides, StudyFile

if TYPE_CHECKING:
    from securefedcollm_audits.privacy.finding import Finding

    from securefedcollm.federation.workload import Progress
    from securefedcollm.study import Study

Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="Write the result into this run's evidence log, so that `audit bundle` includes it.",
    ),
]
Owner = Annotated[
    str,
    typer.Option(
        "--owner",
        metavar="NAME",
        help="With --run: the participant whose log it is, `server` or a silo's name.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Seed of the canaries, to draw the same ones again. Noise and keys are always fresh.",
    ),
]
Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="With --run: that participant's identity file [the one in the run].",
    ),
]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="File with the passphrase of --identity, if it is encrypted [else a prompt].",
    ),
]


def mechanism(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    trials: Annotated[
        int, typer.Option(min=1000, help="Numbers that the attacker reads off released sums.")
    ] = 1_000_000,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Is the noise as large as charged? Sends canaries through the real path of one release.

    Vectors far longer than the clip norm, a million coordinates by default, go through the study's
    own clipping, quantisation, noise, masks and sum. Prints the measured noise with its interval,
    and a lower bound on ε. Finds missing noise, a missing clip, a wrong sampling rate. It says
    nothing about how releases add up; the second accountant checks that. Takes two minutes.

    Exit code 0: not refuted; 1: refuted; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy.mechanism import audit

        return audit(study, records=_records(study, data), trials=trials, progress=progress)

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def whole_run(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    trials: Annotated[
        int,
        typer.Option(
            min=1000, help="Numbers whose whole run the attacker reads; fewer prove less."
        ),
    ] = 1_000_000,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """What do all sums of a study tell together? Sends canaries through every one of them.

    Each canary keeps a coordinate for the whole run, and its silo samples it anew in every step.
    The attacker adds up the evidence and guesses once. Prints a lower bound on the study's ε, the
    measured noise, and by how much noise must fall short to be noticed. Clip, quantiser, sampler
    and noise shares are the product's own; masks, which cancel exactly, are left out. A million
    numbers take a minute or two with `noise: distributed`, and over an hour with `noise: local`:
    give fewer there.

    Exit code 0: not refuted; 1: refuted; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy.whole_run import audit

        return audit(study, records=_records(study, data), trials=trials, progress=progress)

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def coupling(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    records: Annotated[
        int,
        typer.Option(
            min=2, help="Records of the first silo, which the added record must not move."
        ),
    ] = 64,
    adapters: Annotated[
        int, typer.Option(min=2, help="Hostile adapters to try in the search for the worst.")
    ] = 40,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="With `retrieval.mode: answers`: attack the votes of records on questions, "
            "instead of tuning.",
        ),
    ] = False,
    device: Device = "cpu",
    seed: Seed = None,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Can one record change what the others contribute, by a single bit?

    Plays a server that chooses the adapter. First the control: in batches padded to their longest
    record, it searches for the adapter with which an added record moves the others' clipped
    gradients most. The control must find movement. Then it applies the same adapters to this silo's
    own model, data, shapes and device, frozen layers included. "Moved" is ‖S(D + x) − S(D) − S(x)‖
    in clip norms, in exact integers. Any value other than 0 refutes the sensitivity on which the
    whole ε rests.

    With --answers it plays an asker that chooses questions, against the first silo's records with
    and without one more. Nothing but the sum may differ: not which other records vote or pay, nor
    any reply, refusal, size or evidence. The control retrieves the best k, and must find that.

    Exit code 0: not refuted; 1: refuted, or the control found nothing; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy import poll_coupling
        from securefedcollm_audits.privacy.coupling import audit

        _threads()
        if answers:
            few = min(records, poll_coupling.RECORDS)
            about: dict[str, Any] = {"data": data, "seed": seed, "progress": progress}
            return poll_coupling.audit(study, records=few, **about)
        return audit(
            study,
            data=data,
            device=device,
            records=records,
            adapters=adapters,
            seed=seed,
            progress=progress,
        )

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def one_run(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    canaries: Annotated[int, typer.Option(help="Number of records that are canaries.")] = 500,
    seed: Seed = None,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """What do a silo's updates reveal about single records? Runs one real training with hundreds of
    canaries.

    A coin decides for each canary whether it is in the first silo's data; the attacker sees every
    update and guesses. Prints a lower bound on ε (Steinke, Nasr and Jagielski 2023) and the same by
    f-DP for a Gaussian trade-off curve (Mahloujifar et al. 2024). No ledger is charged for the
    training, so use only data that you may use for it. With 500 canaries no bound can exceed 4.4,
    so the output says how much missing noise this attack could have noticed at best; `audit
    whole-run` notices far less. To test the same code harder, lower the claim: --set
    privacy.epsilon=1.

    Exit code 0: not refuted; 1: refuted; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy.one_run import audit

        _threads()
        return audit(study, data=data, canaries=canaries, seed=seed, progress=progress)

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def canaries(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    count: Annotated[
        int, typer.Option("--canaries", help="Number of records whose answer is a new token.")
    ] = 500,
    seed: Seed = None,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """What does the tuned model itself reveal? Uses new-token canaries and looks only at their
    loss.

    The attacker has the base model and the adapter, like everybody who downloads them. Prints the
    area under the curve, the share of members found at 1 % false alarms, and a lower bound on ε
    (canaries of Panda et al. 2025, bound as in `audit one-run`).

    Exit code 0: not refuted; 1: refuted; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy.new_tokens import audit

        _threads()
        return audit(study, data=data, canaries=count, seed=seed, progress=progress)

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def inversion(
    config: StudyFile,
    overrides: Overrides = None,
    data: DataDir = None,
    batches: Annotated[int, typer.Option(min=8, help="Steps to attack.")] = 20,
    records: Annotated[int, typer.Option(min=1, help="Records of each silo in a step.")] = 2,
    seed: Seed = None,
    run: Run = None,
    owner: Owner = "server",
    identity: Identity = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Which words can be read back? Applies the span check of DAGER to updates, uploads and sums.

    Attacks the same small batches at four places: one silo's raw update, the masked upload that the
    server receives of it, the opened sum, and the opened sum with the study's noise. The claim is
    refuted if the last one or the masked upload gives away more words than chance.

    Exit code 0: not refuted; 1: refuted; 2: bad input.
    """

    def attack(study: Study, progress: Progress) -> Finding:
        from securefedcollm_audits.privacy.inversion import audit

        _threads()
        return audit(
            study, data=data, batches=batches, records=records, seed=seed, progress=progress
        )

    _conduct(config, overrides, attack, as_json, run, owner, identity, passphrase_file)


def _conduct(
    config: Path,
    overrides: list[str] | None,
    attack: Callable[[Study, Progress], Finding],
    as_json: bool,
    run: Path | None,
    owner: str,
    identity: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Run the attack, print and log its result, and exit with the outcome."""
    from securefedcollm.study import load_study
    from securefedcollm_cli.progress import Bars

    study = load_study(config, overrides or [])
    key = None if run is None else _key(run, owner, identity, passphrase_file)
    with Bars(quiet=as_json) as bars:
        finding = attack(study, bars.report)
    place = None
    if run is not None and key is not None:
        from securefedcollm_audits.privacy.finding import write_down

        place = write_down(finding, run, owner, key)
    if as_json:
        typer.echo(json.dumps(finding.plain() | {"entry": place}, indent=2))
    else:
        _print(finding)
        if place is not None:
            typer.echo(f"written down as {place}; make the bundle again: audit bundle {run}")
    if not finding.held:
        raise typer.Exit(1)


def _key(run: Path, owner: str, identity: Path | None, passphrase_file: Path | None):  # type: ignore[no-untyped-def]
    """The key that signs the log. The user is asked for it before minutes of work."""
    from securefedcollm_audits.privacy.finding import home

    from securefedcollm.errors import ConfigError
    from securefedcollm.study.identity import open_identity, read_identity
    from securefedcollm_cli.identity import read_passphrase

    path = identity or home(run, owner) / "identity.json"
    if not path.is_file():
        raise ConfigError(
            f"there is no key of {owner}",
            where=str(path),
            hint="--run is a run's directory, --owner a participant; or give --identity FILE",
        )
    found = read_identity(path)
    return open_identity(found, read_passphrase(passphrase_file) if found.encrypted else None)


def _records(study: Study, data: Path | None) -> int | None:
    """Records, or subjects, of a silo; the sampling rate follows from them."""
    if study.privacy is None or study.privacy.noise != "local":
        return None
    from securefedcollm.federation.cotuning import count_units
    from securefedcollm.federation.dealing import deal

    return count_units(study, next(iter(deal(study, data).silos.values())))


def _threads() -> None:
    from securefedcollm.federation.cotuning import set_threads

    set_threads(None)


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from securefedcollm_audits.privacy.finding import CAVEAT

    console = Console()
    console.print(escape(f"audit {finding.audit}: {finding.setting}"), highlight=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in finding.figures.items():
        table.add_row(name, f"{value:,.0f}" if value == int(value) else f"{value:.4g}")
    console.print(table)
    if finding.bound is not None:
        claimed = "nothing" if finding.claimed is None else f"ε = {finding.claimed:.2f}"
        console.print(
            f"claimed: {claimed}   this attack proves: ε ≥ {finding.bound:.2f}   "
            f"(at δ = {finding.delta:g})",
            highlight=False,
        )
        console.print(f"[dim]{CAVEAT}[/dim]")
    if finding.power:
        console.print(escape(finding.power), highlight=False)
    style = "bold green" if finding.held else "bold red"
    console.print(escape(finding.sentence), style=style, highlight=False)
