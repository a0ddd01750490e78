"""``securefedcollm study …``: write, check, show and sign a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securefedcollm.federation.sizes import update_values
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli import study_continue, study_new
from securefedcollm_cli.identity import PassphraseFile, find, read_passphrase
from securefedcollm_cli.options import DataDir, Device, Json, Overrides, StudyFile
from securefedcollm_cli.study_reading import derived, spending
from securefedcollm_cli.units import Units, units_of

if TYPE_CHECKING:
    from securefedcollm.study import Study

app = typer.Typer(no_args_is_help=True, help="Write, check, show and describe a study file.")
app.command()(study_new.new)
app.command()(study_new.keys)
app.command("continue")(study_continue.continue_)


@app.command()
def check(
    config: StudyFile,
    overrides: Overrides = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Also build both models without weights, and print adapter sizes, bytes a "
            "round and memory. This reads their config.json under --data, or once from "
            "the hub.",
        ),
    ] = False,
    hours: Annotated[
        bool,
        typer.Option(
            "--hours",
            help="Also take a few rows through the models on this machine, and estimate how long "
            "a round of a silo, one of the server and a simulation take. Loads the models.",
        ),
    ] = False,
    records: Annotated[
        int | None,
        typer.Option(
            "--records",
            min=1,
            metavar="N",
            help="Records (or subjects) of the smallest silo, where the study does not say.",
        ),
    ] = None,
    silo: Annotated[
        list[str] | None,
        typer.Option(
            "--silo",
            metavar="NAME=FILE",
            help="A silo's own records. Only their number counts (repeat; some silos are enough).",
        ),
    ] = None,
    propose_clip: Annotated[
        bool,
        typer.Option(
            "--propose-clip",
            help="Also tune the small model for one round on public rows, and propose "
            "aggregation.clip_norm from the norm of that update. Loads the model.",
        ),
    ] = False,
    public: Annotated[
        Path | None,
        typer.Option(
            "--public",
            metavar="FILE",
            help="With --propose-clip: public rows [the study's]. Never a silo's records.",
        ),
    ] = None,
    device: Device = "cpu",
    data: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check a study and print what follows from it: digest, thresholds, packing, privacy.

    Refuses the same batches and privacy settings as `simulate` and `client`: a batch larger than a
    silo, an ε that no noise reaches. The number of records is that of the study
    (`task.data.per_silo`), of the files that `--data` or `--silo` names, or `--records`.

    Without these options, `--estimate`, `--hours` and `--propose-clip` it reads only the study
    file: no data, no model, no network.
    """
    from securefedcollm.errors import ConfigError
    from securefedcollm.study import load_study

    if public is not None and not propose_clip:
        raise ConfigError(
            "only a proposal reads public rows", where="--public", hint="add --propose-clip"
        )
    study = load_study(config, overrides or [])
    units = units_of(study, data, records, silo or ())
    if estimate:
        from securefedcollm.federation.estimate import estimate as estimated

        found = estimated(study, data)
        facts = derived(study, found["slm"]["update_values"])
        facts["estimate"] = found
        facts["reading"] |= _estimate_lines(found)
        values = found["slm"]["update_values"]
    else:
        facts = derived(study)
        values = _values(study, data)
    facts |= _plan(study, units, values, facts["reading"])
    if hours:
        from securefedcollm.federation.hours import hours as timed
        from securefedcollm_cli.progress import Bars

        with Bars(quiet=as_json) as bars:
            facts["hours"] = timed(study, data, device=device, progress=bars.report)
        facts["reading"] |= _time_lines(facts["hours"])
    if propose_clip:
        facts["clip"] = _clip(study, units, public, data, device, facts["reading"], as_json)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts["reading"].items():
        typer.echo(printable(f"{key:<17} {value}", MOST_MESSAGE))
    typer.secho("the study is sound", fg="green")


def _plan(
    study: Study, units: Units, values: int | None, reading: dict[str, str]
) -> dict[str, Any]:
    """The noise that a run would plan; its line goes into ``reading``. Refuses the same settings as
    a run."""
    from securefedcollm.federation.feasible import planned, unit_name

    release = planned(study, units.counts, values)
    facts: dict[str, Any] = {
        "noise_multiplier": None,
        "epsilon": None,
        "units": list(units.counts),
    }
    if study.privacy is None:
        return facts
    counts = ""
    if units.counts and study.privacy.unit != "silo":
        low, high = min(units.counts), max(units.counts)
        numbers = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        counts = f", {numbers} {unit_name(study)}s a silo {units.source}"
    if release is not None:
        z = facts["noise_multiplier"] = release.noise_multiplier
        reading["noise"] = f"z = {z:.4f} times the clip norm{counts}"
        facts["epsilon"], reading["spends"] = spending(study, release)
    elif study.privacy.unit == "silo" or study.joint:
        how = "budget plan --values N" if study.task.kind == "own" else "--estimate"
        reading["noise"] = f"depends on the size of an update: {how} plans it"
    else:
        reading["noise"] = "depends on the silos' records: --records or --silo plans it"
    return facts


def _clip(
    study: Study,
    units: Units,
    public: Path | None,
    data: Path | None,
    device: str,
    reading: dict[str, str],
    quiet: bool,
) -> dict[str, Any]:
    """The proposal for the clip norm; its line goes into ``reading``."""
    from securefedcollm.federation.clip_proposal import propose_clip
    from securefedcollm_cli.progress import Bars

    smallest = min(units.counts, default=None)
    with Bars(quiet=quiet) as bars:
        found = propose_clip(
            study, units=smallest, public=public, data=data, device=device, progress=bars.report
        )
    now = study.aggregation.clip_norm
    answers = ", some answers made up" if found.made_up else ""
    silo = study.privacy is not None and study.privacy.unit == "silo"
    keys = "privacy.clip_norm and aggregation.clip_norm" if silo else "aggregation.clip_norm"
    noise = "; the noise grows with it" if silo else ""
    reading["clip norm"] = (
        f"one round on {found.rows:,} public rows{answers} makes an update of norm "
        f"{found.norm:.3g}; {now:g} keeps {found.kept(now):.0%} of it. Proposed for {keys}: "
        f"{found.clip_norm:g}{noise}"
    )
    return {**found._asdict(), "kept": found.kept(now)}


def _values(study: Study, data: Path | None) -> int | None:
    """Number of values in an update, if it follows without building the model."""
    from securefedcollm.errors import ConfigError

    try:
        return update_values(study, data)
    except ConfigError:
        return None


def _estimate_lines(found: dict[str, Any]) -> dict[str, str]:
    lines = {
        name.upper(): f"{found[name]['parameters'] / 1e6:,.1f} M parameters, adapter "
        f"{found[name]['adapter_values']:,} values ({found[name]['adapter_share']:.2%})"
        for name in ("llm", "slm")
        if name in found
    }
    up, down = found["bytes_up_per_round"], found["bytes_down_per_round"]
    memory = found["memory_bytes"]
    lines["a silo's round"] = (
        f"trains {found['slm']['trained_values']:,} values; sends {_size(up)}, receives "
        f"{_size(down)}, and a few kB of keys and shares a silo"
    )
    lines["memory, about"] = (
        f"silo {_size(memory['silo'])}, server {_size(memory['server'])}, if all records had "
        "task.max_tokens; the library not counted"
    )
    return lines


def _time_lines(found: dict[str, Any]) -> dict[str, str]:
    once = found["frozen_layers_once_s"]
    kept = f", with {_span(once)} that --states saves another time" if once > 60 else ""
    return {
        "time, about": f"silo {_span(found['silo_round_s'])} a round, server "
        f"{_span(found['server_round_s'])}; simulate --no-baselines --workers 0 "
        f"{_span(found['simulation_s'])}{kept} ({found['device']}, {found['threads']} threads)"
    }


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


@app.command()
def show(config: StudyFile, overrides: Overrides = None) -> None:
    """Print the study with every default written out (YAML)."""
    from securefedcollm.study import dump_study, load_study

    typer.echo(dump_study(load_study(config, overrides or [])), nl=False)


@app.command()
def deal(
    config: StudyFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the files.")],
    overrides: Overrides = None,
    data: DataDir = None,
    as_json: Json = False,
) -> None:
    """Deal a study's questions out into the files that real roles read, for a rehearsal.

    Writes one NAME.jsonl for each silo, public.jsonl and test.jsonl, just as `simulate` deals them.
    With real data nobody could do this: every silo has its own file.
    """
    from securefedcollm.federation.dealing import deal as dealt_out
    from securefedcollm.federation.files import make_directory
    from securefedcollm.study import load_study
    from securefedcollm.study.config import BUILTIN_SUBJECT
    from securefedcollm.tuning.data import write_questions

    study = load_study(config, overrides or [])
    dealt = dealt_out(study, data)
    make_directory(out)
    files = {"public": dealt.public, "test": dealt.test, **dealt.silos}
    owner = study.subject or BUILTIN_SUBJECT[study.task.data.builtin or "hospitals"]
    for name, questions in files.items():
        write_questions(
            out / f"{name}.jsonl", questions, owner, study.task.rows, study.task.columns
        )
    if as_json:
        typer.echo(json.dumps({name: len(questions) for name, questions in files.items()}))
        return
    for name, questions in files.items():
        typer.echo(f"{len(questions):>7,} questions  {out / name}.jsonl")


@app.command()
def sign(
    config: StudyFile,
    identity: Annotated[
        str, typer.Option("--identity", metavar="NAME", help="Your identity: a name or a file.")
    ],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign the study's digest with your identity, into CONFIG.signatures.json."""
    from securefedcollm.study import digest, load_study
    from securefedcollm.study.identity import open_identity, read_identity
    from securefedcollm.study.signing import sign_study, signatures_path

    study = load_study(config)
    file = read_identity(find(identity))
    passphrase = read_passphrase(passphrase_file) if file.encrypted else None
    key = open_identity(file, passphrase)
    envelope = sign_study(study, file.name, key, signatures_path(config))
    typer.echo(f"{file.name} signed {study.study} (sha256:{digest(study).hex()})")
    typer.echo(f"{len(envelope.signatures)} of {len(study.roster)} participants have signed")


@app.command()
def verify(config: StudyFile, as_json: Json = False) -> None:
    """Check that every participant on the roster signed exactly this study."""
    from securefedcollm.study import digest, load_study
    from securefedcollm.study.signing import (
        read_envelope,
        require_signed,
        signatures_path,
        verify_signatures,
    )

    study = load_study(config)
    path = signatures_path(config)
    signed = verify_signatures(study, read_envelope(path, study))
    if as_json:
        typer.echo(json.dumps({"digest": digest(study).hex(), "signed": signed}))
    else:
        for participant in study.roster:
            state = "signed" if signed[participant.name] else "MISSING"
            typer.echo(f"{state:<8} {participant.role:<9} {participant.name}")
    require_signed(study, path)


@app.command()
def schema(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON schema for editors and machines.")
    ] = False,
) -> None:
    """Print every key of a study, its type and its default."""
    import msgspec

    from securefedcollm.study.config import Study

    if as_json:
        typer.echo(json.dumps(msgspec.json.schema(Study), indent=2))
        return
    for line in _outline(Study, indent=0):
        typer.echo(line)


def _outline(section: Any, indent: int) -> list[str]:
    import typing

    import msgspec

    lines = []
    hints = typing.get_type_hints(section)
    for item in msgspec.structs.fields(section):
        kinds = [hints[item.name], *typing.get_args(hints[item.name])]
        inner = next(
            (k for k in kinds if isinstance(k, type) and issubclass(k, msgspec.Struct)), None
        )
        default = "required" if item.required else f"default {_default(item)}"
        if inner is not None:
            note = "" if item.required else f"  # {default}"
            lines.append(f"{'  ' * indent}{item.encode_name}:{note}")
            lines.extend(_outline(inner, indent + 1))
        else:
            name = str(hints[item.name]).replace("typing.", "").replace("<class '", "")
            lines.append(
                f"{'  ' * indent}{item.encode_name}: {name.rstrip(chr(62) + chr(39))}  # {default}"
            )
    return lines


def _default(item: Any) -> Any:
    import msgspec

    if item.default is not msgspec.NODEFAULT:
        value = item.default
        return "as below" if isinstance(value, msgspec.Struct) else value
    return "[]"
