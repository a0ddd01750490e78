"""Lower bounds on ε from an attack, with a stated confidence.

An (ε, δ) claim limits every attacker who tells "the unit is in" from "it is out" by a test S:

    P[S | in] <= e^ε · P[S | out] + δ,    and the same with in and out exchanged.

Play the attack often, bound both rates by Clopper and Pearson (1934), and solve for ε (Jagielski,
Ullman and Oprea 2020). A bound above the claim refutes it; a bound below proves nothing more than
that this attack did not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

CONFIDENCE = 0.95
_TAIL = np.logspace(-4, -2, 9)[:-1]
_SHARES = np.concatenate([_TAIL, np.linspace(0.01, 0.99, 50), 1.0 - _TAIL])
"""Quantiles of the first half's "in" scores that are tried as thresholds."""


class Guesses(NamedTuple):
    """How often a test said "in": ``hits`` of ``present`` units, ``alarms`` of ``absent`` ones."""

    hits: int
    present: int
    alarms: int
    absent: int

    @property
    def reversed(self) -> Guesses:
        """The test that says "out" where this one says "in"."""
        return Guesses(
            self.absent - self.alarms, self.absent, self.present - self.hits, self.present
        )


class Bound(NamedTuple):
    """Lower bound on ε, and the test that gave it."""

    epsilon: float
    guesses: Guesses
    threshold: float


def epsilon_lower_bound(guesses: Guesses, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound on the mechanism's ε at ``delta``, right with probability ``confidence``.

    The trials must be independent and the test fixed before them. Each of the two rates gets half
    of the error probability (union bound). Never below 0; never infinite, however perfect the
    attack: few trials cannot prove much.
    """
    hits, present, alarms, absent = guesses
    if not (0 <= hits <= present and 0 <= alarms <= absent and present and absent):
        raise ValueError(f"impossible counts {guesses}")
    error = (1.0 - confidence) / 2.0
    caught = _least_rate(hits, present, error) - delta
    false = 1.0 - _least_rate(absent - alarms, absent, error)
    return max(0.0, math.log(caught / false)) if caught > 0.0 else 0.0


def audit_scores(
    present: Scores, absent: Scores, delta: float, confidence: float = CONFIDENCE
) -> Bound:
    """Best lower bound on ε by a threshold on a score: larger scores speak for "in".

    Threshold and direction are chosen on the first half of each sample and tested on the second,
    so that the search costs no confidence. Scores are in the order they were drawn, float64 [n].
    """
    tuned, tested = _halves(present, absent, first=True), _halves(present, absent, first=False)
    tests = [
        (float(threshold), backwards)
        for threshold in np.quantile(tuned[0], _SHARES)
        for backwards in (False, True)
    ]
    threshold, backwards = max(
        tests, key=lambda test: epsilon_lower_bound(_count(*tuned, *test), delta, confidence)
    )
    guesses = _count(*tested, threshold, backwards)
    return Bound(epsilon_lower_bound(guesses, delta, confidence), guesses, threshold)


def _halves(present: Scores, absent: Scores, *, first: bool) -> tuple[Scores, Scores]:
    def half(scores: Scores) -> Scores:
        middle = len(scores) // 2
        return scores[:middle] if first else scores[middle:]

    return half(present), half(absent)


def _count(present: Scores, absent: Scores, threshold: float, backwards: bool) -> Guesses:
    hits, alarms = int((present >= threshold).sum()), int((absent >= threshold).sum())
    guesses = Guesses(hits, len(present), alarms, len(absent))
    return guesses.reversed if backwards else guesses


def rate_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a success rate."""
    error = (1.0 - confidence) / 2.0
    low = _least_rate(successes, trials, error)
    return low, 1.0 - _least_rate(trials - successes, trials, error)


def _least_rate(successes: int, trials: int, error: float) -> float:
    """Clopper-Pearson lower bound on a success rate, wrong with probability at most ``error``."""
    from scipy.special import betaincinv  # only where it is needed: scipy takes a second to import

    if successes == 0:
        return 0.0
    return float(betaincinv(successes, trials - successes + 1, error))
