"""The source of all private randomness of a silo: Gaussian noise and Poisson batches.

One :class:`NoiseSource` is one AES-256-CTR stream under a key of 32 bytes from ``os.urandom``, made
afresh for every (silo, round). It is never derived from a mask key, a seed of the study, or a
numpy or torch generator, so that neither the server nor a colluding silo can subtract the noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.primitives import KEY_BYTES, Keystream
from securefedcollm.privacy.discrete_gaussian import add_sample

CAP_TAIL_BITS: Final = 100
"""A Poisson batch exceeds its cap with probability at most 2^-100; the accountant books it."""

_CHUNK: Final = 1 << 16
_GRID: Final = 2.0**46
_INFLATION: Final = 1.0 + 2.0**-16
_REACH: Final = 2.0**15
_MOST_VALUES: Final = 180_000_000
"""That get noise at once. :class:`GridSum` and :data:`~.events.STEP_SLACK` rest on it."""
_UNITS: Final = 32  # at a time: small enough for the cache


def grid_step(sigma: float) -> float:
    """The distance of two neighbouring totals that :meth:`NoiseSource.add_gaussian` knows."""
    return sigma / _GRID


class GridSum:
    """Σ gᵢ · min(1, C/‖gᵢ‖), exactly: each unit's clipped gradient is rounded by itself.

    Every contribution becomes integers, in steps of σ·2^-46, before it is added. Integer sums know
    no order and no rounding, so one unit more or less changes the sum by exactly its own integers,
    whatever the others are. Their L2 norm is at most C/step · (1 + 2^-26) + √d/2: norms of up to
    180 million values are off by 2^-26 in float64, and rounding lengthens by √d/2 ≤ 2^13 steps,
    which is below 2^-25 of C while z ≤ 2^8. :meth:`NoiseSource.add_gaussian` pays for 2^-16.

    Args:
        values: length d.
        clip_norm: C.
        sigma: σ = z·C of the noise that will be added.
        most: units in the sum at most, by the sampler's cap: it must not overflow.

    Raises:
        ConfigError: more units than a sum of 64 bits holds, or more values than get noise. The
            error follows from public numbers alone: no sample decides it.
    """

    __slots__ = ("_clip_norm", "_step", "integers")

    def __init__(self, values: int, clip_norm: float, sigma: float, most: int) -> None:
        if not (math.isfinite(sigma) and sigma > 0.0):
            raise ConfigError(f"noise needs a positive σ, not {sigma}", where="sigma")
        if most * clip_norm > _REACH * sigma:
            raise ConfigError(
                f"up to {most} units in a step are too many for noise of {sigma / clip_norm:.3g} "
                "clip norms",
                where="local.batch_size",
                hint=f"a batch of at most {int(_REACH / 2.0 * sigma / clip_norm)}",
            )
        _check_count(values)
        self._clip_norm = clip_norm
        self._step = grid_step(sigma)
        self.integers: npt.NDArray[np.int64] = np.zeros(values, dtype=np.int64)
        """The sum, int64 [d], in steps."""

    def clear(self) -> None:
        self.integers[:] = 0

    def add(
        self, blocks: Sequence[npt.NDArray[np.float64]], norms: npt.NDArray[np.float64]
    ) -> None:
        """Add some units.

        Args:
            blocks: their gradients, finite, in parts: float64 [units, part] each.
            norms: of the whole gradients, float64 [units].
        """
        scale = np.minimum(1.0, self._clip_norm / np.maximum(norms, np.finfo(np.float64).tiny))
        scale /= self._step
        at = 0
        for block in blocks:
            into = self.integers[at : at + block.shape[1]]
            at += block.shape[1]
            for start in range(0, len(block), _UNITS):
                part = slice(start, start + _UNITS)
                for first in range(0, len(into), _CHUNK):  # large matrices, part by part
                    columns = slice(first, first + _CHUNK)
                    scaled = block[part, columns] * scale[part, None]
                    np.rint(scaled, out=scaled)
                    into[columns] += scaled.astype(np.int64).sum(axis=0)


def _check_count(values: int) -> None:
    if values > _MOST_VALUES:
        raise ConfigError(
            f"{values} values; at most {_MOST_VALUES} get noise at once",
            where="adapter",
            hint="tune fewer: adapter.method: ffa-lora, or a smaller model",
        )


class NoiseSource:
    """The private randomness of one silo in one round.

    Args:
        key: 32 secret bytes; left out everywhere but in tests with recorded randomness.
    """

    __slots__ = ("_stream",)

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Keystream(os.urandom(KEY_BYTES) if key is None else key)

    def discrete_gaussian(self, sigma: float, n: int) -> npt.NDArray[np.int64]:
        """Exact discrete Gaussian noise N_Z(0, σ²), int64 [n]; |x| <= 13σ.

        Args:
            sigma: σ in integer units, in (0, 2^47].

        Raises:
            ConfigError: σ out of range.
        """
        drawn = np.zeros(n, dtype=np.int64)
        self.add_discrete_gaussian(drawn, sigma)
        return drawn

    def add_discrete_gaussian(self, values: npt.NDArray[np.int64], sigma: float) -> None:
        """The same noise, added to ``values`` (int64 [n]) where they are.

        Raises:
            ConfigError: σ out of range.
        """
        add_sample(self._stream, sigma, values)

    def gaussian(self, n: int) -> npt.NDArray[np.float64]:
        """Standard normal noise on the grid 2^-46, float64 [n].

        Adding it to floats rounds, and the low bits of a rounded sum can betray its noiseless part
        (Mironov 2012). To release a sum, use :meth:`add_gaussian`, which is safe against that.
        """
        return np.multiply(self.discrete_gaussian(_GRID, n), 1.0 / _GRID, dtype=np.float64)

    def add_gaussian(self, total: npt.NDArray[np.int64], sigma: float) -> npt.NDArray[np.float64]:
        """The Gaussian mechanism: ``total`` + N(0, σ²), float64 [d].

        ``total`` is in integer steps of σ·2^-46 (:class:`GridSum`); the noise is a discrete
        Gaussian on the same grid, added in integers. So no floating-point artefact of the addition
        can leak (Mironov 2012; Casacuberta et al. 2022). A discrete Gaussian of σ = 2^46 steps is
        within total variation 2^-97.6 (1/(49·σ²)) a coordinate of a rounded normal one, which is
        post-processing of the continuous mechanism: that is why its PLD applies. The accountant
        books the difference (:data:`~.events.STEP_SLACK`).

        The noise is drawn 2^-16 larger than σ: what rounding each contribution to the grid, and
        clipping it in float64, can add to a sensitivity is far below that (:class:`GridSum`).

        Raises:
            LocalProtocolError: the total is not one of integers, or passes 2^16 σ.
            ConfigError: σ is not positive, or more than 180 million values.
        """
        if not (math.isfinite(sigma) and sigma > 0.0):
            raise ConfigError(f"noise needs a positive σ, not {sigma}", where="sigma")
        _check_count(len(total))
        largest = max(int(total.max(initial=0)), -int(total.min(initial=0)))
        if total.dtype != np.int64 or largest > 2.0 * _REACH * _GRID:
            raise LocalProtocolError("the sum to be noised was not made by GridSum")
        noise = self.discrete_gaussian(_GRID * _INFLATION, len(total))
        noise += total
        # In place, part by part: of all weights of a model every further copy is a gigabyte.
        out, step = noise.view(np.float64), grid_step(sigma)
        for start in range(0, len(noise), _CHUNK):
            part = noise[start : start + _CHUNK].astype(np.float64)
            np.multiply(part, step, out=out[start : start + _CHUNK])
        return out

    def key(self) -> bytes:
        """32 bytes for what is drawn by chance elsewhere, such as views of records."""
        return self._stream.words(KEY_BYTES // 8).tobytes()

    def poisson_batch(self, n_records: int, q: float) -> npt.NDArray[np.int64]:
        """Draw a Poisson sample: every record independently with probability ``q``.

        Args:
            n_records: records (or subjects) of the silo.
            q: sampling probability in (0, 1]; rounded down to a multiple of 2^-64, which never
                weakens the guarantee (amplification is monotone in ``q``).

        Returns:
            Sorted indices, int64 [k] with 0 <= k <= :func:`batch_cap`; possibly empty, and an empty
            batch is still a step that must release noise. In the event of probability at most
            2^-100 that k passes the cap, a uniformly random subset of cap records is returned.
        """
        cap = batch_cap(n_records, q)
        threshold = int(q * 2.0**64)  # exact: a float times a power of two
        chosen = [
            start + np.flatnonzero(self._below(min(_CHUNK, n_records - start), threshold))
            for start in range(0, n_records, _CHUNK)
        ]
        indices = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        if len(indices) > cap:
            order = np.argsort(self._stream.words(len(indices)), kind="stable")
            indices = np.sort(indices[order[:cap]])
        return indices.astype(np.int64, copy=False)

    def _below(self, count: int, threshold: int) -> npt.NDArray[np.bool_]:
        words = self._stream.words(count)
        if threshold >= 1 << 64:
            return np.ones(count, dtype=np.bool_)
        return words < np.uint64(threshold)

    def __repr__(self) -> str:
        return "NoiseSource(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a NoiseSource holds a secret key and is never pickled or copied")


class LayeredNoise:
    """A silo's share of a sum's noise in layers, each from a key of its own.

    A layer whose key is opened can be subtracted exactly; nothing about the others follows from it.
    The keys are in memory only: a silo that was restarted opens none, and its noise stays whole.

    Args:
        keys: 32 secret bytes a layer.

    Raises:
        LocalProtocolError: a key of another length.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        if any(len(key) != KEY_BYTES for key in keys):
            raise LocalProtocolError(f"the key of a layer of noise has {KEY_BYTES} bytes")
        self._keys = tuple(keys)

    @classmethod
    def fresh(cls, layers: int) -> LayeredNoise:
        """With keys from the operating system."""
        return cls([os.urandom(KEY_BYTES) for _ in range(layers)])

    def add(self, values: npt.NDArray[np.int64], sigmas: Sequence[float]) -> None:
        """Add one layer for every σ to ``values``, int64 [n], where they are.

        Raises:
            LocalProtocolError: another number of layers than of keys.
        """
        if len(sigmas) != len(self._keys):
            raise LocalProtocolError(f"{len(self._keys)} keys for {len(sigmas)} layers of noise")
        for key, sigma in zip(self._keys, sigmas, strict=True):
            NoiseSource(key).add_discrete_gaussian(values, sigma)

    def opened(self, layers: slice) -> list[bytes]:
        """The keys of these layers, for the server to subtract them."""
        return list(self._keys[layers])

    def __repr__(self) -> str:
        return "LayeredNoise(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LayeredNoise holds secret keys and is never pickled or copied")


Noise = NoiseSource | LayeredNoise


@lru_cache(maxsize=256)
def batch_cap(n_records: int, q: float) -> int:
    """Largest batch that :meth:`NoiseSource.poisson_batch` hands out: about mean + 12 sd.

    Smallest k for which the Chernoff bound P[Bin(n, q) >= k+1] <= exp(-n KL((k+1)/n || q)) is at
    most 2^-100. A cap near mean + 6 sd would save memory and cost about 1e-9 of total variation a
    step: times (1 + e^ε) and the number of steps that passes a usual δ, so it is not used.

    Raises:
        ConfigError: ``n_records`` < 0 or ``q`` outside (0, 1].
    """
    if n_records < 0:
        raise ConfigError("the number of records is negative", where="n_records")
    if not 0.0 < q <= 1.0:
        raise ConfigError(
            f"a sampling probability lies in (0, 1], not {q}",
            where="q",
            hint="use expected batch / records of the silo",
        )
    low, high = int(n_records * q), n_records
    while low < high:
        middle = (low + high) // 2
        if _log_tail(n_records, q, middle + 1) <= -CAP_TAIL_BITS * math.log(2.0):
            high = middle
        else:
            low = middle + 1
    return low


def _log_tail(n: int, q: float, k: int) -> float:
    """Chernoff bound on log P[Bin(n, q) >= k]."""
    share = k / n
    if share <= q:
        return 0.0
    if k > n:
        return -math.inf
    bits = share * math.log(share / q)
    if k < n:
        bits += (1.0 - share) * math.log((1.0 - share) / (1.0 - q))
    return -n * bits
