"""The server's phase: LLM and SLM learn from each other on the public set.

Knowledge passes between the two models as distributions: over the choices of a prompt, or over the
whole vocabulary at every token of the answer, or of prompt and answer. The models may have
different tokenizers; over tokens they are then compared span by span
(:mod:`securefedcollm.tuning.spans`). Four losses:

``entropy-pooled`` (default)
    At the start of the phase, freeze for every prompt (or position) T = w·p_LLM + (1−w)·p_SLM with
    w = σ(s·(H_SLM − H_LLM)), H the entropy in nats: the surer model teaches, prompt by prompt. Both
    models minimise λ·D(T, p), plus cross-entropy where a prompt is labelled.
``dual-min-ce``
    The same with T the prediction of the better model alone, prompt by prompt (FedMKT, arXiv
    2406.02224): the one with the smaller cross-entropy, or entropy where there is no label.
``mutual-kl``
    FedCoLLM (arXiv 2411.11707, eq. 3 and 4): each model minimises its cross-entropy plus λ times
    the divergence from the other model's current prediction.
``none``
    Cross-entropy on the labelled prompts alone, each model by itself: the control that shows what
    the public labels do without any distillation.

The entropies and cross-entropies that choose a teacher are those of softmax(scores / τ), the
softened predictions that are taught. At τ = 1, the default, they are the models' own; at another τ
the other model may be the better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.tuning.adapters import AdapterLayout, select
from securefedcollm.tuning.choice_distil import (
    ChoiceObjective,
    predict,
    teacher_of,
)
from securefedcollm.tuning.questions import (
    PLAIN,
    EncodedQuestions,
    Scoring,
    shuffled_batches,
    sorted_by_length,
)
from securefedcollm.tuning.recipe import (
    STEADY,
    Pace,
    Progress,
    make_optimizer,
    silent,
    training_mode,
)
from securefedcollm.tuning.spans import SpanObjective
from securefedcollm.tuning.token_distil import Over, TokenObjective
from securefedcollm.tuning.token_loss import Direction
from securefedcollm.tuning.vocabulary import Vocabulary

DistillationLoss = Literal["entropy-pooled", "dual-min-ce", "mutual-kl", "none"]


@dataclass(frozen=True)
class DistilStep:
    """Metrics of one server step; the data are public."""

    step: int
    loss_llm: float
    loss_slm: float


class Objective(Protocol):
    """What a step minimises."""

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the rows ``part``, their share of the mean over ``batch``."""
        ...


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
    over: Literal["choices"] | Over = "choices",
    top_k: int | None = None,
    vocabularies: tuple[Vocabulary, Vocabulary] | None = None,
    weight: float = 1.0,
    temperature: float = 1.0,
    direction: Direction = "forward",
    sharpness: float = 3.0,
    scoring: Scoring = PLAIN,
    micro_batch: int = 256,
    pace: Pace = STEADY,
    on_step: Callable[[DistilStep], None] = lambda step: None,
    progress: Progress = silent,
) -> None:
    """Take ``steps`` Adam steps on both adapters, in place.

    Args:
        llm_data, slm_data: the same public questions, each in its model's tokens.
        over: the distributions that are compared: over the ``choices`` of a question, over the
            vocabulary at every token of the ``answer`` (of every choice, where there is no label),
            or at ``all`` tokens, the prompt's too.
        top_k: over tokens: keep of every frozen prediction only the so many most probable tokens.
        vocabularies: what the tokens of LLM and SLM stand for, if they may differ; then the data
            must have been encoded with their cuts.
        weight: λ, the factor of the distillation term.
        temperature: τ; both distributions are softmax(scores / τ), the term is scaled by τ².
        direction: D(T, p): ``forward`` KL(T‖p), ``reverse`` KL(p‖T), ``js`` their Jensen–Shannon
            divergence.
        sharpness: s of the pooling weight.
        micro_batch: questions in memory at a time; gradients are accumulated over a step's batch.

    Raises:
        ConfigError: nothing to learn from, or the two encodings differ in their questions.
        TrainingError: a loss became NaN or infinite.
    """
    labelled, unlabelled = _rows(llm_data, slm_data, use_unlabelled=loss != "none")
    models, data = (llm, slm), (llm_data, slm_data)
    optimizers = [
        make_optimizer("adam", select(llm, llm_layout), learning_rate_llm, pace.weight_decay),
        make_optimizer("adam", select(slm, slm_layout), learning_rate_slm, pace.weight_decay),
    ]
    generator = torch.Generator().manual_seed(seed)
    batches = _mixed_batches(labelled, unlabelled, batch_labelled, batch_unlabelled, generator)
    objective: Objective
    progress(0, steps, "distillation")  # what both models say takes its time too
    if over == "choices":
        targets = None
        if loss == "entropy-pooled" or loss == "dual-min-ce":
            llm_says, slm_says = (
                predict(
                    model,
                    questions,
                    scoring=scoring,
                    temperature=temperature,
                    batch_size=max(64, micro_batch),
                )
                for model, questions in zip(models, data, strict=True)
            )
            targets = teacher_of(loss, llm_says, slm_says, llm_data.answers, sharpness)
        objective = ChoiceObjective(
            models,
            data,
            targets=targets,
            mutual=loss == "mutual-kl",
            scoring=scoring,
            weight=weight,
            temperature=temperature,
            direction=direction,
        )
    elif vocabularies is not None and vocabularies[0] != vocabularies[1]:
        if top_k is not None:
            raise ConfigError(
                "the two models have different tokenizers; their targets are not shortened",
                where="distillation.top_k",
                hint="remove it",
            )
        objective = SpanObjective(
            models,
            data,
            vocabularies,
            loss=loss,
            over=over,
            sharpness=sharpness,
            weight=weight,
            temperature=temperature,
            direction=direction,
            batch_size=micro_batch,
        )
    else:
        objective = TokenObjective(
            models,
            data,
            loss=loss,
            over=over,
            top_k=top_k,
            sharpness=sharpness,
            weight=weight,
            temperature=temperature,
            direction=direction,
            batch_size=micro_batch,
        )
    with training_mode(llm, slm, seed=seed):
        for step in range(steps):
            rows = next(batches)
            losses = [0.0, 0.0]
            for part in torch.split(sorted_by_length(llm_data, rows), micro_batch):
                for i, term in enumerate(objective.terms(rows, part)):
                    torch.autograd.backward(term)
                    losses[i] += term.item()
            if not all(map(math.isfinite, losses)):
                raise TrainingError(
                    f"a distillation loss of step {step} is not finite",
                    hint="lower distillation.learning_rate_llm and learning_rate_slm",
                )
            rates = (learning_rate_llm, learning_rate_slm)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                pace.set(optimizer, rate, step)
                optimizer.step()
                optimizer.zero_grad()
            on_step(DistilStep(step, losses[0], losses[1]))
            progress(step + 1, steps, "distillation")


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
