"""The server's side of private questions: it calls members in turn and carries their letters.

It cannot alter a frame unnoticed. It sees who asks whom, when and how often. Questions to documents
it cannot read, and lengths follow from the study's terms. A question to records it reads as silos
do; of the votes it sees what the asker sees, the noised sum of all silos.

Every member is called in a thread of its own, so that nobody waits for another member's call.

Adversary: a member that sends letters of any number and length, lets a call wait, or answers at the
last moment, so that the others' questions do not get through.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from securefedcollm.errors import SecureFedCoLLMError, TransportError
from securefedcollm.federation.engines import Engine, Failure, SiloPort
from securefedcollm.federation.questions.letters import (
    ANSWER,
    ASKS,
    Carry,
    Kind,
    Letter,
    Sizes,
    decode_carried,
    encode,
)

log = logging.getLogger(__name__)

SLOWEST: Final = 125_000
"""Bytes a second at which letters must move: 1 Mbit/s."""
ABSENT: Final = 5.0
"""Seconds for which a member that is not connected is not called."""
REST: Final = 15.0
"""Seconds for which one is not called that let a call wait, or answered nonsense. Each further time
doubles it, and each good reply halves it."""
MOST_REST: Final = 240.0
_WAITED: Final = 5.0
"""Seconds of a member's call after which it has cost something that there was no reply."""
_IDLE: Final = 1.0
"""Seconds between calls when nobody asks anything."""
_BUSY: Final = 0.05
_MOST_CALLS: Final = 25
"""Calls of one member without a pause between them: a question to a silo takes two."""
_LOOK: Final = 0.2
_LEAVE: Final = 5.0
"""Seconds for calls to end when the server stops."""


class WithServer:
    """An engine whose members are the silos that another one reaches, and the server itself.

    Args:
        engine: to the silos.
        name: of the server.
        port: its own, in this process.
    """

    def __init__(self, engine: Engine, name: str, port: SiloPort) -> None:
        self._engine, self._name, self._port = engine, name, port

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        """See :class:`securefedcollm.federation.engines.Engine`."""
        others = {name: frame for name, frame in frames.items() if name != self._name}
        replies = self._engine.exchange(others, timeout) if others else {}
        if self._name in frames:
            replies[self._name] = self._port.step(frames[self._name])
        return replies


@dataclass
class _Rest:
    """``until``: when the member is called again. ``pause``: seconds of its next rest."""

    until: float = 0.0
    pause: float = REST


class Pace:
    """How long a member is left alone after a call: the less, the more there is to carry.

    Adversary: a member that always has something to carry. Each call costs a write to a disk.
    """

    def __init__(self) -> None:
        self._busy, self._idle = 0, _BUSY

    @property
    def hurried(self) -> bool:
        """Whether the next call may come at once, if there is a letter."""
        return self._busy < _MOST_CALLS

    def after(self, carried: bool) -> float:
        """Seconds until the next call; ``carried``: whether the last one moved a letter."""
        if carried:
            self._busy, self._idle = self._busy + 1, _BUSY
            return 0.0 if self.hurried else 10 * _BUSY
        self._busy, self._idle = 0, min(_IDLE, 2 * self._idle)
        return self._idle


@dataclass
class Relay:
    """Carries letters between the members that an engine reaches.

    Args:
        engine: knows the members by their names; is called from several threads, and for each
            member from one at a time.
        run: the run's id, 16 bytes.
        askers: members that may ask.
        silos: members that may have a shelf.
    """

    engine: Engine
    run: bytes
    askers: Sequence[str]
    silos: Sequence[str]
    sizes: Sizes
    clock: Callable[[], float] = time.monotonic
    _mail: dict[str, dict[tuple[str, bool], Letter]] = field(default_factory=dict)
    """Recipient → (sender, whether it asks) → the letter on its way. A newer one takes the place of
    an older."""
    _open: dict[tuple[str, str], tuple[bytes, Kind]] = field(default_factory=dict)
    """(asker, silo) → thread and kind of the answer that the asker waits for."""
    _rests: dict[str, _Rest] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _over: bool = False
    _fault: BaseException | None = None

    @property
    def members(self) -> list[str]:
        """Everybody."""
        return sorted({*self.askers, *self.silos})

    def waiting(self, member: str) -> list[Letter]:
        """Letters on their way to a member."""
        return list(self._mail.get(member, {}).values())

    def turn(self) -> bool:
        """Call every member once, one after another; returns whether there is anything to carry."""
        given = {name: self._given(name) for name in self.members if not self._resting(name)}
        for name, letters in given.items():
            self._call(name, letters)
        return bool(self._mail)

    def run_until(self, stop: Callable[[], bool]) -> None:
        """Call every member again and again, each in a thread of its own.

        Raises:
            SecureFedCoLLMError: of the server's own part in questions; and of nobody else's.
        """
        self._over, self._fault = False, None
        loops = [
            threading.Thread(target=self._attend, args=[name], name=f"carry {name}", daemon=True)
            for name in self.members
        ]
        for loop in loops:
            loop.start()
        try:
            while not stop() and self._fault is None:
                time.sleep(_LOOK)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            deadline = time.monotonic() + _LEAVE
            for loop in loops:
                loop.join(max(0.0, deadline - time.monotonic()))
        if self._fault is not None:
            raise self._fault

    def _attend(self, name: str) -> None:
        """Call one member until it is over."""
        pace = Pace()
        try:
            while not self._over:
                carried = not self._resting(name) and self._call(name, self._given(name))
                pause = pace.after(carried)
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._over or (pace.hurried and self._due(name)), pause
                    )
        except BaseException as fault:  # it ends the process, from its main thread
            with self._changed:
                self._fault = self._fault or (None if self._over else fault)

    def _due(self, name: str) -> bool:
        return bool(self._mail.get(name)) and not self._resting(name)

    def _resting(self, name: str) -> bool:
        rest = self._rests.get(name)
        return rest is not None and rest.until > self.clock()

    def _given(self, name: str) -> list[Letter]:
        with self._changed:
            return list(self._mail.pop(name, {}).values())

    def _call(self, name: str, letters: list[Letter]) -> bool:
        """Bring one member its letters, and take what it has; whether any letter moved."""
        frame = encode(Carry(self.run, letters))
        timeout, began = self.sizes.seconds + len(frame) / SLOWEST, self.clock()
        try:
            reply = self.engine.exchange({name: frame}, timeout)[name]
        except TransportError as error:  # nobody at all is connected
            reply = Failure(error.message, waited=0.0)
        with self._changed:
            took = self.clock() - began
            if isinstance(reply, Failure) and reply.waited is not None:
                took = reply.waited
            try:
                if isinstance(reply, Failure):
                    raise TransportError(reply.reason)
                came = decode_carried(reply, name).letters
            except SecureFedCoLLMError as error:
                self._missed(name, error, isinstance(reply, Failure) and took <= _WAITED)
                self._keep(name, letters)
                return False
            # Adversary: a member whose replies are megabytes of letters that nobody waits for.
            owed = {(each.who, each.thread) for each in letters if each.kind in ASKS}
            junk = self._collect(name, came, owed)
            self._heard(name, junk or took > timeout)
            if self._resting(name):
                self._keep(name, [])
            self._changed.notify_all()
        return bool(letters or came)

    # ---- rests; the lock is held ----

    def _missed(self, name: str, error: SecureFedCoLLMError, cheap: bool) -> None:
        """It gave no reply, or nonsense. ``cheap``: it is not connected, and nobody waited."""
        rest = self._rests.get(name)
        if rest is None:  # one line for each absence
            log.warning("%s does not answer: %s", name, error)
            rest = _Rest()
        pause, following = rest.pause, min(MOST_REST, 2 * rest.pause)
        if cheap:
            pause, following = ABSENT, rest.pause
        self._rests[name] = _Rest(self.clock() + pause, following)

    def _heard(self, name: str, costly: bool) -> None:
        """It gave a reply. Adversary: a member that lets every other call wait, or whose reply
        takes long to come in, such as megabytes at the slowest rate."""
        rest = self._rests.get(name)
        if costly:
            rest = rest or _Rest()
            self._rests[name] = _Rest(self.clock() + rest.pause, min(MOST_REST, 2 * rest.pause))
        elif rest is not None and rest.pause > REST:
            self._rests[name] = _Rest(0.0, rest.pause / 2)
        else:
            self._rests.pop(name, None)

    # ---- letters; the lock is held ----

    def _collect(self, name: str, letters: Sequence[Letter], owed: Set[tuple[str, bytes]]) -> bool:
        """Put a member's letters into the mail, one of each kind to each other member.

        Args:
            owed: asker and thread of what this call brought. An honest member answers nothing else.

        Returns:
            whether there was a letter that no honest member sends.
        """
        junk = False
        seen = set[tuple[str, bool]]()
        for letter in letters:
            place = letter.who, letter.kind in ASKS
            if place in seen:
                junk = True
                continue
            seen.add(place)
            if self._may(name, letter):
                self._post(name, letter)
                continue
            junk = junk or (letter.who, letter.thread) not in owed
            if (name, letter.kind) not in self._said:  # one line, however many it sends
                self._said.add((name, letter.kind))
                log.warning("%s: dropped what nobody may send, or waits for: %s", name, letter.kind)
        return junk

    def _may(self, sender: str, letter: Letter) -> bool:
        """Adversary: a member that floods another one, or sends what only makes it compute."""
        asks = letter.kind in ASKS
        ends = (sender, letter.who) if asks else (letter.who, sender)
        fits = len(letter.content) <= self.sizes.longest.get(letter.kind, -1)
        if (
            not fits
            or ends[0] == ends[1]
            or ends[0] not in self.askers
            or ends[1] not in self.silos
        ):
            return False
        if asks:
            return True
        thread, kind = self._open.get(ends, (b"", "declined"))
        return thread == letter.thread and letter.kind in (kind, "declined")

    def _post(self, sender: str, letter: Letter) -> None:
        asks = letter.kind in ASKS
        if asks:
            self._open[sender, letter.who] = letter.thread, ANSWER[letter.kind]
        else:
            self._open.pop((letter.who, sender), None)
        sent = Letter(sender, letter.thread, letter.kind, letter.content)
        if asks and self._resting(letter.who):
            self._away(letter.who, sent)
        else:
            self._mail.setdefault(letter.who, {})[sender, asks] = sent

    def _keep(self, name: str, letters: Sequence[Letter]) -> None:
        """What ``name`` was not brought. An asker is told at once that it is away; an answer waits
        until it is called again, one from each silo."""
        mail = self._mail.pop(name, {})
        for letter in (*letters, *mail.values()):
            if letter.kind in ASKS:
                self._away(name, letter)
        kept = {(each.who, False): each for each in letters if each.kind not in ASKS}
        kept |= {place: each for place, each in mail.items() if each.kind not in ASKS}
        if kept:
            self._mail[name] = kept
        self._changed.notify_all()

    def _away(self, name: str, letter: Letter) -> None:
        """Tell whoever sent this letter that ``name`` is away."""
        if self._open.get((letter.who, name), (b"",))[0] == letter.thread:
            self._post(name, Letter(letter.who, letter.thread, "declined", b"away"))
