"""The pieces that every training recipe of this room shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

Progress = Callable[[int, int, str], None]
"""``progress(done, total, text)``: called from the training thread, often; it must be cheap."""

Optimizer = Literal["adam", "sgd"]


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""


def make_optimizer(
    name: Optimizer, parameters: Sequence[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """A fresh optimizer; Adam without weight decay, β = (0.9, 0.999)."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
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
