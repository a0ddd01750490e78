"""Members whose records answer each other's questions over the network: what a silo agrees to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.aggregation import TRANSITIONS
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.questions.answering import (
    OwnRecords,
    answers_sizes,
    slot_of,
)
from securefedcollm.federation.questions.counter import poll_process
from securefedcollm.federation.questions.polling import Opinion
from securefedcollm.federation.questions.polls import (
    answers_of,
    answers_study,
    check_poll,
    claim_of,
)
from securefedcollm.federation.questions.prepaid import (
    able_to_prepay,
    answers_ledger,
    prepayments,
    whole_claim,
)
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.roles.member import LEDGER, Member, run_in
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.study import Study, digest

if TYPE_CHECKING:
    from securefedcollm.federation.questions.records import Known
    from securefedcollm.tuning.question import Question
    from securefedcollm.tuning.recipe import Progress


@dataclass(frozen=True)
class AnswerTerms:
    """What an operator agrees to by letting records answer members' questions.

    Adversary: the author of the study and the askers. The silo's machine computes all of this from
    its own records and ledger and the signed study. ε is that of the record that has spent most, at
    the pinned δ, over all studies of this ledger.
    """

    study: str
    digest: str
    server: str
    askers: list[str]
    records: int
    left_out: int
    """Records of the file that cannot pay. They cast no vote, and no member is told."""
    reader: str
    threshold: float
    questions: int
    """That one record can answer."""
    votes: int
    """The most of this silo that count for one choice."""
    quorum: int
    colluders: int
    epsilon: float
    """Of all answers together, which every record pays beforehand."""
    delta: float
    spent: float
    """By other studies."""
    after: float
    """With the answers, at worst, of those records that can pay."""
    budget: float
    budget_delta: float
    pinned: bool
    """Whether the owner, or an earlier study, pinned the budget; else this study would."""
    slot: float
    """Seconds, at whose multiples replies leave."""


class RecordBooth:
    """A silo's records before and after its operator agreed. A context manager: it opens ledgers.

    Args:
        questions: the records.
    """

    def __init__(self, member: Member, questions: Sequence[Question]) -> None:
        from securefedcollm.federation.questions.records import known_of

        self._member, self._questions = member, questions
        self._files = ExitStack()
        with ExitStack() as failing:
            failing.callback(self._files.close)
            self._ledger = self._files.enter_context(Ledger(member.ledger, member.name))
            place = answers_ledger(member.ledger, answers_study(member.study))
            self._answers = self._files.enter_context(Ledger(place, member.name))
            self._known: Known = known_of(member.study, questions, self._ledger, self._answers)
            failing.pop_all()

    def __enter__(self) -> RecordBooth:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def terms(self) -> AnswerTerms:
        """What agreeing means. Charges nothing.

        Raises:
            BudgetExceeded: the study asks for more than the owner pinned.
        """
        from securefedcollm.federation.questions.records import budget_of

        member, study, known = self._member, self._member.study, self._known
        plan, (epsilon, delta) = answers_of(study), claim_of(study)
        book, ledger = known.by_text.key, self._ledger
        able = able_to_prepay(ledger, study, known.own, known.dataset, book)
        own = {e.about.study for e in prepayments(ledger, answers_study(study), book)}
        budget = Budget(*budget_of(study))
        before = ledger.standing(known.own, [known.dataset], besides=own, budget=budget)
        after = before.worst
        if able.any():
            payers = known.own.only(able)
            whole = [whole_claim(study)]
            after = max(
                after, ledger.standing(payers, besides=own, plus=whole, budget=budget).worst
            )
        return AnswerTerms(
            study=study.study,
            digest=digest(study).hex(),
            server=next(p.name for p in study.roster if p.role == "server"),
            askers=[SERVER, *(member.roster.names if study.silos.colluders else ())],
            records=len(known.own),
            left_out=len(known.own) - int(able.sum()),
            reader=plan.reader,
            threshold=plan.threshold or 0.0,
            questions=plan.questions,
            votes=1 if plan.reader == "model" else plan.votes,
            quorum=study.quorum,
            colluders=study.silos.colluders,
            epsilon=epsilon,
            delta=delta,
            spent=float(before.worst),
            after=float(after),
            budget=before.budget.epsilon,
            budget_delta=before.budget.delta,
            pinned=ledger.pinned is not None,
            slot=slot_of(study),
        )

    def open(self, data: Path | None, progress: Progress) -> OwnRecords:
        """Pay for the answers, and be ready to give them: its operator has agreed.

        Args:
            data: directory of the study's ``path:`` models and files.

        Raises:
            BudgetExceeded: the study asks for more than the owner pinned.
            ConfigError, DataError: encoder, model or a record will not do.
        """
        from securefedcollm.federation.questions.records import (
            embed_alone,
            load_reader,
            pin_both,
            reader_of,
            shelf_of,
        )
        from securefedcollm.federation.questions.space import space_of

        member, study = self._member, self._member.study
        space = space_of(study, data, progress)
        model = load_reader(study, data, member.run / "adapters" / "slm")
        pin_both(study, self._ledger, self._answers)
        shelf = shelf_of(study, self._questions, space, self._ledger, self._answers, progress)
        self._link()
        return OwnRecords(
            shelf,
            partial(embed_alone, space),
            reader_of(study, self._questions, model),
            self._answers,
            self._ledger,
        )

    def _link(self) -> None:
        """Where `audit bundle` looks for the two ledgers."""
        member = self._member
        place = make_directory(member.run / "silos" / member.name)
        answers = answers_ledger(member.ledger, answers_study(member.study))
        for link, book in ((place / LEDGER, member.ledger), (place / answers.name, answers)):
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(book, place))


def poll_from(
    study: Study, home: Path, question: str, choices: Sequence[str]
) -> tuple[Opinion, float, Path]:
    """Ask records over the network, through the process that runs in a member's home.

    Returns:
        what they say, the seconds that it took, and the study's directory in the home, which has
        this member's evidence.

    Raises:
        ConfigError: no proper question, no process runs there, this member may not ask, or in the
            process' words, too few silos answered.
        TransportError: the process has ended, or the server carries no questions.
    """
    check_poll(question, choices)
    run = run_in(home, study)
    patience = (2 * (1 + len(TRANSITIONS)) + 1) * answers_sizes(study).seconds
    started = time.perf_counter()
    opinion = poll_process(run, question, choices, patience)
    return opinion, time.perf_counter() - started, run
