"""The asker's side of one question to several silos.

Every silo is sent the same number of frames of the same lengths, whatever was found. From each the
asker fetches its k best passages. It embeds them again and ranks them by what it computed itself,
so a silo that gives its passages high scores gains nothing, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.evidence.entries import Answers, Asked, Heard
from securefedcollm.evidence.log import EvidenceLog
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


class Inquiry:
    """One question of one asker.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes.
        key: the asker's identity.
        silos: name → Ed25519 public key of every silo that is asked.
        log: the asker's; it begins with ``opened``.
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
        self._study, self._run, self._key, self._silos = study, run, key, silos
        self._terms, self._log, self._embed = terms, log, embed
        self._failed: dict[str, str] = {}

    def ask(self, query: npt.ArrayLike, carry: Carry) -> Found:
        """Ask all silos. One that fails does not stop the others.

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
        answers = self._each(questions, carry)
        scores = self._each(answers, lambda silo, frame: askers[silo].take_scores(frame))
        best = {silo: self._best(found) for silo, found in scores.items()}
        selections = {silo: askers[silo].select(best[silo]) for silo in scores}
        served = self._each(selections, carry)
        passages = self._each(served, lambda silo, frame: askers[silo].take_blocks(frame))
        heard = {silo: _answers(askers[silo].receipts) for silo in scores}
        self._log.append(Heard(asked=entry.seq, answers=heard))
        found = Found(
            answered=list(passages),
            failed=self._failed,
            sent=_bytes(questions, selections),
            received=_bytes(answers, served),
        )
        for silo, fetched in passages.items():
            self._check(silo, fetched, scores[silo][list(best[silo])], query, found)
        found.hits.sort(key=lambda hit: -hit.score)
        del found.hits[self._terms.fetched :]
        return found

    def _asker(self, silo: str, key: bytes, query: npt.ArrayLike) -> Asker:
        header = Header(self._study, self._run, self._key.public, key, self._terms)
        return Asker(header=header, silo=silo, key=self._key, query=query)

    def _best(self, scores: npt.NDArray[np.float64]) -> tuple[int, ...]:
        """All silos are asked for k blocks anyway, so a silo cannot crowd out the others."""
        return tuple(int(at) for at in np.argsort(-scores, kind="stable")[: self._terms.fetched])

    def _each(self, given: Mapping[str, bytes], take: Callable[[str, bytes], T]) -> dict[str, T]:
        """Do the same with every silo's frame; a silo with which that fails is left out.

        Adversary: a silo that sends anything, to keep the others' answers from the asker. An error
        of its own, such as a full disk where it runs in this process, stops the others no more.
        """
        taken: dict[str, T] = {}
        for silo, frame in given.items():
            try:
                taken[silo] = take(silo, frame)
            except SecureFedCoLLMError as error:
                self._failed[silo] = error.message
        return taken

    def _check(
        self,
        silo: str,
        passages: Sequence[Passage | None],
        claimed: npt.NDArray[np.float64],
        query: npt.ArrayLike,
        found: Found,
    ) -> None:
        """Put the passages into ``found``, with scores of our own.

        Adversary: a silo that scores passages too high, to be read, or serves others than it
        scored. One that scores them too low hides them, which nobody can see. One that sends what
        the encoder cannot read, so that the asker loses the others' passages too.
        """
        unit = np.asarray(query, dtype=np.float64)
        unit = unit / np.linalg.norm(unit)
        for passage, claim in zip(passages, claimed, strict=True):
            score = 0.0 if passage is None else self._score(passage, unit)
            if passage is not None:
                found.hits.append(Hit(silo, passage, score or 0.0))
            if score is None:
                found.suspect[silo] = "sent a passage that the study's encoder cannot read"
            elif abs(score - claim) > TOLERANCE:
                found.suspect[silo] = (
                    f"claimed a score of {claim:.3f} for a passage that has {score:.3f}"
                )

    def _score(self, passage: Passage, unit: Vectors) -> float | None:
        """None: it cannot be embedded, and no honest silo has such a passage in its index."""
        try:
            score = float(self._embed([passage.text])[0] @ unit)
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
