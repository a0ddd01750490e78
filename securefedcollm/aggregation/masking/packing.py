"""Planar packing of bounded integers into 64-bit words.

m = ⌊64 / b⌋ fields of b bits share one word: value i of a vector sits in word i mod w, field
i div w (field 0 lowest), with w = ⌈d / m⌉. A value is stored with the offset ``bound`` so that it
is not negative; fields without a value hold zero. b is wide enough for the offset sum of all n
silos, so no field carries into the next and words are added and masked as wholes modulo 2^64, with
no keystream spent on a modulus. Planes are contiguous: packing is a handful of vector operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import WORD_BITS, RingParameters
from securefedcollm.aggregation.masking.masks import CHUNK_WORDS, Words, each_part
from securefedcollm.errors import LocalProtocolError, ProtocolError

Vector = npt.NDArray[np.int64]
Bounded = npt.NDArray[np.int32] | npt.NDArray[np.int64]
"""A silo's own vector: int32 takes half the memory, and holds every bound that a study can have."""


class Field(msgspec.Struct, frozen=True):
    """One coordinate's place in a 64-bit word of the masked vector.

    ``per_word`` fields of ``bits`` bits share a word. Each silo's integer lies in [−bound, bound]
    and is stored with the offset ``bound``, so ``silos`` of them never carry into the next field.
    """

    bits: int
    per_word: int
    bound: int

    @classmethod
    def fit(cls, value_bits: int, silos: int, *, fill: bool = True) -> Field:
        """The densest packing with at least ``value_bits`` of precision, its bound filled up.

        ``bound`` also stays below 2^31 so that a sum of squares is exact in int64.
        """
        least = 2 ** (value_bits - 1) - 1
        needed = (2 * least * silos).bit_length()
        if needed > 64:
            return cls(bits=0, per_word=0, bound=0)
        per_word = 64 // needed
        bits = 64 // per_word
        room = (2**bits - 1) // (2 * silos)
        bound = min(room, 2**31 - 1) if fill else least
        return cls(bits=bits, per_word=per_word, bound=bound)


def pack(vector: Bounded, parameters: RingParameters, out: Words, threads: int = 1) -> None:
    """Write the packed ``vector`` to ``out``.

    Args:
        vector: int32 or int64 [d]; abs(q) <= bound.
        parameters: sizes.
        out: uint64 [w]; overwritten.
        threads: parts worked on at the same time.

    Raises:
        LocalProtocolError: wrong type or length, or a value out of bounds: the caller's clipping
            failed, and a wrapped sum would be silently wrong.
    """
    hint = "quantise to the study's bound and length first"
    if vector.dtype not in (np.int32, np.int64) or vector.shape != (parameters.values,):
        message = f"the vector is {vector.dtype} {vector.shape}, not int64 ({parameters.values},)"
        raise LocalProtocolError(message, hint=hint)
    offset, greatest = np.int64(parameters.bound), np.uint64(2 * parameters.bound)

    def work(start: int, stop: int) -> None:
        scratch = np.empty(CHUNK_WORDS, dtype=np.uint64)
        for low in range(start, stop, CHUNK_WORDS):
            words = out[low : min(low + CHUNK_WORDS, stop)]
            for shift, first, last in _planes(parameters, low, low + len(words)):
                # Field 0 has a value for every word: it is written in place, the others added.
                target = scratch[: last - first] if shift else words
                np.add(vector[first:last], offset, out=target.view(np.int64))
                field = target  # what is below the bound is a huge number here
                if field.max() > greatest:
                    message = f"a value exceeds the bound {parameters.bound}"
                    raise LocalProtocolError(message, hint=hint)
                if shift:
                    np.left_shift(field, np.uint64(shift), out=field)
                    words[: last - first] += field

    each_part(parameters.words, threads, work)


def unpack(
    words: Words, parameters: RingParameters, count: int, *, narrow: bool = False
) -> Bounded:
    """The sum of ``count`` packed vectors, from the sum of their words.

    Args:
        words: uint64 [w], masks removed.
        parameters: sizes.
        count: vectors in the sum, 1 <= count <= silos.
        narrow: give int32, in half the memory, where that holds every such sum.

    Returns:
        int64 [d].

    Raises:
        ProtocolError: a field is greater than ``count`` honest vectors can make it, or a bit that
            no field owns is set: some silo uploaded something other than a packed vector within
                bounds. The masks hide which. (What stays within bounds cannot be told from honest
                values.)
    """
    w, bits, offset = parameters.words, parameters.field_bits, parameters.bound * count
    result: Bounded
    if narrow and offset < 2**31:
        result = np.empty(parameters.values, dtype=np.int32)
    else:
        result = np.empty(parameters.values, dtype=np.int64)
    low_bits, greatest = np.uint64(2**bits - 1), np.uint64(2 * offset)
    intact = True
    for low in range(0, w, CHUNK_WORDS):
        part = words[low : low + CHUNK_WORDS]
        used = np.zeros(len(part), dtype=np.uint64)  # the words again, of owned fields only
        for shift, first, last in _planes(parameters, low, low + len(part)):
            field = (part[: last - first] >> np.uint64(shift)) & low_bits
            intact = intact and bool(field.max() <= greatest)
            used[: last - first] |= field << np.uint64(shift)
            np.subtract(field.view(np.int64), offset, out=result[first:last], casting="unsafe")
        intact = intact and np.array_equal(used, part)
    if not intact:
        raise ProtocolError(
            "the opened sum is out of bounds: a silo uploaded values outside the agreed range",
            hint="masks hide which silo it was; nothing was released, go on with the next round",
        )
    return result


def _planes(parameters: RingParameters, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """(shift, first, last) of the values whose fields lie in words low..high-1; none if empty."""
    for field in range(WORD_BITS // parameters.field_bits):
        first = field * parameters.words + low
        last = min(field * parameters.words + high, parameters.values)
        if first < last:
            yield field * parameters.field_bits, first, last
