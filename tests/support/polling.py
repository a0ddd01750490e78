"""A consortium of four silos whose few records vote on questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from securefedcollm.aggregation.messages import sign
from securefedcollm.federation.questions.polls import make_poll
from securefedcollm.federation.questions.space import Space, space_of
from securefedcollm.federation.questions.voting import Booth
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.polling import Polls
from securefedcollm.study import Study
from securefedcollm.tuning.question import Question
from tests.support.small import small_study

ANSWERS = {
    "mode": "answers",
    "encoder": {"source": "path:slm", "layer": 0},
    "dimension": 6,
    "threshold": 0.95,
    "questions": 3,
    "epsilon": 40.0,
}
"""With so large an ε the noise is below one vote."""
COPIES = 5
"""Of every record of RECORDS, with another wrong choice each: noise never outvotes five."""
CHOICES = ("w50", "w51", "w52")


def record(words: str, answer: str, wrong: str = "w60") -> Question:
    return Question(words, (answer, wrong), 0)


def copies(words: str, answer: str) -> list[Question]:
    return [record(words, answer, f"w{60 + number}") for number in range(COPIES)]


RECORDS: Mapping[str, Sequence[Question]] = {
    "silo-1": [
        *copies("w1 w2 w3", "w50"),
        *copies("w2 w3 w1", "w51"),
        *copies("w20 w21", "w52"),
    ],
    "silo-2": [*copies("w3 w2 w1", "w50"), *copies("w30 w31 w32", "w51")],
    "silo-3": [*copies("w40 w41", "w50"), *copies("w1 w3 w2", "w70")],
    "silo-4": copies("w40 w42", "w50"),
}
"""The first question retrieves two kinds of silo-1, one of silo-2, and of silo-3 one whose answer
is none of the choices: the encoder is a mean, so the order of words does not count."""
QUESTION = "w2 w1 w3"


class Voters:
    """A study in a directory, its encoder, and every silo's records.

    Args:
        changes: of the section ``retrieval``.
        study: other changes of the study.
    """

    def __init__(self, directory: Path, study: Mapping[str, Any] | None = None, **changes: Any):
        directory.mkdir(exist_ok=True)
        self.data = directory
        privacy = {"epsilon": 40.0, "delta": 1e-5}
        files = {"train": "train.jsonl", "test": "test.jsonl", "public": 8, "per_silo": 20}
        base = {"silos": {"count": 4}, "task": {"data": files}, "privacy": privacy}
        given = {
            **base,
            "local": {"steps": 1, "batch_size": 10, "learning_rate": 0.01},
            **(study or {}),
            "retrieval": ANSWERS | changes,
        }
        self.study: Study = small_study(directory, **given)
        self.space: Space = space_of(self.study, directory)
        self.records = dict(RECORDS)

    def having(self, **records: Sequence[Question]) -> Voters:
        """The same with other records at some silos (``silo_1`` for ``silo-1``)."""
        voters = copy.copy(self)
        changed = {name.replace("_", "-"): own for name, own in records.items()}
        voters.records = self.records | changed
        return voters

    def polls(self, run: Path, asker: str = "server", **more: Any) -> Polls:
        """Everybody's roles in ``run``."""
        return Polls(
            self.study,
            records=self.records,
            asker=asker,
            directory=run,
            space=self.space,
            data=self.data,
            **more,
        )


def booth_of(polls: Polls, name: str = "silo-1") -> Booth:
    return polls._booths[name]


def votes(polls: Polls, question: str = QUESTION, choices: tuple[str, ...] = CHOICES) -> list[int]:
    return [round(vote / COPIES) for vote in polls.ask(question, choices).opinion.tally.votes]


def spent(run: Path) -> list[Any]:
    """What all but answers read in the ledger of silo-1: its charges, and ε of the worst record."""
    with Ledger(run / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        entries = ledger.entries()
        worst = [ledger.most_spent(entry).epsilon for entry in entries]
        return [[(e.counted, e.state, len(ledger.stored(e.about.records))) for e in entries], worst]


def charged(run: Path, name: str) -> list[int]:
    """How many different questions of records each question charged, oldest first."""
    (book,) = (run / "silos" / name).glob("ledger.answers-*.sqlite")
    with Ledger(book, name) as ledger:
        return [len(ledger.stored(e.about.records)) for e in ledger.entries() if e.counted]


def asked(polls: Polls, **changes: Any) -> bytes:
    """The frame of a new, signed poll of the first question, with other fields if need be."""
    canvass = polls._canvass
    poll = make_poll(canvass.study, canvass.run, canvass.key, QUESTION, CHOICES)
    return sign(msgspec.structs.replace(poll, **changes), canvass.key).encode()
