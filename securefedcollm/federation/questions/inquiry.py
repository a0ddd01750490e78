"""The asker's side of one question to several silos.

Every silo is sent the same number of frames of the same lengths, whatever was found. From each the
asker fetches its k best passages. It embeds them again and ranks them by what it computed itself,
so a silo that gives its passages high scores gains nothing, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.evidence.entries import Answers, Asked, Heard
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.questions.desk import slip
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import Asker, Header, Passage, Terms
from securefedcollm.retrieval.messages import Receipt
from securefedcollm.retrieval.reduction import Vectors

T = TypeVar("T")

Carry = Callable[[str, bytes], bytes]
"""(silo, frame) → the silo's answer. Raises an error of the tree where there is none."""
Embed = Callable[[Sequence[str]], Vectors]

TOLERANCE: Final = 0.01
"""Of a score. Its noise has a deviation of 1.6e-4, and two machines' encoders differ by less."""


@dataclass(frozen=True)
class Hit:
    """A passage that was found. ``passage`` is the silo's words: data, and nothing more."""

    silo: str
    passage: Passage
    score: float
    """Cosine similarity to the question, −1 to 1, as the asker computed it from the text."""


@dataclass
class Found:
    """What came back for one question.

    Attributes:
        hits: the best k of all silos, best first.
        answered: silos that sent their passages.
        failed: silo → why it did not.
        suspect: silo → what was wrong with its scores.
        sent, received: bytes of frames.
    """

    hits: list[Hit] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    suspect: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Answered:
    """A question's result, and what it took.

    Attributes:
        spent: silo → questions of this asker that its shelf has counted, this one and those of
            other runs included; over the network, those that this member put to it in the study.
        limit: the most that the study lets it answer.
        seconds: of the protocol: encryption, answers, decryption, evidence; not of loading models
            and shelves.
    """

    found: Found
    spent: Mapping[str, int]
    limit: int
    seconds: float


def check_question(question: str) -> None:
    """Raises: ConfigError, if there are no words in it."""
    if not question.strip():
        raise ConfigError("no question", where="QUESTION", hint="give it some words")


class Fetch(NamedTuple):
    """The passages that one silo sent, and what it claimed that each scores."""

    passages: tuple[Passage | None, ...]
    claimed: tuple[float, ...]

    def __repr__(self) -> str:
        return f"Fetch({len(self.passages)} passages)"


@dataclass
class Fetched:
    """What came back for one question, before anybody looked at it.

    Attributes:
        fetches: silo → its passages, of those that sent them.
        failed, sent, received: as in :class:`Found`.
    """

    fetches: dict[str, Fetch] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    received: int = 0

    def __repr__(self) -> str:
        return f"Fetched({len(self.fetches)} silos, {len(self.failed)} failed)"


Frames = Mapping[str, bytes]
"""Silo → frame."""
Steps = Generator[Frames, Mapping[str, bytes | Failure], Fetched]
"""Gives the frames of a step, is sent the answers of the same silos, and returns the result."""


class Fetching:
    """One question of one asker, without a model: what crosses, and the asker's evidence.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes.
        key: the asker's identity.
        silos: name → Ed25519 public key of every silo that is asked.
        log: the asker's; it begins with ``opened``.
    """

    def __init__(
        self,
        *,
        study: bytes,
        run: bytes,
        key: SigningKey,
        silos: Mapping[str, bytes],
        terms: Terms,
        log: EvidenceLog,
    ) -> None:
        self._study, self._run, self._key, self._silos = study, run, key, silos
        self._terms, self._log = terms, log
        self._failed: dict[str, str] = {}

    def steps(self, query: npt.ArrayLike) -> Steps:
        """Ask all silos. One that fails does not stop the others.

        Whoever carries the frames sends the questions, then the selections, each to all silos at
        once. A second step has a silo only if its first answer was in order.

        Args:
            query: [d], the question's embedding.

        Raises:
            DataError: the embedding is zero or not finite.
            StateError: the evidence log cannot be written; nothing was sent, or nothing is used.
        """
        askers = {silo: self._asker(silo, key, query) for silo, key in self._silos.items()}
        questions = {silo: asker.ask() for silo, asker in askers.items()}
        entry = self._log.append(
            Asked(
                terms=self._terms.digest.hex(),
                questions={silo: asker.transcript.hex() for silo, asker in askers.items()},
            )
        )
        answers = self._came((yield questions))
        scores = self._each(answers, lambda silo, frame: askers[silo].take_scores(frame))
        best = {silo: self._best(found) for silo, found in scores.items()}
        selections = {silo: askers[silo].select(best[silo]) for silo in scores}
        served = self._came((yield selections))
        passages = self._each(served, lambda silo, frame: askers[silo].take_blocks(frame))
        heard = {silo: _answers(askers[silo].receipts) for silo in scores}
        self._log.append(Heard(asked=entry.seq, answers=heard))
        claimed = {silo: tuple(scores[silo][list(best[silo])].tolist()) for silo in passages}
        return Fetched(
            fetches={silo: Fetch(found, claimed[silo]) for silo, found in passages.items()},
            failed=self._failed,
            sent=_bytes(questions, selections),
            received=_bytes(answers, served),
        )

    def _asker(self, silo: str, key: bytes, query: npt.ArrayLike) -> Asker:
        header = Header(self._study, self._run, self._key.public, key, self._terms)
        return Asker(header=header, silo=silo, key=self._key, query=query)

    def _best(self, scores: npt.NDArray[np.float64]) -> tuple[int, ...]:
        """All silos are asked for k blocks anyway, so a silo cannot crowd out the others."""
        return tuple(int(at) for at in np.argsort(-scores, kind="stable")[: self._terms.fetched])

    def _came(self, answers: Mapping[str, bytes | Failure]) -> dict[str, bytes]:
        lost = {s: answer.reason for s, answer in answers.items() if isinstance(answer, Failure)}
        self._failed |= lost
        return {s: answer for s, answer in answers.items() if not isinstance(answer, Failure)}

    def _each(self, given: Frames, take: Callable[[str, bytes], T]) -> dict[str, T]:
        """Do the same with every silo's frame; a silo with which that fails is left out.

        Adversary: a silo that sends anything, to keep the others' answers from the asker.
        """
        taken: dict[str, T] = {}
        for silo, frame in given.items():
            try:
                taken[silo] = take(silo, frame)
            except SecureFedCoLLMError as error:
                self._failed[silo] = error.message
        return taken


class Inquiry:
    """One question of one asker, over a function that carries one frame at a time.

    Args:
        study, run, key, silos, terms, log: as in :class:`Fetching`.
        embed: the study's encoder and reduction, for the passages.
    """

    def __init__(
        self,
        *,
        study: bytes,
        run: bytes,
        key: SigningKey,
        silos: Mapping[str, bytes],
        terms: Terms,
        log: EvidenceLog,
        embed: Embed,
    ) -> None:
        self._fetching = Fetching(study=study, run=run, key=key, silos=silos, terms=terms, log=log)
        self._most, self._embed = terms.fetched, embed

    def ask(self, query: npt.ArrayLike, carry: Carry) -> Found:
        """Ask all silos. One that fails does not stop the others: also if it runs in this process,
        and has an error of its own, such as a full disk.

        Args:
            query: [d], the question's embedding.

        Raises:
            DataError, StateError: as :meth:`Fetching.steps`.
        """
        steps = self._fetching.steps(query)
        frames = next(steps)
        try:
            while True:
                frames = steps.send({s: _carried(carry, s, frame) for s, frame in frames.items()})
        except StopIteration as end:
            return judge(end.value, query, self._embed, self._most)


def _carried(carry: Carry, silo: str, frame: bytes) -> bytes | Failure:
    try:
        return carry(silo, frame)
    except SecureFedCoLLMError as error:
        return Failure(error.message)


def judge(fetched: Fetched, query: npt.ArrayLike, embed: Embed, most: int) -> Found:
    """Rank what was fetched by scores of our own.

    Adversary: a silo that scores passages too high, to be read, or serves others than it scored.
    One that scores them too low hides them, which nobody can see. One that sends what the encoder
    cannot read, so that the asker loses the others' passages too.

    Args:
        query: [d], the question's embedding.
        embed: the study's encoder and reduction.
        most: passages to keep, k.
    """
    unit = np.asarray(query, dtype=np.float64)
    unit = unit / np.linalg.norm(unit)
    found = Found(
        answered=list(fetched.fetches),
        failed=fetched.failed,
        sent=fetched.sent,
        received=fetched.received,
    )
    for silo, fetch in fetched.fetches.items():
        for passage, claim in zip(fetch.passages, fetch.claimed, strict=True):
            score = 0.0 if passage is None else _score(embed, passage, unit)
            if passage is not None:
                found.hits.append(Hit(silo, passage, score or 0.0))
            if score is None:
                found.suspect[silo] = "sent a passage that the study's encoder cannot read"
            elif abs(score - claim) > TOLERANCE:
                found.suspect[silo] = (
                    f"claimed a score of {claim:.3f} for a passage that has {score:.3f}"
                )
    found.hits.sort(key=lambda hit: -hit.score)
    del found.hits[most:]
    return found


def _score(embed: Embed, passage: Passage, unit: Vectors) -> float | None:
    """None: it cannot be embedded, and no honest silo has such a passage in its index."""
    try:
        score = float(embed([passage.text])[0] @ unit)
    except SecureFedCoLLMError:
        return None
    return score if math.isfinite(score) else None


def _answers(receipts: Sequence[Receipt]) -> Answers:
    """From the receipts of question, scores, selection, blocks, as far as they came."""
    slips = [slip(receipt) for receipt in receipts[1:]]
    whole = len(slips) == len(("scores", "selection", "blocks"))
    return Answers(slips[0], *(slips[1:] if whole else ()))


def _bytes(*frames: Mapping[str, bytes]) -> int:
    return sum(len(frame) for each in frames for frame in each.values())
