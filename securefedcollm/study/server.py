"""The section of a study that says what the server does between two sums, before it distils.

The parts run in the order of their keys: ``outer`` makes the opened mean a step of the global
adapter, and ``central`` tunes that adapter on public rows. ``distillation`` follows, in a study
with a large model. ``docs/adr/0015`` says why this order.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from securefedcollm.study.kinds import Count, Fraction, Positive, Schedule, Section, says


class Outer(Section, frozen=True):
    """The server's optimiser: one step a round, with the opened mean in place of the gradient.

    FedOpt (arXiv 2003.00295), and DiLoCo (arXiv 2311.08105) with `nesterov`. `sgd` at learning rate
    1 without momentum is plain FedAvg. What the optimiser remembers lasts for the whole run.
    """

    optimizer: Annotated[
        Literal["sgd", "nesterov", "adam"],
        says(
            "`sgd` with `momentum`; `nesterov`, the same with a look ahead; or `adam`, which "
            "divides every value's step by the root of its mean square."
        ),
    ]
    learning_rate: Annotated[
        Positive,
        says(
            "What the step is multiplied by. DiLoCo takes 0.7 with `nesterov`; `adam` moves every "
            "value by about this much, so choose about 0.01 there."
        ),
    ]
    momentum: Annotated[
        Fraction,
        says(
            "How much of the step before is kept (β₁ of `adam`). Steady updates add up to "
            "1 / (1 - momentum) times one of them, after as many rounds: choose less for few "
            "rounds."
        ),
    ] = 0.9
    beta2: Annotated[
        Fraction, says("With `adam`: how much of the mean square before is kept (β₂).")
    ] = 0.99
    tau: Annotated[
        Positive,
        says(
            "With `adam`: τ, which is added to the root of the mean square. The larger it is, the "
            "less the steps of different values are made alike."
        ),
    ] = 1e-3


class Central(Section, frozen=True):
    """Tuning of the global adapter at the server, on public rows that have their answers.

    Algorithm 2 of arXiv 2305.11414. It minimises the same loss as the silos (`local.loss`), with an
    Adam optimiser that is made anew in every round. The large model has no part in it.
    """

    steps: Annotated[Count, says("Optimiser steps in a round.")] = 50
    batch_size: Annotated[Count, says("Public rows in a step.")] = 32
    learning_rate: Annotated[Positive, says("Learning rate of these steps.")] = 1e-3
    schedule: Annotated[
        Schedule, says("The learning rate over these steps of all rounds, as in `local`.")
    ] = "constant"
    warmup: Annotated[
        Fraction, says("The first part of those steps, in which the learning rate rises.")
    ] = 0.0
    weight_decay: Annotated[Annotated[float, Meta(ge=0)], says("As in `local` (AdamW).")] = 0.0


class Server(Section, frozen=True):
    """What the server does between two sums: these parts in this order, then `distillation`.

    All of it works on what was opened and on public rows, so it costs no ε.
    """

    outer: Annotated[
        Outer | None,
        says(
            "How the opened mean becomes a step of the global adapter. If left out, the mean is "
            "added as it is (FedAvg). Not in joint DP-SGD, where `local.optimizer` is the "
            "server's already."
        ),
    ] = None
    central: Annotated[
        Central | None,
        says("Steps on public rows with answers (of a text, the text). If left out, none."),
    ] = None
