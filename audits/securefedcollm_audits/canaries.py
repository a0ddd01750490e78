"""Canaries through the whole path of the ``silo`` unit: clip, quantise, noise, mask, sum, decode.

Adversary: the server and c silos. They see the opened sum, subtract what the colluders put into it,
and ask for one silo: did it contribute, or a zero vector? The round is the worst one that the
accountant charges for: only the fewest silos are left with which a sum opens.

Each honest silo uploads a *canary*: a vector far longer than C, all of it in one coordinate of its
own, so that after the clip it is C there and zero elsewhere. Why one round gives many independent
trials: a silo's contribution to the other coordinates is zero, and noise is independent from
coordinate to coordinate. So a canary's coordinate is distributed as under "in", and any coordinate
without a canary exactly as the same one would be under "out", all of them independent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.coordinator import CoordinatorRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.primitives import sha256
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.silo_unit import Setting, SiloUnit
from securefedcollm_audits.cohort import Cohort, play
from securefedcollm_audits.lower_bounds import Scores


class CanaryScores(NamedTuple):
    """What the adversary reads off the opened sums, in units of the clip: float64 [n] each."""

    present: Scores
    """Coordinates with a canary; expected value just below 1."""
    absent: Scores
    """Coordinates without; expected value 0."""


class NoNoise(NoiseSource):
    """The bug or the laziness to be found: a silo that adds no noise share."""

    __slots__ = ()

    def discrete_gaussian(self, sigma: float, n: int) -> npt.NDArray[np.int64]:
        return np.zeros(n, dtype=np.int64)


def canary_scores(
    setting: Setting,
    unit: SiloUnit,
    *,
    silos: int,
    rounds: int,
    label: str,
    noiseless: int = 0,
) -> CanaryScores:
    """Play ``rounds`` real rounds and read the canaries' coordinates.

    Args:
        silos: n; all but ``setting.least_survivors`` are lost at the upload.
        label: another label draws other keys and noise; one label, the same.
        noiseless: honest survivors that leave their noise share out.
    """
    seen = np.array(
        [_one_round(setting, unit, silos, f"{label} {i}", noiseless) for i in range(rounds)],
        dtype=np.float64,
    )
    honest = setting.least_survivors - setting.colluders
    seen /= unit.clip_norm
    return CanaryScores(seen[:, :honest].reshape(-1), seen[:, honest:].reshape(-1))


def _one_round(
    setting: Setting, unit: SiloUnit, silos: int, label: str, noiseless: int
) -> npt.NDArray[np.float32]:
    """The sum of the honest survivors' updates as the adversary knows it, float32 [d]."""
    cohort = Cohort(
        silos=silos,
        colluders=setting.colluders,
        values=unit.values,
        bound=setting.field_bound,
        threshold=setting.least_survivors,
        label=label,
    )
    lost = cohort.names[: silos - setting.least_survivors]
    survivors = cohort.names[len(lost) :]
    for index, name in enumerate(survivors):
        canary = np.zeros(setting.values, dtype=np.float32)
        canary[index] = 1e3 * unit.clip_norm
        key = sha256(f"{label} {name} noise".encode())
        noise = NoNoise(key) if index < noiseless else NoiseSource(key)
        cohort.vectors[name] = unit.protect(canary, noise)
    result = play(
        {name: cohort.silo(name) for name in cohort.names},
        CoordinatorRound(header=cohort.header, roster=cohort.roster),
        reply=lambda step, name, frame: None if step is Step.UPLOAD and name in lost else frame,
    )
    if result.survivors != survivors:
        raise RuntimeError(f"the round was to end with {survivors}, not {result.survivors}")
    colluding = cohort.plain_sum(survivors[len(survivors) - setting.colluders :])
    return unit.decode(result.sum - colluding, 1).mean  # of one: the sum itself
