"""How a silo, or a key holder, answers one request after another, and nothing after a failure.

The part of these sides that is the same in every scheme, as :mod:`~.attendance` is that of the
coordinators. The adversary is the server together with up to c silos: it may send any frame at any
time, crash this process and start it again, or talk to two copies of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, NoReturn, Protocol, TypeVar

from securefedcollm.aggregation.checks import (
    check_identity,
    check_list,
    check_signatures,
    record_once,
    refuse_late,
)
from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.messages import S, Signed, sign
from securefedcollm.aggregation.roles import Journal
from securefedcollm.aggregation.steps import Step
from securefedcollm.primitives import SigningKey, sha256


class Secrets(Protocol):
    """Everything that must not outlive the attempt."""

    def close(self) -> None:
        """Overwrite what can be overwritten, and give memory back. Called once."""
        ...


K = TypeVar("K", bound=Secrets)


class AnsweringSide(ABC, Generic[K]):
    """Answers the server's requests, in order, once each. Not thread-safe.

    A scheme hands over its secrets when it is made (:meth:`_hold`), and says what it makes of a
    request (:meth:`_answer`).

    Args:
        header: this side's own view of the round, never the server's.
        roster: the silos of the signed study.
        signing_key: this participant's Ed25519 identity.
        journal: durable, shared by every process that may act for this participant.
        steps: those whose requests this side answers, in order.

    Raises:
        LocalProtocolError: the header is for another roster.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        signing_key: SigningKey,
        journal: Journal,
        steps: Sequence[Step],
    ) -> None:
        check_roster(header, roster)
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._roster = roster
        self._signing_key = signing_key
        self._journal = journal
        self._following = dict(zip(steps, (*steps[1:], Step.DONE), strict=True))
        self._step = steps[0]
        self._secrets: K | None = None

    @property
    def step(self) -> Step:
        """The step whose request this side will answer next."""
        return self._step

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._whose()}step={self._step.value})"

    def _whose(self) -> str:
        return ""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} holds secrets: it is neither copied nor pickled")

    def handle(self, frame: bytes) -> bytes:
        """Answer the server's next request.

        Raises:
            RemoteProtocolError: the request must not be answered; the attempt is over here.
            Exception: whatever the journal raises; the attempt is over here.
        """
        secrets = self._secrets
        # Adversary: a server that goes on with a side that has refused, or is done.
        if secrets is None:
            refuse_late(self._step)
        try:
            reply = self._answer(frame, secrets)
        except BaseException:
            self._finish(Step.FAILED)
            raise
        self._step = self._following[self._step]
        if self._step is Step.DONE:
            self._finish(Step.DONE)
        return reply

    def close(self) -> None:
        """Drop the secrets, if they are still there: this attempt is over."""
        if self._secrets is not None:
            self._finish(Step.FAILED)

    def _finish(self, step: Step) -> None:
        self._step = step
        secrets, self._secrets = self._secrets, None  # gone, even if it cannot be closed
        if secrets is not None:
            secrets.close()

    @abstractmethod
    def _answer(self, frame: bytes, secrets: K) -> bytes:
        """The reply to the request of this step, written down before it is returned.

        Raises:
            RemoteProtocolError: the request must not be answered.
        """

    # For the schemes ----------------------------------------------------------------------------

    def _hold(self, secrets: K) -> None:
        """Keep these until the attempt is over. Called once, when this side is made."""
        self._secrets = secrets

    def _say(self, key: bytes, message: S) -> S:
        """Sign the coming answer of this attempt, and record it in the journal."""
        signed = sign(message, self._signing_key)
        self._record(key + self._header.attempt_scope, sha256(signed.signed()))
        return signed

    def _record(self, key: bytes, value: bytes) -> None:
        record_once(self._journal, key, value, self._step)

    def _check_signatures(self, entries: Iterable[Signed], what: str) -> None:
        check_signatures(entries, what, self._header_digest, self._roster)


class AnsweringSilo(AnsweringSide[K]):
    """The same of a silo, which has a vector.

    Args:
        name: this silo.
        vector_id: 32 bytes that stand for its vector.

    Raises:
        LocalProtocolError: header, roster and identity do not belong together.
        ConfigError: ``name`` is not on the roster.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        name: str,
        signing_key: SigningKey,
        vector_id: bytes,
        journal: Journal,
        steps: Sequence[Step],
    ) -> None:
        super().__init__(
            header=header, roster=roster, signing_key=signing_key, journal=journal, steps=steps
        )
        self._index = check_identity(roster, name, signing_key, vector_id)
        self._vector_id = vector_id

    def _whose(self) -> str:
        return f"silo={self._roster.name(self._index)!r}, "

    def _record_vector(self) -> None:
        """Before the vector leaves, masked or encrypted.

        Adversary: a server that gets two vectors of this silo into two sums over the same silos;
        their difference would be this silo's alone.
        """
        self._record(b"vector:" + self._header.round_scope, self._vector_id)

    def _check_members(
        self, members: Sequence[int], allowed: Iterable[int], what: str = "list"
    ) -> None:
        check_list(members, allowed, self._parameters.quorum, own=self._index, what=what)
