"""The mask kernel: expand keys into keystreams and add them to a vector, in place.

One pass over the vector in chunks that stay in the second-level cache: for each chunk, every
stream's next bytes are generated into one scratch buffer and added or subtracted modulo 2^64. The
cost is that of the raw AES-256-CTR keystream plus one cached addition. The keystream is seekable,
so threads take disjoint parts of the vector; both the cipher and NumPy release the GIL.

A mask is the whole 64-bit word. So masked words are uniform for a party that lacks one key of the
sum, at any width of the packed fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.primitives import Keystream

Words = npt.NDArray[np.uint64]
"""uint64 [w], little-endian in memory and on the wire."""

WORD_BYTES: Final = 8
CHUNK_WORDS: Final = 16384
"""128 KiB: source, scratch and target together fit a 512 KiB second-level cache, and the calls into
the cipher and NumPy are few."""


def each_part(count: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(start, stop)`` on disjoint parts that cover ``range(count)``.

    Parts begin at whole chunks, so a small vector is not split at all.
    """
    chunks = -(-count // CHUNK_WORDS)
    share = -(-chunks // max(1, threads)) * CHUNK_WORDS
    parts = [(start, min(start + share, count)) for start in range(0, count, share)]
    if len(parts) == 1:
        work(*parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(work, *part) for part in parts]:
            done.result()


def apply(
    words: Words, *, add: Sequence[bytes] = (), subtract: Sequence[bytes] = (), threads: int = 1
) -> None:
    """In place: words += Σ keystream(k in add) − Σ keystream(k in subtract), modulo 2^64.

    Args:
        words: uint64 [w], contiguous, writable, little-endian.
        add: 32-byte keys; stream word i is bytes 8i..8i+7 of AES-256-CTR from counter zero.
        subtract: 32-byte keys. Each key masks one vector only, ever.
        threads: parts of the vector worked on at the same time.
    """

    def work(start: int, stop: int) -> None:
        _apply_part(words[start:stop], start * WORD_BYTES, add, subtract)

    each_part(len(words), threads, work)


def _apply_part(words: Words, offset: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    plus = [Keystream(key, offset=offset) for key in add]
    minus = [Keystream(key, offset=offset) for key in subtract]
    scratch = np.empty(CHUNK_WORDS, dtype="<u8")
    for start in range(0, len(words), CHUNK_WORDS):
        part = words[start : start + CHUNK_WORDS]
        mask = scratch[: len(part)]
        view = mask.data
        for stream in plus:
            stream.into(view)
            np.add(part, mask, out=part)
        for stream in minus:
            stream.into(view)
            np.subtract(part, mask, out=part)
