"""What the server writes into its evidence log, and how it gets silos to vouch for it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import structs

from securefedcollm.aggregation import (
    Roster,
    RoundHeader,
    RoundResult,
    Transcript,
)
from securefedcollm.errors import (
    CryptoError,
)
from securefedcollm.evidence.bundle import file_digests
from securefedcollm.evidence.entries import (
    Failed,
    Finished,
    Lost,
    Opening,
    Summed,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import are_many
from securefedcollm.evidence.merkle import (
    consistency_proof,
    inclusion_proofs,
)
from securefedcollm.evidence.note import origin
from securefedcollm.evidence.software import bill_of_materials
from securefedcollm.federation import messages
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.records.common import (
    RoundRecord,
    ciphertexts_of,
    word_of,
)
from securefedcollm.primitives import SigningKey, sha256

_messages = logging.getLogger(__name__)

SBOM = "sbom.json"

_PART: Final = 1 << 20


class ServerRecord(RoundRecord):
    """The server's side of the evidence.

    Args:
        authority: the key holder's Ed25519 public key, where there is one.
        quorum: silos that must vouch for the log. Two quorums share an honest silo, so no two logs
            that contradict each other have one each.
    """

    def __init__(
        self,
        log: EvidenceLog,
        *,
        key: SigningKey,
        roster: Roster,
        quorum: int,
        authority: bytes = b"",
    ) -> None:
        super().__init__(log, roster=roster, server=key.public, authority=authority)
        self._quorum = quorum
        self._proofs: dict[tuple[int, int], list[bytes]] = {}
        """(old, new size) → consistency proof: the same for most silos of a round."""
        self._openings: list[tuple[Opening, messages.Shown]] = []
        self._shown_at = (-1, -1)
        self._vouched: dict[str, int] = {}
        """Silo → entries of the head that it last vouched for."""
        names = {origin(log.study, name): name for name in roster.names}
        for head in log.heads():
            signers = [names[signer] for signer, _ in head.lines if signer in names]
            self._vouched |= dict.fromkeys(signers, head.size)

    @property
    def sealed(self) -> bool:
        """Whether nothing was written since a quorum of silos vouched for the log.

        The signatures here decide: a silo's reply may have been lost.
        """
        if not self._log.size:
            return True
        return len(self.vouching) >= self._quorum

    @property
    def vouching(self) -> set[str]:
        """The silos that vouch for the whole log, by their signatures."""
        if not self._log.size:
            return set()
        signers = {signer for signer, _ in self._log.head.lines}
        return {name for name in self._roster.names if origin(self._log.study, name) in signers}

    def delivery(self) -> tuple[str, messages.Shown] | None:
        """The newest head with its cosignatures, and the newest entry of a finished round in it;
        None before there is both."""
        if len(self.vouching) < self._quorum:
            return None
        ends = [entry.seq for entry in self._log.entries if isinstance(entry.what, Finished)]
        if not ends:
            return None
        leaves, at = self._log.leaves, ends[-1]
        (proof,) = inclusion_proofs(leaves, [at])
        return self._enough(), messages.Shown(at, leaves[at], proof)

    def _enough(self) -> str:
        """The newest head with as many cosignatures as a silo asks for: each of n silos gets it."""
        head = self._log.head
        if are_many(len(self._roster)):
            names = {origin(self._log.study, name) for name in self.vouching}
            lines = [line for line in head.lines[1:] if line[0] in names]
            head = structs.replace(head, lines=(head.lines[0], *lines[: self._quorum]))
        return head.note

    def _software(self) -> bytes:
        sbom = bill_of_materials()
        write_durably(self._log.path.with_name(SBOM), sbom)
        return sbom

    def opening(self, header: RoundHeader, seen: Transcript) -> None:
        """Before anybody is asked to unmask."""
        self._log.append(
            Opening(
                round=header.round,
                attempt=header.attempt,
                header=seen.header.hex(),
                delivery=seen.delivery.hex(),
                survivors=list(seen.survivors),
                dropouts=list(seen.dropouts),
                lists=seen.lists.hex(),
                agreements={name: raw.hex() for name, raw in seen.agreements.items()},
                ciphertexts=None if seen.sealing is None else ciphertexts_of(seen.sealing),
            )
        )

    def summed(self, header: RoundHeader, result: RoundResult) -> None:
        """Before the sum is used."""
        self._log.append(
            Summed(
                round=header.round,
                attempt=header.attempt,
                header=result.header_digest.hex(),
                survivors=list(result.survivors),
                sum=sum_digest(result.sum).hex(),
                word=None if result.word is None else word_of(result.word),
            )
        )

    def failed(self, round_: int, attempt: int, error: Exception) -> None:
        """An attempt failed."""
        name = type(error).__name__.lstrip("_")
        self._log.append(Failed(round=round_, attempt=attempt, error=name))

    def lost(self, round_: int) -> None:
        """The run goes on without this round's updates."""
        self._log.append(Lost(round=round_))

    def finished(
        self,
        round_: int,
        adapter: bytes | memoryview,
        directory: Path,
        score: float | None = None,
        counts: tuple[int, int] | None = None,
    ) -> None:
        """The round is done and its adapters are in ``directory``. Written once a round.

        Args:
            score: the one by which the study compares rounds, if it does.
            counts: opened in its validation, if there was one.
        """
        if any(
            isinstance(entry.what, Finished) and entry.what.round == round_
            for entry in self._log.entries
        ):
            return
        digests = file_digests(directory)
        adapter_digest = sha256(adapter).hex()
        self._log.append(
            Finished(
                round=round_, adapter=adapter_digest, files=digests, score=score, counts=counts
            )
        )

    def witness(self, silo: str) -> messages.Witness | None:
        """What ``silo`` is asked to vouch for; None if there is nothing."""
        if not self._log.size:
            return None
        leaves = self._log.leaves
        old = self._vouched.get(silo, 0)
        return messages.Witness(
            checkpoint=self._log.head.note,
            old=old,
            consistency=self._consistency(leaves, old),
            openings=self._shown(silo, old),
        )

    def _shown(self, silo: str, old: int) -> list[messages.Shown]:
        """The openings of the newest round that has any, as a silo may know of an earlier attempt,
        and those that ``silo`` may have taken part in since it vouched for ``old`` entries."""
        at = self._log.size, self._oldest()
        if self._shown_at != at:
            self._openings, self._shown_at = self._proven(at[1]), at
        newest = self._openings[-1][0].round if self._openings else -1
        return [
            shown
            for what, shown in self._openings
            if what.round == newest or (shown.index >= old and silo in what.survivors)
        ]

    def _oldest(self) -> int:
        """Entries of the oldest head that some silo vouched for last."""
        if len(self._vouched) < len(self._roster):
            return 0
        return min(self._vouched.values())

    def _proven(self, oldest: int) -> list[tuple[Opening, messages.Shown]]:
        """The openings of the newest round and from entry ``oldest`` on, with proofs."""
        found = [(e.seq, e.what) for e in self._log.entries if isinstance(e.what, Opening)]
        newest = found[-1][1].round if found else -1
        found = [(seq, what) for seq, what in found if seq >= oldest or what.round == newest]
        leaves = self._log.leaves
        proofs = inclusion_proofs(leaves, [seq for seq, _ in found])
        return [
            (what, messages.Shown(seq, leaves[seq], proof))
            for (seq, what), proof in zip(found, proofs, strict=True)
        ]

    def _consistency(self, leaves: list[bytes], old: int) -> list[bytes]:
        key = (old, len(leaves))
        if key not in self._proofs:
            self._proofs = {k: proof for k, proof in self._proofs.items() if k[1] == len(leaves)}
            self._proofs[key] = consistency_proof(leaves, old)
        return self._proofs[key]

    def witnessed(self, replies: Mapping[str, messages.Witnessed]) -> list[str]:
        """Take silos' cosignatures; returns the silos to ask again with another proof."""
        again, lines, head = [], dict[str, bytes](), self._log.head
        for silo, reply in replies.items():
            if not reply.cosignature:
                self._vouched[silo] = min(max(0, reply.size), self._log.size)
                again.append(silo)
                continue
            name = origin(self._log.study, silo)
            signed = structs.replace(head, lines=((name, reply.cosignature),))
            try:
                signed.verify_cosigned(name, self._roster.key(self._roster.index(silo)))
            except CryptoError as error:
                _messages.warning("%s: %s", silo, error)
                continue
            lines[name] = reply.cosignature
            self._vouched[silo] = head.size
        if lines:
            self._log.add_cosignatures(head.size, lines)
        return again


def sum_digest(total: npt.NDArray[np.signedinteger[Any]]) -> bytes:
    """Names an opened sum, int64 [d], in the evidence. Hashed part by part: it may be long."""
    digest = hashlib.sha256()
    for start in range(0, len(total), _PART):
        digest.update(np.ascontiguousarray(total[start : start + _PART], dtype="<i8").data)
    return digest.digest()
