"""The sections of a study that say what the server does between two sums, and what it keeps.

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


class Distillation(Section, frozen=True):
    """The server's phase on the public set, after every sum; only with an LLM."""

    loss: Annotated[
        Literal["entropy-pooled", "dual-min-ce", "mutual-kl", "transfer", "none"],
        says(
            "`entropy-pooled`: both models learn a mixture of their predictions, in which the "
            "more confident one weighs more. `dual-min-ce`: both learn the prediction of the "
            "better one, prompt by prompt (FedMKT). `mutual-kl`: the losses of the FedCoLLM "
            "paper (arXiv 2411.11707, eq. 3 and 4). `transfer`: the large model alone learns what "
            "the small one says with its adapter, and what the adapter changes (POST, arXiv "
            "2506.16196). `none`: each is tuned on the labelled public questions alone."
        ),
    ] = "entropy-pooled"
    over: Annotated[
        Literal["choices", "answer", "all"],
        says(
            "What the models predict in distillation: the choices of a question (`choices`), "
            "every token of the answer over the whole vocabulary (`answer`), or the tokens of "
            "the prompt as well (`all`).",
            needed="there is an LLM and `task.kind` is instruction or text",
        ),
    ] = "choices"
    top_k: Annotated[
        Count | None,
        says(
            "Number of tokens that every frozen target keeps (of `entropy-pooled` and "
            "`dual-min-ce`), where the vocabulary or model is too large to keep all."
        ),
    ] = None
    steps: Annotated[Count, says("Steps of the server's phase in a round.")] = 40
    batch_labelled: Annotated[
        Annotated[int, Meta(ge=0)], says("Public questions with answers in a step.")
    ] = 32
    batch_unlabelled: Annotated[
        Annotated[int, Meta(ge=0)], says("Public questions without answers in a step.")
    ] = 128
    learning_rate_slm: Annotated[Positive, says("Learning rate of the small model.")] = 2e-3
    learning_rate_llm: Annotated[Positive, says("Learning rate of the large model.")] = 4e-3
    weight: Annotated[
        Positive, says("λ: weight of distillation, relative to the loss on labelled questions.")
    ] = 1.0
    temperature: Annotated[
        Positive, says("Temperature of both predictions: the higher, the softer.")
    ] = 1.0
    direction: Annotated[
        Literal["forward", "reverse", "js"],
        says("The divergence D(teacher, own): KL, its reverse, or Jensen–Shannon."),
    ] = "forward"
    sharpness: Annotated[
        Positive, says("With `entropy-pooled`: how much more the more confident model weighs.")
    ] = 3.0
    retain: Annotated[
        Annotated[float, Meta(ge=0)],
        says(
            "Of a study that continues earlier runs: weight of the earlier model as a further "
            "teacher. Each model then also keeps to what it said of the choices before this study, "
            "by KL, as a mean over the public questions of a step. It costs no ε."
        ),
    ] = 0.0
    change: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        says(
            "With `transfer`: the part that the change of predictions has in the divergence; the "
            "rest is for the predictions themselves."
        ),
    ] = 0.5
    order: Annotated[
        Literal["together", "llm-first", "slm-first"],
        says(
            "Whether both models learn `together`, from what both said at the beginning of the "
            "phase, or one first (`llm-first`, `slm-first`) and then the other from what the first "
            "has become. Each takes `steps` steps."
        ),
    ] = "together"
    weighting: Annotated[
        Literal["none", "paced"],
        says(
            "Over choices, with `paced`: a question counts p(1 - p) in the divergence, with p the "
            "probability that the model that learns gives to the right choice, or to the teacher's "
            "if the answer is not known, at the beginning of the phase; 1 on average (PACED, "
            "arXiv 2603.11178)."
        ),
    ] = "none"
    schedule: Annotated[
        Schedule,
        says(
            "How both learning rates change over the server's steps of all rounds, as in `local`."
        ),
    ] = "constant"
    warmup: Annotated[
        Fraction,
        says("Fraction of those steps, at the beginning, in which the learning rates rise."),
    ] = 0.0
    weight_decay: Annotated[
        Annotated[float, Meta(ge=0)], says("As in `local`, for both models (AdamW).")
    ] = 0.0


class Keep(Section, frozen=True):
    """Which round's adapters are kept in addition to the last round's, and when a run ends early.

    The server measures released models on public questions, and no private record has a say.
    With `metric: private` the noised counts of `validation` have it.
    """

    best: Annotated[
        Literal["slm", "llm"],
        says(
            "The model by which rounds are compared. `adapters-best/` gets the best round's "
            "adapters."
        ),
    ] = "slm"
    metric: Annotated[
        Literal["loss", "accuracy", "private"],
        says(
            "The best round has the least `loss` (mean negative log-probability of the right "
            "choice, or per token) or the greatest `accuracy`. `private`: the greatest noised "
            "accuracy on the records that `validation` sets aside, instead of public questions. "
            "Of equal rounds the earliest wins."
        ),
    ] = "loss"
    rows: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)],
        says(
            "Number of public questions with answers on which the server measures every round. "
            "It draws them by the study's seed and never distils from them."
        ),
    ] = 64
    patience: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        says(
            "The run ends after this number of rounds in a row without a better one, and silos "
            "settle for the rounds that were run. If left out, all rounds are run."
        ),
    ] = None
