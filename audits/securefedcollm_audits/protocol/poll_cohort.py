"""Four silos whose few records vote on questions, for attacks on questions to records.

Booths, ledgers, evidence and the secure sum are the product's own. The carrier is a function; the
product's letters, relay and processes are not played here. Embeddings are random directions, one
for each text, so that no model is needed.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import Roster
from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.evidence.entries import Entry
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.questions.answering import Answers, OwnRecords
from securefedcollm.federation.questions.begun import Everybody, begin_log
from securefedcollm.federation.questions.polling import Canvass, Opinion
from securefedcollm.federation.questions.polls import Poll, claim_of
from securefedcollm.federation.questions.port import Chair
from securefedcollm.federation.questions.prepaid import begin_answering, prepay
from securefedcollm.federation.questions.voting import (
    Booth,
    BoothConversation,
    Embed,
    RecordShelf,
    count_labels,
)
from securefedcollm.federation.records import SERVER
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.retrieval.nearest import RecordIndex
from securefedcollm.study import Study, digest, load_study
from securefedcollm_audits.protocol.cohort import recorded
from securefedcollm_audits.protocol.retrieval_cohort import embedding

SILOS: Final = ("silo-1", "silo-2", "silo-3", "silo-4")
TOPIC: Final = "which protocol for the patient of bed seven"
CHOICES: Final = ("amber", "violet")
QUESTIONS: Final = 3
"""That one record can answer."""
COUNT: Final = 20
"""Records of the first silo on the topic, all for amber. With so large an ε noise is below one."""
RUN: Final = bytes(16)

Change = Callable[[str, int, bytes], bytes | None]
"""(silo, number of the frame, from 0, frame) → the frame as it arrives, or None to lose it."""


class Held(NamedTuple):
    """A record: its question, and its answer."""

    question: str
    answer: str


OWN: Final[Mapping[str, Sequence[Held]]] = {
    "silo-1": [Held(TOPIC, "amber")] * COUNT + [Held("another topic", "violet")],
    "silo-2": [Held("what is for lunch", "violet")] * 3,
    "silo-3": [Held("what is for lunch", "amber")] * 3,
    "silo-4": [Held("what is for dinner", "amber")] * 3,
}


@cache
def study_of(colluders: int = 1) -> Study:
    """The study: four hospitals' records, as ``configs/answers.yaml`` has them."""
    changes = [
        f"silos.colluders={colluders}",
        f"retrieval.questions={QUESTIONS}",
        "retrieval.epsilon=40",
        "retrieval.threshold=0.95",
        "privacy.epsilon=40",
        "local.reply_slot=0.001",
    ]
    return load_study("answers", changes)


@dataclass
class Voters:
    """Everybody in one directory, and all that they keep.

    Args:
        poor: how many of the first silo's records have spent their budget elsewhere; the first
            ones, or below 0 the last ones.
        forgetful: silos go on with an empty ledger of answers after a restart, and do not notice.
        given: the study; by default :func:`study_of`.
        embed: text → unit vector.
        index: vectors → what finds the records that a question retrieves.
    """

    colluders: int = 1
    own: Mapping[str, Sequence[Held]] = field(default_factory=lambda: OWN)
    poor: int = 0
    forgetful: bool = False
    given: Study | None = None
    embed: Embed = embedding
    index: Callable[[npt.ArrayLike], RecordIndex] = RecordIndex

    def __post_init__(self) -> None:
        self._directory = place = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self.study = self.given or study_of(self.colluders)
        names = (SERVER, *SILOS)
        self.keys = {name: SigningKey.generate(recorded(name)) for name in names}
        self.roster = Roster({name: self.keys[name].public for name in SILOS})
        self.booths: dict[str, Booth] = {}
        self._books = 0
        everybody = Everybody(digest(self.study), self.roster, self.keys[SERVER].public)
        self.logs = {
            name: begin_log(make_directory(place / name), name, self.keys[name], RUN, everybody)
            for name in names
        }
        self.restart()

    def restart(self) -> None:
        """As after a kill of every silo: only what is on disk is left."""
        if self.forgetful and self.booths:
            self._books += 1
            fresh = {name: self._answers(name) for name in SILOS}
            self.booths = {n: replace(self.booths[n], ledger=book) for n, book in fresh.items()}
            return
        for name in SILOS:
            self.booths[name] = self._booth(name)

    def _answers(self, name: str) -> Ledger:
        ledger = Ledger(self._directory / f"{name}-{self._books}.sqlite", name)
        if ledger.pinned is None:
            ledger.pin(*claim_of(self.study))
        return ledger

    def _booth(self, name: str) -> Booth:
        held, place = self.own[name], self._directory
        answers = self._answers(name)
        known = answers.identify((sha256(one.question.encode()), None) for one in held)
        books = Ledger(place / f"{name}-own.sqlite", name)
        if books.pinned is None:
            books.pin(*claim_of(self.study))
        index = self.index([self.embed(one.question) for one in held])
        paid = self._paid(name, books, known)
        head = begin_answering(books, self.study, answers, known.key)
        shelf = RecordShelf(index, known, sha256(name.encode()).hex(), paid, head)
        read = count_labels([one.answer for one in held], str)
        own = OwnRecords(shelf, self.embed, read, answers, books)
        public = {other: key.public for other, key in self.keys.items() if other != name}
        silos = {other: key for other, key in public.items() if other != SERVER}
        chair = Chair(digest(self.study), name, self.keys[name], silos, public)
        booth = Answers(self.study, self.roster, own).answering(chair, RUN, self.logs[name])
        assert booth is not None
        return booth

    def _paid(self, name: str, books: Ledger, by_text: Records) -> npt.NDArray[np.bool_]:
        """Which records have paid, by the silo's own ledger, which knows each by its number."""
        held, dataset = self.own[name], sha256(name.encode()).hex()
        contents = ((sha256(str((at, one)).encode()), None) for at, one in enumerate(held))
        known = books.identify(contents)
        first, last = max(0, self.poor), len(held) + min(0, self.poor)
        places = np.arange(len(held))
        poor = ((places < first) | (places >= last)) & (name == SILOS[0])
        if poor.any():
            prepay(books, self.study, known.only(poor), dataset, "an older study's")
        return prepay(books, self.study, known, dataset, by_text.key)

    def canvass(self, asker: str = SERVER) -> Canvass:
        """The asker's side."""
        return Canvass(self.study, RUN, self.keys[asker], self.roster, self.logs[asker])

    def ask(
        self, asker: str = SERVER, text: str = TOPIC, choices: tuple[str, ...] = CHOICES
    ) -> Opinion:
        """A whole question, honestly carried."""
        return carried(self, self.canvass(asker), asker, text, choices)


_SLOWEST: Final = "a" + "\u0301" * 15 + "\u0316" * 15 + " "
"""The most accents on one letter that a silo takes, in the order that takes longest to sort."""


def longest_choices(number: int = MOST_CHOICES, room: int = 2048) -> tuple[str, ...]:
    """Choices of a poll of the longest kind, of texts that take longest to bring into one form.

    Args:
        room: bytes that are left for the rest.
    """
    each = (Poll.LIMIT - room) // number - 8
    long = (_SLOWEST * (each // len(_SLOWEST.encode()) + 1)).encode()[:each]
    return tuple(f"{place} " + long.decode(errors="ignore") for place in range(number))


_BLIND: Final = frozenset({"poll", "header", "delivery", "ledger", "lists", "prepaid"})
"""Of evidence: digests of random numbers, and heads under the log's blind."""


def shown(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Entries of a log as a reader compares them with another's.

    Of a field that is random to the reader, which ones are equal.
    """
    numbers: dict[str, int] = {}
    plain = [msgspec.to_builtins(entry.what) for entry in entries]
    return [
        {k: numbers.setdefault(str(v), len(numbers)) if k in _BLIND else v for k, v in what.items()}
        for what in plain
    ]


def unchanged(silo: str, number: int, frame: bytes) -> bytes:
    """An honest carrier's :data:`Change`."""
    return frame


def carried(
    voters: Voters,
    canvass: Canvass,
    asker: str = SERVER,
    text: str = TOPIC,
    choices: tuple[str, ...] = CHOICES,
    change: Change = unchanged,
) -> Opinion:
    """Play a question, with a carrier that may change every frame on its way to a silo."""
    talk = Talk(voters, asker, change)
    try:
        return canvass.ask(text, choices, talk)
    finally:
        talk.close()


class Talk:
    """Carries one question. ``refused``: silo → why it stopped, in its own words."""

    def __init__(self, voters: Voters, asker: str, change: Change = unchanged) -> None:
        self._voters, self._asker, self._change = voters, asker, change
        self._open: dict[str, BoothConversation] = {}
        self._count: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.lengths: dict[str, list[int]] = {}

    def __call__(self, silo: str, frame: bytes) -> bytes:
        """The silo's answer to the frame as it arrives."""
        number = self._count.get(silo, 0)
        self._count[silo] = number + 1
        arrived = self._change(silo, number, frame)
        try:
            if arrived is None:
                raise SecureFedCoLLMError("no answer in time")
            if silo not in self._open:
                self._open[silo] = self._voters.booths[silo].open(self._asker)
            answer = self._open[silo].handle(arrived)
        except SecureFedCoLLMError as error:
            self.refused.setdefault(silo, error.message)
            raise
        self.lengths.setdefault(silo, []).append(len(answer))
        return answer

    def close(self) -> None:
        """Silos drop what is left."""
        for conversation in self._open.values():
            conversation.close()
