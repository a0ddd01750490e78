"""A third computation of ε, by nothing but numpy and scipy: an FFT of the privacy loss.

The loss of one release is put on a grid, the grid of T releases is its T-fold convolution, and δ(ε)
is read off. Losses are rounded to the nearest grid point: an estimate, no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Floats = npt.NDArray[np.float64]
_CELL = 2e-4
_CELLS = 2**18


def sampled_gaussian(q: float, z: float) -> list[Floats]:
    """Mass [_CELLS] of the privacy loss of a Poisson-sampled Gaussian: record present, absent."""
    edges = (np.arange(_CELLS + 1) - _CELLS / 2 - 0.5) * _CELL

    def place(loss: Floats) -> Floats:
        """x at which log((1 - q) + q·exp((2x - 1)/2z²)) is ``loss``; -inf if it is larger."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = z * z * np.log((np.exp(loss) - (1.0 - q)) / q) + 0.5
        return np.where(np.exp(loss) > 1.0 - q, found, -np.inf)

    def below(x: Floats) -> Floats:
        return (1.0 - q) * special.ndtr(x / z) + q * special.ndtr((x - 1.0) / z)

    present = np.diff(below(place(edges)))
    absent = -np.diff(special.ndtr(place(-edges) / z))
    return [present, absent]


def lattice(noise: Floats, shift: int, q: float) -> list[Floats]:
    """The same for integer noise, by its probabilities on -r, …, r, and a record of ``shift``."""
    size = len(noise) + shift
    without, with_ = np.zeros(size), np.zeros(size)
    without[: len(noise)] = noise
    with_[shift:] = noise
    with_ = (1.0 - q) * without + q * with_
    found = []
    for first, second in ((with_, without), (without, with_)):
        both = (first > 0.0) & (second > 0.0)
        loss = np.log(first[both] / second[both])
        cells = np.rint(loss / _CELL).astype(np.int64) + _CELLS // 2
        cells = np.clip(cells, 0, _CELLS - 1)  # what has no weight
        found.append(np.bincount(cells, weights=first[both], minlength=_CELLS))
    return found


def epsilon(directions: list[Floats], times: int, delta: float) -> float:
    """ε at ``delta`` of ``times`` releases: the larger of the two directions'."""
    losses = (np.arange(_CELLS) - _CELLS // 2) * _CELL
    return max(_solve(_profile(mass, times, losses), delta) for mass in directions)


def _profile(mass: Floats, times: int, losses: Floats) -> Callable[[float], float]:
    spectrum = np.fft.rfft(np.fft.ifftshift(mass)) ** times
    total = np.maximum(np.fft.fftshift(np.fft.irfft(spectrum, _CELLS)), 0.0)

    def delta_at(eps: float) -> float:
        above = losses > eps
        lost = max(0.0, 1.0 - math.fsum(total))
        return float(np.dot(total[above], -np.expm1(eps - losses[above]))) + lost

    return delta_at


def _solve(delta_at: Callable[[float], float], delta: float) -> float:
    return float(optimize.brentq(lambda eps: delta_at(eps) - delta, 0.0, 25.0, xtol=1e-6))
