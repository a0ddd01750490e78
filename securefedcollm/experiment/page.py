"""An experiment's table as Markdown, and its plot as SVG (``templates/experiment.svg``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from jinja2 import Environment

from securefedcollm.foreign import printable
from securefedcollm.privacy.page import environment, render

_METRICS: Final = {"accuracy": ("accuracy, %", 100, 1), "gold_log_prob": ("gold log-prob", 1, 3)}


def cell(
    metric: str, found: Mapping[str, float], *, signed: bool = False, perplexity: bool = False
) -> str:
    """``63.0 [60.1, 65.9]``: accuracies in %, log-probabilities in nats; differences signed.

    ``perplexity``: a log-probability a token, -x, is shown as e^x.
    """
    _, factor, digits = _METRICS[metric]
    sign = "+" if signed else ""
    values = [factor * found[key] for key in ("mean", "low", "high")]
    if perplexity and metric == "gold_log_prob":
        middle, least, most = (math.exp(-value) for value in values)
        values, digits = [middle, most, least], 2
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def heads(groups: Sequence[str], *, perplexity: bool = False) -> list[str]:
    """The titles of the columns of :func:`cells`."""
    titles = {metric: title for metric, (title, _, _) in _METRICS.items()}
    titles |= {"gold_log_prob": "perplexity"} if perplexity else {}
    return [
        title if group == "all" else f"{group}: {title}"
        for group in _shown(groups)
        for title in titles.values()
    ]


def cells(
    row: Mapping[str, Any],
    groups: Sequence[str],
    *,
    signed: bool = False,
    perplexity: bool = False,
) -> list[str]:
    """The numbers of a row or a difference. The column ``all`` only where there is no other."""
    return [
        cell(m, row[m][g], signed=signed, perplexity=perplexity)
        for g in _shown(groups)
        for m in _METRICS
    ]


def _shown(groups: Sequence[str]) -> list[str]:
    return [g for g in groups if g != "all"] or ["all"]


def markdown(table: Mapping[str, Any]) -> str:
    """The whole table, its differences and notes."""
    groups, perplexity = table["groups"], bool(table.get("generative"))
    titles = [_text(title) for title in heads(groups, perplexity=perplexity)]
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [
        f"# {table['study']}",
        "",
        f"{table['questions']:,} test questions, seeds {seeds}.",
        "",
        *_head(["model", "method", *titles]),
    ]
    for row in table["rows"]:
        shown = cells(row, groups, perplexity=perplexity)
        lines.append(_line([row["model"].upper(), row["method"], *shown]))
    lines += ["", *_head(["model", "difference", *(_text(title) for title in heads(groups))])]
    for row in table["differences"]:
        name = f"{row['method']} − {row['less']}"
        name = f"**{name}**" if row["main"] else name
        lines.append(_line([row["model"].upper(), name, *cells(row, groups, signed=True)]))
    lines += ["", *(f"- {note}" for note in table["notes"]), ""]
    return "\n".join(lines)


def _head(titles: list[str]) -> list[str]:
    return [_line(titles), _line(["---"] * len(titles))]


def _line(fields: list[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def _text(foreign: str) -> str:
    """Somebody else's name as plain Markdown text: no HTML, link or further cell."""
    return re.sub(r"[\\`*_\[\]<>|&]", r"\\\g<0>", printable(foreign))


_ROW, _LABEL, _PANEL, _GAP = 22.0, 190.0, 300.0, 40.0
_COLOURS: Final = {"FedCoLLM": "#1f5fbf"}


def plot(table: Mapping[str, Any]) -> str:
    """Accuracy of every row with its interval: models below, groups side by side (SVG)."""
    groups, rows = _shown(table["groups"]), table["rows"]
    panels: list[dict[str, Any]] = []
    names: list[tuple[float, str]] = []
    top = 30.0
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        for column, group in enumerate(groups):
            left = _LABEL + column * (_PANEL + _GAP)
            title = model.upper() if group == "all" else f"{model.upper()}, {group}"
            panels.append(_panel(mine, group, left, top) | {"title": f"{title}: accuracy, %"})
        names += [(top + _ROW * (i + 1) + 4, row["method"]) for i, row in enumerate(mine)]
        top += _ROW * (len(mine) + 1) + 50
    return render(
        templates().get_template("experiment.svg"),
        title=table["study"],
        width=_LABEL + len(groups) * (_PANEL + _GAP),
        height=top,
        panels=panels,
        names=names,
    )


@lru_cache(maxsize=1)
def templates() -> Environment:
    """Templates of this room's pages and pictures. ``px``: a place in a picture, to a tenth."""
    found = environment("securefedcollm.federation")
    found.filters["px"] = lambda value: f"{value:.1f}"
    return found


def _panel(
    rows: Sequence[Mapping[str, Any]], group: str, left: float, top: float
) -> dict[str, Any]:
    found = [row["accuracy"][group] for row in rows]
    low: float = min(f["low"] for f in found)
    high: float = max(f["high"] for f in found)
    margin = max(0.01, 0.05 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    def at(value: float) -> float:
        return left + _PANEL * (value - low) / (high - low)

    marks = [low + (high - low) * k / 4 for k in range(5)]
    bars = [
        {
            "y": top + _ROW * (i + 1),
            "colour": _COLOURS.get(row["method"], "#555"),
            **{key: at(f[key]) for key in ("low", "mean", "high")},
        }
        for i, (row, f) in enumerate(zip(rows, found, strict=True))
    ]
    return {
        "left": left,
        "right": left + _PANEL,
        "top": top,
        "bottom": top + _ROW * (len(rows) + 0.6),
        "ticks": [(at(value), value) for value in marks],
        "bars": bars,
    }
