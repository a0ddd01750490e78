"""A participant's evidence log in a run in which members ask each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from securefedcollm.aggregation import Roster
from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.entries import Entry, Opened
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.software import bill_of_materials
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.records.common import opened
from securefedcollm.federation.records.server import SBOM
from securefedcollm.primitives import SigningKey


@dataclass(frozen=True)
class Everybody:
    """Who takes part in a study.

    Args:
        study: its digest, 32 bytes.
        server, authority: Ed25519 public keys, 32 bytes; ``authority`` may be empty.
    """

    study: bytes
    roster: Roster
    server: bytes
    authority: bytes = b""


def begin_log(
    home: Path,
    name: str,
    key: SigningKey,
    run: bytes,
    everybody: Everybody,
    on_entry: Callable[[Entry], None] | None = None,
) -> EvidenceLog:
    """The log in a participant's directory, with its first entry. It may be that of a training.

    Args:
        run: the run's id, 16 bytes.

    Raises:
        EvidenceError: it is of another run. A frame is bound to its run, and would never verify.
        StateError: it cannot be written.
    """
    study = everybody.study
    log = EvidenceLog(home / EVIDENCE, study=study, owner=name, key=key, on_entry=on_entry)
    if not log.size:
        sbom = bill_of_materials() if name == SERVER else None
        if sbom is not None:
            write_durably(home / SBOM, sbom)
        log.append(
            opened(
                study,
                run,
                everybody.roster,
                server=everybody.server,
                authority=everybody.authority,
                sbom=sbom,
            )
        )
    first = log.entries[0].what
    if not isinstance(first, Opened) or first.run != run.hex():
        log.close()
        raise EvidenceError(
            f"{home / EVIDENCE}: is of another run than this one",
            hint="put the run's own files back, or choose another --out",
        )
    return log
