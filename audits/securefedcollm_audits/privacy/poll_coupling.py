"""Coupling audit of answers: does one record change what the others answer, or what a silo shows?

Adversary: the asker. It knows all records except one, chooses every question, and has all that
leaves a silo: opened sums, and replies, refusals, sizes and evidence. Only a sum may depend on the
unknown record, by one vote, under noise, and only where that record pays for it.

The audit plays the same questions against the silo's own records without and with one more, through
the product's own booths, ledgers and secure sum. It compares, question by question, which of the
*others* were retrieved and paid, and everything that leaves but the sum. Its control retrieves the
best k instead, as most programs do: there the added record must be found to move the others.

Imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.questions.answering import slot_of
from securefedcollm.federation.questions.polls import (
    Poll,
    answers_of,
    make_poll,
    votes_of,
)
from securefedcollm.federation.questions.prepaid import paying
from securefedcollm.federation.questions.records import bare, embed_alone, frame_of
from securefedcollm.federation.questions.space import Space, space_of
from securefedcollm.federation.questions.voting import count_labels
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.retrieval.nearest import RecordIndex
from securefedcollm.study import Study, study_from_tree
from securefedcollm.tuning.content import folded
from securefedcollm.tuning.question import Question
from securefedcollm_audits.privacy.finding import Finding
from securefedcollm_audits.protocol.poll_cohort import (
    RUN,
    SILOS,
    Held,
    Talk,
    Voters,
    longest_choices,
    shown,
)

RECORDS: Final = 24
ANSWERS: Final = 1
"""That one record can give in the audit, so that records are spent at once."""
_BEST: Final = 2
_LONG: Final = 4096
"""Characters of the longest question that is timed: more than an encoder reads."""

Bools = npt.NDArray[np.bool_]


class Seen(NamedTuple):
    """One question in one world. ``others``: the records that voted, but the added one.
    ``able``: which of the others can pay for another question. ``view``: all that leaves but the
    sum. ``seconds``: of the silo's slowest reply."""

    others: frozenset[int]
    able: tuple[bool, ...]
    view: object
    seconds: float


def audit(
    study: Study,
    *,
    data: Path | None = None,
    records: int = RECORDS,
    seed: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Play all cases, and the control.

    Args:
        records: of the first silo, which the added one may move.
        data: directory of the study's files.

    Raises:
        ConfigError: the study asks no records.
    """
    answers_of(study)
    silo = next(iter(deal(study, data).silos.values()))
    space = space_of(study, data)
    embed = lru_cache(maxsize=4096)(partial(embed_alone, space))
    held = [held_of(study, question) for question in silo[:records]]
    made = quick(study)
    cases = cases_of(held, np.random.default_rng(seed))
    moved, differ, slowest = 0, joins(made, cases[0], embed), 0.0
    for done, case in enumerate(cases):
        progress(done, len(cases) + 1, "questions")
        found = compare(made, case, embed)
        moved, differ = moved + found.moved, differ + found.shown
        slowest = max(slowest, found.slowest)
    own, longest = slowest_reply(made, [held_of(study, each) for each in silo], embed, space)
    slowest = max(slowest, longest)
    progress(len(cases), len(cases) + 1, "the control")
    control = compare(made, cases[0], embed, BestK).moved
    progress(len(cases) + 1, len(cases) + 1, "questions")
    asked = sum(len(case.questions) for case in cases)
    return Finding(
        audit="coupling",
        study=study,
        setting=f"answers: one record more among {len(held)}, {asked} questions",
        claimed=None,
        bound=None,
        delta=study.privacy.delta if study.privacy else 0.0,
        faults=faults_of(moved, differ, control, slowest / slot_of(study)),
        figures={
            "records": float(len(held)),
            "records timed": float(len(silo)),
            "questions": float(asked),
            "answers of others that moved": float(moved),
            "replies or evidence that differ": float(differ),
            "control, best k: answers of others that moved": float(control),
            "the poll by itself, s": own,
            "slowest reply, s": slowest,
            "slot, s": slot_of(study),
        },
    )


def faults_of(moved: int, differ: int, control: int, slots: float) -> list[str]:
    """A sentence for each; ``slots``: of the slowest reply."""
    faults = []
    if moved:
        faults.append(f"{moved} questions were answered, or paid, by other records because of one")
    if differ:
        faults.append(f"{differ} questions show one record in replies or evidence")
    if slots >= 1.0:
        faults.append("a reply took more than a slot, so its time shows how much was retrieved")
    if not control:
        faults.append(
            "the control, the best k records, moved no answer either, so this would notice nothing"
        )
    return faults


class Case(NamedTuple):
    """Records, one that may be added to them, and what is asked.

    ``poor``: the added one has spent its budget elsewhere.
    """

    name: str
    others: list[Held]
    added: Held
    questions: list[str]
    poor: bool = False


def cases_of(held: Sequence[Held], draw: np.random.Generator) -> list[Case]:
    """A record of words of its own, one of the same words as another, and one that cannot pay.

    Raises:
        ConfigError: there are too few records.
    """
    others = list(held)
    kinds = list(dict.fromkeys(one.question for one in others))
    if len(kinds) < 2:
        raise ConfigError("too few records", where="--records", hint="at least 2 that differ")
    first, then = (kinds[int(number)] for number in draw.choice(len(kinds), 2, replace=False))
    alone = Held(f"{first} {then}", others[-1].answer)
    same = Held(first, others[-1].answer)
    asked = [first, first, then]
    return [
        Case("words of its own", others, alone, [alone.question, *asked]),
        Case("the words of another", others, same, asked),
        Case("no budget left", others, alone, [alone.question, *asked], poor=True),
    ]


class Differences(NamedTuple):
    """Questions at which other records voted or paid otherwise; at which what leaves differs but
    for the sum; and seconds of the slowest reply."""

    moved: int
    shown: int
    slowest: float


def compare(
    study: Study,
    case: Case,
    embed: Callable[[str], Any],
    index: Callable[[npt.ArrayLike], RecordIndex] = RecordIndex,
) -> Differences:
    """Ask in both worlds, and compare question by question.

    Args:
        study: with few answers of a record, so that some are spent.
        embed: text → unit vector.
        index: vectors → what finds the records that a question retrieves.
    """
    worlds = [_play(study, case, embed, index, added=added) for added in (False, True)]
    pairs = list(zip(*worlds, strict=True))
    return Differences(
        sum(one[:2] != other[:2] for one, other in pairs),
        sum(one.view != other.view for one, other in pairs),
        max(one.seconds for pair in pairs for one in pair),
    )


def joins(study: Study, case: Case, embed: Callable[[str], Any]) -> int:
    """In how many ways the evidence of a silo that begins again shows what became of a record that
    joined its file meanwhile: against no record, one that can pay, and one that cannot."""
    seen = []
    for joined, poor in ((False, 0), (True, 0), (True, -1)):
        own = dict.fromkeys(SILOS, case.others[:1]) | {SILOS[0]: case.others}
        voters = Voters(own=own, given=study, embed=embed)
        voters.ask(text=case.questions[0])
        voters.own = own | ({SILOS[0]: [*case.others, case.added]} if joined else {})
        voters.poor = poor
        voters.restart()
        voters.ask(text=case.questions[0])
        seen.append(shown(voters.logs[SILOS[0]].entries)[1:])
    return sum(one != seen[0] for one in seen[1:])


class BestK(RecordIndex):
    """The control: the records that are most alike, however alike."""

    def retrieved(self, query: npt.ArrayLike, threshold: float) -> Bools:
        """The best of all."""
        found = np.zeros(len(self), dtype=np.bool_)
        found[np.argsort(-self.similarities(query), kind="stable")[:_BEST]] = True
        return found


class Everybody(RecordIndex):
    """For the longest time: every record is retrieved."""

    def retrieved(self, query: npt.ArrayLike, threshold: float) -> Bools:
        """All, after the same work."""
        return super().retrieved(query, threshold) | True


def slowest_reply(
    study: Study, held: Sequence[Held], embed: Callable[[str], Any], space: Space
) -> tuple[float, float]:
    """Seconds that a silo takes for the longest poll: first for its texts by themselves, then,
    within the slot, where it retrieves, charges and reads all of these records.

    Args:
        embed: of records.
    """
    own = dict.fromkeys(SILOS, held[:1]) | {SILOS[0]: held}
    voters = Voters(own=own, given=study, embed=embed, index=Everybody)
    booth = replace(
        voters.booths[SILOS[0]],
        embed=partial(embed_alone, space),
        read=count_labels([one.answer for one in held], folded),
    )
    question = " ".join(one.question for one in held)[:_LONG]
    choices = longest_choices(room=2048 + len(question.encode()))
    frame = make_poll(study, RUN, voters.keys[SERVER], question, choices).encode()
    conversation, began = booth.open(SERVER), time.perf_counter()
    answer = conversation.prepare(frame)
    slot = time.perf_counter()
    answer()
    ended = time.perf_counter()
    conversation.close()
    return slot - began, ended - slot


def _play(
    study: Study, case: Case, embed: Callable[[str], Any], index: Any, *, added: bool
) -> list[Seen]:
    """All questions in one world. The added record comes first, so that it shifts every number."""
    first = [case.added, *case.others] if added else list(case.others)
    own = dict.fromkeys(SILOS, case.others[:1]) | {SILOS[0]: first}
    voters = Voters(own=own, given=study, embed=embed, index=index, poor=int(case.poor and added))
    return [_ask(voters, question, first, int(added)) for question in case.questions]


def _ask(voters: Voters, question: str, held: Sequence[Held], shift: int) -> Seen:
    booth, read = voters.booths[SILOS[0]], list[int]()
    spying = replace(booth, read=partial(_spy, read, booth.read))
    voters.booths[SILOS[0]] = spying
    talk, size, longest = Talk(voters, SERVER), booth.evidence.size, [0.0]

    def carry(silo: str, frame: bytes) -> bytes:
        began = time.perf_counter()
        try:
            return talk(silo, frame)
        finally:
            if silo == SILOS[0]:
                longest[0] = max(longest[0], time.perf_counter() - began)

    choices = tuple(sorted({one.answer for one in held}))[:64]
    try:
        voters.canvass().ask(question, choices, carry)
    except SecureFedCoLLMError as error:
        talk.refused.setdefault("everybody", error.message)
    talk.close()
    voters.booths[SILOS[0]] = booth
    entries = shown(booth.evidence.entries)[size:]
    shelf, event = booth.shelf, votes_of(voters.study, 2).event()
    able = paying(booth.ledger, voters.study, shelf.known, shelf.dataset, event)
    return Seen(
        frozenset(at - shift for at in read if at >= shift),
        tuple(bool(one) for one in able[shift:]),
        (talk.lengths.get(SILOS[0]), dict(talk.refused), entries),
        longest[0],
    )


def held_of(study: Study, question: Question) -> Held:
    """A record as a question meets it."""
    label = "" if question.answer is None else question.choices[question.answer]
    return Held(folded(bare(question.prompt, frame_of(study.task))), folded(label))


def quick(study: Study) -> Study:
    """The study of four silos, in which a record soon is spent. Retrieval is the same, and the time
    is measured without the slot that hides it."""
    tree = study.tree
    tree.pop("roster", None)
    tree["silos"] = {"count": len(SILOS), "colluders": min(1, study.silos.colluders)}
    tree["local"]["reply_slot"] = 0.001
    tree["retrieval"] |= {"questions": ANSWERS, "reader": "labels", "fetched": 10}
    return study_from_tree(tree)


def _spy(read: list[int], real: Any, poll: Poll) -> Any:
    reading = real(poll)

    def watch(retrieved: Bools, similarities: Any) -> Any:
        read.extend(np.flatnonzero(retrieved).tolist())
        return reading(retrieved, similarities)

    return watch
