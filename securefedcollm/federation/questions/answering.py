"""Questions to records, as a :class:`~.port.Matter`: what a silo answers with, and how it asks.

Everybody may ask: the server, and where the study allows for colluders, silos. The asker
coordinates the sum of the votes (:mod:`.polling`), and its own records vote like others.

Adversary: the asker, the server that carries the letters, and ``c`` silos. A silo believes none of
them: a poll is signed by its asker, and the sum's header binds it, study, roster and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from securefedcollm.aggregation import Roster
from securefedcollm.errors import ConfigError
from securefedcollm.evidence.entries import Voting
from securefedcollm.evidence.ledger import VOTES, check_anchors
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.letters import Kind, Sizes, of_answers
from securefedcollm.federation.questions.polling import Canvass, Opinion, PollSteps
from securefedcollm.federation.questions.polls import answers_of, charge_of, poll_digest
from securefedcollm.federation.questions.port import Chair
from securefedcollm.federation.questions.voting import Booth, Embed, Reader, RecordShelf
from securefedcollm.federation.records import SERVER
from securefedcollm.privacy.ledger import Ledger, Reservation
from securefedcollm.study import Study

SLOT: Final = 1.0
"""Seconds. Over a network an asker measures how long a silo takes, and some of that depends on its
records. So replies to polls leave at multiples of this, or of the study's ``local.reply_slot``."""
MOST_SLOT: Final = 30.0
"""Seconds. ``local.reply_slot`` may be as long as a training; a silo that waits answers nobody."""


def slot_of(study: Study) -> float:
    """Seconds, at whose multiples a silo replies to polls over the network."""
    return min(study.local.reply_slot or SLOT, MOST_SLOT)


def answers_sizes(study: Study) -> Sizes:
    """What letters of a study that asks records may be."""
    reads = answers_of(study).reader == "model"
    return of_answers(study.silos.count, slot_of(study), reads=reads)


@dataclass(frozen=True)
class OwnRecords:
    """What a silo answers with.

    Args:
        ledger: of the study's answers at this silo, and of nothing else.
        books: the silo's own ledger, which all its studies share.
    """

    shelf: RecordShelf
    embed: Embed
    read: Reader
    ledger: Ledger
    books: Ledger


@dataclass(frozen=True)
class Answers:
    """Implements :class:`~.port.Matter`; without records of its own this member only asks."""

    study: Study
    roster: Roster
    own: OwnRecords | None = None

    first: ClassVar[Kind] = "poll"
    then: ClassVar[Kind] = "request"

    @property
    def sizes(self) -> Sizes:
        """See :class:`~.port.Matter`."""
        return answers_sizes(self.study)

    @property
    def slot(self) -> float:
        """See :class:`~.port.Matter`."""
        return slot_of(self.study)

    def answering(self, chair: Chair, run: bytes, evidence: EvidenceLog) -> Booth | None:
        """See :class:`~.port.Matter`."""
        own = self.own
        if own is None:
            return None
        check_anchors(evidence, own.books)
        check_anchors(evidence, own.ledger, VOTES)
        _give_back(own.ledger, evidence)
        askers = {chair.name: chair.key.public, **chair.askers}
        if self.study.silos.colluders < 1:
            # Adversary: a silo that asks, and takes its own share of the noise off the sum.
            askers = {name: key for name, key in askers.items() if name == SERVER}
        return Booth(
            study=self.study,
            run=run,
            name=chair.name,
            key=chair.key,
            roster=self.roster,
            askers=askers,
            shelf=own.shelf,
            embed=own.embed,
            read=own.read,
            ledger=own.ledger,
            evidence=evidence,
        )

    def ask(self, what: Any, chair: Chair, run: bytes, evidence: EvidenceLog) -> PollSteps:
        """See :class:`~.port.Matter`; ``what``: question and choices.

        Raises:
            ConfigError: this member may not ask, or ``what`` is for documents.
        """
        if not isinstance(what, tuple):
            raise ConfigError("this study asks records", hint="give a question and its choices")
        require_asker(self.study, chair.name)
        return Canvass(self.study, run, chair.key, self.roster, evidence).steps(*what)

    def result(self, ended: Opinion, evidence: EvidenceLog) -> Opinion:
        """See :class:`~.port.Matter`."""
        return ended

    def enough(self, asked: int) -> int:
        """See :class:`~.port.Matter`: a quorum. Without one nothing is opened."""
        return self.study.quorum


def require_asker(study: Study, name: str, where: str = "--home") -> None:
    """Raises: ConfigError, if a silo would ask in a study that allows for no colluder."""
    if name != SERVER and study.silos.colluders < 1:
        raise ConfigError(
            f"{name} knows its own share of the noise, and the study allows for no colluder",
            where=where,
            hint=f"let {SERVER} ask, or agree on silos.colluders: 1",
        )


def _give_back(ledger: Ledger, evidence: EvidenceLog) -> None:
    """Void what was charged for votes that never left, because this process was killed.

    Whether anything left is in the evidence, which is written first. No other process answers from
    this ledger: a home runs one of a study.
    """
    left = {
        charge_of(poll_digest(bytes.fromhex(entry.what.poll.signed)))
        for entry in evidence.entries
        if isinstance(entry.what, Voting)
    }
    for entry in ledger.entries():
        if entry.state == "reserved" and entry.key.run not in left:
            ledger.void(Reservation(entry.key, entry.reserved, entry.row))
