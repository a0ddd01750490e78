"""The budget report as one self-contained HTML page: no script, no font, nothing fetched."""

from __future__ import annotations

import math
from html import escape

from securefedcollm.privacy.report import Account, BudgetReport, Line
from securefedcollm.privacy.shown import down, up

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a2430; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #d7dde4;
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .85em; overflow-wrap: anywhere; }
.claim { background: #eef4fb; border-left: 4px solid #2b6cb0; padding: .7rem 1rem; }
.note { color: #52606d; font-size: .9rem; }
svg { width: 100%; height: auto; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; }
  table, svg { break-inside: avoid; } }
"""


def to_html(report: BudgetReport) -> str:
    """The whole page. Every value is escaped; it holds no private data and no key."""
    accounts = "".join(_account(account) for account in report.accounts)
    if not report.accounts:
        accounts = "<p>The ledger is empty: nothing has been reserved or released.</p>"
    assumptions = "".join(f"<li>{escape(text)}</li>" for text in report.assumptions)
    owner = escape(report.owner or "nobody yet")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Privacy budget of {owner}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Privacy budget of {owner}</h1>"
        f'<p class="note">Ledger <code>{escape(report.ledger)}</code>, {report.rows} rows, '
        f"hash chain verified. Head <code>{escape(report.head) or 'none'}</code>; compare it with "
        "the head in the evidence log.</p>"
        f"{accounts}<h2>What these numbers rest on</h2><ul>{assumptions}</ul></body></html>\n"
    )


def _account(account: Account) -> str:
    spent, budget = account.spent, account.budget
    return (
        f"<h2>{escape(account.unit)} level, data set <code>{escape(account.dataset[:16])}</code>"
        "</h2>"
        f'<p class="claim">All releases so far together are (ε = {up(spent.epsilon)}, '
        f"δ = {spent.delta:g}) differentially private for one {escape(_noun(account.unit))}, "
        f"against the strongest adversary below. Budget: ε = {budget.epsilon:g}; "
        f"{down(account.left)} is left. Accountant: {escape(spent.accountant)}.</p>"
        f"{_plot(account)}{_adversaries(account)}{_opinion(account)}{_lines(account.lines)}"
    )


def _adversaries(account: Account) -> str:
    if not account.adversaries:
        return ""
    deltas = [claim.delta for claim in account.adversaries[0].epsilons]
    head = "".join(f'<th class="n">ε at δ = {delta:.0e}</th>' for delta in deltas)
    rows = "".join(
        f"<tr><td>{escape(row.adversary)}</td>"
        + "".join(f'<td class="n">{up(claim.epsilon)}</td>' for claim in row.epsilons)
        + "</tr>"
        for row in account.adversaries
    )
    title = "<h3>Who learns how much, at most</h3>"
    return f"{title}<table><tr><th>adversary</th>{head}</tr>{rows}</table>"


def _opinion(account: Account) -> str:
    residual = (
        f"Residuals of sampler, batch cap and noise shares take {account.delta_residual:.1g} of δ."
    )
    if account.second_opinion is None:
        return (
            '<p class="note">Discrete noise or none: no independent second accountant exists for '
            f"it; its zCDP bound is a closed formula. {residual}</p>"
        )
    low, middle, high = account.second_opinion
    return (
        '<p class="note">Second accountant (prv-accountant), for parameters fixed in advance: '
        f"ε between {low:.4f} and {high:.4f}, estimate {middle:.4f}. {residual}</p>"
    )


def _lines(lines: list[Line]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(line.run[:12])}</code></td>"
        f'<td class="n">{line.round + 1}</td><td class="n">{line.attempt}</td>'
        f"<td>{line.state}</td><td>{escape(line.time)}</td>"
        f"<td><code>{escape(_event(line))}</code></td>"
        f'<td class="n">{"" if line.cumulative is None else up(line.cumulative)}</td></tr>'
        for line in lines
    )
    return (
        "<h3>Ledger</h3><table><tr><th>run</th><th class='n'>round</th><th class='n'>attempt</th>"
        "<th>state</th><th>reserved at (UTC)</th><th>charged</th><th class='n'>ε so far</th></tr>"
        f"{rows}</table>"
    )


def _event(line: Line) -> str:
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


def _plot(account: Account) -> str:
    """Cumulative ε by entry, as steps, and the budget as a line."""
    points = [(i + 1, line.cumulative) for i, line in enumerate(account.lines)]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    width, height, left, bottom = 720.0, 220.0, 44.0, 30.0
    top = max(account.budget.epsilon, *(y for _, y in known)) * 1.1
    count = len(points)

    def place(x: float, y: float) -> str:
        across = left + (width - left - 10) * x / count
        return f"{across:.1f},{height - bottom - (height - bottom - 10) * y / top:.1f}"

    path = [place(0, 0)]
    last = 0.0
    for x, y in known:
        path += [place(x - 1, last), place(x - 1, y), place(x, y)]
        last = y
    limit = account.budget.epsilon
    start, end = place(0, limit), place(count, limit)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="Cumulative ε by ledger entry, budget {limit:g}">'
        f'<polyline points="{place(0, top)} {place(0, 0)} {place(count, 0)}" fill="none" '
        'stroke="#7b8794"/>'
        f'<polyline points="{start} {end}" stroke="#c53030" stroke-dasharray="5 4" fill="none"/>'
        f'<polyline points="{" ".join(path)}" fill="none" stroke="#2b6cb0" stroke-width="2"/>'
        f'<text x="2" y="{float(start.split(",")[1]) + 4:.0f}" font-size="12" fill="#c53030">'
        f"ε = {limit:g}</text>"
        f'<text x="{width / 2:.0f}" y="{height - 8:.0f}" font-size="12" fill="#52606d">'
        f"{count} ledger entr{'y' if count == 1 else 'ies'}</text></svg>"
    )


def _noun(unit: str) -> str:
    return unit.replace("subject:", "subject, by ")
