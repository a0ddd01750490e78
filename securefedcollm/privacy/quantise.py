"""Floats to integers, with a sensitivity that is an exact integer.

A whole vector is clipped to L2 norm C, scaled to ``bound`` integers per C and rounded. Rounding to
the nearest integer can lengthen a vector by √d/2, so the scale is first reduced by the factor 1 -
√d/(2·bound); then Σq² <= bound² is *checked in integers* on the very vector that will be summed.
The sensitivity of a sum of such vectors under add/remove is exactly ``bound``, whatever floating
point did on the way (Kairouz, Liu and Steinke 2021, without the random rotation and with the
conditional rounding replaced by the deterministic check).

The fact that a vector was clipped is itself private. The caller gets it and must not release it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, LocalProtocolError, TrainingError

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]

LARGEST_BOUND: Final = 2**31 - 1
_CHUNK: Final = 1 << 15  # 256 KiB of float64: stays in L2
_DIRECT: Final = 2**23  # up to here _CHUNK squares sum below 2^62
_LARGEST_LOSS: Final = 0.25


class Quantised(NamedTuple):
    """The result of :meth:`Quantiser.encode`."""

    integers: npt.NDArray[np.int64]
    """q, int64 [d]."""
    norm_squared: int
    """Σq² <= bound². Private: do not release."""
    clipped: bool
    """The vector was longer than C. Private: do not release."""


class Quantiser:
    """Clip to ``clip_norm`` and quantise so that C becomes ``bound`` integers.

    Args:
        values: length d of the vectors.
        clip_norm: C, the L2 norm that a whole vector is clipped to.
        bound: integers that C is mapped to (γC in the paper); the integer sensitivity of the sum,
            and a bound on every |qᵢ|. At most 2^31 - 1.

    Raises:
        ConfigError: ``bound`` so small for ``values`` that rounding would eat over a quarter of
            the scale, or an impossible argument.
    """

    __slots__ = ("_shrink", "bound", "clip_norm", "values")

    def __init__(self, values: int, clip_norm: float, bound: int) -> None:
        if values < 1:
            raise ConfigError("a vector has at least one value", where="values")
        if not (math.isfinite(clip_norm) and clip_norm > 0.0):
            raise ConfigError(f"must be positive, not {clip_norm}", where="clip_norm")
        if not 1 <= bound <= LARGEST_BOUND:
            raise ConfigError(f"must lie in 1..{LARGEST_BOUND}, not {bound}", where="bound")
        loss = math.sqrt(values) / (2.0 * bound)
        if loss > _LARGEST_LOSS:
            least = 1 << math.ceil(math.log2(math.sqrt(values) / (2.0 * _LARGEST_LOSS)))
            raise ConfigError(
                f"{bound} integers for the clip norm are too few for {values} values",
                where="bound",
                hint=f"use a bound of at least {least} (about {least.bit_length() + 1} bits)",
            )
        self.values = values
        self.clip_norm = clip_norm
        self.bound = bound
        self._shrink = 1.0 - loss

    @property
    def scale(self) -> float:
        """Integers per unit of the float vector, after the allowance for rounding."""
        return self._shrink * self.bound / self.clip_norm

    def encode(self, vector: Floats) -> Quantised:
        """Clip, scale and round one vector, float32 or float64 [d].

        Raises:
            TrainingError: a value is NaN or infinite.
            LocalProtocolError: another length or dtype.
        """
        integers = np.empty(self.values, dtype=np.int64)
        norm_squared, clipped = self._encode_into(integers, vector)
        return Quantised(integers, norm_squared, clipped)

    def encode_narrow(self, vector: Floats) -> npt.NDArray[np.int32]:
        """The integers of :meth:`encode` in half the memory, for a sum that needs no more noise."""
        integers = np.empty(self.values, dtype=np.int32)
        self._encode_into(integers, vector)
        return integers

    def _encode_into(self, integers: Integers, vector: Floats) -> tuple[int, bool]:
        norm = self._norm(vector)
        clipped = norm > self.clip_norm
        factor = self.scale * (self.clip_norm / norm if clipped else 1.0)
        for _ in range(4):
            total = _round_into(integers, vector, factor)
            if total is not None and total <= self.bound**2:
                return total, clipped
            # Only the last bits of the float norm lead here; the integer check has the last word.
            factor *= 1.0 - 2.0**-20
        raise LocalProtocolError("the quantised vector does not meet its integer bound")

    def encode_sum(self, rows: Iterable[Floats]) -> npt.NDArray[np.int64]:
        """Sum of individually clipped and quantised vectors, int64 [d] (joint DP-SGD).

        Every row is one unit's contribution, so the sum's sensitivity stays ``bound``: rounding
        the sum instead would add √d to it.

        Raises:
            TrainingError: a row has a NaN or infinity.
            LocalProtocolError: a row has another length.
        """
        total = np.zeros(self.values, dtype=np.int64)
        for row in rows:
            total += self.encode(row).integers
        return total

    def decode(self, total: Integers, divisor: float) -> npt.NDArray[np.float32]:
        """Mean of the summed vectors, float32 [d].

        Args:
            total: the (noised) integer sum, int64 or int32 [d].
            divisor: divides the sum, in addition to the scale: the number of survivors, or the
                expected batch in joint DP-SGD. Must not depend on private data.
        """
        if total.shape != (self.values,):
            raise LocalProtocolError(f"a sum of {self.values} values was expected")
        if not divisor > 0:
            raise LocalProtocolError("the divisor of a mean is positive")
        out = np.empty(self.values, dtype=np.float32)
        np.multiply(total, 1.0 / (self.scale * divisor), out=out, casting="unsafe")
        return out

    def _norm(self, vector: Floats) -> float:
        if vector.shape != (self.values,) or vector.dtype not in (np.float32, np.float64):
            raise LocalProtocolError(f"a float vector of {self.values} values was expected")
        squares = []
        for start in range(0, self.values, _CHUNK):
            part = vector[start : start + _CHUNK].astype(np.float64, copy=False)
            # np.dot would wake OpenBLAS's threads, which then spin for a while. This runs for every
            # record, so several silos on one machine would take the cores from each other.
            squares.append(float(np.einsum("i,i", part, part)))
        total = sum(squares)
        if not math.isfinite(total):
            raise TrainingError(
                "the update has a value that is not finite; nothing was released",
                hint="lower the learning rate or the clip norm, and check the training data",
            )
        return math.sqrt(total)

    def __repr__(self) -> str:
        return f"Quantiser(values={self.values}, clip_norm={self.clip_norm}, bound={self.bound})"


def _round_into(out: Integers, vector: Floats, factor: float) -> int | None:
    """``out`` = rint(vector · factor); Σ out², exactly, or None if a value passes 2^31."""
    scratch, whole = np.empty(_CHUNK, dtype=np.float64), np.empty(_CHUNK, dtype=np.int64)
    total = 0
    for start in range(0, len(out), _CHUNK):
        part = vector[start : start + _CHUNK]
        floats = scratch[: len(part)]
        np.multiply(part, factor, out=floats, dtype=np.float64)
        np.rint(floats, out=floats)
        integers = whole[: len(part)]
        np.copyto(integers, floats, casting="unsafe")
        largest = max(int(integers.max()), -int(integers.min()))
        if largest > LARGEST_BOUND:
            return None
        out[start : start + len(part)] = integers
        total += _sum_of_squares(integers, largest)
    return total


def _sum_of_squares(integers: npt.NDArray[np.int64], largest: int) -> int:
    """Σq² without overflow, for at most _CHUNK values of |q| <= largest < 2^31."""
    if largest <= _DIRECT:
        return int(np.dot(integers, integers))
    high, low = integers >> 16, integers & 0xFFFF
    product: Any = np.dot
    squares = int(product(high, high)) << 32
    return squares + (int(product(high, low)) << 17) + int(product(low, low))
