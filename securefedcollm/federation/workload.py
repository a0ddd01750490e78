"""The round loops' interface to training; :mod:`securefedcollm.federation.cotuning` implements it.

The loops see flat float32 vectors only. ``layout(round)`` identifies names, shapes and order of the
tensors behind them; two sides whose layouts differ do not talk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from securefedcollm.privacy.events import Event
from securefedcollm.privacy.identities import Content

Vector = npt.NDArray[np.float32]
Gradient = npt.NDArray[np.float64]
Opened = Vector | npt.NDArray[np.float64]
"""An opened mean; float64 where it is the counts of a validation."""
Keep = Callable[[int, Vector, dict[str, Any]], None]
"""``keep(round, adapter, proof)``: the SLM adapter that a round (from 0) ended with, and, as plain
JSON, why this silo believes it. May raise StateError."""
Progress = Callable[[int, int, str], None]
"""``progress(done, total, text)``; called often, must be cheap. As in ``tuning``, without torch."""


def usable_threads() -> int:
    """One for each core that this process may run on; ``OMP_NUM_THREADS`` sets a limit below that.

    Torch heeds the variable until somebody calls ``set_num_threads``, which we do.
    """
    cores, asked = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    first = asked.split(",")[0].strip()  # the others are for threads within threads
    return min(cores, int(first)) if first.isdecimal() and int(first) else cores


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""


def keep_nothing(round_: int, adapter: Vector, proof: dict[str, Any]) -> None:
    """For a simulation, which has one copy of the adapters for everybody."""


class PrivateRecords(Protocol):
    """A silo's records in a study, as its privacy ledger sees them."""

    dataset: str
    """Fingerprint of the private data set. An older ledger keyed its privacy budget by it."""

    also: Sequence[str]
    """Other fingerprints of the same records, under which an older ledger may have them."""

    def contents(self) -> Iterable[Content]:
        """A digest of the content of every private record, and whose it is if that is the unit.

        The privacy budget belongs to these. Nothing of the study may go into a digest: not its
        task, its labels or the order of the records.
        """
        ...

    def update_size(self, round_: int) -> int:
        """Length d of the update that enters the sum of this round."""
        ...

    def events(self) -> Sequence[Event]:
        """What one round's training will release, in the worst case. Empty without DP."""
        ...


class SiloWorkload(PrivateRecords, Protocol):
    """Tuning at one silo, on data that it alone sees."""

    base_digest: bytes
    """The base model's digest (weights, configuration, tokenizer, chat template), 32 bytes."""

    def layout(self, round_: int) -> bytes:
        """32-byte digest of the adapter's layout in this round."""
        ...

    def size(self, round_: int) -> int:
        """Length of the broadcast adapter; :meth:`update_size` is no more."""
        ...

    def fit(self, adapter: Vector, round_: int, progress: Progress) -> Vector:
        """Tune from ``adapter`` and return the update, float32 [d].

        Raises:
            TrainingError: the result is not finite, or nothing was trained.
        """
        ...

    def gradients(self, adapter: Vector, round_: int, q: float) -> Iterable[Gradient]:
        """The gradient of every record of a fresh Poisson sample at rate ``q``, float64 [d] each.

        For joint DP-SGD; nothing about the sample may be kept. A gradient that is not finite comes
        as zeros: before the noise, no record may decide what happens.
        """
        ...

    def save(self, adapter: Vector, directory: Path, beside: Mapping[str, bytes]) -> None:
        """Write ``adapter`` in place of ``directory``, in PEFT's format, with files ``beside`` it.

        Raises:
            StateError: it cannot be written.
        """
        ...


class ServerWorkload(Protocol):
    """The server's models, their adapters, and its phase between two sums."""

    base_digest: bytes

    def layout(self, round_: int) -> bytes: ...

    def update_size(self, round_: int) -> int: ...

    def adapter(self) -> Vector:
        """The global SLM adapter, as broadcast."""
        ...

    def absorb(self, mean: Vector, round_: int) -> None:
        """Move the global SLM adapter by the mean update, float32 [d].

        It is added, or is the gradient of a step of the study's ``server.outer``.

        Raises:
            TrainingError: the step leads to values that silos refuse.
        """
        ...

    def descend(self, gradient: Vector, round_: int) -> None:
        """One step of the study's optimiser on the global SLM adapter (joint DP-SGD)."""
        ...

    def descent(self) -> dict[str, Vector]:
        """The SLM adapter and the optimisers' state: what :meth:`descend` and :meth:`absorb` need.

        The next one goes on from it.
        """
        ...

    def restore_descent(self, state: Mapping[str, Vector]) -> None:
        """Continue from where :meth:`descent` was taken, bit for bit."""
        ...

    def distil(self, round_: int, progress: Progress) -> dict[str, float]:
        """Run the server's phase on the public set; returns the losses of distillation."""
        ...

    def measure(self) -> dict[str, dict[str, float]]:
        """The round's measurements of both models, by ``model/group``.

        ``evaluation``: accuracies on the test questions that the server has; may be empty.
        ``perplexity``: of the same questions, where they have nothing to choose from.
        ``validation``: ``model/loss`` and ``model/accuracy`` on the study's ``keep.rows``, if any.
        ``central``: ``first_loss`` and ``last_loss`` of the server's own steps on public rows.
        ``outer``: L2 norms of the opened mean and of the step that the outer optimiser made of it.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write both adapters into ``directory`` (exists, empty), safetensors only."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what :meth:`save` wrote, bit for bit."""
        ...
