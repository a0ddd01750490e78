"""What ``securefedcollm model …`` prints: scores, ways to ask a model, and models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import typer

from securefedcollm.foreign import as_text, printable

if TYPE_CHECKING:
    from securefedcollm.tuning.calibrate import Form

_TITLES: Final = {"macro_f1": "macro F1", "auroc": "AUROC"}


def show_scores(result: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console, whole = Console(), result["all"]
    names = [name for name, value in whole.items() if not isinstance(value, list)]
    table = Table("", *(_TITLES.get(name, name.replace("_", " ")) for name in names))
    for group, scores in result.items():
        # A group is a value of the column `subject`.
        table.add_row(as_text(group), *(_cell(scores[name]) for name in names))
    console.print(table)
    if "confusion" not in whole:
        return
    labels = [as_text(found["label"]) for found in whole["classes"]]
    table = Table(
        "label", "records", "F1", "AUROC, against the rest", title="By label, all records"
    )
    for label, found in zip(labels, whole["classes"], strict=True):
        table.add_row(label, *(_cell(found[name]) for name in ("count", "f1", "auroc")))
    console.print(table)
    table = Table("right label", title="Confusion: how often each label was predicted")
    for label in labels:
        table.add_column(label)
    for label, row in zip(labels, whole["confusion"], strict=True):
        table.add_row(label, *map(_cell, row))
    console.print(table)


def _cell(value: float | None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def show_forms(forms: list[Form]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("ask", "score", "accuracy", "temperature", "log p(right)", "at temperature 1")
    for form in forms:
        accuracy = f"{form.accuracy:.1%} ± {form.standard_error:.1%}"
        fitted = f"{form.gold_log_prob:.3f}", f"{form.uncalibrated:.3f}"
        table.add_row(form.ask, form.score, accuracy, f"{form.temperature:.3g}", *fitted)
    console.print(table)
    best = forms[0]
    console.print(f"{best.count} records. For the study, under models.llm or models.slm:")
    console.print(f"  ask: {best.ask}\n  temperature: {best.temperature:.3g}")
    if best.ask == "cloze":
        console.print(f"and under task:\n  score: {best.score}")


def print_models(models: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(models, indent=2))
        return
    for name, facts in models.items():
        typer.echo(printable(name))
        for key, value in facts.items():
            typer.echo(printable(f"  {key.replace('_', ' '):<20} {value}"))
