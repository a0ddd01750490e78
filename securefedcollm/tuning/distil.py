"""The server's phase: LLM and SLM learn from each other on the public set.

Knowledge passes between the two models as distributions over the choices of public prompts, so the
models may have different tokenizers. Three losses:

``entropy-pooled`` (default)
    At the start of the phase, freeze for every prompt T = w·p_LLM + (1−w)·p_SLM with
    w = σ(s·(H_SLM − H_LLM)), H the entropy in nats: the surer model teaches, prompt by prompt. Both
    models minimise λ·KL(T‖p), plus cross-entropy where a prompt is labelled.
``mutual-kl``
    FedCoLLM (arXiv 2411.11707, eq. 3 and 4): each model minimises its cross-entropy plus λ times
    the divergence from the other model's current prediction.
``none``
    Cross-entropy on the labelled prompts alone, each model by itself: the control that shows what
    the public labels do without any distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.tuning.adapters import AdapterLayout, select
from securefedcollm.tuning.questions import (
    EncodedQuestions,
    Normalisation,
    by_length,
    choice_scores,
    shuffled_batches,
    sorted_by_length,
)
from securefedcollm.tuning.recipe import (
    Progress,
    inference_mode,
    make_optimizer,
    silent,
    training_mode,
)

DistillationLoss = Literal["entropy-pooled", "mutual-kl", "none"]
Direction = Literal["forward", "reverse", "js"]


_LOG_FLOOR = -1e4  # e to this is 0 in every float format


@dataclass(frozen=True)
class DistilStep:
    """Metrics of one server step; the data are public."""

    step: int
    loss_llm: float
    loss_slm: float


def distil(
    llm: nn.Module,
    slm: nn.Module,
    llm_layout: AdapterLayout,
    slm_layout: AdapterLayout,
    llm_data: EncodedQuestions,
    slm_data: EncodedQuestions,
    *,
    steps: int,
    batch_labelled: int,
    batch_unlabelled: int,
    learning_rate_llm: float,
    learning_rate_slm: float,
    seed: int,
    loss: DistillationLoss = "entropy-pooled",
    weight: float = 1.0,
    temperature: float = 1.0,
    direction: Direction = "forward",
    sharpness: float = 3.0,
    normalisation: Normalisation = "plain",
    micro_batch: int = 256,
    on_step: Callable[[DistilStep], None] = lambda step: None,
    progress: Progress = silent,
) -> None:
    """Take ``steps`` Adam steps on both adapters, in place.

    Args:
        llm_data, slm_data: the same public questions, each in its model's tokens.
        weight: λ, the factor of the distillation term.
        temperature: τ; both distributions are softmax(scores / τ), the term is scaled by τ².
        direction: for ``mutual-kl``: ``forward`` KL(peer‖own), ``reverse`` KL(own‖peer), ``js``
            their Jensen–Shannon divergence.
        sharpness: s of the pooling weight.

    Raises:
        ConfigError: nothing to learn from, or the two encodings differ in their questions.
        TrainingError: a loss became NaN or infinite.
    """
    labelled, unlabelled = _rows(llm_data, slm_data, use_unlabelled=loss != "none")
    pairs = [
        _Pair(llm, llm_data, make_optimizer("adam", select(llm, llm_layout), learning_rate_llm)),
        _Pair(slm, slm_data, make_optimizer("adam", select(slm, slm_layout), learning_rate_slm)),
    ]
    targets = None
    if loss == "entropy-pooled":
        llm_says, slm_says = (
            predict(
                p.model,
                p.data,
                normalisation=normalisation,
                temperature=temperature,
                batch_size=max(64, micro_batch),
            )
            for p in pairs
        )
        targets = entropy_pooled(llm_says, slm_says, sharpness)
    generator = torch.Generator().manual_seed(seed)
    batches = _mixed_batches(labelled, unlabelled, batch_labelled, batch_unlabelled, generator)
    with training_mode(llm, slm, seed=seed):
        for step in range(steps):
            rows = next(batches)
            labels = max(1, int((llm_data.answers[rows] >= 0).sum()))
            losses = [0.0, 0.0]
            for part in torch.split(sorted_by_length(llm_data, rows), micro_batch):
                batch = [p.data.select(part) for p in pairs]
                scores = [
                    choice_scores(p.model, b, normalisation)
                    for p, b in zip(pairs, batch, strict=True)
                ]
                for i in (0, 1):
                    term = supervised_loss(scores[i], batch[i].answers) / labels
                    if targets is not None:
                        apart = divergence(targets[part], scores[i], temperature, "forward")
                        term = term + weight * apart / len(rows)
                    elif loss == "mutual-kl":
                        peer = F.softmax(scores[1 - i].detach() / temperature, dim=-1)
                        apart = divergence(peer, scores[i], temperature, direction)
                        term = term + weight * apart / len(rows)
                    torch.autograd.backward(term)
                    losses[i] += term.item()
            if not all(map(math.isfinite, losses)):
                raise TrainingError(
                    f"a distillation loss of step {step} is not finite",
                    hint="lower distillation.learning_rate_llm and learning_rate_slm",
                )
            for p in pairs:
                p.optimizer.step()
                p.optimizer.zero_grad()
            on_step(DistilStep(step, losses[0], losses[1]))
            progress(step + 1, steps, "distillation")


def predict(
    model: nn.Module,
    data: EncodedQuestions,
    *,
    normalisation: Normalisation = "plain",
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """softmax(scores / τ) of every question: float32 [N, C], without gradients."""
    scores = torch.zeros(data.choice_mask.shape)
    with inference_mode(model):
        for rows, batch in by_length(data, batch_size):
            scores[rows] = choice_scores(model, batch, normalisation).cpu()
    return F.softmax(scores / temperature, dim=-1)


def entropy_pooled(llm: Tensor, slm: Tensor, sharpness: float = 3.0) -> Tensor:
    """The mixture of two predictions [N, C] in which the surer one weighs more (see above)."""
    surer = torch.special.entr(slm).sum(-1) - torch.special.entr(llm).sum(-1)
    share = torch.sigmoid(sharpness * surer)[:, None]
    return share * llm + (1 - share) * slm


def supervised_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy over the choices, summed over the labelled rows: a scalar."""
    return F.cross_entropy(scores, answers, ignore_index=-1, reduction="sum")


def divergence(teacher: Tensor, scores: Tensor, temperature: float, direction: Direction) -> Tensor:
    """τ² times a divergence of q = softmax(scores / τ) from ``teacher``, summed over the rows.

    Args:
        teacher: probabilities [B, C], constant.
        scores: own choice scores [B, C]; ``-inf`` marks a choice that does not exist.
        direction: ``forward`` KL(teacher‖q), ``reverse`` KL(q‖teacher), ``js`` Jensen–Shannon.
    """
    # A missing choice has probability 0 on both sides; a finite log keeps 0·log 0 = 0, also in the
    # gradient, and the floor bounds the reverse divergence where the teacher underflows.
    log_q = F.log_softmax(scores / temperature, dim=-1).clamp_min(_LOG_FLOOR)
    log_teacher = teacher.log().clamp_min(_LOG_FLOOR)
    if direction == "js":
        log_mean = torch.logaddexp(log_q, log_teacher) - math.log(2.0)
        apart = (_kl(log_teacher, log_mean) + _kl(log_q, log_mean)) / 2
    elif direction == "reverse":
        apart = _kl(log_q, log_teacher)
    else:
        apart = _kl(log_teacher, log_q)
    return apart * temperature**2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


@dataclass(frozen=True)
class _Pair:
    """One of the two models with its encoding of the public questions."""

    model: nn.Module
    data: EncodedQuestions
    optimizer: torch.optim.Optimizer


def _rows(
    llm_data: EncodedQuestions, slm_data: EncodedQuestions, *, use_unlabelled: bool
) -> tuple[Tensor, Tensor]:
    """Row numbers of the labelled and of the usable unlabelled questions."""
    if not torch.equal(llm_data.answers, slm_data.answers):
        raise ConfigError(
            "the two models were given different public questions",
            where="distillation",
            hint="encode one list of questions for both models",
        )
    labelled = torch.nonzero(llm_data.answers >= 0)[:, 0]
    unlabelled = torch.nonzero(llm_data.answers < 0)[:, 0]
    if not use_unlabelled:
        unlabelled = unlabelled[:0]
    if not len(labelled) + len(unlabelled):
        raise ConfigError(
            "the public set has nothing to learn from",
            where="distillation.loss",
            hint="label some public questions, or distil on unlabelled ones (entropy-pooled)",
        )
    return labelled, unlabelled


def _mixed_batches(
    labelled: Tensor, unlabelled: Tensor, n_labelled: int, n_unlabelled: int, g: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches with so many labelled and so many unlabelled rows."""
    streams = [
        (rows, shuffled_batches(len(rows), count, g))
        for rows, count in ((labelled, n_labelled), (unlabelled, n_unlabelled))
        if len(rows) and count
    ]
    if not streams:
        raise ConfigError(
            "every batch would be empty",
            where="distillation.batch_labelled",
            hint="give a batch size to a part of the public set that has questions",
        )
    while True:
        yield torch.cat([rows[next(order)] for rows, order in streams])
