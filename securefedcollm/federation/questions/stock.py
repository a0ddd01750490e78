"""Questions to documents, as a :class:`~.port.Matter`: a silo's shelf, and how a member asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.entries import Asked
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.counter import Result
from securefedcollm.federation.questions.desk import Desk
from securefedcollm.federation.questions.inquiry import Fetched, Fetching, Steps
from securefedcollm.federation.questions.letters import Kind, Sizes, of_documents
from securefedcollm.federation.questions.port import Chair
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.retrieval import PreparedShelf, Terms


@dataclass(frozen=True)
class Stock:
    """What a silo answers from."""

    shelf: PreparedShelf
    quota: StoredQuota


@dataclass(frozen=True)
class Documents:
    """Implements :class:`~.port.Matter`; without a stock this member only asks."""

    terms: Terms
    stock: Stock | None = None

    first: ClassVar[Kind] = "question"
    then: ClassVar[Kind] = "selection"
    slot: ClassVar[float | None] = None

    @property
    def sizes(self) -> Sizes:
        """See :class:`~.port.Matter`."""
        return of_documents(self.terms)

    def answering(self, chair: Chair, run: bytes, evidence: EvidenceLog) -> Desk | None:
        """See :class:`~.port.Matter`."""
        stock = self.stock
        if stock is None:
            return None
        stock.quota.check(evidence)
        return Desk(chair.study, run, chair.key, chair.askers, stock.shelf, stock.quota, evidence)

    def ask(self, what: Any, chair: Chair, run: bytes, evidence: EvidenceLog) -> Steps:
        """See :class:`~.port.Matter`; ``what``: the question's embedding, [d].

        Raises:
            ConfigError: ``what`` is for records.
        """
        if isinstance(what, tuple):
            raise ConfigError("this study asks documents", hint="ask without choices")
        return Fetching(
            study=chair.study,
            run=run,
            key=chair.key,
            silos=chair.silos,
            terms=self.terms,
            log=evidence,
        ).steps(what)

    def result(self, ended: Fetched, evidence: EvidenceLog) -> Result:
        """See :class:`~.port.Matter`."""
        counts: dict[str, int] = {}
        for entry in evidence.entries:
            if isinstance(entry.what, Asked):
                for silo in entry.what.questions:
                    counts[silo] = counts.get(silo, 0) + 1
        return Result(ended, counts)

    def enough(self, asked: int) -> int:
        """See :class:`~.port.Matter`: half of them. Each silo has passages of its own."""
        return -(-asked // 2)
