"""Askers and shelves of private retrieval in one process, with the test in the carrier's place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import (
    Asker,
    CountingQuota,
    Header,
    Index,
    Passage,
    PreparedShelf,
    Shelf,
    Terms,
)

SMALL = Terms(documents=40, dimension=8, block_bytes=96, fetched=3)


def unit(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Random unit vectors [rows, dimension]."""
    drawn = np.random.default_rng(seed).normal(size=(rows, dimension))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def passage(number: int) -> Passage:
    return Passage(f"p{number}", f"Rule {number}: wash hands {number} times. ÄÖ†")


def index_of(terms: Terms, count: int, seed: int = 0) -> Index:
    """An index of ``count`` passages at random embeddings."""
    return Index.build(
        [passage(number) for number in range(count)],
        unit(count, terms.dimension, seed),
        block_bytes=terms.block_bytes,
        space=terms.space,
    )


class Consortium:
    """One asker, one silo and its shelf.

    Args:
        count: passages on the shelf.
        most: questions that the silo answers.
    """

    def __init__(self, terms: Terms = SMALL, count: int = 30, most: int = 1000) -> None:
        self.asker_key, self.silo_key = SigningKey.generate(), SigningKey.generate()
        self.header = Header(
            bytes(32), bytes(16), self.asker_key.public, self.silo_key.public, terms
        )
        self.index = index_of(terms, count)
        self.prepared = PreparedShelf(self.index, terms)
        self.quota = CountingQuota(most)

    def shelf(self) -> Shelf:
        return Shelf(
            self.prepared, header=self.header, asker="ann", key=self.silo_key, quota=self.quota
        )

    def asker(self, query: np.ndarray) -> Asker:
        return Asker(header=self.header, silo="clinic", key=self.asker_key, query=query)

    def question(self, seed: int = 7) -> np.ndarray:
        return unit(1, self.header.terms.dimension, seed)[0]


class Conversation:
    """A whole question. ``view``: every frame that reached the silo or left it, in order.

    Args:
        wanted: documents to fetch; by default the best k.
    """

    def __init__(
        self, consortium: Consortium, query: np.ndarray, wanted: Sequence[int] | None = None
    ) -> None:
        asker, shelf = consortium.asker(query), consortium.shelf()
        asked = asker.ask()
        answered = shelf.handle(asked)
        self.scores = asker.take_scores(answered)
        best = np.argsort(-self.scores)[: consortium.header.terms.fetched]
        selected = asker.select(best.tolist() if wanted is None else wanted)
        served = shelf.handle(selected)
        self.passages = asker.take_blocks(served)
        self.view = [asked, answered, selected, served]
        self.sides = asker, shelf
