"""An experiment's table as Markdown, and its plot as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from securefedcollm.foreign import visible

_METRICS: Final = {"accuracy": ("accuracy, %", 100, 1), "gold_log_prob": ("gold log-prob", 1, 3)}


def cell(metric: str, found: Mapping[str, float], *, signed: bool = False) -> str:
    """``63.0 [60.1, 65.9]``: accuracies in %, log-probabilities in nats; differences signed."""
    _, factor, digits = _METRICS[metric]
    sign = "+" if signed else ""
    mean, low, high = (f"{factor * found[k]:{sign}.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def heads(groups: Sequence[str]) -> list[str]:
    """The titles of the columns of :func:`cells`."""
    return [
        title if group == "all" else f"{group}: {title}"
        for group in _shown(groups)
        for title, _, _ in _METRICS.values()
    ]


def cells(row: Mapping[str, Any], groups: Sequence[str], *, signed: bool = False) -> list[str]:
    """A row's, or a difference's, numbers. The column ``all`` only where there is no other."""
    return [cell(m, row[m][g], signed=signed) for g in _shown(groups) for m in _METRICS]


def _shown(groups: Sequence[str]) -> list[str]:
    return [g for g in groups if g != "all"] or ["all"]


def markdown(table: Mapping[str, Any]) -> str:
    """The whole table, its differences and notes."""
    groups = table["groups"]
    titles = heads(groups)
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [
        f"# {table['study']}",
        "",
        f"{table['questions']:,} test questions, seeds {seeds}.",
        "",
        *_head(["model", "method", *titles]),
    ]
    for row in table["rows"]:
        lines.append(_line([row["model"].upper(), row["method"], *cells(row, groups)]))
    lines += ["", *_head(["model", "difference", *titles])]
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


_ROW, _LABEL, _PANEL, _GAP = 22.0, 190.0, 300.0, 40.0
_COLOURS: Final = {"FedCoLLM": "#1f5fbf"}


def plot(table: Mapping[str, Any]) -> str:
    """Accuracy of every row with its interval: models below, groups beside each other (SVG)."""
    groups, rows = _shown(table["groups"]), table["rows"]
    width = _LABEL + len(groups) * (_PANEL + _GAP)
    parts: list[str] = []
    top = 30.0
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        for column, group in enumerate(groups):
            left = _LABEL + column * (_PANEL + _GAP)
            title = model.upper() if group == "all" else f"{model.upper()}, {group}"
            parts.append(_panel(mine, group, left, top, f"{title}: accuracy, %"))
        for i, row in enumerate(mine):
            y = top + _ROW * (i + 1) + 4
            parts.append(f'<text x="6" y="{y:.1f}">{escape(row["method"])}</text>')
        top += _ROW * (len(mine) + 1) + 50
    return picture(table["study"], "".join(parts), width, top)


def picture(title: str, parts: str, width: float, height: float) -> str:
    """A whole SVG file. ``title`` is escaped here, ``parts`` by their maker."""
    return visible(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" font-size="12">'
        f"<title>{escape(title)}</title>"
        f'<rect width="100%" height="100%" fill="#fff"/>{parts}</svg>\n'
    )


def _panel(
    rows: Sequence[Mapping[str, Any]], group: str, left: float, top: float, title: str
) -> str:
    found = [row["accuracy"][group] for row in rows]
    low: float = min(f["low"] for f in found)
    high: float = max(f["high"] for f in found)
    margin = max(0.01, 0.05 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    def at(value: float) -> float:
        return left + _PANEL * (value - low) / (high - low)

    bottom = top + _ROW * (len(rows) + 0.6)
    parts = [
        f'<text x="{left:.1f}" y="{top:.1f}" font-weight="bold">{escape(title)}</text>',
        f'<line x1="{left:.1f}" y1="{bottom:.1f}" x2="{left + _PANEL:.1f}" y2="{bottom:.1f}" '
        'stroke="#888"/>',
    ]
    for k in range(5):
        value = low + (high - low) * k / 4
        parts.append(
            f'<line x1="{at(value):.1f}" y1="{top + 8:.1f}" x2="{at(value):.1f}" '
            f'y2="{bottom:.1f}" stroke="#e4e4e4"/><text x="{at(value):.1f}" '
            f'y="{bottom + 16:.1f}" text-anchor="middle">{100 * value:.1f}</text>'
        )
    for i, (row, f) in enumerate(zip(rows, found, strict=True)):
        y, colour = top + _ROW * (i + 1), _COLOURS.get(row["method"], "#555")
        parts.append(
            f'<line x1="{at(f["low"]):.1f}" y1="{y:.1f}" x2="{at(f["high"]):.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{at(f["mean"]):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
        )
    return "".join(parts)
