"""Where every private coin of a silo comes from: Gaussian noise and Poisson batches.

One :class:`NoiseSource` is one AES-256-CTR stream under a key of 32 bytes from ``os.urandom``, made
afresh for every (silo, round). It is never derived from a mask key, a seed of the study, or a
numpy or torch generator, so that neither the server nor a colluding silo can subtract the noise.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.primitives import KEY_BYTES, Keystream

CAP_TAIL_BITS: Final = 100
"""A Poisson batch exceeds its cap with probability at most 2^-100; the accountant books it."""

_CHUNK = 1 << 16


class NoiseSource:
    """The private randomness of one silo in one round.

    Args:
        key: 32 secret bytes; left out everywhere but in tests with recorded randomness.
    """

    __slots__ = ("_stream",)

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Keystream(os.urandom(KEY_BYTES) if key is None else key)

    def gaussian(self, n: int) -> npt.NDArray[np.float64]:
        """Standard normal noise, float64 [n]."""
        half = (n + 1) // 2
        words = self._stream.words(2 * half) >> np.uint64(11)
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

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
