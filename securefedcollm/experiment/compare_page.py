"""A comparison of runs as cells of a table, and its course over rounds as SVG or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.experiment.compare import METRICS, Comparison, Run, as_plain
from securefedcollm.experiment.page import templates
from securefedcollm.federation.files import write_durably
from securefedcollm.foreign import printable
from securefedcollm.privacy.page import render

Line = tuple[str, list[str]]
"""A line's title, and its cell for every run."""

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
    drawn = _drawn(found)
    template = "compare.svg"
    if path.suffix == ".html":
        template = "compare.html"
        drawn |= {"runs": found.runs}
        drawn |= {"tables": [("Results", results(found)), ("Studies", changes(found))]}
    page = render(templates().get_template(template), **drawn)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, page.encode())
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written ({error.strerror})", hint="choose another --plot"
        ) from None


def _drawn(found: Comparison) -> dict[str, Any]:
    """Every score after every round, one panel a score, one line a run: what ``compare.svg`` takes.

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
    top, panels = 30.0, []
    for metric in METRICS:
        keys = [key for other, key, _ in scores if other == metric]
        for i, key in enumerate(keys):
            left = _LEFT + (i % 2) * (_PANEL + _GAP)
            panels.append(_panel(found.runs, metric, key, left, top))
            if i % 2 or i == len(keys) - 1:
                top += _HEIGHT + _GAP
    return {
        "title": "Runs compared",
        "width": _LEFT + 2 * _PANEL + _GAP + 20,
        "height": top + _ROW * len(found.runs),
        "left": _LEFT,
        "panels": panels,
        "names": [(top + _ROW * i - 20, _look(i), run.name) for i, run in enumerate(found.runs)],
    }


def _look(i: int) -> dict[str, str]:
    dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
    return {"colour": _COLOURS[i % len(_COLOURS)], "dash": dash}


def _panel(runs: Sequence[Run], metric: str, key: str, left: float, top: float) -> dict[str, Any]:
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

    marks = [low + (high - low) * k / 4 for k in range(5)]
    return {
        "title": label(metric, key),
        "left": left,
        "right": left + _PANEL,
        "top": top,
        "bottom": bottom,
        "ticks": [(y(value), value) for value in marks],
        "rounds": [(x(n), n) for n in range(1, last + 1, max(1, -(-last // 10)))],
        "courses": [
            (_look(i), [(x(n), y(value)) for n, value in course])
            for i, course in enumerate(courses)
        ],
    }
