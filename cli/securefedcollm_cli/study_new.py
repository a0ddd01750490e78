"""``securefedcollm study new`` and ``study keys``: write a study, and explain its keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from securefedcollm.federation.sizes import BUILTIN_RECORDS, BUILTIN_SUBJECTS
from securefedcollm.study.learning import RowKind
from securefedcollm_cli.options import Json, Labels

_RECORDS: Final = 1000


def new(
    out: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The file to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The model that every silo tunes: a directory, `path:DIR` (relative to --data), "
            "`hub:ORG/NAME@COMMIT` or `builtin:NAME`.",
        ),
    ],
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm", metavar="MODEL", help="The server's large model [none: plain FedAvg]."
        ),
    ] = None,
    task: Annotated[
        RowKind,
        typer.Option("--task", help="Kind of a record; the study file explains each kind."),
    ] = "multiple_choice",
    label: Labels = None,
    unit: Annotated[
        Literal["record", "subject", "silo"],
        typer.Option(
            "--unit", help="The unit that ε protects: a record, a patient, or a whole silo."
        ),
    ] = "record",
    subject: Annotated[
        str | None,
        typer.Option(
            "--subject", metavar="COLUMN", help="With --unit subject: the column that names it."
        ),
    ] = None,
    joint: Annotated[
        bool,
        typer.Option(
            "--joint",
            help="Joint DP-SGD: all silos take each step together, in one secure sum. It takes "
            "far less noise, but protects against the server and one silo instead of "
            "everybody.",
        ),
    ] = False,
    scheme: Annotated[
        Literal["masking", "ckks", "ckks-authority"],
        typer.Option("--scheme", help="How the sum is protected; masking is the fastest."),
    ] = "masking",
    silos: Annotated[
        int,
        typer.Option(
            min=3,
            max=10_000,
            help="Number of silos. Above 128 they mask on a graph, which is then set.",
        ),
    ] = 4,
    records: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Approximate number of records (or subjects) of the smallest silo; the batch "
            "size follows from it [1000; the built-in world's].",
        ),
    ] = None,
    method: Annotated[
        Literal["ffa-lora", "rolora", "lora", "prompt", "prefix", "full"],
        typer.Option(
            "--method", help="What is tuned: low-rank matrices, virtual tokens, or all weights."
        ),
    ] = "ffa-lora",
    epsilon: Annotated[float, typer.Option(help="ε of the whole study.")] = 8.0,
    delta: Annotated[float, typer.Option(help="Its δ, below 1/records.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Write a study to start from, with a comment at every key that says what it means.

    It sets the keys that a study of this kind needs. All others are at their defaults, commented
    out. Nothing is overwritten. Change the file as you like, and check it.

        securefedcollm study new clinic.yaml --model hub:ORG/NAME@COMMIT --task text --joint
    """
    from securefedcollm.study.keypage import commented
    from securefedcollm.study.load import study_from_tree
    from securefedcollm.study.starting import Choices, starting_tree

    _check_choices(unit, subject, joint)
    slm = _model("--model", model)
    builtin = slm["source"].startswith("builtin:hospital-") and task == "multiple_choice"
    usual = (BUILTIN_SUBJECTS if unit == "subject" else BUILTIN_RECORDS) if builtin else _RECORDS
    tree = starting_tree(
        Choices(
            name=_name(out),
            kind=task,
            labels=label or [],
            slm=slm,
            llm=_model("--llm", llm) if llm else None,
            unit=unit,
            subject=subject,
            joint=joint,
            scheme=scheme,
            silos=silos,
            records=records or usual,
            epsilon=epsilon,
            delta=delta,
            method=method,
        )
    )
    study = study_from_tree(tree)
    _write(out, commented(tree, _head(out, study)))
    if as_json:
        typer.echo(json.dumps(tree, indent=2))
        return
    typer.echo(f"wrote {out}; next: securefedcollm study check {out}")


def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Only this key or section, e.g. local.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page of all keys (docs/keys.md).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Explain every key of a study: meaning, type, allowed values, default, and when it is
    required."""
    from securefedcollm.errors import ConfigError
    from securefedcollm.study.keypage import markdown
    from securefedcollm.study.keys import study_keys

    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    found = [
        key
        for key in study_keys()
        if section is None or key.path == section or key.path.startswith((f"{section}.",))
    ]
    if not found:
        raise ConfigError(
            f"a study has no key {section!r}",
            where="KEY",
            hint="`securefedcollm study keys` lists all",
        )
    if as_json:
        plain = [{**key._asdict(), "section": key.section is not None} for key in found]
        typer.echo(json.dumps(plain, indent=2))
        return
    for key in found:
        facts = [key.kind, key.allowed.replace("`", "")]
        facts.append("required" if key.required else "" if key.section else _default(key.default))
        facts.append(f"required if {key.needed}" if key.needed else "")
        typer.echo(f"{key.path}: {'; '.join(fact for fact in facts if fact)}")
        typer.echo(f"    {key.meaning}")


def _default(value: Any) -> str:
    return f"default {'none' if value is None else value}"


def _check_choices(unit: str, subject: str | None, joint: bool) -> None:
    from securefedcollm.errors import ConfigError

    if joint and unit == "silo":
        raise ConfigError(
            "a silo is protected once a round, not step by step",
            where="--joint",
            hint="leave it out, or choose --unit record",
        )
    if (unit == "subject") != (subject is not None):
        missing = subject is None
        raise ConfigError(
            "no column names the subject of a record" if missing else f"--unit {unit} needs none",
            where="--subject",
            hint="name it, e.g. --subject patient" if missing else "leave it out",
        )


_COMMIT: Final = re.compile("[0-9a-f]{40}")


def _model(option: str, text: str) -> dict[str, str]:
    """A model's keys from a command-line value."""
    from securefedcollm.errors import ConfigError

    kind, _, rest = text.partition(":")
    if kind in {"builtin", "path"} and rest:
        return {"source": text}
    if kind == "hub" and rest:
        name, _, commit = text.partition("@")
        if _COMMIT.fullmatch(commit):
            return {"source": name, "revision": commit}
        raise ConfigError(
            "a hub model without a commit can change under the participants' feet",
            where=option,
            hint=f"write {name}@COMMIT, with the 40 digits from its page's history",
        )
    if Path(text).is_dir():
        return {"source": f"path:{text}"}
    raise ConfigError(
        f"{text!r} is no directory and no model source",
        where=option,
        hint="a directory, path:DIR, hub:ORG/NAME@COMMIT or builtin:NAME",
    )


def _name(out: Path) -> str:
    """A study's name from its file's."""
    name = re.sub(r"[^a-z0-9._-]+", "-", out.stem.lower()).strip("-._")
    return name[:63] or "study"


def _head(out: Path, study: Any) -> str:
    more = "" if study.task.data.builtin else " --silo NAME=FILE … --test FILE"
    more += " --public FILE" if study.models.llm and more else ""
    more += " --data DIR" if study.models.slm.source.startswith("path:") else ""
    return (
        "Written by `securefedcollm study new`. Every key has its meaning above it. Keys behind a\n"
        "comment sign have the default that is shown. Next:\n"
        f"  securefedcollm study check {out.name}\n"
        f"  securefedcollm budget plan {out.name}\n"
        f"  securefedcollm simulate {out.name}{more}"
    )


def _write(out: Path, text: str) -> None:
    from securefedcollm.errors import ConfigError

    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            "is there already, and nothing is overwritten",
            where=str(out),
            hint="choose another name, or remove it",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot be written ({error.strerror or error})",
            where=str(out),
            hint="choose another place",
        ) from None
