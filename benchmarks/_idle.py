"""A workload that costs nothing, for benchmarks of everything around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from securefedcollm.federation.workload import Gradient, Progress, Vector


class Idle:
    """A silo without records and a server without models: what is left is the overhead."""

    base_digest = b"b" * 32
    dataset = "none"
    also = ()

    def __init__(self, values: int) -> None:
        self.values = values
        self.theta = np.zeros(values, dtype=np.float32)

    def contents(self) -> Iterator[tuple[bytes, str | None]]:
        return iter([(bytes(32), None)])

    def layout(self, round_: int) -> bytes:
        return bytes(32)

    def size(self, round_: int) -> int:
        return self.values

    update_size = size

    def events(self) -> tuple[()]:
        return ()

    def gradients(self, adapter: Vector, round_: int, q: float) -> Iterator[Gradient]:
        return iter(())

    def fit(self, adapter: Vector, round_: int, progress: Progress) -> Vector:
        return np.full(self.values, 1e-3, dtype=np.float32)  # zeros would take no memory

    def adapter(self) -> Vector:
        return self.theta.copy()

    def absorb(self, mean: Vector, round_: int) -> None:
        self.theta = self.theta + mean

    def descend(self, gradient: Vector, round_: int) -> None:
        self.theta = self.theta - gradient

    def descent(self) -> dict[str, Vector]:
        return {"adapter": self.theta}

    def restore_descent(self, state: Mapping[str, Vector]) -> None:
        self.theta = state["adapter"]

    def distil(self, round_: int, progress: Progress) -> dict[str, float]:
        return {}

    def measure(self) -> dict[str, dict[str, float]]:
        return {"evaluation": {}}

    def save(self, directory: Path) -> None:
        np.save(directory / "theta.npy", self.theta)

    def load(self, directory: Path) -> None:
        self.theta = np.load(directory / "theta.npy")
