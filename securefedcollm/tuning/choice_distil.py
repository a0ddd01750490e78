"""Distillation over the choices of a question: each model as a distribution over them.

The models need no tokens in common: with different tokenizers they score the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.tuning.head import without_adapter
from securefedcollm.tuning.plans import DistilLossPlan
from securefedcollm.tuning.questions import (
    PLAIN,
    EncodedQuestions,
    Scoring,
    by_length,
    choice_scores,
)
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.token_loss import Direction

_LOG_FLOOR = -1e4  # e to this is 0 in every float format


class ChoiceObjective:
    """The losses of both models on a part of a batch; see :mod:`securefedcollm.tuning.distil`.

    Cross-entropy is a mean over the labelled questions of a batch, the divergence over all of them.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: Sequence[EncodedQuestions],
        loss: DistilLossPlan,
        learns: tuple[bool, bool] = (True, True),
    ) -> None:
        """``learns``: which models learn; one that does not is only asked, and its term is 0."""
        self._models, self._data, self._loss, self._learns = models, data, loss, learns
        self._targets: Tensor | None = None
        self._weights: list[Tensor | None] = [None, None]
        self._earlier = self._before() if loss.retain else []
        if loss.freezes or (loss.weighting == "paced" and loss.kind != "none"):
            self._freeze()

    def _freeze(self) -> None:
        """The targets T of every question, [N, C], and how much it counts, [N], from both models
        as they are now."""
        loss, answers = self._loss, self._data[0].answers
        llm, slm = says = [self._says(which) for which in (0, 1)]
        if loss.kind == "entropy-pooled" or loss.kind == "dual-min-ce":
            self._targets = teacher_of(loss.kind, llm, slm, answers, loss.sharpness)
        if loss.weighting == "paced":
            for own in (0, 1):
                teacher = says[1 - own] if self._targets is None else self._targets
                self._weights[own] = paced(says[own], teacher, answers)

    def _before(self) -> list[Tensor]:
        """Each model's predictions of every question without its adapter: [N, C]."""
        found = []
        for which, model in enumerate(self._models):
            with without_adapter(model):
                found.append(self._says(which))
        return found

    def _says(self, which: int) -> Tensor:
        """One model's current predictions of every question, at τ: [N, C]."""
        return predict(
            self._models[which],
            self._data[which],
            scoring=self._loss.scorings[which],
            temperature=self._loss.temperature,
            batch_size=max(64, self._loss.micro_batch),
        )

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the questions ``part``, their share of the mean over ``batch``."""
        loss = self._loss
        labels = max(1, int((self._data[0].answers[batch] >= 0).sum()))
        asked = [data.select(part) for data in self._data]
        terms = []
        scores = [self._scores(which, asked[which]) for which in (0, 1)]
        for which, (questions, weights) in enumerate(zip(asked, self._weights, strict=True)):
            own, other = scores[which], scores[1 - which]
            if own is None or not self._learns[which]:
                terms.append(torch.zeros(()))
                continue
            term = supervised_loss(own, questions.answers.to(own.device)) / labels
            if self._targets is not None:
                teacher: Tensor | None = self._targets[part].to(own.device)
            elif loss.kind == "mutual-kl":
                assert other is not None
                teacher = F.softmax(other.detach().to(own.device) / loss.temperature, dim=-1)
            else:
                teacher = None
            if teacher is not None:
                count = None if weights is None else weights[part].to(own.device)
                apart = divergence(teacher, own, loss.temperature, loss.direction, count)
                term = term + loss.weight * apart / len(batch)
            if self._earlier:
                known = self._earlier[which][part].to(own.device)
                forgot = divergence(known, own, loss.temperature, "forward")
                term = term + loss.retain * forgot / len(batch)
            terms.append(term)
        return terms

    def _scores(self, which: int, asked: EncodedQuestions) -> Tensor | None:
        """One model's scores of the choices; None if nobody needs them."""
        learns = self._learns[which]
        if not learns and self._loss.kind != "mutual-kl":
            return None
        with torch.set_grad_enabled(learns):
            return choice_scores(self._models[which], asked, self._loss.scorings[which])


def predict(
    model: nn.Module,
    data: EncodedQuestions,
    *,
    scoring: Scoring = PLAIN,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """softmax(scores / τ) of every question: float32 [N, C], without gradients."""
    return F.softmax(all_scores(model, data, scoring, batch_size) / temperature, dim=-1)


def all_scores(
    model: nn.Module, data: EncodedQuestions, scoring: Scoring, batch_size: int
) -> Tensor:
    """Scores of the choices of every question, without gradients: float32 [N, C]; −∞ for none."""
    scores = torch.zeros(data.choice_mask.shape)
    with inference_mode(model):
        for rows, batch in by_length(data, batch_size):
            scores[rows] = choice_scores(model, batch, scoring).cpu()
    return scores


def teacher_of(
    loss: Literal["entropy-pooled", "dual-min-ce"],
    llm: Tensor,
    slm: Tensor,
    answers: Tensor,
    sharpness: float,
) -> Tensor:
    """The frozen target [N, C] that both models learn, made from both predictions."""
    if loss == "entropy-pooled":
        return entropy_pooled(llm, slm, sharpness)
    return better_teacher(llm, slm, answers)


def entropy_pooled(llm: Tensor, slm: Tensor, sharpness: float = 3.0) -> Tensor:
    """The mixture of two predictions [N, C] in which the surer one weighs more (see above)."""
    surer = torch.special.entr(slm).sum(-1) - torch.special.entr(llm).sum(-1)
    share = torch.sigmoid(sharpness * surer)[:, None]
    return share * llm + (1 - share) * slm


def better_teacher(llm: Tensor, slm: Tensor, answers: Tensor) -> Tensor:
    """For every question the whole prediction [N, C] of the better model (FedMKT's DualMinCE).

    The better model has the smaller cross-entropy on a labelled question, or the smaller entropy
    where there is no label. Both are of the predictions as given (at the temperature); the LLM
    wins ties.
    """
    at = answers.clamp_min(0)[:, None]
    worse = []
    for says in (llm, slm):
        surprise = -says.gather(1, at)[:, 0].log()
        worse.append(torch.where(answers >= 0, surprise, torch.special.entr(says).sum(-1)))
    return torch.where((worse[0] <= worse[1])[:, None], llm, slm)


def paced(own: Tensor, teacher: Tensor, answers: Tensor) -> Tensor:
    """The weight of every question for a model: p(1 - p), with mean 1 (PACED, arXiv 2603.11178).

    p is the probability that the model gives to the right choice, or, where it is not known, to the
    teacher's first choice. A question that a model is sure of, rightly or not, teaches it little.

    Args:
        own, teacher: probabilities [N, C].
        answers: int64 [N], -1 where there is none.

    Returns:
        [N]; ones if every weight would be 0.
    """
    first = torch.where(answers >= 0, answers, teacher.argmax(-1))
    p = own.gather(1, first[:, None])[:, 0]
    weights = p * (1 - p)
    mean = weights.mean()
    return weights / mean if bool(mean > 0) else torch.ones_like(weights)


def supervised_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy over the choices, summed over the labelled rows: a scalar."""
    return F.cross_entropy(scores, answers, ignore_index=-1, reduction="sum")


def divergence(
    teacher: Tensor,
    scores: Tensor,
    temperature: float,
    direction: Direction,
    weights: Tensor | None = None,
) -> Tensor:
    """τ² times a divergence of q = softmax(scores / τ) from ``teacher``, summed over the rows.

    Args:
        teacher: probabilities [B, C], constant.
        scores: own choice scores [B, C]; ``-inf`` marks a choice that does not exist.
        direction: ``forward`` KL(teacher‖q), ``reverse`` KL(q‖teacher), ``js`` Jensen–Shannon.
        weights: of the rows, [B]; None if all weigh 1.
    """
    # A missing choice has probability 0 on both sides; a finite log keeps 0·log 0 = 0, also in the
    # gradient, and the floor bounds the reverse divergence where the teacher underflows.
    log_q = F.log_softmax(scores / temperature, dim=-1).clamp_min(_LOG_FLOOR)
    log_teacher = teacher.log().clamp_min(_LOG_FLOOR)
    if direction == "js":
        log_mean = torch.logaddexp(log_q, log_teacher) - math.log(2.0)
        apart = (_kl(log_teacher, log_mean, weights) + _kl(log_q, log_mean, weights)) / 2
    elif direction == "reverse":
        apart = _kl(log_q, log_teacher, weights)
    else:
        apart = _kl(log_teacher, log_q, weights)
    return apart * temperature**2


def _kl(log_p: Tensor, log_q: Tensor, weights: Tensor | None) -> Tensor:
    apart = log_p.exp() * (log_p - log_q)
    return apart.sum() if weights is None else (apart.sum(-1) * weights).sum()
