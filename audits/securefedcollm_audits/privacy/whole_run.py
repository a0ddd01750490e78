"""Whole-run audit: canaries through every sum of a study, and one guess about each at the end.

The adversary of :mod:`.mechanism`, which looks at one release, here sees all of them, as many as
the study has. A canary keeps its coordinate for the run, and in joint DP-SGD its silo samples it
anew in every step, with the study's rate and the product's own sampler. So a coordinate's readings
are what a whole run tells of one unit. The adversary adds up their log-likelihood ratio, which no
other test beats (Neyman and Pearson 1933), and guesses by a threshold. There are two tests, each
with half of the error. One has the threshold that proves most of the ideal mechanism, by
simulation: it is fixed before anything is played, so that all trials test it. The other chooses its
threshold by one half of the trials, since a weakened build is attacked best with another.

Coordinates are independent, so a run of many canaries is as many trials, and a million of them are
read. The secure sum's masks are left out: they cancel exactly (:func:`.canaries._opened`). All else
is the product's own: clip, quantiser with its check in integers, sampler, and noise shares of the
fewest silos with which a sum opens.

Three things refute a claim: a bound on ε above it, noise that is smaller than charged, and canaries
that move a sum by more than the sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Event, rate, repeat, times
from securefedcollm.study import Study
from securefedcollm_audits.privacy.canaries import CanaryScores, NoiseOf, Path, fresh
from securefedcollm_audits.privacy.finding import Finding, above_claim, power_of
from securefedcollm_audits.privacy.lower_bounds import (
    CONFIDENCE,
    Bound,
    Guesses,
    Scores,
    audit_scores,
    epsilon_lower_bound,
)
from securefedcollm_audits.privacy.mechanism import NOISE_CONFIDENCE, TRIALS, Noise, path_of

_LEAST_WEIGHT: Final = 1e-15
_HALVINGS: Final = 6
_REHEARSALS: Final = 3
_SHARES: Final = np.logspace(-4.0, -0.05, 60)
"""Shares of hits that are tried for a threshold."""


class Readings(NamedTuple):
    """What the adversary makes of the runs that were played."""

    scores: CanaryScores
    """Log-likelihood ratio of every coordinate, over its whole run."""
    noise: Noise
    """Of one release, from the coordinates without a canary."""
    moved: float
    """Lower end, of confidence :data:`~.mechanism.NOISE_CONFIDENCE`, of the mean by which a canary
    moves a sum in which it takes part, in sensitivities."""


def audit(
    study: Study,
    *,
    records: int | None = None,
    trials: int = TRIALS,
    noise: NoiseOf = fresh,
    progress: Progress = silent,
) -> Finding:
    """Attack all releases of the study together.

    Args:
        records: of a silo; fixes the sampling rate of DP-SGD inside it.
        trials: coordinates whose whole run is read. Canaries' are half of them in a silo's own
            DP-SGD, a fifth in joint DP-SGD, and under the ``silo`` unit as many as there are honest
            silos in each play.

    Raises:
        ConfigError: the study adds no noise.
    """
    path = path_of(study, records, whole=True)
    assert study.privacy is not None
    delta, plays = study.privacy.delta, study.rounds * (study.tuning_sums if study.joint else 1)
    whole = repeat(path.event, times(path.event) * plays)
    read = collect(path, plays, trials, noise, progress)
    present, absent = read.scores
    claimed, charged = claim([whole], delta).epsilon, path.event.noise_multiplier
    ideal = Ideal(path.event, plays, len(present), len(absent))
    rehearsed = ideal.threshold(delta)
    found = _best(read.scores, rehearsed, delta)
    by_epsilon = _noticed(ideal, rehearsed, delta, claimed)
    by_sigma = read.noise.estimate / read.noise.high
    return Finding(
        audit="whole-run",
        study=study,
        setting=f"{plays} releases of {path.what}: {len(present):,} canaries, {len(absent):,} "
        "without",
        claimed=claimed,
        bound=found.epsilon,
        delta=delta,
        faults=_faults(found, claimed, read, charged),
        figures=_figures(found, read, charged) | {"notices noise below, by epsilon": by_epsilon},
        power=f"{power_of(max(by_sigma, by_epsilon))}; "
        + (f"{by_epsilon:.2f} by ε alone" if by_epsilon else "none by ε alone"),
    )


def _faults(found: Bound, claimed: float, read: Readings, charged: float) -> list[str]:
    faults = above_claim(found.epsilon, claimed)
    if read.noise.high < charged:
        faults.append(
            f"the noise is at most {read.noise.high:.4f} times the sensitivity; {charged:.4f} was "
            "charged"
        )
    if read.moved > 1.0:
        faults.append(f"a canary moves a sum by at least {read.moved:.4f} times the sensitivity")
    return faults


def _figures(found: Bound, read: Readings, charged: float) -> dict[str, float]:
    guesses = found.guesses
    return {
        "noise charged": charged,
        "noise measured": read.noise.estimate,
        "noise at least": read.noise.low,
        "noise at most": read.noise.high,
        "moved at least": read.moved,
        "canaries": float(len(read.scores.present)),
        "without": float(len(read.scores.absent)),
        "hits": float(guesses.hits),
        "of present": float(guesses.present),
        "false alarms": float(guesses.alarms),
        "of absent": float(guesses.absent),
        "confidence": CONFIDENCE,
    }


def collect(path: Path, plays: int, trials: int, noise: NoiseOf, progress: Progress) -> Readings:
    """Play whole runs of ``plays`` releases until ``trials`` coordinates are read."""
    score = likelihood(path.event)
    runs: list[CanaryScores] = []
    squares = moved = 0.0
    read = 0
    while read < trials or len(runs) < 2:
        inside, outside = np.zeros(0), np.zeros(0)
        for _ in range(plays):
            seen = path.play(noise)
            inside = score(seen.present) + (inside if len(inside) else 0.0)
            outside = score(seen.absent) + (outside if len(outside) else 0.0)
            squares += float(np.square(seen.absent).sum())
            moved += float(seen.present.sum())
        runs.append(CanaryScores(inside, outside))
        read += len(inside) + len(outside)
        progress(min(read, trials), trials, "canaries")
    scores = CanaryScores(
        np.concatenate([run.present for run in runs]), np.concatenate([run.absent for run in runs])
    )
    steps = times(path.event)
    sigma = _interval(squares / steps, plays * len(scores.absent))
    count, q = plays * steps * len(scores.present), rate(path.event)
    error = _quantile(NOISE_CONFIDENCE) * math.sqrt((sigma.high**2 + q * (1.0 - q)) / count)
    return Readings(scores, sigma, (moved / count - error) / q)


def _interval(squares: float, count: int) -> Noise:
    """σ of ``count`` normal readings around 0 with this sum of squares (χ², two-sided)."""
    from scipy.special import chdtri

    error = (1.0 - NOISE_CONFIDENCE) / 2.0
    ends = [float(chdtri(count, level)) for level in (error, 1.0 - error)]
    low, high = (math.sqrt(squares / end) for end in ends)
    return Noise(low, math.sqrt(squares / count), high)


def _quantile(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(confidence))


def likelihood(event: Event) -> Callable[[Scores], Scores]:
    """Reading → log-likelihood ratio of "in" to "out", for readings of ``event`` in sensitivities.

    A canary is in k of the event's steps, k binomial; the noise of a reading is √steps·z.
    """
    from scipy.special import gammaln, logsumexp

    q, steps = rate(event), times(event)
    variance = steps * event.noise_multiplier**2
    if q == 1.0:
        return lambda seen: (2.0 * steps * seen - steps**2) / (2.0 * variance)
    if steps == 1:
        out, into = math.log1p(-q), math.log(q) - 0.5 / variance
        return lambda seen: np.logaddexp(out, into + seen / variance)
    counts = np.arange(steps + 1.0)
    chosen = gammaln(steps + 1.0) - gammaln(counts + 1.0) - gammaln(steps - counts + 1.0)
    weights = chosen + counts * math.log(q) + (steps - counts) * math.log1p(-q)
    kept = weights > math.log(_LEAST_WEIGHT)
    counts, weights = counts[kept], weights[kept]

    def score(seen: Scores) -> Scores:
        terms = weights - counts**2 / (2.0 * variance) + seen[:, None] * (counts / variance)
        found: Scores = logsumexp(terms, axis=1)
        return found

    return score


def _guesses(scores: CanaryScores, threshold: float) -> Guesses:
    hits, alarms = (int((some >= threshold).sum()) for some in scores)
    return Guesses(hits, len(scores.present), alarms, len(scores.absent))


def _best(scores: CanaryScores, rehearsed: float, delta: float) -> Bound:
    """The larger of the two tests' bounds, which hold together with confidence :data:`CONFIDENCE`.

    ``rehearsed``: the threshold of the one.
    """
    each = 1.0 - (1.0 - CONFIDENCE) / 2.0
    guesses = _guesses(scores, rehearsed)
    first = Bound(epsilon_lower_bound(guesses, delta, each), guesses, rehearsed)
    return max(
        first, audit_scores(*scores, delta, confidence=each), key=lambda bound: bound.epsilon
    )


class Ideal(NamedTuple):
    """The mechanism as the accountant sees it, to be played in the adversary's head."""

    event: Event
    plays: int
    present: int
    """Canaries in the audit."""
    absent: int

    def scores(self, factor: float, seed: int) -> CanaryScores:
        """As an audit's, of a build with ``factor`` times the noise that is charged."""
        draw = np.random.default_rng(seed)  # nothing private is hidden by it
        score, steps = likelihood(self.event), times(self.event)
        sigma = factor * self.event.noise_multiplier * math.sqrt(steps)
        found = []
        for size, q in ((self.present, rate(self.event)), (self.absent, 0.0)):
            total = np.zeros(size)
            for _ in range(self.plays):
                seen = sigma * draw.standard_normal(size)
                if q:
                    seen += draw.random(size) < q if steps == 1 else draw.binomial(steps, q, size)
                total += score(seen)
            found.append(total)
        return CanaryScores(*found)

    def threshold(self, delta: float) -> float:
        """The one by which an audit of this size is expected to prove most."""
        runs = [self.scores(1.0, seed) for seed in range(_REHEARSALS)]
        present = np.concatenate([run.present for run in runs])
        absent = np.concatenate([run.absent for run in runs])

        def expected(threshold: float) -> float:
            hits, inside, alarms, outside = _guesses(CanaryScores(present, absent), threshold)
            share = round(hits / inside * self.present), round(alarms / outside * self.absent)
            return epsilon_lower_bound(
                Guesses(share[0], self.present, share[1], self.absent), delta
            )

        return max(map(float, np.quantile(present, 1.0 - _SHARES)), key=expected)


def _noticed(ideal: Ideal, rehearsed: float, delta: float, claimed: float) -> float:
    """The noise, over that charged, below which the bound on ε passes the claim; 0 if nowhere.

    Of the ideal mechanism, in two rehearsals of two.
    """

    def refuted(factor: float) -> bool:
        runs = (ideal.scores(factor, seed) for seed in (_REHEARSALS, _REHEARSALS + 1))
        return all(_best(run, rehearsed, delta).epsilon > claimed for run in runs)

    low, high = 0.05, 1.0
    if not refuted(low):
        return 0.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
