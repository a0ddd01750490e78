"""Accuracy and gold log-probability of a model on labelled questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from securefedcollm.errors import DataError
from securefedcollm.tuning.adapters import load_adapter
from securefedcollm.tuning.class_scores import ClassScores, class_scores
from securefedcollm.tuning.classifiers import read_head
from securefedcollm.tuning.formats import Asking
from securefedcollm.tuning.frozen import with_prior
from securefedcollm.tuning.head import check_positions, check_vocabulary, output_logits
from securefedcollm.tuning.media import MEDIA
from securefedcollm.tuning.models import LoadedModel
from securefedcollm.tuning.packing import check_model
from securefedcollm.tuning.prompts import check_virtual
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import (
    PLAIN,
    EncodedQuestions,
    Scoring,
    by_length,
    choice_scores,
    encode,
)
from securefedcollm.tuning.recipe import Progress, inference_mode, silent
from securefedcollm.tuning.token_distil import positions_of, states_at
from securefedcollm.tuning.token_loss import CHUNK

_CLASSES: Final = frozenset({"classification", *MEDIA})
"""Kinds of record that all choose among the same classes."""


@dataclass(frozen=True)
class GroupScore:
    """Means over ``count`` questions.

    ``accuracy`` in [0, 1] and ``gold_log_prob`` (nats) of the right choice. Responses and
    texts have no choices: there they are the share of tokens that are the most probable one, and
    the log-probability per token. Then there is also ``perplexity`` (over all tokens), and
    ``exact_match``, the share of records that greedy decoding would write.
    """

    accuracy: float
    gold_log_prob: float
    count: int
    perplexity: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Per-question results, in question order, so that two models can be compared in pairs."""

    correct: npt.NDArray[np.float32]  # [N]: 0 or 1; of a text, the share of its tokens
    gold_log_prob: npt.NDArray[np.float32]  # [N]: log softmax over the choices; or per token
    groups: tuple[str, ...]
    tokens: npt.NDArray[np.int64] | None = None  # [N]: how many, where there are no choices
    scores: npt.NDArray[np.float32] | None = None  # [N, C]: of the choices, where there are some
    answers: npt.NDArray[np.int64] | None = None  # [N]: the right ones

    def score(self, group: str | None = None) -> GroupScore:
        """The mean over one group, or over all questions."""
        chosen = self._in(group)
        correct = self.correct[chosen].astype(np.float64)
        gold = self.gold_log_prob[chosen].astype(np.float64)
        score = GroupScore(float(correct.mean()), float(gold.mean()), int(chosen.sum()))
        if self.tokens is None:
            return score
        tokens = self.tokens[chosen]
        return replace(
            score,
            perplexity=float(np.exp(-(gold * tokens).sum() / tokens.sum())),
            exact_match=float((correct == 1).mean()),
        )

    def by_class(self, group: str | None = None) -> ClassScores:
        """For records that all choose among the same classes, in the same order."""
        if self.scores is None or self.answers is None:
            raise ValueError("there is nothing to choose from")
        chosen = self._in(group)
        return class_scores(self.scores[chosen].astype(np.float64), self.answers[chosen])

    def _in(self, group: str | None) -> npt.NDArray[np.bool_]:
        return np.array([group is None or g == group for g in self.groups])

    def by_group(self) -> dict[str, GroupScore]:
        """Scores by group name, in the order of first appearance."""
        return {group: self.score(group) for group in dict.fromkeys(self.groups)}


def evaluate(
    model: nn.Module,
    data: EncodedQuestions,
    *,
    scoring: Scoring = PLAIN,
    batch_size: int = 64,
    progress: Progress = silent,
) -> Evaluation:
    """Answer every question with the choice of the highest score (ties: the first).

    For responses and texts, predict every token from those before it.

    Raises:
        DataError: a question has no answer.
    """
    if bool((data.answers < 0).any()):
        raise DataError(
            "a test question has no answer",
            where="test questions",
            hint="remove the questions without an answer",
        )
    if data.generative:
        return _evaluate_tokens(model, data, batch_size, progress)
    stacked = torch.zeros(data.choice_mask.shape)
    done = 0
    with inference_mode(model):
        for rows, batch in by_length(data, batch_size):
            stacked[rows] = choice_scores(model, batch, scoring).cpu()
            done += len(batch)
            progress(done, len(data), "evaluation")
    answers = data.answers.cpu()
    gold = F.log_softmax(stacked, dim=-1).gather(1, answers[:, None])[:, 0]
    correct = stacked.argmax(1) == answers
    return Evaluation(
        correct=correct.float().numpy(),
        gold_log_prob=gold.numpy(),
        groups=data.groups,
        scores=stacked.numpy(),
        answers=answers.numpy(),
    )


def measure(
    loaded: LoadedModel,
    questions: Sequence[Question],
    *,
    adapter: Path | None,
    asking: Asking,
    scoring: Scoring,
    max_tokens: int,
    batch_size: int = 32,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Scores of a base model, or of one with an adapter: ``all`` and then by group, by name.

    A classification also has ``macro_f1`` and ``auroc`` (the mean over classes, one against the
    rest), ``classes`` (records, F1 and AUROC by label) and ``confusion`` (a row for each right
    label, a column for each predicted one); None means not defined (:mod:`.class_scores`).

    Raises:
        ConfigError: the adapter cannot be read or does not fit the model, or the model cannot score
            these records.
        DataError: a record has no answer, or does not fit into ``max_tokens``.
    """
    if asking.kind in MEDIA:
        read_head(loaded.model, questions[0].choices, adapter)
    check_model(loaded.model, "model")
    asked, form = asking.put(questions, loaded.tokenizer)
    data = encode(asked, loaded.tokenizer, max_tokens, form)
    check_vocabulary(loaded.model, loaded.tokenizer, data.tokens, data.targets)
    if scoring.needs_prior:  # the prior is the base's, so before the adapter
        data = with_prior(loaded.model, asked, data, loaded.tokenizer)
    model = loaded.model if adapter is None else load_adapter(loaded.model, adapter)
    check_virtual(model, "--adapter")
    longest = int(data.positions.max()) + 1
    check_positions(model, longest, "that is evaluated", "--max-tokens")
    result = evaluate(model, data, scoring=scoring, batch_size=batch_size, progress=progress)
    groups: dict[str, str | None] = {"all": None}
    if len(set(result.groups)) > 1:
        groups |= {group: group for group in dict.fromkeys(result.groups)}
    labels = questions[0].choices if asking.kind in _CLASSES else ()
    return {name: _shown(result, group, labels) for name, group in groups.items()}


def _shown(result: Evaluation, group: str | None, labels: Sequence[str]) -> dict[str, Any]:
    score = asdict(result.score(group))
    shown = {name: value for name, value in score.items() if value is not None}
    if not labels:
        return shown
    found = result.by_class(group)
    classes = [
        {"label": label, "count": sum(row), "f1": f1, "auroc": auroc}
        for label, row, f1, auroc in zip(
            labels, found.confusion, found.f1, found.auroc, strict=True
        )
    ]
    return shown | {
        "macro_f1": found.macro_f1,
        "auroc": found.macro_auroc,
        "classes": classes,
        "confusion": found.confusion,
    }


def _evaluate_tokens(
    model: nn.Module, data: EncodedQuestions, batch_size: int, progress: Progress
) -> Evaluation:
    """See :class:`GroupScore`."""
    positions = positions_of(data, "answer")
    counts = positions.starts.diff()
    right, gold = torch.zeros(len(positions.at)), torch.zeros(len(positions.at))
    head, done = output_logits(model), 0
    with inference_mode(model):
        for rows, batch in by_length(data, batch_size):
            index, local = positions.of(rows)
            states = states_at(model, batch, local, positions.at[index])
            for where in torch.split(torch.arange(len(index)), CHUNK):
                log_p = F.log_softmax(head(states[where.to(states.device)]), dim=-1).cpu()
                wanted = positions.gold[index[where]]
                gold[index[where]] = log_p.gather(1, wanted[:, None])[:, 0]
                right[index[where]] = (log_p.argmax(1) == wanted).float()
            done += len(batch)
            progress(done, len(data), "evaluation")
    owner = torch.repeat_interleave(torch.arange(len(data)), counts)
    sums = torch.zeros(2, len(data), dtype=torch.float64).index_add_(
        1, owner, torch.stack([right, gold]).double()
    )
    means = (sums / counts).float().numpy()
    return Evaluation(means[0], means[1], data.groups, counts.numpy())
