"""The common look of pages and pictures: self-contained, light or dark, and fit for a printer.

A page that is filed today reads the same in ten years: no script, no font, nothing fetched. The
pages are Jinja2 templates, in ``templates/`` here or in the package that shows them.

Adversary: an author of evidence, data or names whose texts would act, or reorder the text that a
person reads. The templates escape every value. :func:`render` makes characters visible that would
hide or reorder text (bidi).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from securefedcollm.foreign import visible

_HERE = "securefedcollm.privacy"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720.0, 220.0, 44.0, 30.0


def environment(package: str) -> Environment:
    """The templates of ``package``, and after them those that all pages share."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, _HERE))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Template, **values: Any) -> str:
    """The whole document."""
    return visible(template.render(values)) + "\n"


@lru_cache(maxsize=1)
def _steps() -> Template:
    return environment(_HERE).get_template("steps.svg")


def step_plot(points: Sequence[tuple[int, float | None]], limit: float, what: str) -> Markup:
    """Plot a quantity that grows in steps, with its limit as a dashed line.

    Args:
        points: (x, y) with x = 1, 2, …; y None where it is not known.
        what: label of the x axis.
    """
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return Markup()
    top = max(limit, *(y for _, y in known)) * 1.1
    count = len(points)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 10) * y / top

    def place(x: float, y: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - 10) * x / count:.1f},{up(y):.1f}"

    path = [place(0, 0)]
    last = 0.0
    for x, y in known:
        path += [place(x - 1, last), place(x - 1, y), place(x, y)]
        last = y
    drawn = _steps().render(
        what=what,
        limit=limit,
        width=_WIDTH,
        height=_HEIGHT,
        label_y=up(limit) + 4,
        axes=[place(0, top), place(0, 0), place(count, 0)],
        dashed=[place(0, limit), place(count, limit)],
        path=path,
    )
    return Markup(drawn)  # noqa: S704 - its template escapes
