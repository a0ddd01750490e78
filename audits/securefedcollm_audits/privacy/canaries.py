"""Canaries through the whole path of a noised sum: clip, quantise, noise, mask, sum, decode.

Adversary: the server and c silos. They see the opened sum, subtract the colluders' part, and ask
about one unit: did it contribute, or a zero vector? The round is the worst one that the accountant
charges for: only the fewest silos are left with which a sum opens.

A *canary* is a vector far longer than C, all of it in one coordinate of its own, so that after the
clip it is C there and zero elsewhere. Why one round gives many independent trials: a canary's
contribution to the other coordinates is zero, and noise is independent from coordinate to
coordinate. So a canary's coordinate is distributed as under "in", and any coordinate without a
canary exactly as the same one would be under "out", all of them independent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.joint import JointSetting, JointStep
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.silo_unit import Setting, SiloUnit
from securefedcollm_audits.privacy.lower_bounds import Scores
from securefedcollm_audits.protocol.cohort import Cohort, Vector, play

LENGTH = 1e3
"""Length of a canary in clip norms: it exposes a build that does not clip."""

NoiseOf = Callable[[str], NoiseSource]
"""A silo's noise source by its name."""


class CanaryScores(NamedTuple):
    """The adversary's readings of the opened sum: float64 [n] each.

    In units of the sensitivity that is charged, so that the noise is the noise multiplier: the
    integer bound in a sum of integers, the clip norm in DP-SGD inside a silo.
    """

    present: Scores
    """Coordinates with a canary; expected value at most 1, if the canary takes part: the quantiser
    shrinks a clipped vector a little below the bound."""
    absent: Scores
    """Coordinates without; expected value 0."""


class Path(NamedTuple):
    """A mechanism to be attacked, from a unit's vector to the release."""

    event: Event
    """The accountant's charge for one play."""
    play: Callable[[NoiseOf], CanaryScores]
    """Carry it out once, with these sources of noise."""
    what: str
    """In words."""


def fresh(name: str) -> NoiseSource:
    """The source that a silo uses: its key is from the operating system."""
    return NoiseSource()


def silo_path(setting: Setting, unit: SiloUnit, silos: int, *, masked: bool = True) -> Path:
    """One round of the ``silo`` unit: every honest survivor's update is a canary.

    Args:
        silos: n; all but ``setting.least_survivors`` are lost at the upload.
        masked: as in :func:`_opened`.
    """
    honest = setting.least_survivors - setting.colluders

    def once(noise: NoiseOf) -> CanaryScores:
        vectors: dict[str, Vector] = {}
        for index, name in enumerate(_players(setting, silos, masked)):
            canary = np.zeros(setting.values, dtype=np.float32)
            canary[index] = LENGTH * unit.clip_norm
            vectors[name] = unit.protect(canary, noise(name))
        total = _opened(setting, unit.values, silos, vectors, masked)
        seen = unit.decode(total, 1).mean.astype(np.float64) / one
        return CanaryScores(seen[:honest], seen[honest:])

    event = unit.event()
    one = float(unit.decode(np.full(unit.values, event.sensitivity), 1).mean[0])
    return Path(event, once, "one round's sum of whole updates, a unit being a silo")


def joint_path(
    setting: JointSetting,
    step: JointStep,
    silos: int,
    clip_norm: float,
    units: int,
    *,
    masked: bool = True,
) -> Path:
    """One step of joint DP-SGD: every honest survivor has ``units`` records, each a canary that the
    silo samples at the study's rate. ``masked``: as in :func:`_opened`."""
    honest = setting.least_survivors - setting.colluders
    present = honest * units

    def once(noise: NoiseOf) -> CanaryScores:
        vectors: dict[str, Vector] = {}
        for index, name in enumerate(_players(setting, silos, masked)):
            taken = noise(name).poisson_batch(units, setting.sampling_rate) + index * units
            gradients = _one_hot(taken, LENGTH * clip_norm, setting.values)
            vectors[name] = step.protect(gradients, noise(name))
        total = _opened(setting, step.values, silos, vectors, masked)
        seen = step.decode(total).astype(np.float64) / one
        return CanaryScores(seen[:present], seen[present:])

    event = step.event()
    one = float(step.decode(np.full(step.values, event.sensitivity))[0])
    return Path(event, once, "one step's sum of sampled gradients, a unit being a record")


def _one_hot(
    coordinates: npt.NDArray[np.int64], value: float, length: int
) -> Iterator[npt.NDArray[np.float64]]:
    for coordinate in coordinates:
        row = np.zeros(length)
        if coordinate < length:  # a colluder's, whose contribution the adversary subtracts anyway
            row[coordinate] = value
        yield row


def _players(setting: Setting | JointSetting, silos: int, masked: bool) -> tuple[str, ...]:
    """The fewest silos with which a sum opens, the colluders last; without them if not masked."""
    last = silos if masked else silos - setting.colluders
    first = silos - setting.least_survivors
    return tuple(f"silo-{number + 1:03d}" for number in range(first, last))


def _opened(
    setting: Setting | JointSetting,
    values: int,
    silos: int,
    vectors: dict[str, Vector],
    masked: bool,
) -> Vector:
    """The sum of the honest survivors' vectors as the adversary knows it, int64 [values].

    Args:
        vectors: by the names of :func:`_players`.
        masked: play the protocol's round. Else the integers are added up. That is the same: masks
            cancel exactly in the ring, in which no sum of vectors within the bound wraps (a test
            compares the two), and the colluders' part is subtracted anyway.
    """
    if not masked:
        for vector in vectors.values():
            if int(np.abs(vector).max()) > setting.field_bound:
                raise RuntimeError("a vector does not fit into the field")
        plain: Vector = np.sum(list(vectors.values()), axis=0, dtype=np.int64)
        return plain
    cohort = Cohort(
        silos=silos,
        colluders=setting.colluders,
        values=values,
        bound=setting.field_bound,
        threshold=setting.least_survivors,
    )
    cohort.vectors |= vectors
    survivors = tuple(vectors)
    total = masked_sum(cohort, survivors)
    return total - cohort.plain_sum(survivors[len(survivors) - setting.colluders :])


def masked_sum(
    cohort: Cohort,
    survivors: tuple[str, ...],
    seen: Callable[[Step, str, bytes], None] = lambda step, name, frame: None,
) -> Vector:
    """Play a real round, with all but ``survivors`` lost at the upload; int64 [values].

    Args:
        seen: called with every answer that reaches the server: step, silo, frame.
    """

    def reply(step: Step, name: str, frame: bytes) -> bytes | None:
        if step is Step.UPLOAD and name not in survivors:
            return None
        seen(step, name, frame)
        return frame

    result = play(
        {name: cohort.silo(name, random=os.urandom) for name in cohort.names},
        CoordinatorRound(header=cohort.header, roster=cohort.roster),
        reply=reply,
    )
    if result.survivors != survivors:
        raise RuntimeError(f"the round was to end with {survivors}, not {result.survivors}")
    return result.sum.astype(np.int64, copy=False)
