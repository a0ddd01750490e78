"""What the roles of a real run say on their own terminals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import MOST_MESSAGE, printable

if TYPE_CHECKING:
    from securefedcollm.evidence.entries import Entry
    from securefedcollm.federation.consent import Terms
    from securefedcollm.study import Study
    from securefedcollm_cli.progress import Bars


def say_finished(run: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "finished", "run": str(run)}))
    else:
        typer.echo("finished. To see the run: securefedcollm status. For an auditor:")
        typer.echo(f"  securefedcollm audit bundle {run}")


def say_where(run: Path, study: Study, as_json: bool) -> None:
    """Where a silo finds the result.

    Adversary: a server that ends a run early, or keeps the last adapter to itself.
    """
    from securefedcollm.federation.roles import ADAPTER, newest_adapter

    newest, rounds = newest_adapter(run), study.rounds
    if as_json:
        typer.echo(json.dumps({"event": "adapter", "round": newest, "place": str(run / ADAPTER)}))
    elif newest:
        typer.echo(f"the adapter of round {newest} of {rounds}; with it securefedcollm model")
        typer.echo(f"  evaluate|generate|merge --run {run}")
    if newest < rounds:
        why = f"the server delivered no adapter of round {rounds}"
        if newest and study.keep and study.keep.patience:
            why += "; only the server's evidence shows that the study's patience ended the run"
        typer.echo(f"WARNING: {why}", err=True)


def show_terms(terms: Terms, as_json: bool) -> None:
    """Show the terms of taking part."""
    if as_json:
        figures = {k: None if v == float("inf") else v for k, v in asdict(terms).items()}
        typer.echo(json.dumps({"event": "terms", **figures}))
    else:
        for key, value in _reading(terms).items():
            # Adversary: the study's author, who chose the names.
            typer.echo(printable(f"{key:<9} {value}", MOST_MESSAGE), err=True)


def confirm(yes: bool) -> None:
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
    if terms.continues:
        shown["goes on"] = f"from what these studies released: {', '.join(terms.continues)}"
    if terms.set_aside is not None:
        shown["set aside"] = (
            f"{terms.set_aside:.0%} of them, drawn here: they are asked after every round and "
            "never tuned on; only counts over all silos leave"
            + (", with noise" if terms.epsilon is not None else ", WITHOUT NOISE")
        )
    if terms.epsilon is None:
        shown["privacy"] = "none: the tuned adapter may reveal records"
        shown["budget"] = "the ledger charges nothing"
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


def print_round(rounds: int, bars: Bars, as_json: bool, record: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "round", **record}))
        return
    from securefedcollm.federation.status import round_sentence

    bars.say(round_sentence(record, rounds))


def print_scores(
    rounds: int, bars: Bars, as_json: bool, which: str, round_: int, scores: dict[str, Any]
) -> None:
    """The measurement on the silo's own records, for its operator alone."""
    if as_json:
        typer.echo(json.dumps({"event": which, "round": round_, **scores}))
        return
    whole = scores["all"]
    when = f"after round {round_} of {rounds}" if round_ else "of the base model"
    bars.say(
        f"your {which} records: loss {-whole['gold_log_prob']:.4f}, accuracy "
        f"{whole['accuracy']:.4f} {when} ({whole['count']} records)"
    )


def print_entry(entry: Entry, study: Any, bars: Bars, as_json: bool) -> None:
    """Show the operator a new entry of the silo's evidence log."""
    from securefedcollm.federation.status import told

    if as_json:
        import msgspec

        what = msgspec.to_builtins(entry.what)
        typer.echo(json.dumps({"event": what.pop("kind"), "time": entry.time, **what}))
        return
    line = told(entry, study)
    if line:
        bars.say(line)
