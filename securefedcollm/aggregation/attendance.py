"""Attendance in a step: which silos are asked, have replied, or are out, and why.

The part of a coordinator that is the same in every scheme. The server is honest here. The adversary
is up to c malicious silos and attackers on the network. Nobody can reply twice, reply for somebody
else, or come back after being out. A participant that breaks a rule is named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import NoReturn, TypeVar

from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.messages import Signable, Signed
from securefedcollm.aggregation.roles import RoundResult
from securefedcollm.aggregation.steps import Step, Transition
from securefedcollm.errors import (
    CryptoError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import verify

T = TypeVar("T")


class AttendedRound(ABC):
    """A coordinator's side of an attempt: it makes the requests, takes the replies, opens the sum.

    Drive it as ``while True: send requests(), receive() or lost() each, if not advance(): break``.
    A scheme defines its requests (:meth:`requests`), how it takes a reply (:meth:`_take`) and how a
    step ends (:meth:`_close`). It names with :meth:`_ask` the participants that are asked in the
    next step.

    Args:
        header: the server's view of the round; silos with another view take themselves out.
        roster: the silos of the signed study. All of them are asked in the first step.
        transitions: the steps of the scheme; the first is ``Step.ADVERTISE``.
        others: names of participants that are not silos; their signatures are the scheme's to
            check.

    Raises:
        LocalProtocolError: the header is for another roster.
    """

    def __init__(
        self,
        header: RoundHeader,
        roster: Roster,
        transitions: Mapping[Step, Transition],
        others: Collection[str] = (),
    ) -> None:
        check_roster(header, roster)
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._roster = roster
        self._transitions = transitions
        self._others = others
        self._step = Step.ADVERTISE
        self._asked: tuple[str, ...] = roster.names
        self._replied: set[str] = set()
        self._excluded: dict[str, str] = {}
        self._result: RoundResult | None = None

    @property
    def step(self) -> Step:
        """The step whose replies are being collected."""
        return self._step

    @property
    def excluded(self) -> dict[str, str]:
        """Name -> reason for everybody who has stopped taking part so far."""
        return dict(self._excluded)

    @property
    def result(self) -> RoundResult:
        """The sum, once :meth:`advance` has returned False.

        Raises:
            LocalProtocolError: not yet, or the attempt failed.
        """
        if self._result is None:
            raise LocalProtocolError(
                f"there is no result at step {self._step.value}",
                hint="call advance() until it returns False",
            )
        return self._result

    def __repr__(self) -> str:
        return f"{type(self).__name__}(step={self._step.value}, excluded={self._excluded})"

    @abstractmethod
    def requests(self) -> dict[str, bytes]:
        """One frame for everybody who takes part in this step and has not replied yet.

        Raises:
            LocalProtocolError: the attempt is over.
        """

    @abstractmethod
    def _take(self, name: str, frame: bytes | memoryview) -> None:
        """Check and keep the reply of ``name`` in this step.

        Raises:
            RemoteProtocolError: it does not fit.
        """

    @abstractmethod
    def _close(self) -> None:
        """End this step with the replies that are there.

        Raises:
            ProtocolError: the attempt cannot go on with them.
        """

    @abstractmethod
    def _forget(self) -> None:
        """The attempt has failed: drop the stored replies, and the sum."""

    def receive(self, silo: str, frame: bytes | memoryview) -> None:
        """Take the reply of ``silo``, or of another participant, in this step.

        A reply changes nothing if its sender is out, was not asked or has replied already.

        Raises:
            RemoteProtocolError: the reply does not fit; its sender is out (see ``excluded``).
            ConfigError: nobody has that name.
            LocalProtocolError: the attempt is over.
        """
        self._check_known(silo)
        self._check_running()
        # Adversary: a silo or the network that sends again, to replace a reply or to bring a
        # dropped vector back.
        if silo not in self._waiting():
            raise RemoteProtocolError(
                f"sent a second or a late frame in step {self._step.value}",
                peer=silo,
                hint="ignored; nothing to do",
            )
        try:
            self._take(silo, frame)
        except RemoteProtocolError as error:
            self._excluded.setdefault(silo, error.message)
            raise
        self._replied.add(silo)

    def lost(self, silo: str, reason: str) -> None:
        """Take note that ``silo``, or another participant, will not reply: it is out.

        It is asked nothing more. The scheme decides whether its earlier frames still count: a
        vector that is in the sum stays there.

        Raises:
            ConfigError: nobody has that name.
        """
        self._check_known(silo)
        self._excluded.setdefault(silo, reason)

    def advance(self) -> bool:
        """Close this step; participants without a reply are out. True while there is a next step.

        Raises:
            ProtocolError: too few silos are left, or one (``RemoteProtocolError.peer``) made the
                sum impossible to open. The attempt has failed; nothing was learnt.
            AbandonedError: of these, where the attempt needed a silo that is lost.
            LocalProtocolError: the attempt is over already.
        """
        self._check_running()
        for name in self._waiting():
            self._excluded[name] = f"no reply in step {self._step.value}"
        try:
            self._close()
        except BaseException:
            self._step = Step.FAILED
            self._forget()
            raise
        self._step = self._transitions[self._step].following
        self._replied.clear()
        return self._step is not Step.DONE

    # For the schemes ----------------------------------------------------------------------------

    def _waiting(self) -> tuple[str, ...]:
        """The participants that were asked in this step, are not out and have not replied."""
        return tuple(
            name for name in self._asked if name not in self._replied and name not in self._excluded
        )

    def _ask(self, silos: Iterable[int]) -> None:
        """In the next step, ask these silos (indices) and nobody else."""
        self._asked = self._names(silos)

    def _names(self, silos: Iterable[int]) -> tuple[str, ...]:
        return tuple(map(self._roster.name, silos))

    def _quorum(self, replied: Mapping[int, T]) -> dict[int, T]:
        """Replies of the silos that are still in, by ascending index; these are asked next.

        Raises:
            ProtocolError: they are no quorum.
        """
        staying = {
            index: replied[index]
            for index in sorted(replied)
            if self._roster.name(index) not in self._excluded
        }
        self._enough(len(staying), self._parameters.quorum)
        self._ask(staying)
        return staying

    def _enough(self, count: int, needed: int) -> None:
        """Adversary: a network that keeps silos away until a sum has one silo and colluders."""
        if count < needed:
            raise ProtocolError(
                f"only {count} silos completed step {self._step.value}; {needed} are needed"
                f"{self._reasons()}",
                hint=f"nothing was opened; {self._what_next()}",
            )

    def _what_next(self) -> str:
        """What can still be done for this round when too few silos complete the step."""
        if self._step is Step.UNMASK:
            return "try again with exactly these survivors, or go on with the next round"
        return "bring the lost silos back and start another attempt"

    def _reasons(self) -> str:
        """The participants that are out, with reasons, in brackets; empty if there are none."""
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self._excluded.items()))
        return f" ({reasons})" if reasons else ""

    def _check_known(self, name: str) -> None:
        if name not in self._others:
            self._roster.index(name)

    def _check_running(self) -> None:
        if self._step not in self._transitions:
            raise LocalProtocolError(
                f"this attempt is over ({self._step.value})",
                hint=f"start a new {type(self).__name__}",
            )

    def _check_signed(self, name: str, message: Signed) -> int:
        """A silo's frame is its own and of this attempt; the silo's index."""
        # Adversary: a silo or the network that speaks for another silo, or replays a frame of
        # another round, run, study or attempt.
        index = self._roster.index(name)
        if message.index != index or message.header != self._header_digest:
            self._blame(name, "sent a frame of another silo, round, study or global model")
        self._verify(name, self._roster.key(index), message, message.signature)
        return index

    def _verify(self, name: str, key: bytes, message: Signable, signature: bytes) -> None:
        try:
            verify(key, message.CONTEXT, message.signed(), signature)
        except CryptoError:
            self._blame(name, "sent a frame with a bad signature")

    def _blame(self, name: str, what: str) -> NoReturn:
        """``name`` has broken a rule: it is out, however the attempt ends."""
        self._excluded.setdefault(name, what)
        raise RemoteProtocolError(
            what, peer=name, hint="its operator should compare study, model and version"
        ) from None
