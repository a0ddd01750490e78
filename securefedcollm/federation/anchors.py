"""A participant's journal and ledger must know every step that its own evidence knows.

Every step is recorded in the journal first, then in the evidence log, and then the reply leaves. So
if the log knows a step and the journal does not, the journal is an older copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from securefedcollm.aggregation import SchemeName, attempt_scope, names_digest, round_scope
from securefedcollm.errors import StateError
from securefedcollm.evidence.entries import (
    Agreed,
    Decrypted,
    Entry,
    Keyed,
    Opened,
    Round,
    Told,
    Unmasked,
    Uploaded,
)
from securefedcollm.evidence.ledger import read_anchors
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.federation.questions.prepaid import has_prepaid
from securefedcollm.federation.silostore import SiloStore, restored
from securefedcollm.primitives import equal
from securefedcollm.privacy.ledger import Ledger

_Said = Uploaded | Agreed | Unmasked | Told | Decrypted
_Key = tuple[str, bytes | None]
_KEYED: Final = "ckks-authority"
_GRAPH: Final = "masking-graph"


def check_ledger(home: Path, ledger: Path, owner: str) -> None:
    """Check that the privacy ledger knows every charge that an evidence log of this home knows.

    Adversary: an operator, or a backup, that puts an older ledger back. Its records would have a
    budget again that was spent. Whoever removes the logs too is not found out here, but by what
    other participants' logs say.

    Raises:
        StateError: the ledger is older than a log, or a log cannot be read.
        EvidenceError: the ledger or a log does not verify.
    """
    logs = sorted(home.glob(f"studies/*/silos/*/{FILE_NAME}"))
    anchors = [read_anchors(log) for log in logs]  # before the ledger, which others may write to
    if not any(one.charges or one.answered for one in anchors):
        return
    with Ledger(ledger, owner) as opened:
        rows = opened.rows()
        for one in anchors:
            if one.answered and not has_prepaid(opened, ledger, one.study):
                raise StateError(
                    f"{ledger}: this privacy ledger does not say that the answers which {one.path} "
                    "tells of were paid for",
                    hint="restore the newest copy of the ledger, with its key, and of the ledger "
                    "of answers beside it; without them budget would be spent twice",
                )
    for one in anchors:
        entry = one.missing(rows)
        if entry is not None:
            raise StateError(
                f"{ledger}: this privacy ledger is older than {one.path}, whose {entry.place} says "
                "what was charged and is not in it",
                hint="restore the newest copy of the ledger, with its key; an older one would let "
                "budget be spent twice, so nothing is released",
            )


class Anchor(NamedTuple):
    """An entry of the evidence log, and the journal's record of the same step.

    ``value``: what the journal must say; None where the entry does not determine it.
    """

    entry: Entry
    key: bytes
    value: bytes | None


def check_journal(log: EvidenceLog, journal: SiloStore, scheme: SchemeName) -> None:
    """Check that the journal knows every step of the newest sum that the evidence log knows.

    Adversary: a server that hears of a journal which was put back to an older copy, also within an
    attempt. It has a second sum of the round opened, over other silos than the one that the journal
    has forgotten; the difference of the two is one silo's vector.

    Raises:
        StateError: the journal was put back.
    """
    for anchor in _anchors(log.entries, scheme):
        found = journal.recorded(anchor.key)
        if found is None or not (anchor.value is None or equal(found, anchor.value)):
            raise restored(f"its evidence log knows of {anchor.entry.place}")


def _anchors(entries: list[Entry], scheme: SchemeName) -> Iterator[Anchor]:
    """Those of the newest sum: the others are older than its beginning, which is counted."""
    opened = next((entry.what for entry in entries if isinstance(entry.what, Opened)), None)
    newest = -1
    for entry in reversed(entries if opened else []):
        what = entry.what
        if isinstance(what, Round | Keyed | _Said):
            if what.round < newest:
                return
            newest = what.round
        if opened is not None and isinstance(what, _Said):
            place = bytes.fromhex(opened.study), bytes.fromhex(opened.run), what.round
            scopes = {"open:": round_scope(*place)}
            attempt = attempt_scope(*place, what.attempt)
            for key, value in _keys(what, scheme):
                yield Anchor(entry, key.encode() + scopes.get(key, attempt), value)


def _keys(what: _Said, scheme: SchemeName) -> list[_Key]:
    """Kind of record, and its value: as in docs/protocol.md and docs/ckks.md, *Journal*."""
    masked = scheme in {"masking", _GRAPH}
    match what:
        case Uploaded():
            return [("upload:", None if scheme == _KEYED else bytes.fromhex(what.delivery))]
        case Agreed():
            agreed: list[_Key] = [("agree:", bytes.fromhex(what.lists) if masked else None)]
            return agreed + ([("open:", bytes.fromhex(what.lists))] if scheme == _GRAPH else [])
        case Unmasked():
            if scheme == _GRAPH:
                return [("open:", bytes.fromhex(what.lists))]
            answer: list[_Key] = [] if masked else [("partial:", None)]
            return [("open:", names_digest(what.seeds_of)), *answer]
        case Told():
            return [("noted:", None)]
        case Decrypted():
            return [("open:", names_digest(what.survivors)), ("partial:", None)]
