"""Compare two bundles of one run, to expose a server that told two silos different things.

Adversary: the server, which shows every silo, and every silo's auditor, a history of its own. Each
of two bundles may be consistent by itself. Together they contradict each other, and the two signed
heads, or two silos' own entries, are the proof.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import Bundle
from securefedcollm_audits.verification.case import Case, NotCovered, count
from securefedcollm_audits.verification.checks import ciphertexts, history, logs, rounds
from securefedcollm_audits.verification.progress import progress
from securefedcollm_audits.verification.verdict import Check, Faults, Result, Verdict, carry_out
from securefedcollm_audits.verification.verify import examine

_ACROSS = (
    *("one-history", "same-code", "models", "one-kind", "one-sum", "transcripts", "authority"),
    *("attempts", "lost", "clocks"),
)
"""Checks that examine several logs at once; they get those of both bundles."""


def compare(first: Path, second: Path) -> Verdict:
    """The verdict on two bundles together.

    Raises:
        ConfigError: a file is missing, or they are not of one study and run.
    """
    (mine, one), (theirs, other) = examine(first), examine(second)
    results = [_alone(mine, "A"), _alone(theirs, "B")]
    outcome = Verdict(f"{first} and {second}", "", results)
    if one is None or other is None:
        return outcome
    pair = one, other
    cases = Case(pair[0]), Case(pair[1])
    if (cases[0].digest, cases[0].run) != (cases[1].digest, cases[1].run):
        raise ConfigError(
            "are not of one study and run", where=outcome.bundle, hint="compare bundles of one run"
        )
    common = Check("common-logs", "Nobody signed two different logs", _Common(pair).check)
    both = Case(_united(*pair))
    known = (*logs.CHECKS, *rounds.CHECKS, *ciphertexts.CHECKS, *history.CHECKS)
    chosen = [check for check in known if check.name in _ACROSS]
    results += [carry_out(check, both) for check in (common, *chosen)]
    far = progress(both)
    return msgspec.structs.replace(
        outcome,
        study=both.study.study,
        digest=both.digest.hex(),
        run=both.run.hex(),
        participants=list(both.logs),
        rounds_done=far.done,
        rounds=far.rounds,
        progress=far.sentence,
    )


def _alone(verdict: Verdict, label: str) -> Result:
    title = f"Bundle {label} holds by itself"
    if verdict.holds:
        return Result(f"bundle-{label}", title, "pass", f"{count(verdict.passed, 'check')} passed")
    faults = [f"{result.name}: {fault}" for result in verdict.failed for fault in result.faults]
    return Result(f"bundle-{label}", title, "fail", faults[0], faults)


def _united(first: Bundle, second: Bundle) -> Bundle:
    """Both bundles' logs, the longer where both have one."""
    longer = {
        name: bundle
        for bundle in (first, second)
        for name in bundle.logs
        if len(bundle.logs[name]) >= max(len(b.logs.get(name, [])) for b in (first, second))
    }
    return msgspec.structs.replace(
        first,
        logs={name: bundle.logs[name] for name, bundle in longer.items()},
        leaves={name: bundle.leaves[name] for name, bundle in longer.items()},
        heads={name: bundle.heads[name] for name, bundle in longer.items()},
    )


class _Common:
    """The logs that both bundles hold: one is the beginning of the other."""

    def __init__(self, pair: tuple[Bundle, Bundle]) -> None:
        self._pair = pair

    def check(self, case: Case, wrong: Faults) -> str:
        first, second = self._pair
        shared = sorted(set(first.logs) & set(second.logs))
        for name in shared:
            leaves = zip(first.leaves[name], second.leaves[name], strict=False)
            for seq, (mine, theirs) in enumerate(leaves):
                if mine != theirs:
                    entry, other = first.logs[name][seq], second.logs[name][seq]
                    wrong(entry, f"in A; {other.place} in B is another: {name} signed both")
                    break
        if not shared:
            raise NotCovered("no participant's log is in both")
        return f"{', '.join(shared)}: one is the beginning of the other"
