"""The ``silo`` unit in a round: from a whole update to noised integers, and back to a mean.

One silo is one unit. Its update is clipped to L2 norm C as a whole, quantised with the exact
integer check of :mod:`.quantise` and given this silo's share of the noise; the server decodes the
sum (:mod:`.distributed`). Both sides derive the same mechanism from the study; :attr:`identity`
goes into the round's header, so that silos which do not share it refuse each other's keys.

Adversary: the server and c silos. The guarantee rests on nothing that the server chooses here.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate_events
from securefedcollm.privacy.adaptive_clip import AdaptiveClip, split
from securefedcollm.privacy.distributed import DistributedGaussian
from securefedcollm.privacy.events import SUM_KIND, DiscreteGaussian, Event, SumKind
from securefedcollm.privacy.noise import Noise
from securefedcollm.privacy.quantise import Floats, Integers


class Setting(NamedTuple):
    """The parameters that fix the mechanism, except the noise: the same on both sides."""

    values: int
    """Largest length d of an update in any round."""
    field_bound: int
    """Largest absolute integer of one silo in the ring."""
    least_survivors: int
    """Fewest silos with which a sum is opened."""
    colluders: int
    kind: SumKind = SUM_KIND
    """As what a round is charged."""
    silos: int = 0
    """On the roster, where surplus noise is removed from sums; else 0."""


class Opened(NamedTuple):
    """The server's decoding of one sum."""

    mean: npt.NDArray[np.float32]
    """Noised mean update, float32 [d]."""
    indicator_sum: float | None
    """Noised sum of :meth:`~.adaptive_clip.AdaptiveClip.indicator`, where the clip is adaptive."""


class SiloUnit:
    """Protects one silo's update of one round, and decodes the sum of all.

    Noise and sensitivity are integers that do not depend on C. So the guarantee is the same,
    whoever chooses C.

    Args:
        setting: with ``values`` the length of this round's update.
        noise_multiplier: z of the sum, against the adversary, with ``least_survivors``.
        clip_norm: C of this round.
        count_noise: with an adaptive clip, noise of the count over that of the sum (above 1). The
            count is one more coordinate, ±s with s = C·z_Δ/z_b, so that one noise serves all: it
            is z_Δ·C on the update, z_b/2 on the count, and z times the norm √(C² + s²) of both,
            which is the sensitivity of the joint release (:func:`~.adaptive_clip.split`).

    Raises:
        ConfigError: no honest share, or a field too narrow; names the study's key.
    """

    __slots__ = ("_count", "_distributed", "clip_norm")

    def __init__(
        self,
        setting: Setting,
        noise_multiplier: float,
        clip_norm: float,
        count_noise: float | None = None,
    ) -> None:
        self.clip_norm = clip_norm
        self._count = 0.0
        if count_noise is not None:
            noise = count_noise * noise_multiplier
            self._count = clip_norm * split(noise_multiplier, noise) / noise
            setting = setting._replace(values=setting.values + 1)
        norm = math.hypot(clip_norm, self._count)
        self._distributed = _mechanism(setting, noise_multiplier, norm)

    @property
    def values(self) -> int:
        """Length of the integer vector."""
        return self._distributed.quantiser.values

    @property
    def noise_multiplier(self) -> float:
        return self._distributed.noise_multiplier

    @property
    def adapted(self) -> tuple[float, float] | None:
        """(C, s of the count) of this round where the clip is adaptive: not in the study."""
        return (self.clip_norm, self._count) if self._count else None

    @property
    def mechanism(self) -> DistributedGaussian:
        """What noises the vector."""
        return self._distributed

    @property
    def identity(self) -> bytes:
        """32 bytes that two participants share exactly if they run the same mechanism."""
        made = self._distributed
        return identity_of(
            (self.clip_norm, self._count, made.share_sigma),
            (made.quantiser.bound, made.quantiser.values),
        )

    def protect(self, update: Floats, noise: Noise) -> npt.NDArray[np.int64]:
        """Clip, quantise and noise one update, float [d] to int64 [values].

        Raises:
            TrainingError: a value is not finite.
        """
        if not self._count:
            return self._distributed.protect(update, noise)
        exact = update.astype(np.float64)
        norm = float(np.linalg.norm(exact))
        clipped = norm > self.clip_norm
        if clipped and math.isfinite(norm):  # what is not finite, the quantiser refuses
            exact *= self.clip_norm / norm
        indicator = 2.0 * self._count * AdaptiveClip.indicator(clipped)
        return self._distributed.protect(np.append(exact, indicator), noise)

    def decode(self, total: Integers, weight: float) -> Opened:
        """The mean of updates from their noised integer sum, int64 [values].

        Args:
            weight: of all updates together: their number, if they count alike. Public.
        """
        mean = self._distributed.quantiser.decode(total, weight)
        if not self._count:
            return Opened(mean, None)
        return Opened(mean[:-1], float(mean[-1]) * weight / (2.0 * self._count))

    def event(self) -> DiscreteGaussian:
        """The release of one round in the worst case: ``least_survivors`` shares."""
        return self._distributed.event(self._distributed.least_survivors)


def identity_of(floats: tuple[float, float, float], integers: tuple[int, int]) -> bytes:
    """A mechanism's identity: (C, s of the count or 0, σ of a share), (bound, values)."""
    return sha256(b"securefedcollm/silo-unit/v1\0", struct.pack(">dddQQ", *floats, *integers))


def with_survivors(reserved: Event, survivors: int) -> Event:
    """The ``reserved`` event as it was, with the noise of ``survivors`` silos in the sum."""
    if not isinstance(reserved, DiscreteGaussian):
        return reserved
    return msgspec.structs.replace(reserved, shares=survivors)


@lru_cache(maxsize=64)
def calibrate_silo(epsilon: float, delta: float, rounds: int, setting: Setting) -> float:
    """Smallest noise multiplier with which ``rounds`` worst-case rounds are (ε, δ) private.

    Against the server and ``colluders`` silos, within the ledger's tight filter.

    Raises:
        ConfigError: no noise within this field reaches ε.
    """

    def at(z: float) -> tuple[Event, ...]:
        made = _mechanism(setting, z, 1.0)
        return (made.event(setting.least_survivors, count=rounds),)

    return calibrate_events(at, epsilon, TIGHT_SHARE * delta)


def _mechanism(setting: Setting, z: float, clip_norm: float) -> DistributedGaussian:
    return DistributedGaussian(
        values=setting.values,
        clip_norm=clip_norm,
        field_bound=setting.field_bound,
        noise_multiplier=z,
        least_survivors=setting.least_survivors,
        colluders=setting.colluders,
        kind=setting.kind,
        silos=setting.silos,
    )
