"""Which records of a silo a question retrieves: those that are alike enough, each by itself.

A record is retrieved if its similarity to the question is at least a fixed threshold. That depends
on the question, the public encoder and this record, and on no other record. The best k of all would
not do: a record that is added pushes another one out, that one then keeps budget which it would
have spent, and much later the answers differ although the added record was not retrieved and paid
nothing (``docs/privacy.md``, "Answers of records").

So that not even the last bit of a similarity depends on other records, embeddings are rounded to
integers by themselves, and similarities are exact integers whatever the order of additions.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from securefedcollm.retrieval.reduction import normalised
from securefedcollm.retrieval.terms import ENTRY_SCALE

Whole = npt.NDArray[np.int64]


class RecordIndex:
    """The embeddings of a silo's records, as integers.

    Args:
        vectors: [n, d], of each record's question. The caller computes each row from its own record
            alone; they are scaled to unit norm here, row by row.

    Raises:
        DataError: an embedding is zero or not finite.
    """

    def __init__(self, vectors: npt.ArrayLike) -> None:
        rows = [_whole(row) for row in np.asarray(vectors, dtype=np.float64)]
        # Float64 holds these integers and all their sums exactly: below d·2^24, so below 2^53.
        self._entries = np.array(rows, dtype=np.float64)

    def __len__(self) -> int:
        return len(self._entries)

    def similarities(self, query: npt.ArrayLike) -> Whole:
        """Of every record to the question, int64 [n]: cosine times 2^24, exactly.

        Args:
            query: [d], the question's embedding.

        Raises:
            DataError: it is zero or not finite.
        """
        product = self._entries @ _whole(np.asarray(query, dtype=np.float64)).astype(np.float64)
        found: Whole = product.astype(np.int64)
        return found

    def retrieved(self, query: npt.ArrayLike, threshold: float) -> npt.NDArray[np.bool_]:
        """Which records a question retrieves, bool [n]. Raises as :meth:`similarities`.

        Args:
            threshold: least cosine similarity, −1 to 1.
        """
        found: npt.NDArray[np.bool_] = self.similarities(query) >= math.ceil(
            threshold * ENTRY_SCALE**2
        )
        return found


def _whole(vector: npt.NDArray[np.float64]) -> Whole:
    (unit,) = normalised(np.atleast_2d(vector))
    made: Whole = np.rint(unit * ENTRY_SCALE).astype(np.int64)
    return made
