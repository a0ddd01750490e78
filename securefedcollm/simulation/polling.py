"""A question to the silos' records, with every role in this process.

Each party has its own directory with identity, evidence log and, at a silo, privacy ledger, as in a
simulation; so the run may be a finished simulation's, whose ledgers then go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from securefedcollm.aggregation import Roster
from securefedcollm.evidence.ledger import VOTES, check_anchors
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.plan import check_names, silo_names
from securefedcollm.federation.questions.answering import require_asker
from securefedcollm.federation.questions.begun import Everybody, begin_log
from securefedcollm.federation.questions.polling import Canvass, Opinion
from securefedcollm.federation.questions.polls import answers_study, votes_of
from securefedcollm.federation.questions.prepaid import answers_ledger
from securefedcollm.federation.questions.records import (
    embed_alone,
    load_reader,
    pin_both,
    reader_of,
    shelf_of,
)
from securefedcollm.federation.questions.space import Space
from securefedcollm.federation.questions.voting import Booth, BoothConversation
from securefedcollm.federation.records import SERVER
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.simulation.asking import (
    begun,
    check_asker,
    check_keys,
    held,
    home_of,
)
from securefedcollm.simulation.cohort import identity_at, same_ledger
from securefedcollm.study import Study, digest
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import Progress, silent


@dataclass(frozen=True)
class Polled:
    """A question's result. ``seconds``: of all of it, without loading models and records."""

    opinion: Opinion
    seconds: float


class Polls:
    """The participants of a study in one directory, for questions to their records.

    A context manager; closing it closes the participants' files.

    Args:
        records: every silo's, by its name.
        asker: who asks: ``server``, or a silo, which counts as one of the study's colluders.
        directory: of the run; made if absent.
        space: the study's encoder and reduction.
        data: directory of the study's ``path:`` models.
        ledgers: where the silos' privacy ledgers are; None: each in the silo's own directory.

    Raises:
        ConfigError: the study does not ask records, has a roster, a name is none of the study's, or
            the directory belongs to another study or is in use.
        DataError: a silo has no records, or one that cannot be embedded.
        EvidenceError: a ledger is older than its silo's evidence.
        StateError: a file cannot be written.
    """

    def __init__(
        self,
        study: Study,
        *,
        records: Mapping[str, Sequence[Question]],
        asker: str,
        directory: Path,
        space: Space,
        data: Path | None = None,
        ledgers: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        _check(study, records, asker)
        names = silo_names(study)
        self._study, self._asker = study, asker
        self._files = ExitStack()
        with ExitStack() as failing:
            failing.callback(self._files.close)
            self._files.enter_context(held(directory))
            run = begun(directory, study)
            keys = {n: identity_at(home_of(directory, n), n) for n in [SERVER, *names]}
            roster = Roster({name: keys[name].public for name in names})
            everybody = Everybody(digest(study), roster, keys[SERVER].public)
            logs = {}
            for name in dict.fromkeys([asker, *names]):
                home = home_of(directory, name)
                logs[name] = begin_log(home, name, keys[name], run, everybody)
                self._files.callback(logs[name].close)
            model = load_reader(study, data, directory / "adapters" / "slm")
            self._booths: dict[str, Booth] = {}
            for name in names:
                ledger, answers = self._ledgers(directory, name, ledgers, logs[name])
                self._booths[name] = Booth(
                    study=study,
                    run=run,
                    name=name,
                    key=keys[name],
                    roster=roster,
                    askers={who: key.public for who, key in keys.items()},
                    shelf=shelf_of(study, records[name], space, ledger, answers, progress),
                    embed=partial(embed_alone, space),
                    read=reader_of(study, records[name], model),
                    ledger=answers,
                    evidence=logs[name],
                )
            self._canvass = Canvass(study, run, keys[asker], roster, logs[asker])
            failing.pop_all()

    def __enter__(self) -> Polls:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def left_out(self) -> dict[str, int]:
        """Silo → how many of its records cannot pay, and cast no vote; of silos that have any."""
        counts = {name: int((~booth.shelf.paid).sum()) for name, booth in self._booths.items()}
        return {name: count for name, count in counts.items() if count}

    def _ledgers(
        self, directory: Path, name: str, ledgers: Path | None, log: EvidenceLog
    ) -> tuple[Ledger, Ledger]:
        """The silo's ledger, and that of this study's answers, which is beside it."""
        book = same_ledger(home_of(directory, name), name, ledgers)
        ledger = self._files.enter_context(Ledger(book, name))
        check_anchors(log, ledger)
        place = answers_ledger(book, answers_study(self._study))
        answers = self._files.enter_context(Ledger(place, name))
        check_anchors(log, answers, VOTES)
        pin_both(self._study, ledger, answers)
        return ledger, answers

    def ask(self, question: str, choices: Sequence[str]) -> Polled:
        """Ask every silo.

        Raises:
            ConfigError: no question, or no proper choices.
            DataError: the question has no words that the encoder knows.
            BudgetExceeded: the study asks for more than a silo's owner pinned, at too many silos.
            ProtocolError: too few silos answered.
        """
        self._booths[next(iter(self._booths))].embed(question)  # before anybody is asked
        open_now: dict[str, BoothConversation] = {}

        def carry(silo: str, frame: bytes) -> bytes:
            if silo not in open_now:
                open_now[silo] = self._booths[silo].open(self._asker)
            return open_now[silo].handle(frame)

        started = time.perf_counter()
        try:
            opinion = self._canvass.ask(question, tuple(choices), carry)
        finally:
            for conversation in open_now.values():
                conversation.close()
        return Polled(opinion, time.perf_counter() - started)


def _check(study: Study, records: Mapping[str, Sequence[Question]], asker: str) -> None:
    check_keys(study)
    votes_of(study, MOST_CHOICES)  # refuses a study whose field has no room
    check_names(study, list(records), "records")
    check_asker(silo_names(study), asker)
    require_asker(study, asker, "--as")
