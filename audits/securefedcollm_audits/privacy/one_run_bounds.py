"""Lower bounds on ε from one training run: guesses about many canaries at once.

Half of m canaries, drawn by independent fair coins, are put into the training data; an attacker
says of some of them whether they are in. Under (ε, δ)-DP for adding or removing one canary the
number of right guesses is bounded in distribution, although all of them rest on one run and so
depend on each other: Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run"
(2023), Theorem 5.2. Mahloujifar, Melis and Chaudhuri, "Auditing f-differential privacy in one run"
(2024), use the whole trade-off curve f and are tighter, for a mechanism whose curve is known.

The number of guesses is fixed before the scores are seen; where several are tried, each gets its
part of the error (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm_audits.privacy.lower_bounds import CONFIDENCE, Scores

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the canaries that are guessed, tried one after the other."""
_LARGEST = 60.0
"""No bound is looked for above this ε."""

Curve = Callable[[float], float]
"""Power → least false-alarm rate of a test that has it, by a symmetric trade-off curve f: the
inverse of α → 1 − f(α)."""


class Tally(NamedTuple):
    """``right`` of ``guesses`` guesses about ``canaries`` canaries."""

    canaries: int
    guesses: int
    right: int


class OneRunBound(NamedTuple):
    """A lower bound on ε, and the tally that gave it."""

    epsilon: float
    tally: Tally


def tallies(
    scores: Scores, present: npt.NDArray[np.bool_], shares: Iterable[float] = SHARES
) -> list[Tally]:
    """Guess "in" of the canaries with the largest scores and "out" of as many with the smallest.

    Args:
        scores: float64 [m]; larger speaks for "in".
        present: bool [m], the coins.
        shares: of the canaries to guess about, in (0, 1].
    """
    order = np.argsort(scores, kind="stable")
    count = len(scores)
    found = []
    for share in shares:
        half = max(1, int(count * share / 2))
        right = int(present[order[-half:]].sum()) + int((~present[order[:half]]).sum())
        found.append(Tally(count, 2 * half, right))
    return found


def p_value(tally: Tally, epsilon: float, delta: float) -> float:
    """Greatest probability of at least this many right guesses, under (ε, δ)-DP (Theorem 5.2).

    β + 2mδ·max_{1 <= i <= v} (Σ_{k=1}^{i} P[W = v − k]) / i, with W binomial of ``guesses`` trials
    of success e^ε/(1 + e^ε) and β = P[W >= v].
    """
    from scipy.stats import binom

    count, guesses, right = tally
    if not 0 <= right <= guesses <= count:
        raise ValueError(f"an impossible tally {tally}")
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, rate))
    if not right:
        return 1.0
    below = np.cumsum(binom.pmf(right - np.arange(1, right + 1), guesses, rate))
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2.0 * count * delta * alpha)


def epsilon_lower_bound(
    found: Sequence[Tally], delta: float, confidence: float = CONFIDENCE
) -> OneRunBound:
    """Largest ε that some tally refutes; each is tested at its part of the error."""
    error = (1.0 - confidence) / len(found)

    def bound(tally: Tally) -> OneRunBound:
        return OneRunBound(_last_refuted(lambda eps: p_value(tally, eps, delta) <= error), tally)

    return max(map(bound, found), key=lambda bound: bound.epsilon)


def refutes_curve(tally: Tally, least_alarms: Curve, error: float) -> bool:
    """Whether this many right guesses have probability at most ``error`` under f-DP.

    Mahloujifar et al. 2024, Algorithm 1, with a bounded number of guesses. With p_i the probability
    of exactly i right ones among r guesses about m canaries, f-DP says for every j:
    Σ_{i >= j} (i/m) p_i <= 1 − f(Σ_{i >= j−1} ((r − i)/m) p_i). Were the tail from ``right`` on as
    heavy as ``error``, this recursion down to 0 gives the least that all p_i would have to sum to.
    More than 1 is the contradiction.
    """
    count, guesses, right = tally
    inside = error * right / count
    outside = error * (guesses - right) / count
    most = guesses / count
    for index in range(right - 1, -1, -1):
        needed = max(outside, least_alarms(inside))
        inside += index / (guesses - index) * (needed - outside)
        outside = needed
        if inside + outside > most:
            return True
    return False


def curve_of(claims: Iterable[tuple[float, float]]) -> Curve:
    """The trade-off curve that several (ε, δ) together promise (Dong, Roth and Su 2022, eq. 5)."""
    pairs = [(math.exp(-min(eps, 700.0)), delta) for eps, delta in claims]

    def least_alarms(power: float) -> float:
        return max(
            max(small * (power - delta), 1.0 - delta - (1.0 - power) / small)
            for small, delta in [*pairs, (1.0, 1.0)]
        )

    return least_alarms


def gaussian_curve(mu: float) -> Curve:
    """The trade-off curve of N(0, 1) against N(μ, 1) (Dong, Roth and Su 2022)."""
    normal = NormalDist()

    def least_alarms(power: float) -> float:
        if not 0.0 < power < 1.0:
            return max(0.0, min(1.0, power))
        return normal.cdf(normal.inv_cdf(power) - mu)

    return least_alarms


def gaussian_lower_bound(
    found: Sequence[Tally], delta: float, confidence: float = CONFIDENCE
) -> OneRunBound:
    """Lower bound on ε at ``delta`` if the mechanism's trade-off curve is a Gaussian one.

    That is exact for full-batch Gaussian noise and the limit of many sampled steps; for others it
    is a figure to compare, not a theorem.
    """
    error = (1.0 - confidence) / len(found)

    def bound(tally: Tally) -> OneRunBound:
        mu = _last_refuted(lambda m: refutes_curve(tally, gaussian_curve(m), error))
        return OneRunBound(gaussian_epsilon(mu, delta), tally)

    return max(map(bound, found), key=lambda bound: bound.epsilon)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at ``delta`` of N(0, 1) against N(μ, 1) (Balle and Wang 2018, Theorem 8)."""
    from scipy.special import log_ndtr, ndtr

    def delta_at(eps: float) -> float:
        above = float(ndtr(mu / 2.0 - eps / mu))
        return above - math.exp(min(700.0, eps + float(log_ndtr(-mu / 2.0 - eps / mu))))

    return _last_refuted(lambda eps: delta_at(eps) > delta, most=1e4) if mu > 0.0 else 0.0


def _last_refuted(refuted: Callable[[float], bool], most: float = _LARGEST) -> float:
    """Largest value that is still refuted, from below; ``refuted`` holds up to some value."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, most
    while high - low > 1e-4 * max(1e-3, low):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
