"""The privacy audits that participants carried out and wrote down."""

from __future__ import annotations

from securefedcollm.evidence.entries import Audited, Entry
from securefedcollm_audits.verification.case import Case, NotCovered, count, of
from securefedcollm_audits.verification.checks.budget import TOLERANCE
from securefedcollm_audits.verification.verdict import Check, Faults


def audits(case: Case, wrong: Faults) -> str:
    """Adversary: a participant that carried out an audit and reports a better result. Only the
    signer of the log vouches that the audit was carried out at all."""
    names, others = [], 0
    for owner, log in case.logs.items():
        for entry, what in of(log, Audited):
            names.append(what.audit)
            others += what.study != case.digest.hex()
            for fault in _faults(case, owner, entry, what):
                wrong(entry, fault)
    if not names:
        raise NotCovered("nobody wrote down a privacy audit; `audit mechanism … --run RUN` does")
    said = f"{count(len(names), 'audit')} ({', '.join(sorted(set(names)))}): nothing was refuted"
    return said + (f"; {others} at other settings of the same code" if others else "")


def _faults(case: Case, owner: str, entry: Entry, what: Audited) -> list[str]:
    found = []
    if not what.held:
        found.append(f"{what.audit} refuted the claim")
    elif what.bound is not None and what.claimed is not None and what.bound > what.claimed:
        found.append(f"ε is at least {what.bound:.2f}, above the claim of {what.claimed:.2f}")
    opened = case.opened.get(owner)
    if opened is not None and what.code != opened.code:
        found.append("attacked other code than the one that ran")
    privacy = case.study.privacy
    if what.study == case.digest.hex() and what.claimed is not None:
        most = privacy.epsilon if privacy else 0.0
        if what.claimed > most * (1.0 + TOLERANCE):
            found.append(f"holds a claim of ε = {what.claimed:.2f}; the study's is {most:g}")
    return found


CHECKS = (Check("audits", "No privacy audit refutes the claim", audits),)
