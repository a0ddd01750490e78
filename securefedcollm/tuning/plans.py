"""What a training recipe does, as values: losses, steps, and the protection of the units.

A plan says nothing about whose data it is for, so one plan serves every silo. Seeds and noise
sources stay outside, because two runs of one plan differ in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from securefedcollm.tuning.questions import PLAIN, Scoring
from securefedcollm.tuning.recipe import STEADY, Optimizer, Pace
from securefedcollm.tuning.token_loss import Direction

Loss = Literal["answer", "choices"]
DistillationLoss = Literal["entropy-pooled", "dual-min-ce", "mutual-kl", "transfer", "none"]
Turns = Literal["together", "llm-first", "slm-first"]
"""Who learns when in the server's phase."""
Weighting = Literal["none", "paced"]
"""How much a prompt counts in the distillation term."""
Over = Literal["answer", "all"]
"""The tokens at which predictions over the vocabulary are compared."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a picture or a recording is varied; every view is drawn anew in every step.

    Attributes:
        views: of one record in a step. Its loss is their mean.
        shift: how far a view is moved at most, as a fraction of each side or of the length.
        flip: half of the views are mirrored, left to right.
        noise: standard deviation of normal noise: of a picture, as a fraction of the range from
            black to white; of a recording, of its own standard deviation.
    """

    views: int
    shift: float = 0.0
    flip: bool = False
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """What tuning minimises, and for how many records at a time.

    Attributes:
        kind: the loss of a record, in nats: over the tokens of the right ``answer``, or over the
            ``choices`` (:func:`securefedcollm.tuning.per_record.question_losses`).
        scoring: the scores of the choices, for the loss ``choices``.
        micro_batch: records in memory at a time, about. Without differential privacy the gradients
            of a batch are accumulated over them; under DP-SGD each of them has its own gradient.
        augmentation: the loss of a record is the mean over views of it.
    """

    kind: Loss = "answer"
    scoring: Scoring = PLAIN
    micro_batch: int = 64
    augmentation: Augmentation | None = None


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One round of tuning inside a silo.

    Attributes:
        steps: optimizer steps.
        batch_size: records of a step; under DP-SGD the expected number of units in its sample.
        learning_rate: before ``pace``.
        optimizer: made anew for the round.
        loss: what a step minimises.
        pace: the learning rate and the weight decay from step to step.
    """

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = "adam"
    loss: LossPlan = field(default_factory=LossPlan)
    pace: Pace = STEADY


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What DP-SGD does to every step (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    Attributes:
        noise_multiplier: z, the noise's standard deviation over ``clip_norm``.
        clip_norm: C, the largest L2 norm of what one unit contributes to a sum.
    """

    noise_multiplier: float
    clip_norm: float

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on every coordinate of a sum: z · C."""
        return self.noise_multiplier * self.clip_norm


@dataclass(frozen=True, kw_only=True)
class DistilLossPlan:
    """What the server's phase minimises, and for how many questions at a time.

    Attributes:
        kind: which of the five losses of :mod:`securefedcollm.tuning.distil`.
        over: the distributions that are compared: over the ``choices`` of a question, over the
            vocabulary at every token of the ``answer`` (of every choice, where there is no label),
            or at ``all`` tokens, the prompt's too.
        top_k: over tokens: keep only this many most probable tokens of every frozen prediction.
        weight: λ, the factor of the distillation term.
        temperature: τ; both distributions are softmax(scores / τ), the term is scaled by τ².
        direction: D(T, p): ``forward`` KL(T‖p), ``reverse`` KL(p‖T), ``js`` their Jensen–Shannon
            divergence.
        sharpness: s of the pooling weight.
        change: of ``transfer``: α, the weight of the change of predictions; 1 − α is that of the
            predictions themselves.
        weighting: over choices: ``paced`` gives a prompt the more weight, the less decided the
            learning model is about it (:func:`securefedcollm.tuning.choice_distil.paced`).
        retain: over choices: the factor of the divergence from what each model says without its
            adapter.
        scoring: the scores of the choices.
        scoring_llm: the large model's, if it is asked in another form or has another temperature.
        micro_batch: questions in memory at a time; gradients are accumulated over a step's batch.
    """

    kind: DistillationLoss = "entropy-pooled"
    over: Literal["choices"] | Over = "choices"
    top_k: int | None = None
    weight: float = 1.0
    temperature: float = 1.0
    direction: Direction = "forward"
    sharpness: float = 3.0
    change: float = 0.5
    weighting: Weighting = "none"
    retain: float = 0.0
    scoring: Scoring = PLAIN
    scoring_llm: Scoring | None = None
    micro_batch: int = 256

    @property
    def scorings(self) -> tuple[Scoring, Scoring]:
        """The scorings of (LLM, SLM)."""
        return self.scoring_llm or self.scoring, self.scoring

    @property
    def freezes(self) -> bool:
        """Whether both models learn one target T that stays as it was when the phase began."""
        return self.kind in {"entropy-pooled", "dual-min-ce"}


@dataclass(frozen=True, kw_only=True)
class DistilPlan:
    """One phase of the server: Adam steps on both adapters.

    Attributes:
        steps: of either model.
        order: both models learn ``together``; or one after the other, and the second one learns
            from what the first one has become.
        batch_labelled, batch_unlabelled: public questions of a step with and without an answer.
        learning_rate_llm, learning_rate_slm: before ``pace``.
        loss: what a step minimises.
        pace: both learning rates and the weight decay from step to step.
    """

    steps: int
    batch_labelled: int
    batch_unlabelled: int
    learning_rate_llm: float
    learning_rate_slm: float
    order: Turns = "together"
    loss: DistilLossPlan = field(default_factory=DistilLossPlan)
    pace: Pace = STEADY
