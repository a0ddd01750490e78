"""A public linear map from an encoder's dimension to fewer: how it is made, and its file.

A file is ``SFCRDCT1``, two little-endian 32-bit numbers (D, d), the mean [D] and the matrix [D, d]
as little-endian float64, and the SHA-256 of all that. Its length follows from its first 16 bytes.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import DataError
from securefedcollm.primitives import KEY_BYTES, equal, sha256
from securefedcollm.retrieval.terms import MOST_DIMENSION

MAGIC: Final = b"SFCRDCT1"
_NUMBERS: Final = struct.Struct("<II")
HEAD_BYTES: Final = len(MAGIC) + _NUMBERS.size
_LEAST_SHARE: Final = 1e-6
"""Of the greatest variance: a direction with less is not made longer still."""
_ROUNDING: Final = 1e-12
"""Variance of equal texts, whose embeddings an encoder computes in float32."""

_ANEW: Final = "make it anew with `securefedcollm index reduce`"
_SIZE: Final = "is cut, too long or of no size"

Vectors = npt.NDArray[np.float64]


def normalised(vectors: npt.ArrayLike) -> Vectors:
    """Rows scaled to unit norm, float64 [n, d].

    Raises:
        DataError: not a matrix of finite numbers, or a row is zero.
    """
    found = np.asarray(vectors, dtype=np.float64)
    if found.ndim != 2 or not np.isfinite(found).all():
        raise DataError(
            f"embeddings of shape {found.shape} are not a matrix of finite numbers",
            hint="give one row of numbers for each passage",
        )
    # By the greatest entry first, so that no square overflows or vanishes.
    greatest = np.abs(found).max(axis=1, keepdims=True, initial=0.0)
    if not greatest.all():
        raise DataError("an embedding is zero", hint="leave out passages without words")
    scaled = found / greatest
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))


class Reduction:
    """A public linear map to fewer dimensions, such as PCA on public text. Fixed in the study.

    Args:
        mean: [D], subtracted first.
        matrix: [D, d].

    Raises:
        DataError: shapes do not fit, or a number is not finite.
    """

    def __init__(self, mean: npt.ArrayLike, matrix: npt.ArrayLike) -> None:
        self._mean = np.array(mean, dtype="<f8")
        self._matrix = np.array(matrix, dtype="<f8")
        if self._matrix.ndim != 2 or self._mean.shape != self._matrix.shape[:1]:
            raise DataError(
                f"a mean of {self._mean.shape} does not fit a matrix of {self._matrix.shape}",
                hint="both begin with the dimension of the encoder",
            )
        if not (np.isfinite(self._mean).all() and np.isfinite(self._matrix).all()):
            raise DataError("a reduction has finite numbers", hint="make it anew")

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for these numbers."""
        shape = struct.pack("<III", *self._matrix.shape, 0)
        prefix = b"securefedcollm/v1/retrieval-reduction\0"
        return sha256(prefix, shape, self._mean.tobytes(), self._matrix.tobytes())

    def apply(self, vectors: npt.ArrayLike) -> Vectors:
        """Embeddings [n, D] reduced and scaled to unit norm, float64 [n, d].

        Raises:
            DataError: another dimension than D, a number that is not finite, or a zero row.
        """
        found = normalised(vectors)
        if found.shape[1] != len(self._mean):
            raise DataError(
                f"embeddings of {found.shape[1]} numbers, not {len(self._mean)}",
                hint="use the encoder that the study names",
            )
        return normalised((found - self._mean) @ self._matrix)

    @property
    def dimensions(self) -> tuple[int, int]:
        """(D, d)."""
        before, after = self._matrix.shape
        return before, after

    @classmethod
    def fit(cls, vectors: npt.ArrayLike, dimension: int) -> Reduction:
        """Principal components of public embeddings, each divided by the fourth root of its
        variance.

        So a score counts the many small differences between texts too, and not only the few
        directions in which all texts of a model differ most.

        Args:
            vectors: [n, D], as the encoder gives them, of more than d texts.
            dimension: d, at most D.

        Raises:
            DataError: fewer texts or numbers than that, or texts that are all alike.
        """
        unit = normalised(vectors)
        n, before = unit.shape
        if not 1 <= dimension <= before or n <= dimension:
            raise DataError(
                f"{n} texts of {before} numbers give no {dimension} directions",
                hint="lower retrieval.dimension, or give more public text",
            )
        mean = unit.mean(axis=0)
        variances, directions = np.linalg.eigh((unit - mean).T @ (unit - mean) / n)
        variances, directions = variances[::-1][:dimension], directions[:, ::-1][:, :dimension]
        if not variances[0] > _ROUNDING:
            raise DataError("all texts have the same embedding", hint="give other public text")
        # A direction has no sign: its greatest entry is made positive.
        greatest = np.abs(directions).argmax(axis=0)
        directions = directions * np.sign(directions[greatest, np.arange(dimension)])
        return cls(mean, directions / np.maximum(variances, _LEAST_SHARE * variances[0]) ** 0.25)

    def encode(self) -> bytes:
        """The content of its file."""
        head = MAGIC + _NUMBERS.pack(*self._matrix.shape)
        content = head + self._mean.tobytes() + self._matrix.tobytes()
        return content + sha256(content)

    @classmethod
    def decode(cls, content: bytes, where: str) -> Reduction:
        """Inverse of :meth:`encode`; ``where`` names the file.

        Adversary: whoever wrote the file.

        Raises:
            DataError: not a reduction, damaged, or with numbers that are not finite.
        """
        before, after = dimensions_of(content, where)
        if len(content) != file_bytes(before, after):
            raise DataError(_SIZE, where=where, hint=_ANEW)
        if not equal(sha256(content[:-KEY_BYTES]), content[-KEY_BYTES:]):
            raise DataError("is damaged", where=where, hint=_ANEW)
        numbers = np.frombuffer(content[HEAD_BYTES:-KEY_BYTES], dtype="<f8")
        try:
            return cls(numbers[:before], numbers[before:].reshape(before, after))
        except DataError as error:
            raise DataError(error.problem, where=where, hint=error.hint) from None


def file_bytes(before: int, after: int) -> int:
    """The length of a file with a map from ``before`` to ``after`` numbers."""
    return HEAD_BYTES + 8 * before * (after + 1) + KEY_BYTES


def dimensions_of(head: bytes, where: str) -> tuple[int, int]:
    """(D, d) that the first :data:`HEAD_BYTES` of a file state; ``where`` names it.

    Adversary: whoever wrote the file.

    Raises:
        DataError: not a reduction, or with numbers out of range.
    """
    if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
        raise DataError("is not a reduction", where=where, hint=_ANEW)
    before, after = _NUMBERS.unpack_from(head, len(MAGIC))
    if not 1 <= after <= before <= MOST_DIMENSION:
        raise DataError(_SIZE, where=where, hint=_ANEW)
    return before, after
