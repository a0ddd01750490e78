"""The pieces that every training recipe of this room shares."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Final, Literal

import torch
from torch import nn

Progress = Callable[[int, int, str], None]
"""``progress(done, total, text)``: called from the training thread, often; it must be cheap."""

Optimizer = Literal["adam", "sgd"]


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Pace:
    """The learning rate, as a fraction of the study's, and the weight decay of every step.

    ``first``: how many of the ``total`` steps were taken before this call. Adversary: none; the
    number of a step is public.
    """

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    total: int = 1
    first: int = 0
    weight_decay: float = 0.0

    def factor(self, step: int) -> float:
        """Fraction at step ``step`` (from 0) of this call; above 0 until all steps are taken."""
        at = self.first + step
        rising = round(self.warmup * self.total)
        if at < rising:
            return (at + 1) / (rising + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (at - rising) / max(1, self.total - rising))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def set(self, optimizer: torch.optim.Optimizer, learning_rate: float, step: int) -> None:
        """Call this before the optimizer's step ``step``."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * self.factor(step)


STEADY: Final = Pace()


def make_optimizer(
    name: Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """A fresh optimizer; Adam with β = (0.9, 0.999) and decoupled weight decay (AdamW)."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    if weight_decay:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    return torch.optim.Adam(parameters, lr=learning_rate)


@contextmanager
def training_mode(*models: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, dropout drawn from ``seed``; modes and global random state are put back."""
    with torch.random.fork_rng(devices=[]), _modes(models, training=True):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients as they were: no dropout in adapter or base; modes are put back.

    For per-record gradients under differential privacy. Dropout masks are drawn for a whole batch
    at once: with one record more or less, every other record gets another mask and another
    gradient, and the sum moves by far more than the one clipped gradient that noise is scaled to.
    """
    with _modes(models, training=False):
        yield


@contextmanager
def inference_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes are put back."""
    with torch.no_grad(), evaluation_mode(*models):
        yield


@contextmanager
def _modes(models: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.callback(model.train, model.training)
            model.train(training)
        yield


ONE_AT_A_TIME = RLock()
"""Whoever holds it may use transformers' loaders."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off stderr, which belongs to the CLI.

    One thread at a time. While it builds a model, transformers replaces methods of its classes and
    torch's default dtype for the whole process, and puts back what it found: of two threads, one
    would put back the other's replacement, and no model loaded later would have tied weights.
    """
    from transformers.utils import logging as library

    with ONE_AT_A_TIME:
        level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
