"""What the key holder writes into its evidence log."""

from __future__ import annotations

from securefedcollm.aggregation import (
    AuthoritySide,
    Roster,
    RoundHeader,
    SchemeName,
)
from securefedcollm.evidence.entries import (
    Decrypted,
    Keyed,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.anchors import check_journal
from securefedcollm.federation.records.common import (
    ciphertexts_of,
    newest_sum,
    note_refusal,
    opened_by,
    word_of,
)
from securefedcollm.federation.silostore import Mark, SiloStore


class AuthorityRecord:
    """The key holder's side of the evidence.

    Args:
        key: the authority's Ed25519 public key, 32 bytes; ``server``: the server's.
    """

    def __init__(self, log: EvidenceLog, *, key: bytes, roster: Roster, server: bytes) -> None:
        self._log = log
        self._key = key
        self._roster = roster
        self._server = server

    @property
    def marks(self) -> list[Mark]:
        """The newest sum in the log; none if there is none."""
        return newest_sum(self._log)

    def check_journal(self, journal: SiloStore, scheme: SchemeName) -> None:
        """Raises: StateError if ``journal`` does not know a step that the log knows."""
        check_journal(self._log, journal, scheme)

    def attempt(self, header: RoundHeader) -> None:
        """Before a key is made."""
        if not self._log.size:
            self._log.append(opened_by(header, self._roster, self._server, self._key, None))
        self._log.append(
            Keyed(
                round=header.round,
                attempt=header.attempt,
                model=header.model_digest.hex(),
                values=header.parameters.values,
                header=header.digest.hex(),
            )
        )

    def said(self, header: RoundHeader, side: AuthoritySide) -> None:
        """After an answer was made, before it leaves."""
        seen = side.transcript
        if seen.word is None or seen.sealing is None:
            return
        self._log.append(
            Decrypted(
                round=header.round,
                attempt=header.attempt,
                header=seen.header.hex(),
                delivery=seen.delivery.hex(),
                survivors=list(seen.survivors),
                dropouts=list(seen.dropouts),
                lists=seen.lists.hex(),
                agreements={name: raw.hex() for name, raw in seen.agreements.items()},
                ciphertexts=ciphertexts_of(seen.sealing),
                word=word_of(seen.word),
            )
        )

    def refused(self, error: Exception) -> None:
        """A request was not answered."""
        note_refusal(self._log, error)
