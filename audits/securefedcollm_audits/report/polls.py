"""The report's table of questions to records."""

from __future__ import annotations

from securefedcollm.evidence.entries import Voted, Voting
from securefedcollm_audits.report.rows import PollRow
from securefedcollm_audits.verification.case import Case, of


def polls_of(case: Case) -> list[PollRow]:
    """Adversary: a silo that spreads one member's questions over several names: one row has all."""
    found: dict[tuple[str, str], PollRow] = {}
    for silo, log in case.silos.items():
        opened = {what.header for _, what in of(log, Voted)}
        for entry, what in of(log, Voting):
            pair = (silo, case.log_name(what.asker) or what.asker)
            before = found.get(pair, PollRow(*pair, 0, 0, entry.place))
            asked, seen = before.asked + 1, before.opened + (what.header in opened)
            found[pair] = PollRow(*pair, asked, seen, entry.place)
    return [found[pair] for pair in sorted(found)]
