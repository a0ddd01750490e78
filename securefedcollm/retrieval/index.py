"""A silo's shelf on disk: quantised embeddings, and one block of text for each.

A file is ``SFCINDX1``, three little-endian 32-bit numbers (documents, dimension, bytes of a block),
the 32-byte digest of the space that embeddings are in, the entries as little-endian int16 [n, d],
the blocks one after another, and the SHA-256 of all that. This last one is the index's fingerprint.
Nothing in it is executed or decompressed, and its length follows from its first 20 bytes. It is
read and checked in pieces, so that memory follows what was found to be in order.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, DataError, StateError
from securefedcollm.primitives import KEY_BYTES, equal, sha256
from securefedcollm.retrieval.passages import Passage, from_block, to_block
from securefedcollm.retrieval.reduction import normalised
from securefedcollm.retrieval.terms import (
    ENTRY_SCALE,
    MOST_BLOCK_BYTES,
    MOST_DIMENSION,
    MOST_DOCUMENTS,
    Terms,
)

MAGIC: Final = b"SFCINDX1"
_NUMBERS: Final = struct.Struct("<III")
_HEAD: Final = len(MAGIC) + _NUMBERS.size + KEY_BYTES
PIECE_BYTES: Final = 1 << 20
"""Of a file, read and checked at once."""


class Index:
    """Quantised embeddings and passages of one silo. Make it with :meth:`build` or :meth:`load`.

    Attributes:
        entries: int16 [n, d], unit-norm embeddings times 2^12, rounded.
        blocks: uint8 [n, block_bytes].
        space: 32 bytes that stand for encoder and reduction.
    """

    def __init__(
        self, entries: npt.NDArray[np.int16], blocks: npt.NDArray[np.uint8], space: bytes
    ) -> None:
        self.entries = entries
        self.blocks = blocks
        self.space = space

    @classmethod
    def build(
        cls,
        passages: Sequence[Passage],
        vectors: npt.ArrayLike,
        *,
        block_bytes: int,
        space: bytes = bytes(KEY_BYTES),
    ) -> Index:
        """An index of passages that fit a block (:func:`~.passages.split`).

        Args:
            vectors: [n, d], one row for each passage, after the reduction. Scaled to unit norm.

        Raises:
            DataError: too many or no passages, a repeated id, a passage that does not fit, or
                vectors that do not.
        """
        unit = normalised(vectors)
        if len(unit) != len(passages):
            raise DataError(
                f"{len(unit)} embeddings for {len(passages)} passages", hint="give one for each"
            )
        entries = np.rint(unit * ENTRY_SCALE).astype(np.int16)
        content = b"".join(to_block(passage, block_bytes) for passage in passages)
        blocks = np.frombuffer(content, dtype=np.uint8).reshape(len(passages), -1)
        index = cls(entries, blocks, space)
        index.check("the index")
        return index

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Index({len(self)} passages, d={self.entries.shape[1]})"

    @property
    def passages(self) -> tuple[Passage, ...]:
        """In order."""
        found = (from_block(block.tobytes()) for block in self.blocks)
        return tuple(passage for passage in found if passage is not None)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the index's file without its end (32 bytes)."""
        return sha256(self._content())

    def check(self, where: str) -> None:
        """Refuse an index that :meth:`build` would not make.

        Adversary: whoever wrote the file. A norm above 1 would make every score of a passage
        greater, and sums wrap around.

        Raises:
            DataError: numbers out of range, norms that are not 1, damaged or repeated passages.
        """
        n, d = self.entries.shape
        if not 1 <= n <= MOST_DOCUMENTS or not 1 <= d <= MOST_DIMENSION:
            raise DataError(f"{n} passages of dimension {d}", where=where, hint="see the limits")
        step = max(1, PIECE_BYTES // (2 * d))
        for first in range(0, n, step):
            _check_norms(self.entries[first : first + step], where)
        _check_blocks(self.blocks, 1, set(), where)

    def encode(self) -> bytes:
        """The content of its file; the last 32 bytes are its fingerprint."""
        content = self._content()
        return content + sha256(content)

    @classmethod
    def load(cls, path: str | Path, terms: Terms | None = None) -> Index:
        """Read a file, within the bounds that its first bytes state.

        Adversary: whoever wrote the file. A few bytes on disk may state 2^20 passages of the
        greatest size, and the rest be a hole. So the first bytes are compared with the terms before
        anything else is read, and then memory grows only by pieces that are in order: a hole is
        refused at its first piece.

        Args:
            terms: of the study that the index is for; None: of any.

        Raises:
            ConfigError: it does not fit the terms.
            DataError: not an index, damaged, or not one that :meth:`build` makes.
            StateError: it cannot be read.
        """
        where = str(path)
        try:
            with _opened(path) as file:
                head = file.read(_HEAD)
                count, dimension, block_bytes = _numbers(head, where)
                space = head[-KEY_BYTES:]
                problem = terms and misfit((count, dimension, block_bytes), space, terms)
                if problem:
                    raise ConfigError(problem, where=where, hint="build the index with this study")
                size = _HEAD + count * (2 * dimension + block_bytes) + KEY_BYTES
                if os.fstat(file.fileno()).st_size != size:
                    raise _cut(where)
                entries = _read_entries(file, count, dimension, where)
                blocks = _read_blocks(file, count, block_bytes, where)
                fingerprint = file.read(KEY_BYTES)
        except OSError as error:
            raise StateError(f"cannot read {where} ({error.strerror})", hint="look there") from None
        if not equal(sha256(head, entries, blocks), fingerprint):
            raise DataError("is damaged", where=where, hint="copy or build the index anew")
        return cls(
            np.frombuffer(entries, dtype="<i2").astype(np.int16).reshape(count, dimension),
            np.frombuffer(blocks, dtype=np.uint8).reshape(count, block_bytes),
            space,
        )

    def _content(self) -> bytes:
        numbers = _NUMBERS.pack(*self.entries.shape, self.blocks.shape[1])
        parts = (MAGIC, numbers, self.space, self.entries.astype("<i2"), self.blocks)
        return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


def _numbers(head: bytes, where: str) -> tuple[int, int, int]:
    if len(head) != _HEAD or not head.startswith(MAGIC):
        raise DataError("is not an index", where=where, hint="build one from the passages")
    count, dimension, block_bytes = _NUMBERS.unpack_from(head, len(MAGIC))
    limits = MOST_DOCUMENTS, MOST_DIMENSION, MOST_BLOCK_BYTES
    numbers = count, dimension, block_bytes
    if not all(1 <= number <= most for number, most in zip(numbers, limits, strict=True)):
        raise DataError("states numbers out of range", where=where, hint="build the index anew")
    return numbers


def misfit(numbers: tuple[int, int, int], space: bytes, terms: Terms) -> str | None:
    """Why an index does not fit a study's terms; None if it does.

    Args:
        numbers: its passages, dimension and bytes of a block.
    """
    count, dimension, block_bytes = numbers
    fits = count <= terms.documents and dimension == terms.dimension
    if not fits or block_bytes != terms.block_bytes:
        return (
            f"an index of {count} passages, dimension {dimension} and blocks of {block_bytes} "
            "bytes does not fit the study's terms"
        )
    if space != terms.space:
        return "the index was made with another encoder or reduction than the study's"
    return None


def _opened(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except ValueError:
        raise DataError(
            "holds a character that no path has", where=str(path), hint="write another path"
        ) from None


def _cut(where: str) -> DataError:
    return DataError("is cut or too long for an index", where=where, hint="build the index anew")


def _pieces(file: BinaryIO, rows: int, width: int, where: str) -> Iterator[bytes]:
    """Whole rows of ``width`` bytes, some at a time."""
    step = max(1, PIECE_BYTES // width)
    for first in range(0, rows, step):
        size = min(step, rows - first) * width
        piece = file.read(size)
        if len(piece) != size:  # cut since its length was asked for
            raise _cut(where)
        yield piece


def _read_entries(file: BinaryIO, count: int, dimension: int, where: str) -> bytes:
    found = []
    for piece in _pieces(file, count, 2 * dimension, where):
        _check_norms(np.frombuffer(piece, dtype="<i2").reshape(-1, dimension), where)
        found.append(piece)
    return b"".join(found)


def _read_blocks(file: BinaryIO, count: int, block_bytes: int, where: str) -> bytes:
    found, seen = [], set[str]()
    for piece in _pieces(file, count, block_bytes, where):
        blocks = np.frombuffer(piece, dtype=np.uint8).reshape(-1, block_bytes)
        _check_blocks(blocks, len(seen) + 1, seen, where)
        found.append(piece)
    return b"".join(found)


def _check_norms(entries: npt.NDArray[np.int16], where: str) -> None:
    norms = np.linalg.norm(entries.astype(np.float64), axis=1)
    if np.abs(norms - ENTRY_SCALE).max() > np.sqrt(entries.shape[1]) / 2 + 1e-6:
        raise DataError("an embedding is not of unit norm", where=where, hint="build it anew")


def _check_blocks(blocks: npt.NDArray[np.uint8], first: int, seen: set[str], where: str) -> None:
    """Each is a passage, with an id that was not ``seen``; ``first``: the number of the first."""
    for at, block in enumerate(blocks, start=first):
        try:
            passage = from_block(block.tobytes())
        except ValueError:  # also of text that is not UTF-8
            passage = None
        if passage is None or passage.id in seen:
            what = "has an id that is there twice" if passage else "is damaged"
            raise DataError(f"passage {at} {what}", where=where, hint="build the index anew")
        seen.add(passage.id)
