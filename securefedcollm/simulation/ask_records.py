"""The front door to the silos' records: one question, on this machine or over the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.questions.polling import Opinion
from securefedcollm.federation.questions.polls import answers_of, claim_of
from securefedcollm.federation.roles import poll_from
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.votes import Tally
from securefedcollm.study import Study, load_study

Place = str | Path


@dataclass(frozen=True)
class Vote:
    """What the silos' records say to one question, as :func:`ask_records` learnt it.

    ``choice``: the one with most votes. ``votes``: of every choice, with noise of standard
    deviation ``sigma`` on each, so that one may be negative. ``doubt``: how often noise makes the
    first lead the second so far if they are equal. ``counted``: silos whose votes are in the sum,
    although nobody knows whether they had any; ``failed``: silo → why it is not. ``questions``: how
    many of these one record can answer within its budget of ``epsilon`` and ``delta``. ``sent`` and
    ``received``: bytes of all frames; ``seconds``: of the whole question. ``left_out``: silo → how
    many of its records had no budget left for answers, or no words, and cast no vote.
    Only whoever plays all roles is told that.
    """

    choice: str
    votes: Mapping[str, float]
    sigma: float
    doubt: float
    counted: Sequence[str]
    failed: Mapping[str, str]
    questions: int
    epsilon: float
    delta: float
    sent: int
    received: int
    seconds: float
    directory: Path
    left_out: Mapping[str, int] = field(default_factory=dict)

    def mixed(self, prior: Mapping[str, float], weight: float) -> dict[str, float]:
        """The choices' probabilities by a model of the asker's own, mixed with the votes.

        See :meth:`securefedcollm.privacy.votes.Tally.mixed`. It costs no privacy.

        Args:
            prior: choice → the model's probability.
            weight: of the votes, 0 to 1, chosen on other questions.
        """
        tally = Tally([*self.votes.values()], self.sigma, len(self.counted))
        shares = tally.mixed([prior[choice] for choice in self.votes], weight)
        return dict(zip(self.votes, shares.tolist(), strict=True))

    def bundle(self, out: Place | None = None) -> Path:
        """Write the evidence of all that was asked in this directory; the file's path.

        Args:
            out: default ``evidence.zip`` in the directory.
        """
        path = Path(out) if out is not None else self.directory / "evidence.zip"
        write_durably(path, make_bundle(self.directory))
        return path


def ask_records(
    question: str,
    choices: Sequence[str],
    study: Study | Place,
    *,
    records: Mapping[str, Place] | None = None,
    asker: str = "server",
    out: Place | None = None,
    data: Place | None = None,
    progress: Progress = silent,
) -> Vote:
    """Let all silos' records vote on a question, every role on this machine.

    The silos learn the question. Nobody learns a record, or what one silo's records voted: only the
    sum over all silos is opened, with noise. All records of a silo pay once, before the first
    question, in its ledger. One that has given all its answers is not retrieved any more.

    Args:
        question: words that the study's encoder knows.
        choices: 2 to 64 answers to choose from, none twice.
        study: with a section ``retrieval`` of ``mode: answers``; or the path of its file.
        records: silo → the file of its records, for every silo; default: those that the study deals
            out in a simulation.
        asker: ``server``, or a silo, which counts as one of the study's colluders.
        out: the run's directory; default ``runs/STUDY``. It may be that of a finished simulation of
            the same study, whose ledgers then go on.
        data: the directory of the study's data files and ``path:`` models.
        progress: called as ``progress(done, total, text)``.

    Raises:
        ConfigError: the study asks no records or has a roster, a name is none of its own, ``out``
            is of another study or in use, or question or choices will not do.
        DataError: a silo's records cannot be read or embedded, or the question has no words.
        BudgetExceeded: the study asks for more than a silo's owner pinned.
        ProtocolError: too few silos answered.
        StateError: a participant's file cannot be written; nothing was answered then.
    """
    from securefedcollm.federation.dealing import deal, read_records
    from securefedcollm.federation.questions.space import space_of
    from securefedcollm.simulation.polling import Polls

    agreed = _agreed(study, question, choices)
    directory = Path(out) if out is not None else Path("runs") / agreed.study
    place = None if data is None else Path(data)
    silos = (
        {name: read_records(agreed, Path(path)) for name, path in records.items()}
        if records
        else deal(agreed, place).silos
    )
    space = space_of(agreed, place, progress)
    about: dict[str, Any] = {"data": place, "progress": progress}
    with Polls(
        agreed, records=silos, asker=asker, directory=directory, space=space, **about
    ) as polls:
        asked = polls.ask(question, choices)
        found = asked.opinion, asked.seconds
        return _vote(agreed, found, choices, directory, polls.left_out)


def ask_records_from(
    home: Place, question: str, choices: Sequence[str], study: Study | Place
) -> Vote:
    """Let all silos' records vote on a question over the network, as a member of a signed study.

    The member's process that runs in ``home`` asks (``securefedcollm shelf serve``; at the server
    ``shelf relay``). It needs no encoder.

    Args:
        home: the member's directory.
        question, choices, study: as in :func:`ask_records`.

    Raises:
        ConfigError: question or choices will not do, no process runs in ``home``, or in its words,
            this member may not ask or too few silos answered.
        TransportError: the process has ended, or the server carries no questions.
    """
    agreed = _agreed(study, question, choices)
    opinion, seconds, run = poll_from(agreed, Path(home), question, choices)
    return _vote(agreed, (opinion, seconds), choices, run, {})


def _agreed(study: Study | Place, question: str, choices: Sequence[str]) -> Study:
    try:
        "".join((question, *choices)).encode()
    except UnicodeEncodeError:  # as of an argument's byte that is not UTF-8
        raise ConfigError(
            "is not valid Unicode", where="QUESTION", hint="write it in UTF-8"
        ) from None
    agreed = study if isinstance(study, Study) else load_study(study)
    answers_of(agreed)
    return agreed


def _vote(
    study: Study,
    asked: tuple[Opinion, float],
    choices: Sequence[str],
    directory: Path,
    left_out: Mapping[str, int],
) -> Vote:
    (opinion, seconds), (epsilon, delta) = asked, claim_of(study)
    return Vote(
        choice=choices[opinion.tally.choice],
        votes=dict(zip(choices, opinion.tally.votes, strict=True)),
        sigma=opinion.tally.sigma,
        doubt=opinion.tally.doubt,
        counted=opinion.survivors,
        failed=opinion.failed,
        questions=answers_of(study).questions,
        epsilon=epsilon,
        delta=delta,
        sent=opinion.sent,
        received=opinion.received,
        seconds=seconds,
        directory=directory,
        left_out=left_out,
    )
