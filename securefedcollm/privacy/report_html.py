"""The budget report as one self-contained HTML page: no script, no font, nothing fetched.

The page is ``templates/budget.html``, which escapes every value.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment
from markupsafe import Markup

from securefedcollm.privacy.page import environment, render, step_plot
from securefedcollm.privacy.report import Account, BudgetReport, Line
from securefedcollm.privacy.shown import down, up


def to_html(report: BudgetReport) -> str:
    """The whole page. It holds no private data and no key."""
    return render(_templates().get_template("budget.html"), report=report)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    found = environment("securefedcollm.privacy")
    found.filters |= {
        "at_delta": lambda delta: f"ε at δ = {delta:.0e}",
        "charged": _charged,
        "down": down,
        "plain": lambda value: f"{value:g}",
        "plot": _plot,
        "thousands": lambda count: f"{count:,}",
        "up": up,
    }
    return found


def _charged(line: Line) -> str:
    charged = line.reserved if line.settled is None else line.settled
    if line.state == "void":
        return "nothing"
    return "; ".join(
        " ".join(
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in event.items()
            if name != "kind"
        )
        for event in charged
    )


def _plot(account: Account) -> Markup:
    """Cumulative ε by entry, as steps, and the budget as a line."""
    points = [(i + 1, line.cumulative) for i, line in enumerate(account.lines)]
    count = len(points)
    what = f"{count} ledger entr{'y' if count == 1 else 'ies'}"
    return step_plot(points, account.budget.epsilon, what)
