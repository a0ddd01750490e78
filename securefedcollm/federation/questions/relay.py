"""The server's side of private questions: it calls members in turn and carries their letters.

It cannot read a frame, nor alter one unnoticed. It sees who asks whom, when and how often, and that
is all that its traffic depends on: lengths follow from the study's terms.

Adversary: a member that sends letters of any number and length, or lets a call wait, so that the
others' questions do not get through.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from securefedcollm.errors import SecureFedCoLLMError, TransportError
from securefedcollm.federation.engines import Engine, Failure, SiloPort
from securefedcollm.federation.questions.letters import (
    ASKS,
    Carry,
    Letter,
    decode_carried,
    encode,
    longest,
    seconds_for,
)
from securefedcollm.retrieval import Terms

log = logging.getLogger(__name__)

SLOWEST: Final = 125_000
"""Bytes a second at which letters must move: 1 Mbit/s."""
ABSENT: Final = 5.0
"""Seconds for which a member that is not connected is not called."""
REST: Final = 15.0
"""Seconds for which one is not called that let a call wait, or answered nonsense. Each further time
doubles it."""
MOST_REST: Final = 240.0
_WAITED: Final = 5.0
"""Seconds of a call that were lost on somebody."""
_IDLE: Final = 1.0
"""Seconds between calls when nobody asks anything."""
_BUSY: Final = 0.05
_MOST_TURNS: Final = 25
"""Turns without a pause between them: a question takes five."""


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
    until: float = 0.0
    pause: float = REST


@dataclass
class Relay:
    """Carries letters between the members that an engine reaches.

    Args:
        engine: knows the members by their names.
        run: the run's id, 16 bytes.
        askers: members that may ask.
        silos: members that may have a shelf.
    """

    engine: Engine
    run: bytes
    askers: Sequence[str]
    silos: Sequence[str]
    terms: Terms
    clock: Callable[[], float] = time.monotonic
    _mail: dict[str, dict[tuple[str, bool], Letter]] = field(default_factory=dict)
    """Recipient → (sender, whether it asks) → the letter on its way. A newer one takes the place of
    an older."""
    _rests: dict[str, _Rest] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        """Everybody."""
        return sorted({*self.askers, *self.silos})

    def waiting(self, member: str) -> list[Letter]:
        """Letters on their way to a member."""
        return list(self._mail.get(member, {}).values())

    def turn(self) -> bool:
        """Call every member once; returns whether there is anything to carry.

        Raises:
            TransportError: the engine reaches nobody at all. What was on its way is lost.
        """
        now = self.clock()
        called = [name for name in self.members if self._rest(name).until <= now]
        mail, self._mail = self._mail, {}
        given = {name: list(mail.pop(name, {}).values()) for name in called}
        for name, letters in mail.items():  # of those who are not called now
            self._bounce(name, letters.values())
        frames = {name: encode(Carry(self.run, letters)) for name, letters in given.items()}
        if not frames:
            return False
        timeout = seconds_for(self.terms) + max(map(len, frames.values())) / SLOWEST
        replies = self.engine.exchange(frames, timeout)
        waited = self.clock() - now > _WAITED
        for name, reply in replies.items():
            if self._collected(name, reply, waited):
                self._rests.pop(name, None)
            else:
                self._bounce(name, given[name])
        return bool(self._mail)

    def run_until(
        self, stop: Callable[[], bool], wait: Callable[[float], None] = time.sleep
    ) -> None:
        """Call members, and do so the more often the more there is to carry.

        Raises:
            TransportError: as :meth:`turn`.
        """
        pause, busy = _BUSY, 0
        while not stop():
            if self.turn():
                # Adversary: a member that always has something to carry. Each call of a turn costs
                # every other member a write to its disk.
                busy, pause = busy + 1, 0.0 if busy < _MOST_TURNS else 10 * _BUSY
            else:
                busy, pause = 0, min(_IDLE, max(_BUSY, 2 * pause))
            if pause:
                wait(pause)

    def _rest(self, name: str) -> _Rest:
        return self._rests.get(name, _Rest())

    def _collected(self, name: str, reply: bytes | Failure, waited: bool) -> bool:
        """Put a member's letters into the mail; whether there was a reply that makes sense."""
        try:
            if isinstance(reply, Failure):
                raise TransportError(reply.reason)
            letters = decode_carried(reply, name).letters
        except SecureFedCoLLMError as error:
            rest = self._rest(name)
            pause, next_ = rest.pause, min(MOST_REST, 2 * rest.pause)
            if isinstance(reply, Failure) and not waited:  # it cost nobody anything
                pause, next_ = ABSENT, rest.pause
            if name not in self._rests:  # one line for each absence
                log.warning("%s does not answer: %s", name, error)
            self._rests[name] = _Rest(self.clock() + pause, next_)
            return False
        seen = set[tuple[str, bool]]()
        for letter in letters:
            place = letter.who, letter.kind in ASKS
            if place not in seen and self._may(name, letter):
                seen.add(place)
                self._post(name, letter)
        return True

    def _may(self, sender: str, letter: Letter) -> bool:
        """Adversary: a member that floods another one, or sends what only makes it compute."""
        ends = (sender, letter.who) if letter.kind in ASKS else (letter.who, sender)
        fits = len(letter.content) <= longest(letter.kind, self.terms)
        return fits and ends[0] != ends[1] and ends[0] in self.askers and ends[1] in self.silos

    def _post(self, sender: str, letter: Letter) -> None:
        sent = Letter(sender, letter.thread, letter.kind, letter.content)
        self._mail.setdefault(letter.who, {})[sender, letter.kind in ASKS] = sent

    def _bounce(self, name: str, letters: Iterable[Letter]) -> None:
        """Tell askers at once that ``name`` is away."""
        for letter in letters:
            if letter.kind in ASKS:
                self._post(name, Letter(letter.who, letter.thread, "declined", b"away"))
