"""A private question to one silo: ``python -m benchmarks.retrieval --json``.

Synthetic passages at random unit embeddings, one question after another, the best of ``--repeats``
for times. ``--documents 100000`` for a large shelf. CPU seconds of each side in this process, on
one thread if the environment says so; bytes are whole frames, signatures included.

``plain``: the same search over float64 embeddings, unprotected, in the same run (its embeddings
are sent in clear: 8·d bytes up; ids and scores of the best k and their blocks down). ``recall``:
how many of its best k are among the best k of the encrypted scores, over ``--questions``
questions. Every fetched passage is compared with the one that was built.

``published``: what Tiptoe (Henzinger, Dauterman, Corrigan-Gibbs and Zeldovich, SOSP 2023) states of
its own search engine. These figures are copied from the paper, not measured here: its documents are
public, its servers are many, and it returns addresses of pages and no passages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from benchmarks._machine import machine
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import (
    Asker,
    CountingQuota,
    Header,
    Index,
    Passage,
    PreparedShelf,
    Product,
    Shelf,
    Terms,
)

TIPTOE = {
    "measured_here": False,
    "source": "Henzinger et al., Private Web Search with Tiptoe, SOSP 2023, abstract",
    "documents": 360_000_000,
    "bytes_of_a_query": 57 * 2**20,
    "latency_s": 2.7,
}
"""Published constants, for comparison."""
_WORD = "hand hygiene before and after each contact with a patient or a device "


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    made = work()
    return made, time.process_time() - start


def shelf_of(terms: Terms) -> tuple[Index, np.ndarray]:
    """An index that fills the terms, and its embeddings before quantisation."""
    drawn = np.random.default_rng(0).normal(size=(terms.documents, terms.dimension))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    text = (_WORD * 200)[: terms.block_bytes - 20]
    passages = [Passage(f"p{n:07d}", f"{n} {text}"[: len(text)]) for n in range(terms.documents)]
    return Index.build(passages, drawn, block_bytes=terms.block_bytes), drawn


def layout(product: Product) -> dict[str, float]:
    """How a product lies in polynomials, and what protects the rest of the matrix."""
    return {
        "width": product.width,
        "polynomials_up": product.vectors * (product.groups + 1),
        "parts_down": product.parts,
        "bits_told_at_most": product.capacity,
        "advantage_log2": float(np.log2(product.advantage)),
    }


class Played:
    """One question from beginning to end: ``seconds`` of each side, ``frames`` in bytes."""

    def __init__(self, shelf: Shelf, asker: Asker, count: int) -> None:
        asked, ask = timed(asker.ask)
        answered, score = timed(lambda: shelf.handle(asked))
        self.scores, read = timed(lambda: asker.take_scores(answered))
        self.best = np.argsort(-self.scores, kind="stable")[:count].tolist()
        selected, select = timed(lambda: asker.select(self.best))
        served, serve = timed(lambda: shelf.handle(selected))
        self.passages, take = timed(lambda: asker.take_blocks(served))
        self.seconds = {
            "asker_scores_s": ask + read,
            "silo_scores_s": score,
            "asker_blocks_s": select + take,
            "silo_blocks_s": serve,
        }
        self.frames = {
            "scores_bytes_up": len(asked),
            "scores_bytes_down": len(answered),
            "blocks_bytes_up": len(selected),
            "blocks_bytes_down": len(served),
        }


def measure(terms: Terms, questions: int, repeats: int) -> dict[str, object]:
    """Figures of ``questions`` questions, of which the first ``repeats`` also fetch."""
    index, vectors = shelf_of(terms)
    prepared, prepare = timed(lambda: PreparedShelf(index, terms))
    asker_key, silo_key = SigningKey.generate(), SigningKey.generate()
    header = Header(bytes(32), bytes(16), asker_key.public, silo_key.public, terms)
    queries = np.random.default_rng(1).normal(size=(questions, terms.dimension))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    quota, k = CountingQuota(questions), terms.fetched
    passages, best = index.passages, dict[str, float]()
    frames: dict[str, int] = {}
    found = 0
    error = 0.0
    for number, query in enumerate(queries):
        shelf = Shelf(prepared, header=header, asker="asker", key=silo_key, quota=quota)
        asker = Asker(header=header, silo="silo", key=asker_key, query=query)
        (exact, order), plain = timed(lambda query=query: _plain(vectors, query, k))
        if number < repeats:
            played = Played(shelf, asker, k)
            if list(played.passages) != [passages[at] for at in played.best]:
                raise SystemExit("a passage came back changed")
            scores, frames = played.scores, played.frames
            now = played.seconds | {"plain_s": plain}
            best = {name: min(value, best.get(name, value)) for name, value in now.items()}
        else:
            scores = asker.take_scores(shelf.handle(asker.ask()))
        error = max(error, float(np.std(scores - exact)))
        found += len({*order} & {*np.argsort(-scores, kind="stable")[:k].tolist()})
    return {
        "documents": terms.documents,
        "dimension": terms.dimension,
        "fetched": k,
        "block_bytes": terms.block_bytes,
        "recall": found / (k * questions),
        "score_error_rms": error,
        **best,
        **frames,
        "plain_bytes_up": 8 * terms.dimension,
        "plain_bytes_down": k * (12 + terms.block_bytes),
        "silo_prepares_s": prepare,
        "scoring": layout(terms.scoring),
        "fetching": layout(terms.fetching),
    }


def _plain(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, list[int]]:
    exact = vectors @ query
    return exact, np.argsort(-exact, kind="stable")[:k].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[2048], help="one report for each number"
    )
    parser.add_argument("--dimension", type=int, default=96)
    parser.add_argument("--fetched", type=int, default=10)
    parser.add_argument("--block-bytes", type=int, default=768)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    arguments = parser.parse_args()
    reports = []
    for documents in arguments.documents:
        terms = Terms(
            documents=documents,
            dimension=arguments.dimension,
            block_bytes=arguments.block_bytes,
            fetched=arguments.fetched,
        )
        reports.append(measure(terms, arguments.questions, arguments.repeats))
    report = reports[0] if len(reports) == 1 else {"sizes": reports}
    report |= {"published": {"tiptoe": TIPTOE}, "machine": machine("tenseal", "numpy")}
    json.dump(report, sys.stdout, indent=None if arguments.json else 2)
    print()


if __name__ == "__main__":
    main()
