"""Augmentation: a record is trained on as several views of itself, and stays one record.

The loss of a record is the mean of its views' losses. So its gradient is one gradient, clipped once
and with the sensitivity of one record (De et al. 2022, arXiv 2204.13650, section 3.2, "augmentation
multiplicity"). ε stays what it is without augmentation.

A view follows from its record, its number, the step and a key, and from nothing else: for every key
the record's gradient is a function of that record alone. The key is drawn without regard to any
record.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securefedcollm.primitives import sha256
from securefedcollm.tuning.plans import Augmentation
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm.tuning.signals import Signal

Values = npt.NDArray[Any]  # uint8 or float32


@dataclass(frozen=True)
class Views(Signal):
    """Views of N records, V of each: row V·i + v is the v-th view of record i.

    ``values`` are the records', not the views': a row is computed when it is selected.
    """

    how: Augmentation = field(kw_only=True)
    key: bytes = field(kw_only=True, repr=False)
    turn: int = field(kw_only=True, default=0)

    def __len__(self) -> int:
        return len(self.values) * self.how.views

    def select(self, index: Tensor) -> Signal:
        return self.padded(index, len(index))

    def padded(self, index: Tensor, size: int) -> Signal:
        values = self.values.new_zeros(size, *self.values.shape[1:])
        for place, row in enumerate(index.tolist()):
            values[place] = self._view(*divmod(row, self.how.views))
        return Signal(values, self.scale, self.shift)

    def inputs(self, dtype: torch.dtype) -> Tensor:
        return self.select(torch.arange(len(self))).inputs(dtype)

    def _view(self, record: int, view: int) -> Tensor:
        """One view, shaped as one of ``values``. Equal records have equal views."""
        plain: Values = self.values[record].cpu().numpy()
        seed = sha256(
            b"securefedcollm/view/v1\0",
            self.key,
            self.turn.to_bytes(8, "big"),
            view.to_bytes(8, "big"),
            plain.tobytes(),
        )
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "big")))
        found, own = plain, plain
        for axis in self.along:
            side = length = plain.shape[axis]
            if self.lengths is not None:
                length = int(self.lengths[record])
                own = plain.take(np.arange(length), axis)
            most = max(int(self.how.shift * length), int(self.how.shift > 0))
            moved = np.arange(side) - int(draw.integers(-most, most, endpoint=True))
            found = found.take(moved.clip(0, side - 1), axis)  # what moves in repeats the edge
        if self.how.flip and draw.integers(2):
            found = np.flip(found, -1)
        if self.how.noise:
            spread = 255.0 if plain.dtype == np.uint8 else float(own.std())
            found = _noisy(found, self.how.noise * spread, draw)
        return torch.from_numpy(np.ascontiguousarray(found))


def _noisy(values: Values, sigma: float, draw: np.random.Generator) -> Values:
    """``values`` with normal noise, in their own type."""
    drawn = draw.standard_normal(values.shape, dtype=np.float32)
    noisy: Values = values + drawn * np.float32(sigma)
    if values.dtype == np.uint8:
        noisy = np.rint(noisy).clip(0, 255).astype(np.uint8)
    return noisy


def views_of(data: EncodedQuestions, how: Augmentation, key: bytes) -> EncodedQuestions:
    """The views of the records ``data``, ``how.views`` rows for each.

    Args:
        key: of all views; equal keys give equal ones.
    """
    assert data.signal is not None  # the study's checks
    return replace(data, signal=Views(**vars(data.signal), how=how, key=key), views=how.views)


def anew(data: EncodedQuestions) -> EncodedQuestions:
    """The next views of the same records."""
    if not isinstance(data.signal, Views):
        return data
    return replace(data, signal=replace(data.signal, turn=data.signal.turn + 1))
