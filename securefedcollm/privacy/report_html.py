"""The budget report as one self-contained HTML page: no script, no font, nothing fetched."""

from __future__ import annotations

from html import escape

from securefedcollm.privacy.page import page, step_plot, table
from securefedcollm.privacy.report import Account, BudgetReport, Line
from securefedcollm.privacy.shown import down, up


def to_html(report: BudgetReport) -> str:
    """The whole page. Every value is escaped; it holds no private data and no key."""
    accounts = "".join(_account(account) for account in report.accounts)
    if not report.accounts:
        accounts = "<p>The ledger is empty: nothing has been reserved or released.</p>"
    assumptions = "".join(f"<li>{escape(text)}</li>" for text in report.assumptions)
    owner = escape(report.owner or "nobody yet")
    body = (
        f"<h1>Privacy budget of {owner}</h1>"
        f'<p class="note">Ledger <code>{escape(report.ledger)}</code>, {report.rows} rows, '
        f"hash chain verified. Head <code>{escape(report.head) or 'none'}</code>; compare it with "
        "the head in the evidence log.</p>"
        f"{_sets(report)}{accounts}<h2>What these numbers rest on</h2><ul>{assumptions}</ul>"
    )
    return page(f"Privacy budget of {report.owner or 'nobody yet'}", body)


def _sets(report: BudgetReport) -> str:
    """The budget by record, across files and studies: what the owner pinned."""
    if report.pinned is None:
        return ""
    head = ("set of records", "records", "ε, most", "ε, median", "nothing spent", "left")
    rows = [
        (
            f"<code>{escape(found.records[:16])}</code>",
            f"{found.standing.accounts:,}",
            up(found.standing.worst),
            up(found.standing.median),
            f"{found.standing.untouched:,}",
            down(found.standing.left),
        )
        for found in report.sets
    ]
    older = (
        f'<p class="note">{report.unattributed} charges name no records, and no file of which the '
        "records are known: they count for no record above.</p>"
        if report.unattributed
        else ""
    )
    return (
        f"<h2>By record</h2><p>Every record may spend ε = {report.pinned.epsilon:g} at "
        f"δ = {report.pinned.delta:g}, in all files and studies together. What follows by data set "
        "is of that data set alone.</p>"
        + (table(head, rows, numbers=range(1, len(head))) if rows else "")
        + older
    )


def _account(account: Account) -> str:
    spent, budget = account.spent, account.budget
    return (
        f"<h2>{escape(account.unit)} level, data set <code>{escape(account.dataset)}</code>"
        "</h2>"
        f'<p class="claim">All releases so far together are (ε = {up(spent.epsilon)}, '
        f"δ = {spent.delta:g}) differentially private for one {escape(_noun(account.unit))}, "
        f"against the strongest adversary below. Budget: ε = {budget.epsilon:g}, "
        f"which holds however later releases are chosen; {down(account.left)} is left. "
        f"Accountant: {escape(spent.accountant)}.</p>"
        f"{_plot(account)}{_adversaries(account)}{_opinion(account)}{_lines(account.lines)}"
    )


def _adversaries(account: Account) -> str:
    if not account.adversaries:
        return ""
    deltas = [claim.delta for claim in account.adversaries[0].epsilons]
    head = ["adversary", *(f"ε at δ = {delta:.0e}" for delta in deltas)]
    rows = [
        [escape(row.adversary), *(up(claim.epsilon) for claim in row.epsilons)]
        for row in account.adversaries
    ]
    title = "<h3>Who learns how much, at most</h3>"
    return title + table(head, rows, numbers=range(1, len(head)))


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
    head = ("run", "round", "attempt", "state", "reserved at (UTC)", "charged", "ε so far")
    rows = [
        (
            f"<code>{escape(line.run[:12])}</code>",
            f"{line.round + 1}",
            f"{line.attempt}",
            line.state,
            escape(line.time),
            f"<code>{escape(_event(line))}</code>",
            "" if line.cumulative is None else up(line.cumulative),
        )
        for line in lines
    ]
    return "<h3>Ledger</h3>" + table(head, rows, numbers=(1, 2, 6))


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
    count = len(points)
    what = f"{count} ledger entr{'y' if count == 1 else 'ies'}"
    return step_plot(points, account.budget.epsilon, what)


def _noun(unit: str) -> str:
    return unit.replace("subject:", "subject, by ")
