"""Verdicts as plain text and as plain values, for terminals and machines alike."""

from __future__ import annotations

import textwrap
from typing import Any

import msgspec

from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_audits.verification.verdict import Verdict

_MARKS = {"pass": "pass", "fail": "FAIL", "not covered": "–"}


def sentence(verdict: Verdict) -> str:
    """The outcome in one line."""
    if verdict.failed:
        names = ", ".join(result.name for result in verdict.failed)
        return f"evidence does NOT hold: {len(verdict.failed)} of the checks failed ({names})"
    return f"evidence verified offline: {verdict.passed} checks passed"


def about(verdict: Verdict) -> list[str]:
    """The bundle's identity, in a few lines."""
    lines = [f"bundle {verdict.bundle}"]
    if verdict.sha256:
        lines.append(f"sha256 {verdict.sha256}")
    if verdict.study:
        lines.append(
            f"study  {verdict.study} ({verdict.digest[:16]}…), run {verdict.run[:8]}…, "
            f"{verdict.progress}"
        )
    return lines + [f"key    {printable(name):<12} {key}" for name, key in verdict.keys.items()]


def silence(verdict: Verdict) -> list[str]:
    """The things that were not compared, one a line."""
    return [f"not compared: {what}" for what in verdict.not_compared]


def text(verdict: Verdict, width: int = 100) -> str:
    """The table of checks: mark, name, evidence; faults below, one a line."""
    lines = [*(printable(line, MOST_MESSAGE) for line in about(verdict)), ""]
    for result in verdict.results:
        head = f"{_MARKS[result.status]:<5}{result.name:<18} "
        found = result.evidence if result.status != "fail" else f"{result.title}: not so"
        body = textwrap.wrap(found, max(20, width - len(head))) or [""]
        lines += [head + body[0], *(" " * len(head) + more for more in body[1:])]
        for fault in result.faults:
            lines += textwrap.wrap(fault, width, initial_indent=" " * 7, subsequent_indent=" " * 9)
    return "\n".join([*lines, "", *silence(verdict), sentence(verdict)])


def plain(verdict: Verdict) -> dict[str, Any]:
    """For ``--json``."""
    values: dict[str, Any] = msgspec.to_builtins(verdict)
    counts = {"holds": verdict.holds, "passed": verdict.passed, "failed": len(verdict.failed)}
    return counts | values
