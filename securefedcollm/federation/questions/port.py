"""A member's side of private questions over the network: it answers from its shelf, and it asks.

One process, one thread: the server's calls drive everything (:mod:`.letters`). Adversary: the
server, which chooses every call; and members behind it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from securefedcollm.errors import (
    BudgetExceeded,
    RemoteProtocolError,
    SecureFedCoLLMError,
    StateError,
)
from securefedcollm.evidence.entries import Asked
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.questions.counter import Counter, Handed, Result
from securefedcollm.federation.questions.desk import Desk, DeskConversation
from securefedcollm.federation.questions.inquiry import Fetching, Frames, Steps
from securefedcollm.federation.questions.letters import (
    ANSWER,
    ASKS,
    REASONS,
    THREAD_BYTES,
    Carried,
    Kind,
    Letter,
    Letters,
    decode_carry,
    encode,
    seconds_for,
)
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import PreparedShelf, Terms

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chair:
    """Who a member is, and whom it asks or answers.

    Args:
        study: its digest, 32 bytes.
        silos: name → Ed25519 public key of every silo but this one.
        askers: the same of every member that may ask here.
    """

    study: bytes
    name: str
    key: SigningKey
    silos: Mapping[str, bytes]
    askers: Mapping[str, bytes]
    terms: Terms


@dataclass(frozen=True)
class Stock:
    """What a silo answers from."""

    shelf: PreparedShelf
    quota: StoredQuota


@dataclass
class _Errand:
    """A question of this member that is under way: in which step, and what has come of it."""

    handed: Handed
    steps: Steps
    kind: Kind
    threads: dict[str, bytes]
    deadline: float
    came: dict[str, bytes | Failure] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"_Errand({self.kind}, {len(self.threads)} silos)"


class QuestionPort:
    """Implements :class:`securefedcollm.federation.engines.SiloPort`.

    Args:
        enter: run id → this member's log of that run. Raises RemoteProtocolError for another run
            than the one that this member is in.
        stock: None for a member that only asks.
        counter: where questions come from.
        patience: seconds that an asker waits for the silos' answers, in either step; by default
            what a silo may take, twice over.
    """

    def __init__(
        self,
        chair: Chair,
        enter: Callable[[bytes], EvidenceLog],
        *,
        stock: Stock | None = None,
        counter: Counter | None = None,
        patience: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chair, self._enter, self._stock = chair, enter, stock
        self._counter, self._clock = counter or Counter(), clock
        self._patience = 2 * seconds_for(chair.terms) if patience is None else patience
        self._run = b""
        self._log: EvidenceLog | None = None
        self._desk: Desk | None = None
        self._open: dict[str, tuple[bytes, DeskConversation]] = {}
        """Asker → its question that waits for a selection. One each, so it cannot fill memory."""
        self._errand: _Errand | None = None
        self._said: set[tuple[str, bytes]] = set()

    @property
    def over(self) -> bool:
        """Never: a member takes part in questions until its operator stops it."""
        return False

    def step(self, frame: bytes) -> bytes:
        """Answer one call. Never raises for what the server or another member sent.

        Raises:
            StateError: the evidence log cannot be opened; nothing is answered.
            EvidenceError: it, or the count of questions, is not what this member wrote.
        """
        try:
            carry = decode_carry(frame)
            evidence = self._entered(carry.run)
        except RemoteProtocolError as error:
            if ("server", b"call") not in self._said:
                self._said.add(("server", b"call"))
                log.warning("%s: %s; %s", self._chair.name, error, error.hint)
            return encode(Carried([]))
        out = []
        for letter in carry.letters:
            if letter.kind in ASKS:
                out.append(self._answer(letter))
            else:
                self._take(letter)
        out += self._ask(evidence)
        return encode(Carried(out))

    def _entered(self, run: bytes) -> EvidenceLog:
        """Adversary: a server that shows members different runs of a study. A log is of one run,
        and frames of another never verify."""
        if self._log is None or run != self._run:
            evidence, chair, stock = self._enter(run), self._chair, self._stock
            if stock is not None:
                stock.quota.check(evidence)
                self._desk = Desk(
                    chair.study, run, chair.key, chair.askers, stock.shelf, stock.quota, evidence
                )
            self._run, self._log = run, evidence
        return self._log

    # ---- answering ----

    def _answer(self, letter: Letter) -> Letter:
        """The answer to a question or a selection; or one word instead.

        A question begins anew only if it is in order. Adversary: a server that repeats an old
        question, so that the shelf forgets the one under way.
        """
        asker = letter.who
        try:
            if self._desk is None:
                return _declined(letter, b"none")
            if letter.kind == "question":
                conversation = self._desk.open(asker)
                content = conversation.handle(letter.content)
                self._open[asker] = letter.thread, conversation
            else:
                thread, begun = self._open.pop(asker, (b"", None))
                if begun is None or thread != letter.thread:
                    return _declined(letter, b"refused")
                content = begun.handle(letter.content)
        except BudgetExceeded as error:
            return self._no(letter, b"spent", error)
        except StateError as error:
            return self._no(letter, b"unable", error)
        except SecureFedCoLLMError as error:
            return self._no(letter, b"refused", error)
        return Letter(asker, letter.thread, ANSWER[letter.kind], content)

    def _no(self, letter: Letter, why: bytes, error: SecureFedCoLLMError) -> Letter:
        # Adversary: an asker that fills the log, or a server that makes up names to do so.
        who = letter.who if letter.who in self._chair.askers else ""
        if (who, why) not in self._said:
            self._said.add((who, why))
            log.warning("%s does not answer: %s", self._chair.name, error)
        return _declined(letter, why)

    # ---- asking ----

    def _take(self, letter: Letter) -> None:
        """Adversary: a server, or a silo, that sends an answer late, twice, or to nothing."""
        errand, silo = self._errand, letter.who
        if errand is None or errand.threads.get(silo) != letter.thread or silo in errand.came:
            return
        if letter.kind == "declined":
            errand.came[silo] = Failure(REASONS.get(letter.content, "declined"))
        elif letter.kind == ANSWER[errand.kind]:
            errand.came[silo] = letter.content

    def _ask(self, evidence: EvidenceLog) -> Letters:
        """Go on with the question under way, or begin the next; what leaves for it."""
        if self._errand is None:
            handed = self._counter.next()
            return [] if handed is None else self._begin(handed, evidence)
        errand = self._errand
        if errand.came.keys() < errand.threads.keys() and self._clock() < errand.deadline:
            return []
        missing = dict.fromkeys(errand.threads, Failure("did not answer in time"))
        return self._go_on(errand, missing | errand.came, evidence)

    def _begin(self, handed: Handed, evidence: EvidenceLog) -> Letters:
        chair = self._chair
        steps = Fetching(
            study=chair.study,
            run=self._run,
            key=chair.key,
            silos=chair.silos,
            terms=chair.terms,
            log=evidence,
        ).steps(handed.query)
        try:
            frames = next(steps)
        except SecureFedCoLLMError as error:
            handed.result.set_exception(error)
            return []
        errand = self._errand = _Errand(handed, steps, "question", {}, 0.0)
        return self._send(errand, frames)

    def _go_on(
        self, errand: _Errand, came: Mapping[str, bytes | Failure], evidence: EvidenceLog
    ) -> Letters:
        """All came, or will not come."""
        try:
            frames = errand.steps.send(came)
            while not frames:  # nobody is left to be asked
                frames = errand.steps.send({})
        except StopIteration as end:
            self._errand = None
            errand.handed.result.set_result(Result(end.value, _asked(evidence)))
            return []
        except SecureFedCoLLMError as error:
            self._errand = None
            errand.handed.result.set_exception(error)
            return []
        errand.kind = "selection"
        return self._send(errand, frames)

    def _send(self, errand: _Errand, frames: Frames) -> Letters:
        """Each silo sees a thread of its own: two silos cannot tell by it that they were asked the
        same."""
        old = errand.threads
        errand.threads = {silo: old.get(silo) or os.urandom(THREAD_BYTES) for silo in frames}
        errand.came, errand.deadline = {}, self._clock() + self._patience
        return [
            Letter(silo, errand.threads[silo], errand.kind, frame) for silo, frame in frames.items()
        ]


def _declined(letter: Letter, why: bytes) -> Letter:
    return Letter(letter.who, letter.thread, "declined", why)


def _asked(evidence: EvidenceLog) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in evidence.entries:
        if isinstance(entry.what, Asked):
            for silo in entry.what.questions:
                counts[silo] = counts.get(silo, 0) + 1
    return counts
