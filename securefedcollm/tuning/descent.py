"""An optimizer over one flat vector, fed with gradients from elsewhere.

In joint DP-SGD the gradient comes out of a secure sum, and what the server does with it is
post-processing: it costs no privacy, so the optimizer may remember as much as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import nn

from securefedcollm.tuning.adapters import Vector
from securefedcollm.tuning.recipe import STEADY, Optimizer, Pace, make_optimizer

_TAKEN: Final = "taken"
"""Steps so far, [2]: quotient and remainder by 65536; both are exact as float32 in any study."""


class Descent:
    """See the module's docstring.

    Args:
        name: which optimizer, as in a study.
    """

    def __init__(self, name: Optimizer, learning_rate: float, pace: Pace = STEADY) -> None:
        self._pace = pace
        self._taken = 0
        self._name = name
        self._learning_rate = learning_rate
        self._point: nn.Parameter | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def step(self, point: Vector, gradient: Vector) -> Vector:
        """The result of one step from ``point`` against ``gradient``; all three are float32 [d]."""
        place, optimizer = self._at(point)
        place.grad = torch.from_numpy(gradient.copy())
        self._pace.set(optimizer, self._learning_rate, self._taken)
        optimizer.step()
        self._taken += 1
        return place.detach().numpy().copy()

    def state(self) -> dict[str, Vector]:
        """The optimizer's memory: float32 vectors by name; empty before the first step."""
        if self._optimizer is None or self._point is None:
            return {}
        kept = self._optimizer.state[self._point]
        state = {name: value.detach().numpy().copy() for name, value in kept.items()}
        return state | (
            {} if self._even else {_TAKEN: np.array(divmod(self._taken, 65536), dtype=np.float32)}
        )

    def restore(self, state: Mapping[str, Vector]) -> None:
        """Continue from where :meth:`state` was taken."""
        kept = {k: torch.from_numpy(v.copy()) for k, v in state.items() if k != _TAKEN}
        if _TAKEN in state:
            often, rest = (int(part) for part in state[_TAKEN])
            self._taken = often * 65536 + rest
        if kept:
            size = max(value.numel() for value in kept.values())
            place, optimizer = self._at(np.zeros(size, dtype=np.float32))
            optimizer.state[place] = kept

    @property
    def _even(self) -> bool:
        """Whether all steps are alike, so that their number need not be kept."""
        return self._pace.schedule == "constant" and not self._pace.warmup

    def _at(self, point: Vector) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        if self._point is None or self._optimizer is None:
            self._point = nn.Parameter(torch.from_numpy(point.copy()))
            self._optimizer = make_optimizer(
                self._name, [self._point], self._learning_rate, self._pace.weight_decay
            )
        with torch.no_grad():
            self._point.copy_(torch.from_numpy(point))
        return self._point, self._optimizer
