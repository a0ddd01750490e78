"""Passages of text, and the fixed-size blocks that they are fetched in.

A block holds one passage: two 16-bit little-endian lengths, the id and the text in UTF-8, zeros up
to the block's length. An empty block, all zeros, pads the silo's shelf.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import DataError
from securefedcollm.foreign import printable
from securefedcollm.retrieval.terms import DIGIT_BITS

_LENGTHS: Final = struct.Struct("<HH")
MOST_ID_BYTES: Final = 128
_HALF: Final = 1 << (DIGIT_BITS - 1)


class Passage(NamedTuple):
    """One document of a shelf, which is fetched as a whole.

    Both fields are the silo's words: whoever shows them treats them as data
    (:mod:`securefedcollm.foreign`).
    """

    id: str
    text: str


def to_block(passage: Passage, block_bytes: int) -> bytes:
    """Its block of exactly ``block_bytes`` bytes.

    Raises:
        DataError: it does not fit, has no id, or is not valid Unicode.
    """
    where = printable(passage.id, 64)
    try:
        name, text = passage.id.encode(), passage.text.encode()
    except UnicodeEncodeError:
        raise DataError("is not valid Unicode", where=where, hint="mend the file") from None
    if not 1 <= len(name) <= MOST_ID_BYTES:
        raise DataError(f"an id has 1 to {MOST_ID_BYTES} bytes", where=where, hint="shorten the id")
    size = _LENGTHS.size + len(name) + len(text)
    if size > block_bytes:
        raise DataError(
            f"takes {size} bytes of a block of {block_bytes}",
            where=where,
            hint="split it before it is embedded",
        )
    block = _LENGTHS.pack(len(name), len(text)) + name + text
    return block.ljust(block_bytes, b"\0")


def from_block(block: bytes) -> Passage | None:
    """The passage in a block, None in an empty one.

    Adversary: the silo, or whoever wrote its index file.

    Raises:
        ValueError: the block is not one that :func:`to_block` makes.
    """
    if not any(block):
        return None
    name_size, text_size = _LENGTHS.unpack_from(block)
    end = _LENGTHS.size + name_size + text_size
    if not 1 <= name_size <= MOST_ID_BYTES or end > len(block) or any(block[end:]):
        raise ValueError("not a passage's block")
    content = block[_LENGTHS.size : end]
    return Passage(content[:name_size].decode(), content[name_size:].decode())


def split(passage: Passage, block_bytes: int) -> list[Passage]:
    """The passage in parts that each fit a block, to be embedded one by one.

    A part ends at the last white space that fits. Where there is none, it ends after the last whole
    character that fits. Parts after the first are named ``id#2``, ``id#3`` and so on. White space
    around a part is dropped.

    Raises:
        DataError: not valid Unicode, or an id without room for one character of text beside it.
    """
    where, rest = printable(passage.id, 64), passage.text.strip()
    parts: list[Passage] = []
    try:
        while rest or not parts:
            name = passage.id if not parts else f"{passage.id}#{len(parts) + 1}"
            room = block_bytes - _LENGTHS.size - len(name.encode())
            head = rest.encode()[: max(room, 0)].decode(errors="ignore")
            if len(head) < len(rest):
                if not head:
                    raise DataError("its id fills a block", where=where, hint="shorten the id")
                if not rest[len(head)].isspace():
                    spaces = [at for at, char in enumerate(head) if char.isspace()]
                    head = head[: spaces[-1]] if spaces else head
            parts.append(Passage(name, head.rstrip()))
            rest = rest[len(head) :].lstrip()
    except UnicodeEncodeError:
        raise DataError("is not valid Unicode", where=where, hint="mend the file") from None
    return parts


def to_digits(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Blocks [n, bytes] as centred 12-bit digits, int16 [n, bytes · 2/3] in [−2048, 2048)."""
    triples = blocks.reshape(len(blocks), -1, 3).astype(np.int16)
    low = triples[..., 0] | (triples[..., 1] & 15) << 8
    high = triples[..., 1] >> 4 | triples[..., 2] << 4
    digits = np.stack([low, high], axis=-1).reshape(len(blocks), -1)
    return (digits - _HALF).astype(np.int16)


def from_digits(digits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`to_digits`; digits are taken modulo 2^12."""
    values = (digits + _HALF) & (2 * _HALF - 1)
    words = values[:, 0::2] | values[:, 1::2] << DIGIT_BITS
    triples = np.stack([words & 255, words >> 8 & 255, words >> 16], axis=-1)
    return triples.reshape(len(digits), 3 * words.shape[1]).astype(np.uint8)
