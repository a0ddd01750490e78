"""Noised counts of right and wrong answers over all silos' held-out units, as one secure sum.

A held-out unit, a record or a subject, contributes (r, 1 - r), where r in [0, 1] is the share of
its questions that were answered right. That vector has an L1 norm of 1, so an L2 norm of at most 1:
one unit more or less moves the two sums by 1 at most. (The pair *right, asked* would move them by
√2, and its ratio would be two to three times as noisy.) In integers a unit is (g, G - g) with
g = rint(G·r), whose squares sum to at most G²: the sensitivity is the integer G.

Every silo adds to both counts a share of discrete Gaussian noise. Under ``noise: local`` it is the
whole noise zG, so the claim holds against everybody. Under ``noise: distributed`` it is zG/√h, with
h = least survivors − colluders honest shares in every sum that is opened (:mod:`.distributed`).

Adversary: the server, which chooses the model that is asked, and c silos. No unit is sampled, so
each pays for every round. Which units are held out is :mod:`.aside`'s.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate_events
from securefedcollm.privacy.discrete_gaussian import TAIL
from securefedcollm.privacy.events import (
    SMALLEST_SHARE,
    SUM_KIND,
    SUMS,
    DiscreteGaussian,
    SumKind,
)
from securefedcollm.privacy.noise import NoiseSource

VALUES: Final = 2
"""Length of the vector: right, wrong."""
_LEAST_LEVELS: Final = 16
_Z95: Final = 1.96


class CountSetting(NamedTuple):
    """What fixes the mechanism, except its noise: the same at every participant."""

    field_bound: int
    """Largest absolute integer of one silo in the ring."""
    shares: int
    """Noise shares that a sum has at least: of all survivors, or 1 where each adds the whole."""
    colluders: int
    """Of them, those whose noise the adversary knows; 0 where each adds the whole."""
    kind: SumKind = SUM_KIND
    """As what a round is charged."""

    @property
    def honest(self) -> int:
        return self.shares - self.colluders


class Counting:
    """Protects one silo's counts of one round, and decodes the sum of all.

    Args:
        noise_multiplier: z, noise of each count against the adversary, in units; None: the study
            has no privacy, and the counts no noise.

    Raises:
        ConfigError: the field has no room for the noise; names the study's key.
    """

    __slots__ = ("_setting", "levels", "noise_multiplier", "share_sigma")

    def __init__(self, setting: CountSetting, noise_multiplier: float | None) -> None:
        self._setting = setting
        self.noise_multiplier = noise_multiplier
        per_share = (noise_multiplier or 0.0) / math.sqrt(setting.honest)
        fine = math.ceil(SMALLEST_SHARE / per_share) if per_share else 1
        self.levels = max(_LEAST_LEVELS, fine)
        """G: integers of one unit."""
        self.share_sigma = per_share * self.levels
        """σ of one silo's share, in integers."""
        if self.most < 1:
            raise ConfigError(
                "the field is too narrow for the noise on the counts of the held-out records",
                where="aggregation.value_bits",
                hint="raise it, or allow less noise with a larger privacy.epsilon",
            )

    @property
    def values(self) -> int:
        """Length of the integer vector."""
        return VALUES

    @property
    def most(self) -> int:
        """Most units of one silo that a sum has room for."""
        return (self._setting.field_bound - math.floor(TAIL * self.share_sigma)) // self.levels

    @property
    def identity(self) -> bytes:
        """32 bytes that two participants share exactly if they run the same mechanism."""
        return identity_of(self.share_sigma, self.levels)

    def protect(self, right: npt.NDArray[np.float64], noise: NoiseSource) -> npt.NDArray[np.int64]:
        """This silo's noised counts, int64 [2].

        Args:
            right: r of every held-out unit, [units]; a value that is no number counts as wrong.

        Raises:
            ConfigError: more units than :attr:`most`.
        """
        if len(right) > self.most:
            raise too_many(len(right), self.most)
        shares = np.clip(np.nan_to_num(right, nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
        integers = np.rint(shares * self.levels).astype(np.int64)
        total = np.array([integers.sum(), self.levels * len(right) - integers.sum()])
        if self.share_sigma:
            total = total + noise.discrete_gaussian(self.share_sigma, VALUES)
        return total.astype(np.int64)

    def events(self, count: int = 1) -> tuple[DiscreteGaussian, ...]:
        """What ``count`` rounds release at worst; empty without noise."""
        if not self.share_sigma:
            return ()
        return (
            SUMS[self._setting.kind](
                share_sigma=self.share_sigma,
                sensitivity=self.levels,
                values=VALUES,
                shares=self._setting.shares,
                colluders=self._setting.colluders,
                count=count,
            ),
        )

    def read(self, total: tuple[int, int], survivors: int) -> Counts:
        """The counts in an opened sum of ``survivors`` silos."""
        right, wrong = (value / self.levels for value in total)
        return Counts(right, wrong, self.share_sigma * math.sqrt(survivors) / self.levels)


class Counts(NamedTuple):
    """Counts of right and wrong answers, in units, and the noise on each."""

    right: float
    wrong: float
    sigma: float
    """Standard deviation of the noise, all survivors' shares together."""

    @property
    def accuracy(self) -> float | None:
        """right / (right + wrong), in [0, 1]; None where the noise drowned the number of units."""
        asked = self.right + self.wrong
        # The noise on the denominator has √2·σ: below 3 of that the ratio means nothing.
        if asked <= max(0.0, 3.0 * math.sqrt(2.0) * self.sigma):
            return None
        return min(1.0, max(0.0, self.right / asked))

    @property
    def margin(self) -> float | None:
        """Half of the 95 % interval that the noise alone gives the accuracy.

        The delta method for R / (R + W), with noise of σ on either: 1.96·σ·√(R² + W²) / (R + W)².
        """
        if self.accuracy is None:
            return None
        return _Z95 * self.sigma * math.hypot(self.right, self.wrong) / sum(self[:2]) ** 2


def identity_of(share_sigma: float, levels: int) -> bytes:
    """A mechanism's identity from its numbers."""
    return sha256(b"securefedcollm/counting/v1\0", struct.pack(">dQ", share_sigma, levels))


def too_many(units: int, most: int) -> ConfigError:
    """More held-out units than the sum has room for. Follows from numbers, not from content."""
    return ConfigError(
        f"{units} records or subjects are set aside, and the counts have room for {most}",
        where="validation.share",
        hint="lower it, or raise aggregation.value_bits",
    )


@lru_cache(maxsize=64)
def calibrate_counting(epsilon: float, delta: float, rounds: int, setting: CountSetting) -> float:
    """Smallest noise multiplier with which ``rounds`` rounds keep a held-out unit within (ε, δ).

    Within the ledger's tight filter, as the noise of tuning.

    Raises:
        ConfigError: no noise within this field reaches ε.
    """

    def at(z: float) -> tuple[DiscreteGaussian, ...]:
        return Counting(setting, z).events(rounds)

    try:
        return calibrate_events(at, epsilon, TIGHT_SHARE * delta)
    except ConfigError as error:
        if error.where != "privacy.epsilon":
            raise
        raise ConfigError(
            error.message,
            where=error.where,
            hint="raise ε, run fewer rounds, or remove validation",
        ) from None
