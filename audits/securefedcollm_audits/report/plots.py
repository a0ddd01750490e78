"""Inline SVG for the report: attendance by round, the limits of an attacker, and accuracy by ε
spent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Final

MOST_LINES: Final = 24
"""Number of silos with a line in the plot of attendance."""


def participation_plot(silos: Sequence[str], rounds: Sequence[Collection[str]]) -> str:
    """One square per silo and round: filled if its update is in the sum, else an outline.

    If there are many silos, only those that missed most sums have a line.
    """
    if not silos or not rounds:
        return ""
    silos, rest = _most_absent(silos, rounds)
    side, left = min(18.0, 560.0 / len(rounds)), 110.0
    width, height = left + side * len(rounds) + 10, side * len(silos) + 28
    squares = []
    for row, name in enumerate(silos):
        y = side * row
        label = escape(name[:14])
        squares.append(f'<text x="0" y="{y + side * 0.75:.1f}">{label}</text>')
        for column, survivors in enumerate(rounds):
            taken = name in survivors
            squares.append(
                f'<rect x="{left + side * column:.1f}" y="{y + 1:.1f}" width="{side - 2:.1f}" '
                f'height="{side - 2:.1f}" fill="{"var(--blue)" if taken else "none"}" '
                f'stroke="{"var(--blue)" if taken else "var(--red)"}"/>'
            )
    caption = f"sums 1 to {len(rounds)}; outlined: not in the sum{rest}"
    squares.append(f'<text x="{left:.0f}" y="{height - 8:.0f}">{caption}</text>')
    return (
        f'<div class="wide"><svg viewBox="0 0 {max(width, 720):.0f} {height:.0f}" role="img" '
        f'aria-label="Which silos are in each sum">{"".join(squares)}</svg></div>'
    )


def _most_absent(silos: Sequence[str], rounds: Sequence[Collection[str]]) -> tuple[list[str], str]:
    """The silos that have a line, and the caption about the others."""
    missed = {name: sum(name not in survivors for survivors in rounds) for name in silos}
    if len(silos) <= MOST_LINES:
        return list(silos), ""
    ranked = sorted(silos, key=lambda name: -missed[name])  # stable: by name otherwise
    shown = [name for name in ranked if missed[name]][:MOST_LINES] or ranked[:1]
    most = max(missed[name] for name in silos if name not in shown)
    others = f"the other {len(silos) - len(shown)} silos missed"
    return shown, f"; {others} {'none' if not most else f'{most} at most, each'}"


def advantage_plot(points: Sequence[tuple[float, float]]) -> str:
    """Greatest share of members found (up) by share of false alarms (right); dashed: guessing."""
    if not points:
        return ""
    width, height, left, bottom = 720.0, 240.0, 44.0, 34.0

    def place(alpha: float, power: float) -> str:
        x = left + (width - left - 10) * alpha
        return f"{x:.1f},{height - bottom - (height - bottom - 10) * power:.1f}"

    path = " ".join(place(*point) for point in [(0.0, 0.0), *points])
    return (
        f'<div class="wide"><svg viewBox="0 0 {width:g} {height:g}" role="img" '
        'aria-label="Greatest share of members that any test finds, by its false-alarm rate">'
        f'<polyline points="{place(0, 1)} {place(0, 0)} {place(1, 0)}" fill="none" '
        'stroke="var(--soft)"/>'
        f'<polyline points="{place(0, 0)} {place(1, 1)}" fill="none" stroke="var(--soft)" '
        'stroke-dasharray="5 4"/>'
        f'<polyline points="{path}" fill="none" stroke="var(--blue)" stroke-width="2"/>'
        '<text x="2" y="14">100 %</text>'
        f'<text x="{width - 10:.0f}" y="{height - 10:.0f}" text-anchor="end">'
        f'false alarms, 0 to 100 %</text><text x="{left + 6:.0f}" y="{height - 10:.0f}">'
        "members found (up); dashed: guessing</text></svg></div>"
    )


_STROKES = ("", "7 4", "2 4", "10 3 2 3")
"""Dashes tell the lines apart in black and white, too."""


def utility_plot(course: Sequence[tuple[float, Mapping[str, float]]]) -> str:
    """Accuracy by group (up) by ε spent so far (right): one point a round.

    Args:
        course: (ε, group → accuracy in [0, 1]), ε rising; the first may be before any training.
    """
    if len(course) < 2:
        return ""
    width, height, left, right, bottom = 720.0, 240.0, 44.0, 130.0, 34.0
    most = max(epsilon for epsilon, _ in course) or 1.0

    def place(epsilon: float, accuracy: float) -> tuple[float, float]:
        across = left + (width - left - right) * epsilon / most
        return across, height - bottom - (height - bottom - 12) * accuracy

    def points(values: Sequence[tuple[float, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(*value)) for value in values)

    axis = points([(0.0, 1.0), (0.0, 0.0), (most, 0.0)])
    parts = [f'<polyline points="{axis}" fill="none" stroke="var(--soft)"/>']
    groups = list(dict.fromkeys(group for _, scores in course for group in scores))
    ends: list[float] = []
    for group, dashes in zip(groups, _STROKES * len(groups), strict=False):
        line = [(epsilon, scores[group]) for epsilon, scores in course if group in scores]
        parts.append(
            f'<polyline points="{points(line)}" fill="none" stroke="var(--blue)" '
            f'stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        for value in line:
            x, y = place(*value)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--blue)"/>')
        end = place(*line[-1])[1] + 4
        while any(abs(end - other) < 13 for other in ends):
            end += 13
        ends.append(end)
        label = escape(group or "accuracy")[:16]
        parts.append(f'<text x="{width - right + 8:.0f}" y="{end:.0f}">{label}</text>')
    for epsilon, _ in course:
        x, y = place(epsilon, 0.0)
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 14:.0f}">{epsilon:.1f}</text>')
    parts.append(f'<text x="2" y="16">100 %</text><text x="{left}" y="{height - 4}">')
    parts.append("ε charged so far, after each round; up: accuracy of the small model</text>")
    return (
        f'<div class="wide"><svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="Accuracy of the small model by ε charged so far">{"".join(parts)}</svg></div>'
    )
