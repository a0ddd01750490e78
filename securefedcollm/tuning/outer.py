"""The server's outer optimiser: one step a round, on an opened mean in place of a gradient.

FedOpt (Reddi et al. 2021, arXiv 2003.00295), and DiLoCo (Douillard et al. 2023, arXiv 2311.08105)
with Nesterov momentum. The gradient is the negative mean update of the silos, so a step leads
along the mean. Steps are those of ``torch.optim.SGD`` and ``torch.optim.Adam`` to float32 accuracy.
NumPy alone: a server whose silos train with code of their own needs no torch.

Adversary: none. The mean was opened before, so all of this is post-processing and costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

_FIRST: Final = "momentum"
_SECOND: Final = "square"
_TAKEN: Final = "taken"
"""Steps so far, [1]; exact as float32, since a study has at most 10,000 rounds."""


@dataclass(frozen=True, kw_only=True)
class OuterPlan:
    """How the opened mean becomes a step.

    Attributes:
        learning_rate: factor of the step.
        momentum: μ of ``sgd`` and ``nesterov``, in [0, 1); β₁ of ``adam``.
        beta2: β₂ of ``adam``.
        tau: τ of ``adam``, added to the root of the second moment (ε of ``torch.optim.Adam``).
    """

    optimizer: Literal["sgd", "nesterov", "adam"]
    learning_rate: float
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


class Outer:
    """See the module's docstring. It has a separate memory for each *part* of the adapter.

    RoLoRA trains and averages one half of the adapter in a round, and the other half in the next. A
    part is named by the caller, for example by the digest of its layout.
    """

    def __init__(self, plan: OuterPlan) -> None:
        self._plan = plan
        self._memories: dict[str, dict[str, Vector]] = {}

    def step(self, part: str, mean: Vector) -> Vector:
        """What to add to the values of ``part`` after their mean update; float32 [d] both."""
        memory = self._memories.setdefault(part, {})
        take = _adam if self._plan.optimizer == "adam" else _sgd
        return take(self._plan, memory, mean)

    def state(self) -> dict[str, Vector]:
        """All that it remembers: float32 vectors by ``PART/NAME``; empty before the first step."""
        return {
            f"{part}/{name}": value.copy()
            for part, memory in self._memories.items()
            for name, value in memory.items()
        }

    def restore(self, state: Mapping[str, Vector]) -> None:
        """Continue from where :meth:`state` was taken, bit for bit.

        Raises:
            ValueError: it is not the state of such an optimiser.
        """
        found: dict[str, dict[str, Vector]] = {}
        for name, value in state.items():
            part, _, which = name.rpartition("/")
            found.setdefault(part, {})[which] = np.array(value, dtype=np.float32)
        wanted = {_FIRST, _SECOND, _TAKEN} if self._plan.optimizer == "adam" else {_FIRST}
        for part, memory in found.items():
            if set(memory) != wanted:
                raise ValueError(f"{sorted(memory)} of {part} are not {sorted(wanted)}")
        self._memories = found


def _sgd(plan: OuterPlan, memory: dict[str, Vector], mean: Vector) -> Vector:
    """Sutskever et al. 2013 as PyTorch has it: v ← μv + g, then along v, or along g + μv."""
    rate = np.float32(plan.learning_rate)
    if not plan.momentum:
        return rate * mean
    kept = memory.setdefault(_FIRST, np.zeros_like(mean))
    kept *= plan.momentum
    kept += mean
    ahead = mean + np.float32(plan.momentum) * kept if plan.optimizer == "nesterov" else kept
    return rate * ahead


def _adam(plan: OuterPlan, memory: dict[str, Vector], mean: Vector) -> Vector:
    """Kingma and Ba 2015, algorithm 1, with its bias correction, which FedAdam leaves out."""
    if not memory:
        memory |= {_FIRST: np.zeros_like(mean), _SECOND: np.zeros_like(mean)}
        memory[_TAKEN] = np.zeros(1, dtype=np.float32)
    first, second, taken = memory[_FIRST], memory[_SECOND], memory[_TAKEN]
    taken += 1
    first += (1 - plan.momentum) * (mean - first)
    second *= plan.beta2
    second += (1 - plan.beta2) * mean * mean
    count = int(taken[0])
    root = np.sqrt(second) / np.float32(math.sqrt(1 - plan.beta2**count)) + np.float32(plan.tau)
    step = np.float32(plan.learning_rate / (1 - plan.momentum**count)) * first / root
    return step.astype(np.float32, copy=False)
