"""The section ``local``: how a silo tunes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from securefedcollm.study.kinds import Count, Fraction, Positive, Schedule, Section, says


class Augmentation(Section, frozen=True):
    """Views of pictures and recordings to tune on: a record varied by chance, anew in every step.

    The loss of a record is the mean over its views. A record still has one gradient, so ε stays
    the same (De et al. 2022, "augmentation multiplicity").
    """

    views: Annotated[
        Annotated[int, Meta(ge=1, le=64)],
        says("Views of each record in a step. Tuning takes this many times as long."),
    ] = 4
    shift: Annotated[
        Annotated[float, Meta(ge=0, le=0.5)],
        says(
            "A view is moved by up to this fraction of a picture's sides, a pixel at least, or of "
            "a recording's own length. What moves in repeats the edge."
        ),
    ] = 0.0
    flip: Annotated[bool, says("Half of the views of a picture are mirrored, left to right.")] = (
        False
    )
    noise: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        says(
            "Standard deviation of normal noise on a view: as a fraction of the range from black "
            "to white, or of a recording's own standard deviation."
        ),
    ] = 0.0


class Local(Section, frozen=True):
    """Tuning inside a silo, per round.

    In joint DP-SGD (``privacy.noise: distributed`` with ``unit: record`` or ``subject``) all silos
    take every step together. Each silo makes its optimiser anew in every round. In joint DP-SGD the
    optimiser is the server's and keeps its state.
    """

    batch_size: Annotated[
        Count,
        says(
            "Records (or subjects) in a step. With DP-SGD it is the expected size of a Poisson "
            "batch, and in joint DP-SGD that of all silos together."
        ),
    ]
    learning_rate: Annotated[Positive, says("Learning rate of the silos' optimiser.")]
    steps: Annotated[
        Annotated[int, Meta(ge=0)],
        says("Optimiser steps in a round.", needed="there are no `epochs`"),
    ] = 0
    optimizer: Annotated[Literal["adam", "sgd"], says("The silos' optimiser.")] = "adam"
    loss: Annotated[
        Literal["answer", "choices"],
        says(
            "What tuning minimises: the negative log-likelihood of the answer's tokens "
            "(`answer`), or the cross-entropy of the scores of all choices (`choices`)."
        ),
    ] = "answer"
    max_grad_norm: Annotated[
        Positive | None,
        says(
            "Clips the gradient of a whole batch, in studies where privacy does not clip "
            "single gradients."
        ),
    ] = None
    micro_batch: Annotated[
        Count,
        says(
            "Number of records (or of their views) whose gradients are in memory at a time. A "
            "smaller number takes less memory and more passes."
        ),
    ] = 64
    sampling_rate: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        says(
            "Joint DP-SGD only: probability with which each record of each silo takes part in a "
            "step. batch_size / sampling_rate is therefore the number of records in all silos.",
            needed="joint DP-SGD",
        ),
    ] = None
    reply_slot: Annotated[
        Annotated[float, Meta(gt=0, le=86_400)] | None,
        says(
            "Seconds. Time since the request is divided into slots of this length, and a silo "
            "answers only at the end of a slot. This hides how long it trains, which depends "
            "on the records. Choose more than a round (in joint DP-SGD: a step) takes. If left "
            "out, silos answer at once."
        ),
    ] = None
    epochs: Annotated[
        Annotated[float, Meta(gt=0, le=10_000)] | None,
        says(
            "Instead of `steps`: passes over a silo's own records in a round, in whole "
            "batches. DP-SGD cannot use epochs, because its cost follows from steps that all "
            "know."
        ),
    ] = None
    augmentation: Annotated[
        Augmentation | None,
        says("Tunes on several views of each picture or recording, varied by chance."),
    ] = None
    schedule: Annotated[
        Schedule,
        says(
            "How the learning rate changes over all rounds together: it stays constant, or "
            "falls to zero on a line (`linear`) or a `cosine`."
        ),
    ] = "constant"
    warmup: Annotated[
        Fraction, says("Fraction of all steps, at the beginning, in which the learning rate rises.")
    ] = 0.0
    weight_decay: Annotated[
        Annotated[float, Meta(ge=0)],
        says(
            "Each step subtracts learning rate × this × the weight from every trained weight "
            "(AdamW). With `sgd` the product is added to the gradient, which has the same "
            "effect."
        ),
    ] = 0.0
