"""Mechanism audit: does the noise of the real path support the claim?

Canaries (:mod:`.canaries`, and :mod:`.probe` for DP-SGD inside a silo) are played through the
product's own code. There are two questions: is the noise as large as charged, and can an attacker
tell "in" from "out" better than the accountant's ε allows? The threshold is chosen on one half of
the trials and tested on the other (:mod:`.lower_bounds`).

It attacks one release, not a whole study. The two accountants compose many releases.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import joint_setting, joint_step, silo_unit
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.accounting import calibrate, claim
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.silo_unit import Setting
from securefedcollm.study import Study
from securefedcollm_audits.privacy.canaries import (
    CanaryScores,
    NoiseOf,
    Path,
    fresh,
    joint_path,
    seats_of,
    silo_path,
)
from securefedcollm_audits.privacy.finding import Finding, above_claim
from securefedcollm_audits.privacy.lower_bounds import CONFIDENCE, Scores, audit_scores

TRIALS: Final = 1_000_000
_UNITS: Final = 2000  # records of a silo in one play: memory and time are small
_SHORT: Final = 4.0
"""Length in clip norms of gradients that have to last for several steps."""
_COORDINATES: Final = 400  # of a whole update in one play
NOISE_CONFIDENCE: Final = 0.999


class Noise(NamedTuple):
    """An estimate of σ, and its interval of confidence :data:`NOISE_CONFIDENCE`."""

    low: float
    estimate: float
    high: float


def audit(
    study: Study,
    *,
    records: int | None = None,
    trials: int = TRIALS,
    noise: NoiseOf = fresh,
    progress: Progress = silent,
) -> Finding:
    """Attack one release of the study's mechanism.

    Args:
        records: of a silo; fixes the sampling rate of DP-SGD inside it.
        trials: coordinates that are read, about half of them canaries'; for the ``silo`` unit only
            as many as there are honest silos in each round.

    Raises:
        ConfigError: the study adds no noise.
    """
    path = path_of(study, records)
    assert study.privacy is not None
    scores = collect(path, trials, noise, progress)
    delta = study.privacy.delta
    claimed = claim([path.event], delta).epsilon
    found = audit_scores(*scores, delta)
    charged, measured = path.event.noise_multiplier, interval(scores.absent)
    faults = above_claim(found.epsilon, claimed)
    if measured.high < charged:
        faults.append(
            f"the noise is at most {measured.high:.4f} times the sensitivity; {charged:.4f} was "
            "charged"
        )
    return Finding(
        audit="mechanism",
        study=study,
        setting=f"{path.what}: {len(scores.present):,} canaries, {len(scores.absent):,} without",
        claimed=claimed,
        bound=found.epsilon,
        delta=delta,
        faults=faults,
        figures={
            "noise charged": charged,
            "noise measured": measured.estimate,
            "noise at least": measured.low,
            "noise at most": measured.high,
            "canaries": float(len(scores.present)),
            "without": float(len(scores.absent)),
            "threshold": found.threshold,
            "hits": float(found.guesses.hits),
            "of present": float(found.guesses.present),
            "false alarms": float(found.guesses.alarms),
            "of absent": float(found.guesses.absent),
            "confidence": CONFIDENCE,
        },
    )


def path_of(study: Study, records: int | None = None, *, whole: bool = False) -> Path:
    """The study's way from a unit's vector to the release.

    Args:
        whole: to be played very often. The masks, which cancel, are left out, and a silo's own
            DP-SGD takes all steps of a round.

    Raises:
        ConfigError: the study adds no noise.
    """
    privacy, local = study.privacy, study.local
    if privacy is None:
        raise ConfigError(
            "this study adds no noise: there is no mechanism to audit",
            where="privacy",
            hint="`audit one-run` and `audit inversion` show what its updates reveal",
        )
    if privacy.unit == "silo":
        unit = silo_unit(study, lambda round_: _COORDINATES, 0)
        assert unit is not None
        shares, colluders = study.noise_shares(), study.silos.colluders
        setting = Setting(_COORDINATES, study.field.bound, shares, colluders)
        return silo_path(setting, unit, seats_of(study), masked=not whole)
    if study.joint:
        # Where a whole run is read, false alarms are rare: four of five coordinates are for them.
        apart = 5 if whole else 2
        units = max(1, 2 * _UNITS // apart // study.silos.count)
        values = apart * units * (study.noise_shares() - study.silos.colluders)
        step, shape = joint_step(study, values), joint_setting(study, values)
        assert step is not None
        assert shape is not None
        given = (shape, step, seats_of(study), privacy.clip_norm, units)
        return joint_path(*given, masked=not whole)
    from securefedcollm_audits.privacy.probe import local_path

    rate = min(1.0, local.batch_size / (records or local.batch_size))
    z = calibrate(privacy.epsilon, privacy.delta, rate, local.steps * study.rounds)
    event = PoissonGaussian(q=rate, noise_multiplier=z, steps=local.steps if whole else 1)
    if not whole:
        return local_path(study, event, _UNITS)
    return local_path(study, event, _UNITS, length=_SHORT, masked=False)


def collect(path: Path, trials: int, noise: NoiseOf, progress: Progress) -> CanaryScores:
    """Play until ``trials`` coordinates are read."""
    played: list[CanaryScores] = []
    read = 0
    while read < trials or len(played) < 2:
        played.append(path.play(noise))
        read += len(played[-1].present) + len(played[-1].absent)
        progress(min(read, trials), trials, "canaries")
    return CanaryScores(
        np.concatenate([scores.present for scores in played]),
        np.concatenate([scores.absent for scores in played]),
    )


def interval(absent: Scores, confidence: float = NOISE_CONFIDENCE) -> Noise:
    """σ of normal noise around 0, with its exact two-sided interval (χ² of n degrees)."""
    from scipy.special import chdtri

    total, count = float(np.square(absent).sum()), len(absent)
    error = (1.0 - confidence) / 2.0
    return Noise(
        math.sqrt(total / float(chdtri(count, error))),
        math.sqrt(total / count),
        math.sqrt(total / float(chdtri(count, 1.0 - error))),
    )
