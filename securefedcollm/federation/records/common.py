"""What all participants' records share: entries made from what the round loops know."""

from __future__ import annotations

import logging
from typing import Final

from securefedcollm.aggregation import (
    Roster,
    RoundHeader,
    Sealing,
)
from securefedcollm.aggregation import Word as Statement
from securefedcollm.errors import (
    ConfigError,
    StateError,
)
from securefedcollm.evidence.entries import (
    Ciphertexts,
    Keyed,
    Offer,
    Opened,
    Refused,
    Root,
    Round,
    Word,
)
from securefedcollm.evidence.fields import Member
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import silo_members
from securefedcollm.evidence.software import code_digest
from securefedcollm.federation.plan import AUTHORITY
from securefedcollm.federation.silostore import Mark
from securefedcollm.primitives import sha256
from securefedcollm.version import __version__

_messages = logging.getLogger(__name__)

SERVER: Final = "server"

Clip = tuple[float, float] | None
"""Clip norm and count noise of a sum whose clip norm adapts."""


def opened(
    study: bytes,
    run: bytes,
    roster: Roster,
    *,
    server: bytes,
    authority: bytes,
    sbom: bytes | None,
) -> Opened:
    """A log's first entry: who takes part in which run, with what code.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes.
        server, authority: Ed25519 public keys, 32 bytes; ``authority`` may be empty.
        sbom: the software bill of materials, where it lies beside the log.
    """
    office = [Member(AUTHORITY, "authority", authority.hex())] if authority else []
    return Opened(
        study=study.hex(),
        run=run.hex(),
        roster=[Member(SERVER, "server", server.hex()), *office, *silo_members(roster)],
        version=__version__,
        code=code_digest().hex(),
        sbom=None if sbom is None else sha256(sbom).hex(),
    )


def opened_by(
    header: RoundHeader, roster: Roster, server: bytes, authority: bytes, sbom: bytes | None
) -> Opened:
    """:func:`opened`, by a log that a round begins."""
    study, run = header.study_digest, header.run_id
    return opened(study, run, roster, server=server, authority=authority, sbom=sbom)


class RoundRecord:
    """What the records of server and silos have in common: the beginning of an attempt at a sum.

    Args:
        server, authority: Ed25519 public keys, 32 bytes; ``authority`` may be empty.
    """

    def __init__(
        self, log: EvidenceLog, *, roster: Roster, server: bytes, authority: bytes = b""
    ) -> None:
        self._log = log
        self._roster = roster
        self._server = server
        self._authority = authority

    def check_base(self, base: bytes) -> None:
        """Before anything of a round is written, and before a run goes on.

        Adversary: whoever swaps this party's model files between two rounds of a run.

        Raises:
            ConfigError: an earlier round of this run had another base model.
        """
        rounds = (entry.what for entry in reversed(self._log.entries))
        before = next((what.base for what in rounds if isinstance(what, Round)), base.hex())
        if before != base.hex():
            raise ConfigError(
                f"this base model has the digest {base.hex()[:16]}…, but this run's earlier rounds "
                f"had {before[:16]}…",
                where="models.slm",
                hint="put the files back that the run began with. If a version whose digest "
                "covered the weights alone began it, finish it with that version, or begin a new "
                "run",
            )

    def round(
        self,
        header: RoundHeader,
        base: bytes,
        layout: bytes,
        adapter: bytes | memoryview,
        mechanism: bytes,
        clip: Clip = None,
    ) -> None:
        """Before the model is sent, or trained on.

        Args:
            base, layout, mechanism: digests; ``mechanism`` is empty where the sum is not noised.
            adapter: the global adapter, float32.
        """
        if not self._log.size:
            sbom = self._software()
            self._log.append(opened_by(header, self._roster, self._server, self._authority, sbom))
        self._log.append(
            Round(
                round=header.round,
                attempt=header.attempt,
                base=base.hex(),
                layout=layout.hex(),
                adapter=sha256(adapter).hex(),
                mechanism=mechanism.hex() or None,
                clip=clip,
                model=header.model_digest.hex(),
                values=header.parameters.values,
                header=header.digest.hex(),
            )
        )

    def _software(self) -> bytes | None:
        """The software bill of materials that lies beside this log, if one does."""
        return None


def ciphertexts_of(sealing: Sealing) -> Ciphertexts:
    """The encrypted values, and the key that they are under."""
    offer = sealing.offer
    return Ciphertexts(
        key=sealing.key.hex(),
        roots={name: Root(root.hex(), raw.hex()) for name, (root, raw) in sealing.roots.items()},
        offer=None if offer is None else Offer(offer[0].hex(), offer[1].hex()),
    )


def word_of(word: Statement) -> Word:
    """The authority's signed word on a sum."""
    return Word(word.share.hex(), word.signature.hex())


def note_refusal(log: EvidenceLog, error: Exception) -> None:
    """A request was not answered. Only the kind of error is written: reasons are private.

    Adversary: a server that fills this disk with refusals. However many come in a row, only one of
    each kind is written, and none before the first round.
    """
    if not log.size:
        return
    refusal = Refused(error=type(error).__name__)
    for entry in reversed(log.entries):
        if entry.what == refusal:
            return
        if not isinstance(entry.what, Refused):
            break
    try:
        log.append(refusal)
    except StateError as full:  # saying nothing needs no evidence
        _messages.warning("%s", full)


def newest_sum(log: EvidenceLog) -> list[Mark]:
    """The newest sum in ``log`` and how often it was begun; nothing if there is none."""
    newest, attempts = -1, 0
    for entry in reversed(log.entries):
        if isinstance(entry.what, Round | Keyed):
            if entry.what.round < newest:
                break
            newest, attempts = entry.what.round, attempts + 1
    return [Mark("evidence log", newest, attempts)] if attempts else []
