"""A silo's desk: it answers members' questions from its shelf, counts them and writes evidence.

The silo never learns a question (:mod:`securefedcollm.retrieval.shelf` says what it does learn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from securefedcollm.errors import LocalProtocolError, SecureFedCoLLMError
from securefedcollm.evidence.entries import Counted, Served, Slip
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.federation.records.common import note_refusal
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import Header, PreparedShelf, Receipt, Shelf, ShelfStep
from securefedcollm.retrieval.messages import Question, transcript


@dataclass(frozen=True)
class Desk:
    """What a silo answers with.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes.
        key: the silo's identity.
        askers: name → Ed25519 public key of every member that may ask.
        log: the silo's; it begins with ``opened``.
    """

    study: bytes
    run: bytes
    key: SigningKey
    askers: Mapping[str, bytes]
    shelf: PreparedShelf
    quota: StoredQuota
    log: EvidenceLog

    def open(self, asker: str) -> DeskConversation:
        """For one question of ``asker``, whose frames the engine knows to be from there.

        Raises:
            LocalProtocolError: it is no member that may ask.
        """
        if asker not in self.askers:
            raise LocalProtocolError(f"{asker} may not ask here", hint="look at the study's roster")
        header = Header(self.study, self.run, self.askers[asker], self.key.public, self.shelf.terms)
        return DeskConversation(self, asker, header)


class DeskConversation:
    """One question of one asker: :meth:`handle` its two frames. Is its shelf's ``Quota``."""

    def __init__(self, desk: Desk, asker: str, header: Header) -> None:
        self._desk, self._asker, self._header = desk, asker, header
        self._number = 0
        self._shelf = Shelf(desk.shelf, header=header, asker=asker, key=desk.key, quota=self)

    def spend(self, asker: str, number: bytes) -> bool:
        """As :meth:`securefedcollm.retrieval.Quota.spend` says; remembers which number this is."""
        place = self._desk.quota.take(asker, number)
        self._number = place or 0
        return place is not None

    @property
    def over(self) -> bool:
        """Whether it takes no selection: it has had one, or no question yet."""
        return self._shelf.step is not ShelfStep.SELECTION

    def close(self) -> None:
        """Nothing of it outlives it but the count."""

    def prepare(self, frame: bytes) -> Callable[[], bytes]:
        """:meth:`handle`, later: what it takes shows nothing."""
        return partial(self.handle, frame)

    def handle(self, frame: bytes) -> bytes:
        """The answer to the next frame. Its entry is in the evidence log before this returns.

        Raises:
            RemoteProtocolError: the asker, or a relay, sent what must not be answered.
            BudgetExceeded: the asker has no question left.
            StateError: count or log cannot be written; nothing may leave.
        """
        try:
            answer = self._shelf.handle(frame)
        except SecureFedCoLLMError as error:
            note_refusal(self._desk.log, error)
            raise
        question = self._shelf.receipts[0]
        if self._shelf.step is ShelfStep.SELECTION:
            self._desk.log.append(self._counted(question))
        else:
            digest = transcript(self._header.digest, Question, question.signed)
            self._desk.log.append(
                Served(question=digest.hex(), blocks=self._shelf.transcript.hex())
            )
        return answer

    def _counted(self, question: Receipt) -> Counted:
        return Counted(
            asker=self._asker,
            number=self._number,
            terms=self._header.terms.digest.hex(),
            index=self._desk.shelf.fingerprint.hex(),
            question=slip(question),
            scores=self._shelf.transcript.hex(),
        )


def slip(receipt: Receipt) -> Slip:
    """A receipt as evidence has it."""
    return Slip(receipt.signed.hex(), receipt.signature.hex())
