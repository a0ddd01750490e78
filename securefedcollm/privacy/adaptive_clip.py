"""Clipping to a quantile of the update norms, learnt privately (Andrew, Thakkar et al. 2021).

Each silo adds one coordinate to its vector: +1/2 if its update was *not* clipped, -1/2 if it was.
The noised sum estimates the share β of silos below C, and C moves geometrically until β meets the
target quantile. The coordinate is part of the one secure sum and of its sensitivity: vector and
indicator together keep the L2 norm C_total that the noise is calibrated to, so the step costs no ε
of its own, only a little more noise on the update (:func:`split`).

For ``silo`` units in large federations; with few silos the noise on β drowns it: use a fixed C.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from securefedcollm.errors import ConfigError

_ROUNDING: Final = 1e-9


class AdaptiveClip(msgspec.Struct, frozen=True):
    """The state of the clip norm. It is public, like everything derived from noised sums.

    Args:
        clip_norm: C of the coming round.
        quantile: target share of updates that are not clipped, in (0, 1).
        learning_rate: η of C ← C·exp(-η(β - quantile)).
        smallest, largest: C stays within them, so that a run of noise cannot ruin it.
    """

    clip_norm: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    smallest: float = 1e-6
    largest: float = 1e6

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise ConfigError(f"lies in (0, 1), not {self.quantile}", where="quantile")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0):
            raise ConfigError(f"must be positive, not {self.learning_rate}", where="learning_rate")
        if not 0.0 < self.smallest <= self.clip_norm <= self.largest < math.inf:
            raise ConfigError(
                f"{self.clip_norm} is not within {self.smallest}..{self.largest}",
                where="clip_norm",
            )

    @staticmethod
    def indicator(clipped: bool) -> float:
        """This silo's extra coordinate. ``clipped`` is private; only the noised sum may leave."""
        return -0.5 if clipped else 0.5

    def reach(self, rounds: int) -> tuple[float, float]:
        """Smallest and largest C that ``rounds`` applications of :meth:`next` can lead to."""
        down = math.exp(-self.learning_rate * (1.0 - self.quantile) * rounds)
        up = math.exp(min(700.0, self.learning_rate * self.quantile * rounds))
        low, high = (
            self.clip_norm * down * (1.0 - _ROUNDING),
            self.clip_norm * up * (1.0 + _ROUNDING),
        )
        return max(self.smallest, low), min(self.largest, high)

    def next(self, indicator_sum: float, silos: int) -> AdaptiveClip:
        """The state after a round.

        Args:
            indicator_sum: noised, decoded sum of :meth:`indicator` over ``silos`` survivors.
        """
        if silos < 1 or not math.isfinite(indicator_sum):
            raise ConfigError("no silo, or the sum is not finite", where="indicator_sum")
        share = min(1.0, max(0.0, indicator_sum / silos + 0.5))
        moved = self.clip_norm * math.exp(-self.learning_rate * (share - self.quantile))
        return msgspec.structs.replace(self, clip_norm=min(self.largest, max(self.smallest, moved)))


def split(noise_multiplier: float, indicator_multiplier: float) -> float:
    """Noise multiplier for the update so that update and indicator together have the first.

    The joint release of a vector with noise z_Δ·C and an indicator (sensitivity 1/2 under
    zero-out) with noise z_b·1/2 costs 1/z² = 1/z_Δ² + 1/z_b² (Andrew et al. 2021, Theorem 1).

    Args:
        noise_multiplier: z, what the accountant is told.
        indicator_multiplier: z_b, noise on the indicator sum over its sensitivity 1/2; above z.

    Returns:
        z_Δ, slightly above z.
    """
    if not indicator_multiplier > noise_multiplier > 0.0:
        raise ConfigError(
            f"{indicator_multiplier} must be above the noise multiplier {noise_multiplier}",
            where="indicator_multiplier",
            hint="ten times the noise multiplier costs half a percent",
        )
    return 1.0 / math.sqrt(1.0 / noise_multiplier**2 - 1.0 / indicator_multiplier**2)
