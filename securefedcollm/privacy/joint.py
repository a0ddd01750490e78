"""Joint DP-SGD: one optimiser step as one noised secure sum over all silos' records.

Every silo draws a Poisson batch of its own records, clips and quantises each record's gradient by
itself, sums the integers and adds its share of the noise; the server decodes the noised sum of all
and divides it by the expected batch. The result is what a trusted curator with all records would
compute in DP-SGD (Abadi et al. 2016), with a discrete Gaussian (Kairouz, Liu and Steinke 2021).

Adversary: the server and c silos. They see every noised sum, know c silos' noise and batches, and
steer the model between steps. They never learn an honest silo's batch, nor how many records are in
it: so a record of an honest silo takes part with probability q in their eyes, too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate_events
from securefedcollm.privacy.distributed import DistributedGaussian
from securefedcollm.privacy.events import SUM_KIND, DiscreteGaussian, Event, SumKind
from securefedcollm.privacy.noise import Noise, batch_cap
from securefedcollm.privacy.quantise import Floats, Integers


class JointSetting(NamedTuple):
    """The mechanism of a step, except its noise: the same at every participant."""

    values: int
    """Length d of a gradient."""
    field_bound: int
    """Largest absolute integer of one silo in the ring."""
    least_survivors: int
    """Fewest silos with which a sum is opened."""
    colluders: int
    sampling_rate: float
    """q: probability with which each record of every silo takes part in a step."""
    batch_size: int
    """Expected batch of all silos together."""
    kind: SumKind = SUM_KIND
    """As what a step is charged."""
    silos: int = 0
    """On the roster, where surplus noise is removed from sums; else 0."""

    @property
    def batch_cap(self) -> int:
        """Largest number of records of one silo in one step, if that silo had all records."""
        return batch_cap(round(self.batch_size / self.sampling_rate), self.sampling_rate)


class JointStep:
    """Protects one silo's gradients of one step, and decodes the sum of all silos.

    Args:
        noise_multiplier: z of the sum, against the adversary, with ``least_survivors``.
        clip_norm: C, of one record's gradient.

    Raises:
        ConfigError: no honest share, or a field too narrow; names the study's key.
    """

    __slots__ = ("_distributed", "_setting")

    def __init__(self, setting: JointSetting, noise_multiplier: float, clip_norm: float) -> None:
        self._setting = setting
        self._distributed = _mechanism(setting, noise_multiplier, clip_norm)

    @property
    def values(self) -> int:
        """Length of the integer vector."""
        return self._setting.values

    @property
    def sampling_rate(self) -> float:
        return self._setting.sampling_rate

    @property
    def noise_multiplier(self) -> float:
        return self._distributed.noise_multiplier

    @property
    def mechanism(self) -> DistributedGaussian:
        """What noises the vector."""
        return self._distributed

    @property
    def identity(self) -> bytes:
        """32 bytes that two participants share exactly if they run the same mechanism."""
        made = self._distributed
        clip_norm, bound = made.quantiser.clip_norm, made.quantiser.bound
        return identity_of(self._setting, clip_norm, made.share_sigma, bound)

    def protect(self, gradients: Iterable[Floats], noise: Noise) -> npt.NDArray[np.int64]:
        """One silo's batch, each gradient float [d] by itself, to its noised sum, int64 [d].

        An empty batch is noise alone: it must not show.
        """
        return self._distributed.protect_sum(gradients, noise)

    def decode(self, total: Integers) -> npt.NDArray[np.float32]:
        """The step's gradient, float32 [d]: the noised sum over the *expected* batch."""
        return self._distributed.quantiser.decode(total, self._setting.batch_size)

    def event(self) -> DiscreteGaussian:
        """The release of one step in the worst case: ``least_survivors`` shares."""
        made = self._distributed
        return made.event(made.least_survivors, q=self._setting.sampling_rate)


def identity_of(setting: JointSetting, clip_norm: float, share_sigma: float, bound: int) -> bytes:
    """A mechanism's identity from its numbers; ``bound``: of one record's integers."""
    numbers = (clip_norm, share_sigma, setting.sampling_rate)
    counts = (bound, setting.values, setting.batch_size, setting.batch_cap)
    return sha256(b"securefedcollm/joint-step/v1\0", struct.pack(">dddQQQQ", *numbers, *counts))


@lru_cache(maxsize=64)
def calibrate_joint(epsilon: float, delta: float, steps: int, setting: JointSetting) -> float:
    """Smallest noise multiplier with which ``steps`` worst-case steps are (ε, δ) private.

    Against the server and ``colluders`` silos, within the ledger's tight filter.

    Raises:
        ConfigError: no noise within this field reaches ε.
    """

    def at(z: float) -> tuple[Event, ...]:
        made = _mechanism(setting, z, 1.0)
        return (made.event(made.least_survivors, count=steps, q=setting.sampling_rate),)

    return calibrate_events(at, epsilon, TIGHT_SHARE * delta)


def _mechanism(setting: JointSetting, z: float, clip_norm: float) -> DistributedGaussian:
    return DistributedGaussian(
        values=setting.values,
        clip_norm=clip_norm,
        field_bound=setting.field_bound,
        noise_multiplier=z,
        least_survivors=setting.least_survivors,
        colluders=setting.colluders,
        contributions=setting.batch_cap,
        kind=setting.kind,
        silos=setting.silos,
    )
