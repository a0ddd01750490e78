"""The asker's side of a question to the silos' records: it coordinates the sum of their votes.

Adversary: silos that send anything. A silo that fails is left out of the sum; one that lies votes
as it likes, within its bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Final

from securefedcollm.aggregation import CoordinatorSide, Roster, coordinator_side
from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.evidence.entries import Polled, Tallied
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.questions.polls import make_poll, sum_header, votes_of
from securefedcollm.federation.questions.voting import READY, slip_of
from securefedcollm.federation.records.server import sum_digest
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.votes import Tally
from securefedcollm.study import Study

Carry = Callable[[str, bytes], bytes]
"""(silo, frame) → the silo's answer. Raises an error of the tree where there is none."""

_ODD: Final = "answered the question with something else"


@dataclass(frozen=True)
class Opinion:
    """What the silos' records say to one question.

    Attributes:
        tally: noised votes for every choice.
        survivors: silos whose votes are in the sum; whether they had any, nobody knows.
        failed: silo → why it is not.
        sent, received: bytes of frames.
    """

    tally: Tally
    survivors: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    sent: int = 0
    received: int = 0


Frames = Mapping[str, bytes]
"""Silo → frame."""
PollSteps = Generator[Frames, Mapping[str, bytes | Failure], Opinion]
"""Gives the frames of a step, is sent the replies of the same silos, and returns the result."""


@dataclass(frozen=True)
class Canvass:
    """Asks the silos of one run.

    Args:
        run: the run's id, 16 bytes.
        key: the asker's identity.
        roster: the silos.
        evidence: the asker's log; it begins with ``opened``.
    """

    study: Study
    run: bytes
    key: SigningKey
    roster: Roster
    evidence: EvidenceLog

    def steps(self, question: str, choices: tuple[str, ...]) -> PollSteps:
        """Ask all silos, and open the sum of their votes.

        Whoever carries the frames sends those of a step to all silos at once. A silo that fails is
        left out.

        Raises:
            ConfigError: no question, or no proper choices.
            ProtocolError: too few silos answered; nothing was opened.
            StateError: the evidence log cannot be written; nothing was sent, or nothing is used.
        """
        poll = make_poll(self.study, self.run, self.key, question, choices)
        votes = votes_of(self.study, len(choices))
        header = sum_header(self.study, self.roster, poll.digest, votes)
        self.evidence.append(
            Polled(poll=slip_of(poll), header=header.digest.hex(), values=len(choices))
        )
        side = coordinator_side("masking", header=header, roster=self.roster)
        frames: Frames = dict.fromkeys(self.roster.names, poll.encode())
        replies = yield frames
        sent, received = _bytes(frames), _bytes(replies)
        for silo in frames:
            reply = replies[silo]
            if reply != READY:
                side.lost(silo, reply.reason if isinstance(reply, Failure) else _ODD)
        while True:
            frames = side.requests()
            replies = yield frames
            sent, received = sent + _bytes(frames), received + _bytes(replies)
            for silo in frames:
                _take(side, silo, replies[silo])
            if not side.advance():
                break
        result, seen = side.result, side.transcript
        self.evidence.append(
            Tallied(
                header=header.digest.hex(),
                delivery=seen.delivery.hex(),
                survivors=list(result.survivors),
                dropouts=list(result.dropouts),
                lists=seen.lists.hex(),
                agreements={name: raw.hex() for name, raw in result.agreements.items()},
                sum=sum_digest(result.sum).hex(),
            )
        )
        tally = votes.read(result.sum, len(result.survivors))
        return Opinion(tally, result.survivors, dict(result.excluded), sent, received)

    def ask(self, question: str, choices: tuple[str, ...], carry: Carry) -> Opinion:
        """As :meth:`steps`, over a function that carries one frame at a time."""
        steps = self.steps(question, choices)
        frames = next(steps)
        try:
            while True:
                frames = steps.send({silo: _reply(carry, silo, f) for silo, f in frames.items()})
        except StopIteration as end:
            opinion: Opinion = end.value
            return opinion


def _take(side: CoordinatorSide, silo: str, reply: bytes | Failure) -> None:
    if isinstance(reply, Failure):
        side.lost(silo, reply.reason)
        return
    with contextlib.suppress(SecureFedCoLLMError):  # it is named in side.excluded
        side.receive(silo, reply)


def _bytes(frames: Mapping[str, bytes | Failure]) -> int:
    return sum(len(frame) for frame in frames.values() if not isinstance(frame, Failure))


def _reply(carry: Carry, silo: str, frame: bytes) -> bytes | Failure:
    try:
        return carry(silo, frame)
    except SecureFedCoLLMError as error:
        return Failure(error.message)
