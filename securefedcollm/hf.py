"""A Hugging Face ``Trainer`` as one silo's training, for :func:`securefedcollm.simulate_own`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from securefedcollm.errors import ConfigError


class SiloTrainer:
    """What a ``transformers.Trainer`` does in one round: ``trainer.train()`` on the global values.

    What all silos tune are the parameters of ``trainer.model`` that require a gradient: with PEFT
    the adapter, else all that is not frozen. Buffers, such as running means, stay each silo's own.
    The trainers of one process may share a model. A trainer whose optimiser was made by hand keeps
    it, with its state; every other one begins each round with a fresh optimiser and schedule.
    """

    def __init__(self, trainer: Any) -> None:
        """
        Args:
            trainer: ``transformers.Trainer``, or what inherits from it.

        Raises:
            ConfigError: no parameter of its model requires a gradient.
        """
        self.trainer = trainer
        self._keeps = trainer.optimizer is not None
        if not self._trained():
            raise ConfigError(
                "no parameter of the trainer's model requires a gradient",
                where="trainer",
                hint="attach a PEFT adapter, or leave the parameters unfrozen",
            )

    @property
    def values(self) -> dict[str, Any]:
        """The trained parameters as they are now, by name: copies."""
        return {name: p.detach().clone() for name, p in self._trained().items()}

    def load(self, values: Mapping[str, Any]) -> None:
        """Put ``values`` into the model."""
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(values[name])

    def evaluate(self, values: Mapping[str, Any]) -> dict[str, float]:
        """What of ``trainer.evaluate()`` on ``values`` is a share, such as ``eval_accuracy``."""
        self.load(values)
        found = self.trainer.evaluate()
        known = ("accuracy", "f1", "precision", "recall")
        return {k: float(v) for k, v in found.items() if k.removeprefix("eval_") in known}

    def __call__(self, values: Mapping[str, Any], round_: int) -> dict[str, Any]:
        """Train in round ``round_`` (from 0) and return the new values."""
        self.load(values)
        if not self._keeps:
            self.trainer.optimizer = self.trainer.lr_scheduler = None
        self.trainer.train()
        return self.values

    def _trained(self) -> dict[str, Any]:
        named = self.trainer.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}
