"""What a model is given that reads no tokens: pictures of one size, or recordings of one length, a
row for each record."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """The inputs of N records: ``values`` · ``scale`` + ``shift``.

    Kept in bytes, a picture takes a quarter of the memory of its numbers. A recording's are numbers
    already, so its scale is 1.

    ``along``: the dimensions of one record along which it can be moved: height and width of a
    picture, the samples or frames of a recording. ``lengths``: how far a recording goes along its
    own; silence follows. A picture is all there is.
    """

    values: Tensor  # uint8 [N, C, H, W]; float32 [N, T] or [N, T, bins]
    scale: Tensor  # float32 [C, 1, 1]; [1]
    shift: Tensor  # as scale
    along: tuple[int, ...] = ()
    lengths: Tensor | None = None  # int64 [N]

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Tensor) -> Signal:
        """The rows ``index``, int64 [B]."""
        lengths = None if self.lengths is None else self.lengths[index]
        return replace(self, values=self.values[index], lengths=lengths)

    def to(self, device: torch.device) -> Signal:
        """The same on ``device``."""
        values, scale, shift = (v.to(device) for v in (self.values, self.scale, self.shift))
        return replace(self, values=values, scale=scale, shift=shift)

    def padded(self, index: Tensor, size: int) -> Signal:
        """The rows ``index``, then rows of zeros, ``size`` in all."""
        values = self.values.new_zeros(size, *self.values.shape[1:])
        values[: len(index)] = self.values[index]
        return replace(self, values=values, lengths=None)

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the model is given, shaped as the values. Each follows from one."""
        return (self.values.float() * self.scale + self.shift).to(dtype)
