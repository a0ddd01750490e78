"""Verify a bundle offline: without the server, the people who ran it, torch, or any network.

Adversary: the maker of the bundle, or somebody who had it in between. A participant with its own
key can write its own log as it likes. It cannot write the others' logs, signatures and
countersignatures, and the checks examine where these must agree.
"""

from __future__ import annotations

from pathlib import Path

from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.bundle import Bundle, decode_bundle, read_content
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm.primitives import sha256
from securefedcollm_audits.verification.case import Case
from securefedcollm_audits.verification.chain import Look, follow
from securefedcollm_audits.verification.checks import (
    budget,
    ciphertexts,
    findings,
    history,
    logs,
    order,
    polls,
    questions,
    rounds,
)
from securefedcollm_audits.verification.expected import Expected, compare
from securefedcollm_audits.verification.progress import progress
from securefedcollm_audits.verification.verdict import Check, Result, Verdict, carry_out

CHECKS: tuple[Check, ...] = (
    *logs.CHECKS,
    *order.CHECKS,
    *rounds.CHECKS,
    *ciphertexts.CHECKS,
    *history.CHECKS,
    *budget.CHECKS,
    *findings.CHECKS,
)
QUESTIONS: tuple[Check, ...] = questions.CHECKS
"""Where the study lets members ask for documents, or somebody did."""
POLLS: tuple[Check, ...] = polls.CHECKS
"""The same for records."""
_ARCHIVE = ("archive", "The archive is complete and unaltered")


def verify(path: str | Path, expected: Expected = Expected()) -> Verdict:  # noqa: B008 - immutable
    """Carry out every check on the bundle at ``path``.

    Args:
        expected: the verifier's own knowledge of the participants.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    return examine(Path(path), expected)[0]


def examine(
    path: Path,
    expected: Expected = Expected(),  # noqa: B008 - immutable
    look: Look | None = None,
) -> tuple[Verdict, Bundle | None]:
    """:func:`verify`, and the bundle that was checked; None if it cannot be decoded.

    The file is read once, so that nobody can exchange it between its hash and its checks.

    Args:
        look: in place of this function, for the bundles of earlier runs.
    """
    digest = ""  # empty for a file that is larger than any bundle
    try:
        content = read_content(path)
        digest = sha256(content).hex()
        bundle = decode_bundle(content, path)
    except EvidenceError as error:
        fault = error.message.removeprefix(f"{printable(path, MOST_MESSAGE)}: ")
        return Verdict(str(path), digest, [Result(*_ARCHIVE, "fail", fault, [fault])]), None
    files = len(bundle.logs) + len(bundle.heads)
    whole = Result(*_ARCHIVE, "pass", f"{files} logs and heads, study and lists: hashes fit")
    return _verdict(bundle, str(path), digest, whole, expected, look or examine), bundle


def _verdict(
    bundle: Bundle, path: str, digest: str, first: Result, expected: Expected, look: Look
) -> Verdict:
    case = Case(bundle)
    known, silent = compare(case, expected)
    far = progress(case)
    return Verdict(
        bundle=path,
        sha256=digest,
        results=[
            *(first, known),
            *follow(case, expected.earlier, look),
            *(carry_out(check, case) for check in CHECKS),
            *(carry_out(check, case) for check in QUESTIONS if questions.concern(case)),
            *(carry_out(check, case) for check in POLLS if polls.concern(case)),
        ],
        study=case.study.study,
        digest=case.digest.hex(),
        run=case.run.hex(),
        participants=list(case.logs),
        rounds_done=far.done,
        rounds=far.rounds,
        progress=far.sentence,
        keys={name: key.hex() for name, key in case.keys.items()},
        not_compared=silent,
    )
