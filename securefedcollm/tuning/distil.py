"""The server's phase: LLM and SLM learn from each other on the public set.

Knowledge passes between the two models as distributions: over the choices of a prompt, or over the
whole vocabulary at every token of the answer, or of prompt and answer. The models may have
different tokenizers; over tokens they are then compared span by span
(:mod:`securefedcollm.tuning.spans`). Five losses:

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
``transfer``
    POST (arXiv 2506.16196): the LLM alone learns, over choices, what the SLM says with its adapter
    and what the adapter changes (:mod:`.transfer`). The SLM stays as it is.
``none``
    Cross-entropy on the labelled prompts alone, each model by itself: the control that shows what
    the public labels do without any distillation.

Both learn together, from the predictions of both at the start of the phase. Or one learns first,
and then the other learns from the updated one (labels to the strong teacher first: arXiv
2605.12483). A model that does not learn is only asked.

Over choices, each of the first three and ``none`` may have a further teacher (``retain``): the same
model without its adapter. In a study that continues earlier runs that is the earlier model.

The entropies and cross-entropies that choose a teacher are those of softmax(scores / τ), the
softened predictions that are taught. At τ = 1, the default, they are the models' own; at another τ
the other model may be the better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.tuning.adapters import AdapterLayout, select
from securefedcollm.tuning.choice_distil import ChoiceObjective
from securefedcollm.tuning.plans import DistilLossPlan, DistilPlan, Turns
from securefedcollm.tuning.questions import EncodedQuestions, shuffled_batches, sorted_by_length
from securefedcollm.tuning.recipe import Progress, make_optimizer, silent, training_mode
from securefedcollm.tuning.spans import SpanObjective
from securefedcollm.tuning.token_distil import TokenObjective
from securefedcollm.tuning.transfer import TransferObjective
from securefedcollm.tuning.vocabulary import Vocabulary

Pair = tuple[nn.Module, nn.Module]
"""The LLM and the SLM; every other pair of this module has the same order."""


@dataclass(frozen=True)
class DistilStep:
    """Metrics of one server step; the data are public. None for a model that did not learn."""

    step: int
    loss_llm: float | None
    loss_slm: float | None


class Objective(Protocol):
    """What a step minimises."""

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the rows ``part``, their share of the mean over ``batch``."""
        ...


def distil(
    models: Pair,
    layouts: tuple[AdapterLayout, AdapterLayout],
    data: tuple[EncodedQuestions, EncodedQuestions],
    plan: DistilPlan,
    *,
    seed: int,
    vocabularies: tuple[Vocabulary, Vocabulary] | None = None,
    on_step: Callable[[DistilStep], None] = lambda step: None,
    progress: Progress = silent,
) -> None:
    """Take ``plan.steps`` Adam steps on both adapters, in place.

    Args:
        models: LLM and SLM, in this order in every pair.
        data: the same public questions, each in its model's tokens.
        seed: of the batches and of dropout.
        vocabularies: what the tokens of both stand for, if they may differ; then the data must have
            been encoded with their cuts.

    Raises:
        ConfigError: nothing to learn from, or the two encodings differ in their questions.
        TrainingError: a loss became NaN or infinite.
    """
    rows = _rows(*data, use_unlabelled=plan.loss.kind != "none")
    turns = _TURNS[plan.order]
    total = plan.steps * len(turns)
    for number, learns in enumerate(turns):
        first = number * plan.steps
        progress(first, total, "distillation")  # computing both models' predictions takes time too
        batches = _mixed_batches(*rows, plan, torch.Generator().manual_seed(seed))
        objective = _objective(models, data, plan.loss, vocabularies, learns)
        pupils = _Pupils(models, layouts, plan, learns)
        with training_mode(*pupils.models, seed=seed):
            for step in range(plan.steps):
                batch = next(batches)
                parts = torch.split(sorted_by_length(data[0], batch), plan.loss.micro_batch)
                losses = _backward(objective, batch, parts)
                if not all(map(math.isfinite, losses)):
                    raise TrainingError(
                        f"a distillation loss of step {first + step} is not finite",
                        hint="lower distillation.learning_rate_llm and learning_rate_slm",
                    )
                pupils.step(step)
                llm, slm = (loss if own else None for loss, own in zip(losses, learns, strict=True))
                on_step(DistilStep(first + step, llm, slm))
                progress(first + step + 1, total, "distillation")


Learns = tuple[bool, bool]
"""Whether the LLM, and whether the SLM, learns."""

_TURNS: Final[dict[Turns, tuple[Learns, ...]]] = {
    "together": ((True, True),),
    "llm-first": ((True, False), (False, True)),
    "slm-first": ((False, True), (True, False)),
}


class _Pupils:
    """The models that learn in a turn, each with an optimiser of its own."""

    def __init__(
        self,
        models: Pair,
        layouts: tuple[AdapterLayout, AdapterLayout],
        plan: DistilPlan,
        learns: Learns,
    ) -> None:
        rates = (plan.learning_rate_llm, plan.learning_rate_slm)
        self.models = [model for model, own in zip(models, learns, strict=True) if own]
        self._pace = plan.pace
        self._optimizers = [
            (make_optimizer("adam", select(model, layout), rate, plan.pace.weight_decay), rate)
            for model, layout, rate, own in zip(models, layouts, rates, learns, strict=True)
            if own
        ]

    def step(self, number: int) -> None:
        """Apply the accumulated gradients, then clear them."""
        for optimizer, rate in self._optimizers:
            self._pace.set(optimizer, rate, number)
            optimizer.step()
            optimizer.zero_grad()


def _objective(
    models: Pair,
    data: tuple[EncodedQuestions, EncodedQuestions],
    loss: DistilLossPlan,
    vocabularies: tuple[Vocabulary, Vocabulary] | None,
    learns: Learns,
) -> Objective:
    """The loss over choices, over tokens, or over the spans of two tokenizers.

    Frozen targets are taken here, from both models as they are now.
    """
    if loss.kind == "transfer":
        return TransferObjective(models, data, loss)
    if loss.over == "choices":
        return ChoiceObjective(models, data, loss, learns)
    if vocabularies is None or vocabularies[0] == vocabularies[1]:
        return TokenObjective(models, data, loss, learns)
    if loss.top_k is not None:
        raise ConfigError(
            "the two models have different tokenizers; their targets are not shortened",
            where="distillation.top_k",
            hint="remove it",
        )
    return SpanObjective(models, data, vocabularies, loss, learns)


def _backward(objective: Objective, batch: Tensor, parts: Sequence[Tensor]) -> tuple[float, float]:
    """The (LLM, SLM) loss of ``batch``, part by part; its gradients are added to the adapters'."""
    losses = [0.0, 0.0]
    for part in parts:
        for i, term in enumerate(objective.terms(batch, part)):
            if term.requires_grad:
                torch.autograd.backward(term)
            losses[i] += term.item()
    return losses[0], losses[1]


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
    labelled: Tensor, unlabelled: Tensor, plan: DistilPlan, g: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches with fixed numbers of labelled and of unlabelled rows."""
    streams = [
        (rows, shuffled_batches(len(rows), count, g))
        for rows, count in ((labelled, plan.batch_labelled), (unlabelled, plan.batch_unlabelled))
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
