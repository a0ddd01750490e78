"""A member's side of private questions over the network: it answers, and it asks.

One process, one thread: the server's calls drive everything (:mod:`.letters`). What is asked is a
:class:`Matter`: documents (:mod:`.stock`) or records (:mod:`.answering`). Adversary: the server,
which chooses every call; and members behind it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from securefedcollm.errors import (
    BudgetExceeded,
    RemoteProtocolError,
    SecureFedCoLLMError,
    StateError,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.questions.counter import Counter, Handed
from securefedcollm.federation.questions.letters import (
    ANSWER,
    ASKS,
    REASONS,
    THREAD_BYTES,
    Carried,
    Kind,
    Letter,
    Letters,
    Sizes,
    decode_carry,
    encode,
)
from securefedcollm.federation.silo import CLOCK, Clock
from securefedcollm.primitives import SigningKey

log = logging.getLogger(__name__)

GRACE: Final = 5.0
"""Seconds, and twice the time that enough silos took, that an asker waits for the others."""
LATE_GRACE: Final = 1.0
"""Seconds, and once that time, that it waits for those that it waited for in vain before."""

Frames = Mapping[str, bytes]
"""Silo → frame."""
Steps = Generator[Frames, Mapping[str, bytes | Failure], Any]
"""Gives the frames of a step, is sent the answers of the same silos, and returns the result."""


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


class Conversation(Protocol):
    """One question of one asker, at a silo."""

    @property
    def over(self) -> bool:
        """Whether it takes no further frame."""
        ...

    def prepare(self, frame: bytes) -> Callable[[], bytes]:
        """Do all work that follows from the next frame alone; what is returned answers it.

        Both raise an error of the tree where there is no answer.
        """
        ...

    def close(self) -> None:
        """Drop its secrets."""
        ...


class Answering(Protocol):
    """Where a silo answers in a run."""

    def open(self, asker: str) -> Conversation:
        """Raises: LocalProtocolError, if ``asker`` may not ask here."""
        ...


class Matter(Protocol):
    """What the members of a study ask each other.

    ``sizes``: of its letters. ``first`` and ``then``: kinds of an asker's first letter, and of
    those that follow. ``slot``: seconds. A call with a first letter returns at a multiple of it
    after the work on this member's own data began; None: at once.
    """

    @property
    def sizes(self) -> Sizes: ...
    @property
    def first(self) -> Kind: ...
    @property
    def then(self) -> Kind: ...
    @property
    def slot(self) -> float | None: ...

    def answering(self, chair: Chair, run: bytes, evidence: EvidenceLog) -> Answering | None:
        """Where this member answers; None if it only asks.

        Raises:
            EvidenceError: its files are older than its own evidence.
        """
        ...

    def ask(self, what: Any, chair: Chair, run: bytes, evidence: EvidenceLog) -> Steps:
        """Put a question to all silos."""
        ...

    def result(self, ended: Any, evidence: EvidenceLog) -> Any:
        """What whoever asked is told; ``ended``: what the steps returned."""
        ...

    def enough(self, asked: int) -> int:
        """How many answers, of so many silos, make a question worth going on with."""
        ...


class _Open(NamedTuple):
    """A question that this silo has begun to answer, and when it gives up waiting for more."""

    thread: bytes
    conversation: Conversation
    until: float


@dataclass
class _Errand:
    """A question of this member that is under way: in which step, and what has come of it."""

    handed: Handed
    steps: Steps
    kind: Kind
    threads: dict[str, bytes]
    began: float = 0.0
    enough: float | None = None
    """When enough silos had answered in this step."""
    came: dict[str, bytes | Failure] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"_Errand({self.kind}, {len(self.threads)} silos)"


class QuestionPort:
    """Implements :class:`securefedcollm.federation.engines.SiloPort`.

    Args:
        enter: run id → this member's log of that run. Raises RemoteProtocolError for another run
            than the one that this member is in.
        matter: what is asked.
        counter: where questions come from.
        patience: seconds that an asker waits for the silos' answers in a step, at most; by default
            what a silo may take, twice over. Once :meth:`Matter.enough` are there, it waits for the
            others only a few times as long as those took (:data:`GRACE`).
    """

    def __init__(
        self,
        chair: Chair,
        enter: Callable[[bytes], EvidenceLog],
        matter: Matter,
        *,
        counter: Counter | None = None,
        patience: float | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        self._chair, self._enter, self._matter = chair, enter, matter
        self._counter, self._clock, self._wait = counter or Counter(), *clock
        self.pace = None if matter.slot is None else Pace(matter.slot)
        """Of whatever calls arrive during a call with questions."""
        self._patience = 2 * matter.sizes.seconds if patience is None else patience
        self._run = b""
        self._log: EvidenceLog | None = None
        self._answering: Answering | None = None
        self._open: dict[str, _Open] = {}
        """Asker → its question that waits for more. One each, so it cannot fill memory."""
        self._errand: _Errand | None = None
        self._late: set[str] = set()
        """Silos that this member waited for in vain when it last asked them."""
        self._said: set[tuple[str, bytes]] = set()
        self._first: set[str] = set()
        """Askers whose first letter came in this call."""

    @property
    def over(self) -> bool:
        """Never: a member takes part in questions until its operator stops it."""
        return False

    def step(self, frame: bytes) -> bytes:
        """Answer one call. Never raises for what the server or another member sent.

        Where there are slots, a call with first letters waits once, after all of them: so several
        askers make nobody wait for longer, and the time tells nothing of a record. What follows
        from their frames alone is done for all of them before the slot begins. Adversary: an asker
        whose texts take long, who would choose with them where in a slot the rest ends.

        Raises:
            StateError: the evidence log cannot be opened; nothing is answered.
            EvidenceError: it, or the count of questions, is not what this member wrote.
        """
        self._first = set()
        try:
            carry = decode_carry(frame)
            evidence = self._entered(carry.run)
        except RemoteProtocolError as error:
            if ("server", b"call") not in self._said:
                self._said.add(("server", b"call"))
                log.warning("%s: %s; %s", self._chair.name, error, error.hint)
            return encode(Carried([]))
        self._drop_overdue()
        due: list[Callable[[], Letter]] = []
        for letter in carry.letters:
            if letter.kind not in ASKS:
                self._take(letter)
            elif letter.who == self._chair.name:  # Adversary: a server that asks us in our own name
                due.append(partial(_declined, letter, b"refused"))
            else:
                due.append(self._prepared(letter))
        if self.pace is not None and self._first:
            self.pace.begin()
        began = self._clock()
        out = [answer() for answer in due]
        out += self._ask(evidence)
        slot = self._matter.slot
        if slot is not None and self._first:
            self._wait(slot - (self._clock() - began) % slot)
        return encode(Carried(out))

    def _entered(self, run: bytes) -> EvidenceLog:
        """Adversary: a server that shows members different runs of a study. A log is of one run,
        and frames of another never verify."""
        if self._log is None or run != self._run:
            evidence = self._enter(run)
            self._answering = self._matter.answering(self._chair, run, evidence)
            self._run, self._log = run, evidence
        return self._log

    # ---- answering ----

    def _prepared(self, letter: Letter) -> Callable[[], Letter]:
        """What gives the answer to a letter of an asker, or one word instead."""
        asker, answering = letter.who, self._answering
        if answering is None or letter.kind not in (self._matter.first, self._matter.then):
            return partial(_declined, letter, b"none")
        if letter.kind == self._matter.then:
            return partial(self._go_on_with, letter)
        if asker in self._first:
            # Adversary: a server that brings many, so that the call takes too long.
            return partial(_declined, letter, b"refused")
        self._first.add(asker)
        try:
            conversation = answering.open(asker)
            answer = conversation.prepare(letter.content)
        except SecureFedCoLLMError as error:
            return partial(self._no, letter, error)
        return partial(self._begun, letter, conversation, answer)

    def _begun(
        self, letter: Letter, conversation: Conversation, answer: Callable[[], bytes]
    ) -> Letter:
        """A question begins anew only if it is in order. Adversary: a server that repeats an old
        question, so that the silo forgets the one under way."""
        try:
            content = answer()
        except SecureFedCoLLMError as error:
            return self._no(letter, error)
        self._forget(letter.who)
        return self._answered(letter, conversation, content)

    def _go_on_with(self, letter: Letter) -> Letter:
        begun = self._open.get(letter.who)
        if begun is None or begun.thread != letter.thread:
            return _declined(letter, b"refused")
        del self._open[letter.who]  # what handles one frame wrongly takes no other
        try:
            content = begun.conversation.prepare(letter.content)()
        except SecureFedCoLLMError as error:
            return self._no(letter, error)
        return self._answered(letter, begun.conversation, content)

    def _answered(self, letter: Letter, conversation: Conversation, content: bytes) -> Letter:
        if not conversation.over:
            until = self._clock() + 2 * self._patience
            self._open[letter.who] = _Open(letter.thread, conversation, until)
        return Letter(letter.who, letter.thread, ANSWER[letter.kind], content)

    def _forget(self, asker: str) -> None:
        begun = self._open.pop(asker, None)
        if begun is not None:
            try:
                begun.conversation.close()
            except StateError as error:  # whoever calls sees nothing of it
                log.warning("%s: a charge could not be given back: %s", self._chair.name, error)

    def _drop_overdue(self) -> None:
        """Adversary: an asker that begins questions and leaves them, so that their charges stay."""
        now = self._clock()
        for asker in [asker for asker, begun in self._open.items() if begun.until < now]:
            self._forget(asker)

    def _no(self, letter: Letter, error: SecureFedCoLLMError) -> Letter:
        why = b"unable" if isinstance(error, StateError) else b"refused"
        if isinstance(error, BudgetExceeded) and self._matter.first == "question":
            why = b"spent"  # of records it says what their owner pinned: nothing that anybody spent
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
        if self._waits(errand):
            return []
        late = errand.threads.keys() - errand.came.keys()
        self._late = self._late - errand.threads.keys() | late
        missing = dict.fromkeys(errand.threads, Failure("did not answer in time"))
        return self._go_on(errand, missing | errand.came, evidence)

    def _waits(self, errand: _Errand) -> bool:
        """Whether this step still waits for somebody.

        Adversary: a few silos that answer in their last second, so that whoever asks waits for
        them. It waits that long only where too few others answer.
        """
        now, left = self._clock(), errand.threads.keys() - errand.came.keys()
        if not left or now >= errand.began + self._patience:
            return False
        answered = sum(not isinstance(each, Failure) for each in errand.came.values())
        if answered < self._matter.enough(len(errand.threads)):
            return True
        errand.enough = now if errand.enough is None else errand.enough
        took = errand.enough - errand.began
        grace = LATE_GRACE + took if left <= self._late else GRACE + 2 * took
        return now < errand.enough + grace

    def _begin(self, handed: Handed, evidence: EvidenceLog) -> Letters:
        try:
            steps = self._matter.ask(handed.what, self._chair, self._run, evidence)
            frames = next(steps)
        except SecureFedCoLLMError as error:
            handed.result.set_exception(error)
            return []
        errand = self._errand = _Errand(handed, steps, self._matter.first, {})
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
            errand.handed.result.set_result(self._matter.result(end.value, evidence))
            return []
        except SecureFedCoLLMError as error:
            self._errand = None
            errand.handed.result.set_exception(error)
            return []
        errand.kind = self._matter.then
        return self._send(errand, frames)

    def _send(self, errand: _Errand, frames: Frames) -> Letters:
        """Each silo sees a thread of its own: two silos cannot tell by it that they were asked the
        same. What this member answers itself never leaves."""
        old = errand.threads
        errand.threads = {silo: old.get(silo) or os.urandom(THREAD_BYTES) for silo in frames}
        errand.came, errand.began, errand.enough = {}, self._clock(), None
        out = [
            Letter(silo, errand.threads[silo], errand.kind, frame) for silo, frame in frames.items()
        ]
        own = [letter for letter in out if letter.who == self._chair.name]
        for letter in own:
            self._take(self._prepared(letter)())
        return [letter for letter in out if letter not in own]


def _declined(letter: Letter, why: bytes) -> Letter:
    return Letter(letter.who, letter.thread, "declined", why)
