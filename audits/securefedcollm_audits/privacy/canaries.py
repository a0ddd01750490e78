"""Canaries through the whole path of a noised sum: clip, quantise, noise, mask, sum, decode.

Adversary: the server and c silos. They see the opened sum, subtract the colluders' part, and ask
about one unit: did it contribute, or a zero vector? The round is the worst one that the accountant
charges for: only the fewest silos are left with which a sum opens. On a random graph a lying server
may leave β of those out of the sum; here the adversary is given what they contributed instead.

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

from securefedcollm.aggregation import SchemeName, SiloSide, Step, coordinator_side
from securefedcollm.aggregation.masking.graph.choice import Graph
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.joint import JointSetting, JointStep
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.silo_unit import Setting, SiloUnit
from securefedcollm.study import Study
from securefedcollm_audits.privacy.lower_bounds import Scores
from securefedcollm_audits.protocol.cohort import Cohort, Vector, play
from securefedcollm_audits.protocol.graph_cohort import GraphCohort

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


class Seats(NamedTuple):
    """Who is in a played sum."""

    silos: int
    """n."""
    survivors: int
    """Q, the fewest that a sum opens with. Their number less those whose noise counts is β."""
    colluders: int
    graph: Graph | None = None
    """Of the masks; None if they are between all silos."""

    def cohort(self, values: int, bound: int) -> Cohort:
        """Silos with identities, for vectors int64 [values] within ±``bound``."""
        n, c = self.silos, self.colluders
        if self.graph is None:
            return Cohort(n, c, values, bound, threshold=self.survivors)
        k, t = self.graph.neighbours, self.graph.shares
        return GraphCohort(n, c, values, bound, neighbours=k, shares=t, minimum=self.survivors)


def seats_of(study: Study) -> Seats:
    """The fewest silos that the study's sums open with."""
    silos = study.silos
    return Seats(silos.count, study.quorum, silos.colluders, study.graph)


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


def silo_path(setting: Setting, unit: SiloUnit, seats: Seats, *, masked: bool = True) -> Path:
    """One round of the ``silo`` unit: every honest survivor's update is a canary.

    Args:
        seats: all but its survivors are lost at the upload.
        masked: as in :func:`_opened`.
    """
    honest = setting.least_survivors - setting.colluders

    def once(noise: NoiseOf) -> CanaryScores:
        vectors: dict[str, Vector] = {}
        for index, name in enumerate(_players(seats, honest, masked)):
            canary = np.zeros(setting.values, dtype=np.float32)
            canary[index] = LENGTH * unit.clip_norm
            vectors[name] = unit.protect(canary, noise(name))
        total = _opened(setting.field_bound, unit.values, seats, vectors, honest, masked)
        seen = unit.decode(total, 1).mean.astype(np.float64) / one
        return CanaryScores(seen[:honest], seen[honest:])

    event = unit.event()
    one = float(unit.decode(np.full(unit.values, event.sensitivity), 1).mean[0])
    return Path(event, once, "one round's sum of whole updates, a unit being a silo")


def joint_path(
    setting: JointSetting,
    step: JointStep,
    seats: Seats,
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
        for index, name in enumerate(_players(seats, honest, masked)):
            taken = noise(name).poisson_batch(units, setting.sampling_rate) + index * units
            gradients = _one_hot(taken, LENGTH * clip_norm, setting.values)
            vectors[name] = step.protect(gradients, noise(name))
        total = _opened(setting.field_bound, step.values, seats, vectors, honest, masked)
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


def _players(seats: Seats, honest: int, masked: bool) -> tuple[str, ...]:
    """The fewest silos with which a sum opens, those whose noise counts first; only they if not
    masked."""
    first = seats.silos - seats.survivors
    last = seats.silos if masked else first + honest
    return tuple(f"silo-{number + 1:03d}" for number in range(first, last))


def _opened(
    bound: int,
    values: int,
    seats: Seats,
    vectors: dict[str, Vector],
    honest: int,
    masked: bool,
) -> Vector:
    """The sum of the honest survivors' vectors as the adversary knows it, int64 [values].

    Args:
        bound: of the field.
        vectors: by the names of :func:`_players`, of which ``honest`` are unknown to the adversary.
        masked: play the protocol's round. Else the integers are added up. That is the same: masks
            cancel exactly in the ring, in which no sum of vectors within the bound wraps (a test
            compares the two), and the others' part is subtracted anyway.
    """
    if not masked:
        for vector in vectors.values():
            if int(np.abs(vector).max()) > bound:
                raise RuntimeError("a vector does not fit into the field")
        plain: Vector = np.sum(list(vectors.values()), axis=0, dtype=np.int64)
        return plain
    cohort = seats.cohort(values, bound)
    cohort.vectors |= vectors
    survivors = tuple(vectors)
    total = masked_sum(cohort, survivors)
    return total - cohort.plain_sum(survivors[honest:])


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

    scheme: SchemeName = "masking"
    sides: dict[str, SiloSide]
    if isinstance(cohort, GraphCohort):
        scheme = "masking-graph"
        sides = {name: cohort.member(name, random=os.urandom) for name in cohort.names}
    else:
        sides = {name: cohort.silo(name, random=os.urandom) for name in cohort.names}
    result = play(
        sides,
        coordinator_side(scheme, header=cohort.header, roster=cohort.roster),
        reply=reply,
    )
    if result.survivors != survivors:
        raise RuntimeError(f"the round was to end with {survivors}, not {result.survivors}")
    return result.sum.astype(np.int64, copy=False)
