"""A silo's part in answering a question from its records: what it retrieves, pays and sends.

Adversary: the asker, which chooses every question after it has seen the answers to earlier ones,
and ``c`` silos. A record may influence what leaves only through the noised sum. So

* a record is retrieved by its own similarity alone (:mod:`securefedcollm.retrieval.nearest`) and by
  what it has itself spent. Every record that is retrieved is charged, before anything leaves;
* a silo sends frames of the same number and length whatever was retrieved, writes the same evidence
  and keeps the same kinds of rows in its ledger. Where nothing was retrieved, or a record makes
  something fail, it votes for nothing, with its noise;
* a poll has one attempt. Whoever asks again asks a new question, which is charged anew;
* it does the same work for all records alike, whether a question retrieved them or not. What time
  depends on records all the same is hidden in slots, where it can be measured (:mod:`.port`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import Roster, SiloSide, Step, silo_side
from securefedcollm.aggregation.inmemory import MemoryJournal
from securefedcollm.aggregation.messages import decode
from securefedcollm.errors import (
    BudgetExceeded,
    CryptoError,
    LocalProtocolError,
    RemoteProtocolError,
    SecureFedCoLLMError,
)
from securefedcollm.evidence.entries import Slip, Voted, Voting
from securefedcollm.evidence.ledger import anchor
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.polls import (
    Poll,
    answers_of,
    answers_study,
    charge_of,
    claim_of,
    poll_header,
    sum_header,
    votes_of,
)
from securefedcollm.federation.questions.prepaid import UNIT, Bools, paying
from securefedcollm.federation.records.common import note_refusal
from securefedcollm.foreign import stream_safe
from securefedcollm.primitives import SigningKey, sha256, verify
from securefedcollm.privacy.events import DiscreteGaussian, encode_events
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.ledger import Key, Ledger, Reservation
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.votes import Votes
from securefedcollm.retrieval.nearest import RecordIndex
from securefedcollm.study import Study, digest

log = logging.getLogger(__name__)

MOST_DROPPED: Final = 256
"""Polls of one asker that a silo's process lets end before any vote left."""
MOST_ASKED: Final = 2048
"""Polls of one asker that a silo's process begins: each makes every later one a little slower."""
_ANEW: Final = "ask a new one"
READY: Final = b"ready"
"""The reply to every poll."""
_T = TypeVar("_T")
Embed = Callable[[str], npt.NDArray[np.float64]]
"""A text → its unit vector in the study's space, computed by itself."""


class Reading(Protocol):
    """What a silo makes of the records that one question retrieved."""

    def __call__(
        self, retrieved: Bools, similarities: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Votes for every choice, of each record at most one, whatever the others say; or a
        distribution over the choices, or zeros: float64 [choices].

        Args:
            retrieved: which of the silo's records, bool [n], in file order.
            similarities: of all of them, int64 [n].
        """
        ...


Reader = Callable[[Poll], Reading]
"""Does what follows from the poll alone, and returns what reads records for it."""


@dataclass(frozen=True)
class RecordShelf:
    """A silo's records as a question meets them.

    Args:
        known: by their identities in the ledger of answers, in the order of ``index``: by what is
            embedded alone, so that records which share an account are retrieved together.
        dataset: fingerprint of the file, for the ledger.
        paid: which of them have paid for their answers, bool [n]; the others cast no vote.
        prepaid: head of the silo's own ledger after that, 32 bytes; another one in every process.
    """

    index: RecordIndex
    known: Records
    dataset: str
    paid: Bools
    prepaid: bytes


@dataclass(frozen=True)
class Booth:
    """Where a silo's records vote.

    Args:
        run: the run's id, 16 bytes.
        name: the silo's, on the roster.
        askers: name → Ed25519 public key of everybody who may ask.
        ledger: of the study's answers at this silo, and of nothing else. It charges the retrieved
            records; a plain one, since this class writes the evidence.
        evidence: the silo's log; it begins with ``opened``.
        dropped: asker → how many of its polls ended before any vote left.
        asked: asker → how many of its polls began.
    """

    study: Study
    run: bytes
    name: str
    key: SigningKey
    roster: Roster
    askers: Mapping[str, bytes]
    shelf: RecordShelf
    embed: Embed
    read: Reader
    ledger: Ledger
    evidence: EvidenceLog
    dropped: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def open(self, asker: str) -> BoothConversation:
        """For one question of ``asker``, whose frames the engine knows to be from there.

        Raises:
            LocalProtocolError: it is no member that may ask.
        """
        if asker not in self.askers:
            raise LocalProtocolError(f"{asker} may not ask here", hint="look at the study's roster")
        return BoothConversation(self, asker)


class _Asked(NamedTuple):
    """A poll in order, and all that follows from it alone."""

    poll: Poll
    votes: Votes
    query: npt.NDArray[np.float64]
    reading: Reading


class _Charged(NamedTuple):
    """A poll that this silo takes part in."""

    poll: Poll
    votes: Votes
    side: SiloSide
    reservation: Reservation


class BoothConversation:
    """One question of one asker: :meth:`handle` its poll, then the frames of the secure sum."""

    def __init__(self, booth: Booth, asker: str) -> None:
        self._booth, self._asker = booth, asker
        self._at: _Charged | None = None
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether it takes no further frame."""
        return self._ended

    def handle(self, frame: bytes) -> bytes:
        """The answer to the next frame. Raises what :meth:`prepare` says."""
        return self.prepare(frame)()

    def prepare(self, frame: bytes) -> Callable[[], bytes]:
        """Do all work that follows from the next frame alone; what is returned answers it.

        Charge and evidence are on disk before it returns the answer. Adversary: an asker whose
        texts take long to read, who would choose with them where in a slot the records' work ends.

        Raises, as does what is returned:
            RemoteProtocolError: the asker, or a relay, sent what must not be answered.
            BudgetExceeded: the study asks for more than the owner of these records pinned. That
                depends on no record.
            StateError: ledger or log cannot be written; nothing may leave.
        """
        if self._ended:
            raise RemoteProtocolError("this question is over", peer=self._asker, hint="ask anew")
        at = self._at
        if at is not None:
            return partial(self._ending, partial(self._sum, at, frame))
        asked = self._ending(partial(self._asked, frame))
        return partial(self._ending, partial(self._begin, asked))

    def _ending(self, work: Callable[[], _T]) -> _T:
        """A frame that is refused ends the question."""
        try:
            return work()
        except SecureFedCoLLMError as error:
            note_refusal(self._booth.evidence, error)
            self.close()
            raise

    def close(self) -> None:
        """Drop the secrets. A charge from which nothing left is given back."""
        self._ended = True
        at, self._at = self._at, None
        if at is None:
            return
        at.side.close()
        entries = self._booth.ledger.entries()
        state = next((e.state for e in entries if e.key == at.reservation.key), None)
        if state == "reserved":
            self._booth.ledger.void(at.reservation)
            self._booth.dropped[self._asker] += 1

    def _asked(self, frame: bytes) -> _Asked:
        """Adversary: an asker whose texts take seconds to bring into one form."""
        booth, asker = self._booth, self._asker
        poll = decode(Poll, frame, asker)
        key = booth.askers[asker]
        if poll.before != poll_header(digest(booth.study), booth.run, key):
            raise RemoteProtocolError(
                "asks in another study, run or name", peer=asker, hint="use the study's own run"
            )
        try:
            verify(key, poll.CONTEXT, poll.signed(), poll.signature)
        except CryptoError:
            raise RemoteProtocolError("did not sign its question", peer=asker) from None
        if not all(map(stream_safe, (poll.question, *poll.choices))):
            raise RemoteProtocolError(
                "asks with over 30 accents on one letter", peer=asker, hint="write it without them"
            )
        if booth.dropped[asker] >= MOST_DROPPED:
            # Adversary: an asker that begins questions and leaves them. No record pays for those,
            # and each is kept in the ledger for good.
            raise RemoteProtocolError(
                f"began {MOST_DROPPED} questions and left them",
                peer=asker,
                hint="whoever serves the records starts the process again to allow more",
            )
        if booth.asked[asker] >= MOST_ASKED:
            # Adversary: an asker whose questions retrieve nothing, so that nobody pays. They would
            # fill the disk, and a slot: then it could choose where in a slot the rest ends.
            raise RemoteProtocolError(
                f"asked {MOST_ASKED} questions",
                peer=asker,
                hint="whoever serves the records starts the process again to allow more",
            )
        if any(entry.key.run == charge_of(poll.digest) for entry in booth.ledger.entries()):
            # Adversary: an asker, or a relay, that has one question summed twice, with other noise;
            # also after the silo has changed its file.
            raise RemoteProtocolError("asked the same question twice", peer=asker, hint=_ANEW)
        booth.ledger.require_room(len(booth.shelf.known))
        votes = votes_of(booth.study, len(poll.choices))
        return _Asked(poll, votes, *self._of_texts(poll))

    def _begin(self, asked: _Asked) -> bytes:
        """The work on this silo's own records."""
        booth, (poll, votes, *_) = self._booth, asked
        booth.asked[self._asker] += 1
        content, reservation = self._paid(asked)
        vector = votes.protect(content, NoiseSource())
        side = silo_side(
            "masking",
            header=sum_header(booth.study, booth.roster, poll.digest, votes),
            roster=booth.roster,
            name=booth.name,
            signing_key=booth.key,
            vector=vector,
            vector_id=sha256(vector.tobytes()),
            # One attempt in the whole life of this header, by the ledger: nothing to remember.
            journal=MemoryJournal(),
        )
        self._at = _Charged(poll, votes, side, reservation)
        return READY

    def _paid(self, asked: _Asked) -> tuple[npt.NDArray[np.float64], Reservation]:
        """The content of this silo's votes, after the records that make it were charged."""
        booth, plan = self._booth, answers_of(self._booth.study)
        event, shelf = asked.votes.event(), booth.shelf
        assert plan.threshold is not None  # study.retrievalchecks
        place = Key(shelf.dataset, UNIT, charge_of(asked.poll.digest), 0, 0)
        alike = shelf.paid & shelf.index.retrieved(asked.query, plan.threshold)
        before: Bools | None = None
        while True:
            chosen = alike & self._paying(event)
            if before is not None and bool((chosen == before).all()):
                chosen = np.zeros_like(alike)  # our own mistake, which must not refuse either
            try:
                reservation = booth.ledger.reserve(
                    *(*place, [event], claim_of(booth.study)),
                    records=shelf.known.only(chosen),
                    study=answers_study(booth.study),
                    individually=True,
                )
                return self._read(asked, chosen), reservation
            except BudgetExceeded:
                # Another process charged one of them just now. Adversary: whoever asks both, to
                # learn from a refusal, or from what becomes of the others. So each is asked again.
                if not chosen.any():
                    raise LocalProtocolError("a charge to no record was refused") from None
                before = chosen

    def _of_texts(self, poll: Poll) -> tuple[npt.NDArray[np.float64], Reading]:
        """The question's embedding, and what reads records for it. Adversary: an asker whose texts
        make an encoder fail, to end the silo's process. That depends on no record.

        Raises:
            RemoteProtocolError, DataError: it cannot be embedded.
        """
        try:
            return self._booth.embed(poll.question), self._booth.read(poll)
        except SecureFedCoLLMError:
            raise
        except Exception as error:  # whatever the encoder raises on a text
            log.error("%s: a question failed (%s)", self._booth.name, type(error).__name__)
            raise RemoteProtocolError(
                "asked what cannot be embedded", peer=self._asker, hint="ask in other words"
            ) from None

    def _paying(self, event: DiscreteGaussian) -> Bools:
        """Which of the silo's records can pay for one question more, each by itself.

        Raises:
            BudgetExceeded: the study asks for more than is pinned; says nothing of what is spent.
        """
        booth, shelf = self._booth, self._booth.shelf
        try:
            return paying(booth.ledger, booth.study, shelf.known, shelf.dataset, event)
        except BudgetExceeded:
            log.warning("%s: its answers' ledger has another budget than the study's", booth.name)
            raise BudgetExceeded(
                "the study asks for more than the owner of these records pinned",
                hint="the owner decides: `securefedcollm budget set`",
            ) from None

    def _read(self, asked: _Asked, chosen: Bools) -> npt.NDArray[np.float64]:
        """What the retrieved records say; zeros if reading fails.

        Adversary: an asker whose question makes reading fail on certain records only. A refusal
        would be an answer without noise. The log has no words of theirs.
        """
        try:
            return asked.reading(chosen, self._booth.shelf.index.similarities(asked.query))
        except Exception as error:  # whatever a record made fail
            log.error(
                "%s: reading its records failed (%s); it votes for nothing",
                *(self._booth.name, type(error).__name__),
            )
            return np.zeros(len(asked.poll.choices))

    def _sum(self, at: _Charged, frame: bytes) -> bytes:
        booth = self._booth
        answer = at.side.handle(frame)
        seen = at.side.transcript
        if at.side.step is Step.AGREE:  # the masked votes are about to leave
            booth.evidence.append(
                Voting(
                    asker=self._asker,
                    poll=slip_of(at.poll),
                    header=seen.header.hex(),
                    values=at.votes.choices,
                    delivery=seen.delivery.hex(),
                    events=encode_events(at.reservation.events),
                    ledger=self._head(),
                    prepaid=anchor(booth.evidence, booth.shelf.prepaid).hex(),
                )
            )
            booth.ledger.release(at.reservation)
        elif at.side.step is Step.DONE:
            # More survivors are not credited: every question costs the same, so N of them are what
            # was prepaid, at every order of every accountant.
            events = at.reservation.events
            booth.ledger.settle(at.reservation, events)
            booth.evidence.append(
                Voted(
                    header=seen.header.hex(),
                    survivors=list(seen.survivors),
                    dropouts=list(seen.dropouts),
                    lists=seen.lists.hex(),
                    events=encode_events(events),
                    ledger=self._head(),
                )
            )
            self.close()
        return answer

    def _head(self) -> str:
        return anchor(self._booth.evidence, self._booth.ledger.head.digest).hex()


def slip_of(poll: Poll) -> Slip:
    """A poll as evidence has it."""
    return Slip(poll.signed().hex(), poll.signature.hex())


def count_labels(labels: Sequence[str], folded: Callable[[str], str]) -> Reader:
    """The reader ``labels``: every retrieved record votes for the choice that is its own answer.

    A record whose answer is none of the choices votes for none. Every record is looked up, so that
    the time tells nothing of which were retrieved. Adversary: an asker whose choices take long to
    fold, and who counts the records by that; so each is folded once, before any record is read.

    Args:
        labels: each record's answer, already ``folded``; empty where it has none.
    """
    known = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    numbers = np.array([known[label] for label in labels], dtype=np.int64)

    def read(poll: Poll) -> Reading:
        none = len(poll.choices)
        places = {folded(choice): at for at, choice in enumerate(poll.choices)}

        def count(retrieved: Bools, similarities: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
            place_of = np.array([places.get(label, none) for label in known], dtype=np.int64)
            places_voted = np.where(retrieved, place_of[numbers], none)
            return np.bincount(places_voted, minlength=none + 1)[:none].astype(np.float64)

        return count

    return read
