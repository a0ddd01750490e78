"""Exact, fast samples of the discrete Gaussian: P[x] ∝ exp(-x²/2σ²) on the integers, |x| <= 13σ.

Rejection from a staircase. 2,048 buckets of 2^k integers cover ±13σ; a bucket is drawn in
proportion to its largest weight from an alias table (Walker 1977, Vose 1991), an integer uniformly
in it, and kept with probability exp(-(x² - m²)/2σ²), m being the bucket's integer nearest to 0.
About 99.5 % are kept, 99 % of all without computing an exponential, because the uniform lies below
the smallest probability in the bucket.

Soundness. Rounded numbers decide no comparison:

* alias thresholds are integers out of 2^117, built with 256-bit arithmetic; the 53 bits of the fast
  comparison decide unless they equal the threshold's leading bits, then 64 more are drawn;
* the acceptance test is decided in float64 unless the uniform lies within 2^-48 (plus its own
  width) of the computed probability, more than ten times the error of that probability; then 128
  more bits are drawn and the exponential is evaluated to 320 bits.

The residual, as total variation of one draw to the untruncated distribution, is at most 2^-116 from
the integer weights, 2^-150 from the last comparison, and 2^-120 for the tail past 13σ. The
accountant books :data:`~.events.SAMPLER_SLACK` = 2^-100.

Timing is not constant: rejections and ties change how long a call takes. An adversary who can time
the silo's process to nanoseconds is outside the model.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.primitives import Keystream

TAIL: Final = 13
"""No sample exceeds TAIL·σ in absolute value, so sums of shares have a hard bound."""

LARGEST_SIGMA: Final = 2.0**47

_BUCKETS: Final = 2048
_INDEX_BITS: Final = 11
_KEEP_BITS: Final = 53  # of a word, after the index
_EXTRA_BITS: Final = 64
_COLUMN: Final = 1 << (_KEEP_BITS + _EXTRA_BITS)
_PRECISION: Final = 256
_UNSURE: Final = 2.0**-48
_CHUNK: Final = 1 << 14

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Table(NamedTuple):
    """Everything that depends on σ only; public."""

    sigma: float
    limit: int
    """⌊13σ⌋."""
    width_bits: int
    """k: a bucket has 2^k integers."""
    base: Integers
    """Smallest integer of each bucket, [2048]."""
    nearest: Integers
    """m: smallest |x| in each bucket, [2048]."""
    squeeze: Words
    """Keep outright below this, out of 2^keep_bits, [2048]."""
    keep: Words
    """Leading 53 bits of the alias threshold, [2048]."""
    keep_exact: tuple[int, ...]
    """Alias threshold out of 2^117."""
    alias: Integers
    """The other bucket of each alias column, [2048]."""

    @property
    def shift(self) -> int:
        """Bits of the second word that are not part of the acceptance uniform."""
        return max(self.width_bits, 1)


def sample(stream: Keystream, sigma: float, count: int) -> Integers:
    """``count`` independent draws, int64 [count], from the words of ``stream``.

    Raises:
        ConfigError: σ outside (0, 2^47].
    """
    out = np.zeros(count, dtype=np.int64)
    add_sample(stream, sigma, out)
    return out


def add_sample(stream: Keystream, sigma: float, values: Integers) -> None:
    """The draws of :func:`sample`, added to ``values`` (int64 [count]) in place.

    Raises:
        ConfigError: σ outside (0, 2^47].
    """
    table, count = build(sigma), len(values)
    scratch = _Scratch()
    filled = 0
    while filled < count:
        # Slightly more than is missing, so that the last chunk is rarely drawn twice.
        missing = count - filled
        wanted = min(_CHUNK, missing + missing // 64 + 16)
        kept = _candidates(stream, table, wanted, scratch)[:missing]
        values[filled : filled + len(kept)] += kept
        filled += len(kept)


class _Scratch:
    """Buffers of one call, reused for every chunk so that they stay in L2."""

    def __init__(self) -> None:
        self.words = np.empty(2 * _CHUNK, dtype=np.uint64)
        self.uniform = np.empty(_CHUNK, dtype=np.uint64)
        self.table = np.empty(_CHUNK, dtype=np.uint64)
        self.column = np.empty(_CHUNK, dtype=np.int64)
        self.other = np.empty(_CHUNK, dtype=np.int64)
        self.x = np.empty(_CHUNK, dtype=np.int64)
        self.flag = np.empty(_CHUNK, dtype=np.bool_)


def _candidates(stream: Keystream, table: Table, count: int, scratch: _Scratch) -> Integers:
    """Accepted draws out of ``count`` candidates; valid until the next call."""
    words = scratch.words[: 2 * count]
    stream.into(words.data)
    bucket = _buckets(stream, table, words[:count], scratch)
    second = words[count:]
    x = scratch.x[:count]
    np.take(table.base, bucket, out=x, mode="clip")
    uniform = scratch.uniform[:count]
    np.bitwise_and(second, np.uint64((1 << table.width_bits) - 1), out=uniform)
    np.add(x, uniform.view(np.int64), out=x)
    np.right_shift(second, np.uint64(table.shift), out=uniform)
    squeeze = scratch.table[:count]
    np.take(table.squeeze, bucket, out=squeeze, mode="clip")
    unsure = np.flatnonzero(np.greater_equal(uniform, squeeze, out=scratch.flag[:count]))
    if not len(unsure):
        return x
    kept = _decide(stream, table, x[unsure], bucket[unsure], uniform[unsure])
    keep = scratch.flag[:count]
    keep.fill(True)
    keep[unsure] = kept
    return x[keep]


def _buckets(stream: Keystream, table: Table, words: Words, scratch: _Scratch) -> Integers:
    """Bucket numbers with the probabilities of the alias table, int64 [count]."""
    count = len(words)
    column, other = scratch.column[:count], scratch.other[:count]
    np.bitwise_and(words, np.uint64(_BUCKETS - 1), out=column.view(np.uint64))
    uniform, threshold = scratch.uniform[:count], scratch.table[:count]
    np.right_shift(words, np.uint64(_INDEX_BITS), out=uniform)
    np.take(table.keep, column, out=threshold, mode="clip")
    flag = scratch.flag[:count]
    np.equal(uniform, threshold, out=flag)
    ties = np.flatnonzero(flag) if flag.any() else ()
    stay = [_below(stream, table.keep_exact[column[i]], int(threshold[i])) for i in ties]
    kept = [int(column[i]) for i in ties]
    np.take(table.alias, column, out=other, mode="clip")
    np.less(uniform, threshold, out=flag)
    np.copyto(other, column, where=flag)
    for i, stays, own in zip(ties, stay, kept, strict=True):
        other[i] = own if stays else table.alias[own]
    return other


def _below(stream: Keystream, exact: int, leading: int) -> bool:
    """Whether a uniform that shares the threshold's 53 leading bits lies below it."""
    return int(stream.words(1)[0]) < exact - (leading << _EXTRA_BITS)


def _decide(
    stream: Keystream, table: Table, x: Integers, bucket: Integers, uniform: Words
) -> npt.NDArray[np.bool_]:
    """The acceptance test for candidates above the squeeze, bool [k]."""
    size, near = np.abs(x), table.nearest[bucket]
    exponent = (size - near).astype(np.float64) * (size + near) / (2.0 * table.sigma**2)
    probability = np.exp(-exponent)
    resolution = 2.0 ** -(64 - table.shift)
    margin = probability - (uniform.astype(np.float64) + 0.5) * resolution
    keep = margin > 0.0
    for i in np.flatnonzero(np.abs(margin) <= _UNSURE + resolution):
        keep[i] = _exactly(stream, table, int(size[i]), int(near[i]), int(uniform[i]))
    keep[size > table.limit] = False
    return keep


def _exactly(stream: Keystream, table: Table, size: int, near: int, uniform: int) -> bool:
    """The acceptance test with 128 more bits of the uniform and 320 bits of the exponential."""
    high, low = (int(word) for word in stream.words(2))
    drawn = (uniform << 128) | (high << 64) | low
    context = _context(320)
    scale = (64 - table.shift) + 128
    variance = context.mpf(table.sigma) ** 2
    probability = context.exp(-context.mpf(size * size - near * near) / (2 * variance))
    return drawn < int(context.floor(context.ldexp(probability, scale)))


@lru_cache(maxsize=160)
def build(sigma: float) -> Table:
    """The table for σ; takes about 0.1 s the first time.

    Raises:
        ConfigError: σ outside (0, 2^47].
    """
    if not (math.isfinite(sigma) and 0.0 < sigma <= LARGEST_SIGMA):
        raise ConfigError(
            f"a discrete Gaussian needs σ in (0, 2^47], not {sigma}",
            where="sigma",
            hint="lower the noise multiplier or the quantisation bound",
        )
    limit = math.floor(TAIL * sigma)
    half = _BUCKETS // 2
    bits = max(0, math.ceil(math.log2((limit + 1) / half)))
    width = 1 << bits
    left = [(i - half) * width for i in range(_BUCKETS)]
    right = [start + width - 1 for start in left]
    near = [0 if a <= 0 <= b else min(abs(a), abs(b)) for a, b in zip(left, right, strict=True)]
    far = [max(abs(a), abs(b)) for a, b in zip(left, right, strict=True)]
    context = _context(_PRECISION)
    two_variance = 2 * context.mpf(sigma) ** 2
    weights = [
        context.exp(-context.mpf(m * m) / two_variance) if m <= limit else context.mpf(0)
        for m in near
    ]
    thresholds, alias = _alias(_integer_weights(context, weights))
    scale = 64 - max(bits, 1)
    squeeze = [
        _squeeze(context, two_variance, m, f, scale) if f <= limit else 0
        for m, f in zip(near, far, strict=True)
    ]
    return Table(
        sigma=sigma,
        limit=limit,
        width_bits=bits,
        base=np.array(left, dtype=np.int64),
        nearest=np.array(near, dtype=np.int64),
        squeeze=np.array(squeeze, dtype=np.uint64),
        keep=np.array([t >> _EXTRA_BITS for t in thresholds], dtype=np.uint64),
        keep_exact=tuple(thresholds),
        alias=np.array(alias, dtype=np.int64),
    )


def _squeeze(context: Any, two_variance: Any, near: int, far: int, scale: int) -> int:
    """A lower bound of the acceptance probabilities in a bucket, out of 2^scale."""
    if far == near:
        return 1 << scale
    lowest = context.exp(-context.mpf(far * far - near * near) / two_variance)
    return max(0, int(context.floor(context.ldexp(lowest, scale))) - 1)


def _integer_weights(context: Any, weights: list[Any]) -> list[int]:
    """``weights`` as integers that sum to 2048·2^117 exactly."""
    total = context.fsum(weights)
    goal = _BUCKETS * _COLUMN
    integers = [int(context.nint(weight * goal / total)) for weight in weights]
    heaviest = max(range(_BUCKETS), key=integers.__getitem__)
    integers[heaviest] += goal - sum(integers)
    return integers


def _alias(weights: list[int]) -> tuple[list[int], list[int]]:
    """Vose's alias table in integers: column i keeps i below its threshold out of 2^117."""
    rest = list(weights)
    thresholds, alias = [_COLUMN] * _BUCKETS, list(range(_BUCKETS))
    small = [i for i, weight in enumerate(rest) if weight < _COLUMN]
    large = [i for i, weight in enumerate(rest) if weight >= _COLUMN]
    while small:
        poor, rich = small.pop(), large[-1]
        thresholds[poor], alias[poor] = rest[poor], rich
        rest[rich] -= _COLUMN - rest[poor]
        if rest[rich] < _COLUMN:
            small.append(large.pop())
    return thresholds, alias


@lru_cache(maxsize=4)
def _context(precision: int) -> Any:
    from mpmath.ctx_mp import MPContext

    context = MPContext()  # our own, so that nobody else's precision setting matters
    context.prec = precision
    return context
