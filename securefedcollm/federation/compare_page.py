"""A comparison of runs as cells of a table, and its course over rounds as SVG or a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.compare import METRICS, Comparison, Run, as_plain
from securefedcollm.federation.experiment_page import picture
from securefedcollm.federation.files import write_durably
from securefedcollm.foreign import printable
from securefedcollm.privacy.page import page, table

Line = tuple[str, list[str]]
"""What a line says, and its cell for every run."""

_COLOURS: Final = ("#1f5fbf", "#b5442d", "#2c7a4b", "#7a4fa3", "#a8741a", "#3b8ea5", "#555555")
_DASHES: Final = ("", "6 3", "2 3")
_LEFT, _PANEL, _HEIGHT, _GAP, _ROW = 60.0, 420.0, 170.0, 70.0, 18.0


def results(found: Comparison) -> list[Line]:
    """Scores, privacy and cost."""
    lines = [
        (label(metric, key), [_score(metric, value) for value in values])
        for metric, key, values in found.scores()
    ]
    runs = found.runs
    return [
        *lines,
        ("ε spent, worst silo", [_epsilon(run) for run in runs]),
        ("rounds", [str(run.rounds) for run in runs]),
        ("seconds of all rounds", ["–" if r.seconds is None else f"{r.seconds:g}" for r in runs]),
        ("bytes from all silos", [f"{run.bytes_up:,}" for run in runs]),
        ("bytes to all silos", [f"{run.bytes_down:,}" for run in runs]),
    ]


def changes(found: Comparison) -> list[Line]:
    """The studies' keys that differ."""
    return [
        (d.key, [printable(as_plain(value), 60) for value in d.values]) for d in found.differences
    ]


def label(metric: str, key: str) -> str:
    """``SLM private: accuracy, %``."""
    model, _, group = key.partition("/")
    unit = ", %" if metric == "accuracy" else ""
    return f"{f'{model.upper()} {group}'.strip()}: {metric}{unit}"


def _score(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.2f}"


def _epsilon(run: Run) -> str:
    spent = run.privacy
    if spent is None:
        return "no DP"
    first = f"at most {spent.budget:g}" if spent.epsilon is None else f"{spent.epsilon:.2f}"
    return f"{first} per {spent.unit} (δ = {spent.delta:g})"


def write_plot(found: Comparison, path: Path) -> None:
    """Write the course over rounds: ``.svg`` the picture, ``.html`` with the tables.

    Raises:
        ConfigError: another kind of file, or nothing was measured.
        StateError: it cannot be written.
    """
    if path.suffix not in {".svg", ".html"}:
        raise ConfigError(
            f"no picture is drawn as {path.suffix or 'a file without an ending'}",
            where="--plot",
            hint="name a file that ends in .svg or .html; a browser prints both",
        )
    drawn = plot(found)
    if path.suffix == ".html":
        heads = ("", *(escape(run.name) for run in found.runs))
        body = "".join(
            f"<h2>{title}</h2>" + table(heads, _escaped(lines), numbers=range(1, len(heads)))
            for title, lines in (("Results", results(found)), ("Studies", changes(found)))
            if lines
        )
        drawn = page("Runs compared", f"<h1>Runs compared</h1>{drawn}{body}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, drawn.encode())
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written ({error.strerror})", hint="choose another --plot"
        ) from None


def _escaped(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    return [(escape(name), *map(escape, cells)) for name, cells in lines]


def plot(found: Comparison) -> str:
    """Every score after every round, one panel a score, one line a run (SVG).

    Raises:
        ConfigError: no run measured anything.
    """
    scores = found.scores()
    if not scores:
        raise ConfigError(
            "no run measured anything after its rounds",
            where="--plot",
            hint="runs measure where they have test records (`server --test`)",
        )
    top, parts = 30.0, []
    for metric in METRICS:
        keys = [key for other, key, _ in scores if other == metric]
        for i, key in enumerate(keys):
            left = _LEFT + (i % 2) * (_PANEL + _GAP)
            parts.append(_panel(found.runs, metric, key, left, top))
            if i % 2 or i == len(keys) - 1:
                top += _HEIGHT + _GAP
    for i, run in enumerate(found.runs):
        y = top + _ROW * i - 20
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + 30}" y2="{y:.1f}" {_stroke(i)}/>'
            f'<text x="{_LEFT + 38}" y="{y + 4:.1f}">{escape(run.name)}</text>'
        )
    width = _LEFT + 2 * _PANEL + _GAP + 20
    return picture("Runs compared", "".join(parts), width, top + _ROW * len(found.runs))


def _stroke(i: int) -> str:
    dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
    return (
        f'fill="none" stroke="{_COLOURS[i % len(_COLOURS)]}" stroke-width="2"'
        + f' stroke-dasharray="{dash}"' * bool(dash)
    )


def _panel(runs: Sequence[Run], metric: str, key: str, left: float, top: float) -> str:
    factor = 100 if metric == "accuracy" else 1
    courses = [
        [
            (number, factor * scores[metric][key])
            for number, scores in enumerate(run.course, start=1)
            if key in scores.get(metric, {})
        ]
        for run in runs
    ]
    values = [value for course in courses for _, value in course]
    low, high, last = min(values), max(values), max(len(run.course) for run in runs)
    margin = max(0.01 * abs(high), 0.05 * (high - low), 1e-6)
    low, high = low - margin, high + margin
    bottom = top + _HEIGHT

    def x(number: int) -> float:
        return left + _PANEL * (number - 1) / max(1, last - 1)

    def y(value: float) -> float:
        return bottom - (_HEIGHT - 14) * (value - low) / (high - low)

    parts = [
        f'<text x="{left:.1f}" y="{top:.1f}" font-weight="bold">{escape(label(metric, key))}</text>'
    ]
    for k in range(5):
        value = low + (high - low) * k / 4
        parts.append(
            f'<line x1="{left:.1f}" y1="{y(value):.1f}" x2="{left + _PANEL:.1f}" '
            f'y2="{y(value):.1f}" stroke="#e4e4e4"/><text x="{left - 6:.1f}" '
            f'y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        )
    step = max(1, -(-last // 10))
    parts += [
        f'<text x="{x(n):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{n}</text>'
        for n in range(1, last + 1, step)
    ]
    parts.append(f'<text x="{left:.1f}" y="{bottom + 32:.1f}">rounds</text>')
    for i, course in enumerate(courses):
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in course)
        parts.append(f'<polyline points="{points}" {_stroke(i)}/>')
        parts += [
            f'<circle cx="{x(n):.1f}" cy="{y(value):.1f}" r="3" '
            f'fill="{_COLOURS[i % len(_COLOURS)]}"/>'
            for n, value in course
        ]
    return "".join(parts)
