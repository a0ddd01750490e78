"""Canaries through the whole real path: clip, quantise, noise, mask, sum, open.

Every silo hides a one-hot vector of norm C in its update; the adversary looks at the opened sum and
guesses, coordinate by coordinate, whether a canary sits there. The guesses' Clopper-Pearson bound
on ε stays below the claim. With all but one noise share forgotten it must not: the same test, on
the same path, then refutes the claim, which shows that it can.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from securefedcollm_audits.cohort import Cohort

from securefedcollm.aggregation import coordinator_side
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.distributed import DistributedGaussian
from securefedcollm.privacy.noise import NoiseSource

SILOS, VALUES, ROUNDS, DELTA = 10, 6000, 24, 1e-5
FIELD_BOUND = 2**22


def mechanism() -> DistributedGaussian:
    """All ten silos survive and none colludes: the sum's noise multiplier is 1."""
    return DistributedGaussian(
        values=VALUES,
        clip_norm=0.5,
        field_bound=FIELD_BOUND,
        noise_multiplier=1.0,
        least_survivors=SILOS,
        colluders=0,
    )


def opened_sum(made: DistributedGaussian, round_: int, noisy: int) -> np.ndarray:
    """One real round; only the first ``noisy`` silos add their share of the noise."""
    cohort = Cohort(
        silos=SILOS, colluders=0, values=VALUES, bound=FIELD_BOUND, label=f"canary {round_}"
    )
    for index, name in enumerate(cohort.names):
        update = np.zeros(VALUES, dtype=np.float32)
        update[index] = 3.0  # longer than C: the clip is part of the path
        if index < noisy:
            key = bytes([round_, index]) * 16
            cohort.vectors[name] = made.protect(update, NoiseSource(key))
        else:
            cohort.vectors[name] = made.quantiser.encode(update).integers
    silos = {name: cohort.silo(name) for name in cohort.names}
    coordinator = coordinator_side("masking", header=cohort.header, roster=cohort.roster)
    while True:
        for name, frame in coordinator.requests().items():
            coordinator.receive(name, silos[name].handle(frame))
        if not coordinator.advance():
            return coordinator.result.sum


def scores(noisy: int) -> tuple[np.ndarray, np.ndarray]:
    """(with canary [rounds, silos], without [rounds, rest]), in units of C."""
    made = mechanism()
    sums = np.array([opened_sum(made, round_, noisy) for round_ in range(ROUNDS)])
    scaled = sums / made.quantiser.bound
    return scaled[:, :SILOS], scaled[:, SILOS:]


def epsilon_bound(present: np.ndarray, absent: np.ndarray) -> float:
    """95 % lower bound on ε: threshold chosen on one half of the rounds, tested on the other."""
    half = ROUNDS // 2

    def bound(threshold: float, rounds: slice) -> float:
        true, false = present[rounds] > threshold, absent[rounds] > threshold
        hits, misses = int(true.sum()), int(false.sum())
        if not hits:
            return -math.inf
        least = stats.beta.ppf(0.025, hits, true.size - hits + 1)
        most = stats.beta.ppf(0.975, misses + 1, false.size - misses)
        return math.log(max(least - DELTA, 1e-12) / most)

    grid = np.linspace(-1.0, 4.0, 101)
    best = max(grid, key=lambda threshold: bound(threshold, slice(None, half)))
    return bound(float(best), slice(half, None))


@pytest.fixture(scope="module")
def claimed():
    return claim([mechanism().event(SILOS)], DELTA).epsilon


def test_canaries_do_not_refute_the_claim(claimed):
    present, absent = scores(noisy=SILOS)
    assert present.mean() == pytest.approx(1.0, abs=0.25)  # the canaries are in the sum
    assert absent.std() == pytest.approx(1.0, rel=0.02)  # and so is all of the noise
    bound = epsilon_bound(present, absent)
    assert 0.5 < bound < claimed


def test_canaries_refute_it_when_nine_of_ten_noise_shares_are_missing(claimed):
    assert epsilon_bound(*scores(noisy=1)) > claimed
