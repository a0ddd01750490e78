"""Accuracy and gold log-probability of a model on labelled questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from securefedcollm.errors import DataError
from securefedcollm.tuning.questions import (
    EncodedQuestions,
    Normalisation,
    by_length,
    choice_scores,
)
from securefedcollm.tuning.recipe import Progress, inference_mode, silent


@dataclass(frozen=True)
class GroupScore:
    """Accuracy in [0, 1] and mean log-probability (nats) of the right choice, over ``count``."""

    accuracy: float
    gold_log_prob: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """Per-question results, in question order, so that two models can be compared in pairs."""

    correct: npt.NDArray[np.bool_]  # [N]
    gold_log_prob: npt.NDArray[np.float32]  # [N]: log softmax over the choices
    groups: tuple[str, ...]

    def score(self, group: str | None = None) -> GroupScore:
        """The mean over one group, or over all questions."""
        chosen = np.array([group is None or g == group for g in self.groups])
        return GroupScore(
            accuracy=float(self.correct[chosen].mean()),
            gold_log_prob=float(self.gold_log_prob[chosen].mean(dtype=np.float64)),
            count=int(chosen.sum()),
        )

    def by_group(self) -> dict[str, GroupScore]:
        """Scores by group name, in the order of first appearance."""
        return {group: self.score(group) for group in dict.fromkeys(self.groups)}


def evaluate(
    model: nn.Module,
    data: EncodedQuestions,
    *,
    normalisation: Normalisation = "plain",
    batch_size: int = 64,
    progress: Progress = silent,
) -> Evaluation:
    """Answer every question with the choice of the highest score (ties: the first).

    Raises:
        DataError: a question has no answer.
    """
    if bool((data.answers < 0).any()):
        raise DataError(
            "a test question has no answer",
            where="test questions",
            hint="remove the questions without an answer",
        )
    stacked = torch.zeros(data.choice_mask.shape)
    done = 0
    with inference_mode(model):
        for rows, batch in by_length(data, batch_size):
            stacked[rows] = choice_scores(model, batch, normalisation).cpu()
            done += len(batch)
            progress(done, len(data), "evaluation")
    answers = data.answers.cpu()
    gold = F.log_softmax(stacked, dim=-1).gather(1, answers[:, None])[:, 0]
    correct = stacked.argmax(1) == answers
    return Evaluation(correct=correct.numpy(), gold_log_prob=gold.numpy(), groups=data.groups)
