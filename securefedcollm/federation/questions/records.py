"""A silo's records as they meet a question: embedded one by one, known to the ledger, and read.

Importing this module imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import DataError
from securefedcollm.federation.cotuning import Holdings
from securefedcollm.federation.questions.polls import Poll, answers_of, claim_of, votes_of
from securefedcollm.federation.questions.prepaid import begin_answering, paying, prepay
from securefedcollm.federation.questions.space import Space
from securefedcollm.federation.questions.voting import (
    Reader,
    Reading,
    RecordShelf,
    count_labels,
)
from securefedcollm.federation.tuned import Tuned
from securefedcollm.primitives import sha256
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.retrieval.nearest import RecordIndex
from securefedcollm.study import Study
from securefedcollm.study.config import Task
from securefedcollm.tuning.content import folded
from securefedcollm.tuning.formats import CLASSIFY, QUESTION
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import Progress, silent

log = logging.getLogger(__name__)


def embed_alone(space: Space, text: str) -> npt.NDArray[np.float64]:
    """The unit vector of one text, [d].

    By itself: in a batch a text's last bits depend on the length of the others.

    Raises:
        DataError: it has no words that the encoder knows.
    """
    vector: npt.NDArray[np.float64] = space.embed([folded(text)])[0]
    return vector


def frame_of(task: Task) -> tuple[str, str]:
    """What stands before and after the question in a record's prompt that a template made."""
    usual = {"multiple_choice": QUESTION, "classification": CLASSIFY}
    before, _, after = (task.template or usual.get(task.rows, "{}")).partition("{}")
    return before, after


def bare(prompt: str, frame: tuple[str, str]) -> str:
    """The question in a record's prompt, as an asker would put it: without the template."""
    before, after = frame
    framed = prompt.startswith(before) and prompt.endswith(after)
    inside = prompt[len(before) : len(prompt) - len(after)]
    return inside if framed and inside.strip() else prompt


def index_records(
    space: Space,
    questions: Sequence[Question],
    progress: Progress = silent,
    frame: tuple[str, str] = ("", ""),
) -> tuple[RecordIndex, npt.NDArray[np.bool_]]:
    """The embeddings of the records' questions; and which have no words that the encoder knows,
    bool [n]. Those stand in the index with an embedding that says nothing.

    They are embedded in one Unicode form and with single spaces, as the ledger identifies them.
    Adversary: whoever learns from a silo that stays away that it has such a record.

    Args:
        frame: of a template that is not part of the question.

    Raises:
        DataError: there is no record, or none has words that the encoder knows.
    """
    if not questions:
        raise DataError("no records", where="records", hint="give at least one")
    found: dict[str, npt.NDArray[np.float64] | None] = {}
    texts: list[str] = []
    for number, question in enumerate(questions, start=1):
        text = folded(bare(question.prompt, frame))
        texts.append(text)
        if text not in found:
            try:
                found[text] = embed_alone(space, text)
            except DataError:
                found[text] = None
        progress(number, len(questions), "embedding records")
    some = next((vector for vector in found.values() if vector is not None), None)
    if some is None:
        raise DataError(
            "no record has words that the encoder knows", where="records", hint="is it their file?"
        )
    vectors = [found[text] for text in texts]
    wordless = np.array([vector is None for vector in vectors])
    return RecordIndex(np.array([some if v is None else v for v in vectors])), wordless


def pin_both(study: Study, ledger: Ledger, answers: Ledger) -> None:
    """Give both ledgers of a silo their budget, if they have none.

    Before any question: else a ledger would be pinned only once a record has paid.

    Args:
        ledger: the silo's own.
        answers: of the study's answers.
    """
    if ledger.pinned is None:
        ledger.pin(*budget_of(study))
    if answers.pinned is None:
        answers.pin(*claim_of(study))


def budget_of(study: Study) -> tuple[float, float]:
    """(ε, δ) that a silo's records get where nothing is pinned yet."""
    (epsilon, delta), privacy = claim_of(study), study.privacy
    assert privacy is not None  # study.retrievalchecks
    return max(epsilon, privacy.epsilon), delta


class Known(NamedTuple):
    """A silo's records as its two ledgers know them.

    ``own``: by the silo's, which all its studies share. ``by_text``: by that of the study's
    answers, which knows a record by what is embedded. Records of equal questions have one account
    there, and are always retrieved together. ``dataset``: fingerprint of the file.
    """

    own: Records
    by_text: Records
    dataset: str


def known_of(study: Study, questions: Sequence[Question], ledger: Ledger, answers: Ledger) -> Known:
    """The records, identified by both ledgers.

    Raises:
        StateError: a ledger's key is lost.
    """
    holdings, frame = Holdings(study, questions), frame_of(study.task)
    own = ledger.identify(holdings.contents(), also=holdings.also)
    ledger.recognise(own, [holdings.dataset, *holdings.also])
    texts = (folded(bare(question.prompt, frame)) for question in questions)
    by_text = answers.identify((sha256(text.encode()), None) for text in texts)
    return Known(own, by_text, holdings.dataset)


def shelf_of(
    study: Study,
    questions: Sequence[Question],
    space: Space,
    ledger: Ledger,
    answers: Ledger,
    progress: Progress = silent,
) -> RecordShelf:
    """A silo's records, of which those that can have paid for all the answers that they may give.

    Args:
        ledger: the silo's, which charges each of them once.
        answers: of the study's answers at this silo.

    Raises:
        BudgetExceeded: the study asks for more than the owner pinned.
        DataError: there is none, or none can be embedded.
        StateError: a ledger's key is lost.
        EvidenceError: the ledger of answers was put back to an older copy.
    """
    known = known_of(study, questions, ledger, answers)
    index, wordless = index_records(space, questions, progress, frame_of(study.task))
    if wordless.any():
        log.warning(
            "%s: %d of %d records have no words that the encoder knows; they cast no vote",
            *(ledger.owner, int(wordless.sum()), len(wordless)),
        )
    paid = prepay(ledger, study, known.own, known.dataset, known.by_text.key) & ~wordless
    # Reads what the ledger of answers has of these records, so that no question has to wait for it.
    paying(answers, study, known.by_text, known.dataset, votes_of(study, MOST_CHOICES).event())
    head = begin_answering(ledger, study, answers, known.by_text.key)
    return RecordShelf(index, known.by_text, known.dataset, paid, head)


def reader_of(study: Study, questions: Sequence[Question], model: Tuned | None = None) -> Reader:
    """What a silo makes of the records that a question retrieved, as the study says.

    Args:
        model: the SLM, with the run's adapter if there is one; for ``reader: model``.
    """
    if answers_of(study).reader == "labels":
        return count_labels([_label(question) for question in questions], folded)
    assert model is not None
    frame = ("", "") if study.task.data.builtin else frame_of(study.task)
    return ModelReader(model, questions, answers_of(study).fetched, frame)


def load_reader(study: Study, data: Path | None, adapter: Path) -> Tuned | None:
    """The SLM of ``reader: model``; None for the other reader.

    Args:
        adapter: of the run; it need not exist.

    Raises:
        ConfigError: the model cannot be loaded.
        StateError: the adapter is damaged.
    """
    if answers_of(study).reader == "labels":
        return None
    tuned = Tuned.load(study, study.models.slm, data=data)
    if adapter.exists():
        tuned.load_adapter(adapter)
    return tuned


class ModelReader:
    """The reader ``model``: the silo's SLM reads the best of the retrieved records and answers.

    The adapter is the run's: what the study released already. The model answers whether something
    was retrieved or not, so that this takes a pass either way; without a record its answer is not
    sent.

    Args:
        most: the most records that it reads, best last. The prompt loses its beginning where the
            study's ``task.max_tokens`` has no room.
        frame: of the template that the question is put in.
    """

    def __init__(
        self,
        model: Tuned,
        questions: Sequence[Question],
        most: int,
        frame: tuple[str, str] = ("", ""),
    ) -> None:
        self._model, self._questions, self._most = model, questions, most
        self._frame = frame

    def __call__(self, poll: Poll) -> Reading:
        """What reads records for this poll."""
        return partial(self._read, poll)

    def _read(
        self, poll: Poll, retrieved: npt.NDArray[np.bool_], similarities: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """The SLM's distribution over the choices; zeros where nothing was retrieved."""
        order = np.argsort(-similarities, kind="stable")
        best: list[int] = order[retrieved[order]][: self._most].tolist()
        texts = [_sentence(self._questions[at]) for at in reversed(best)]
        put = poll.question.join(self._frame)
        asked = Question("\n".join([*texts, put]), poll.choices, answer=0)
        scores = self._model.answers(self._model.encode([asked])).scores
        assert scores is not None  # there are choices
        shares = np.exp(scores[0].astype(np.float64) - float(scores[0].max()))
        return shares / shares.sum() if best else np.zeros(len(poll.choices))


def _label(question: Question) -> str:
    if question.answer is None or not question.prompt:
        return ""
    return folded(question.choices[question.answer])


def _sentence(question: Question) -> str:
    return f"{question.prompt} {_label(question)}".strip()
