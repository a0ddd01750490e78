"""One asker, two silos with shelves, and a carrier, for attacks on private retrieval.

Everything but the attacker is the product's own state machine. Embeddings are random directions,
one for each text, so that no model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.messages import UNSIGNED, Signable, sign
from securefedcollm.errors import ProtocolError, SecureFedCoLLMError
from securefedcollm.primitives import SigningKey, sha256
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
from securefedcollm.retrieval.messages import Encryption
from securefedcollm_audits.protocol.cohort import recorded

SMALL = Terms(documents=40, dimension=16, block_bytes=96, fetched=3)
QUESTIONS = 20
"""Questions that a silo answers each asker."""

Change = Callable[[str, bytes], bytes | None]
"""(kind, frame) → the frame as it arrives, or None to lose it."""


def embedding(text: str, dimension: int = SMALL.dimension) -> npt.NDArray[np.float64]:
    """The unit vector of a text, [dimension]: the same for the same text, and no other."""
    seed = int.from_bytes(sha256(b"embedding\0", text.encode())[:8], "big")
    drawn = np.random.default_rng(seed).normal(size=dimension)
    return drawn / np.linalg.norm(drawn)


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """As a study's encoder and map do, [n, dimension]."""
    return np.array([embedding(text) for text in texts])


def text_of(silo: str, number: int) -> str:
    """What a silo's passage says."""
    return f"{silo}, rule {number}: keep the ward at {number} degrees"


def index_of(silo: str, terms: Terms = SMALL, count: int = 12) -> Index:
    """A silo's shelf."""
    texts = [text_of(silo, number) for number in range(count)]
    passages = [Passage(f"{silo}:{number}", text) for number, text in enumerate(texts)]
    vectors = np.array([embedding(text, terms.dimension) for text in texts])
    return Index.build(passages, vectors, block_bytes=terms.block_bytes, space=terms.space)


@dataclass
class Pair:
    """An asker and a silo, and all that the silo needs over several questions."""

    silo: str = "clinic"
    asker: str = "ann"
    terms: Terms = SMALL
    most: int = QUESTIONS
    index: Index | None = None
    quota: CountingQuota = field(init=False)

    def __post_init__(self) -> None:
        self.keys = {
            name: SigningKey.generate(recorded(name)) for name in (self.silo, self.asker, "bob")
        }
        self.shelf = PreparedShelf(self.index or index_of(self.silo, self.terms), self.terms)
        self.quota = CountingQuota(self.most)

    def header(self, asker: str = "") -> Header:
        """Of a conversation with ``asker``."""
        named = self.keys[asker or self.asker]
        return Header(bytes(32), bytes(16), named.public, self.keys[self.silo].public, self.terms)

    def ask(self, text: str, asker: str = "") -> Asker:
        """The asker's side of a question that is the embedding of ``text``."""
        name = asker or self.asker
        query = embedding(text, self.terms.dimension)
        return Asker(header=self.header(name), silo=self.silo, key=self.keys[name], query=query)

    def answer(self, asker: str = "") -> Shelf:
        """The silo's side of one question; a fresh one is what a restarted process has."""
        name = asker or self.asker
        return Shelf(
            self.shelf,
            header=self.header(name),
            asker=name,
            key=self.keys[self.silo],
            quota=self.quota,
        )

    def counted(self, asker: str = "") -> int:
        """Questions that the silo has counted."""
        return self.most - self.quota.left(asker or self.asker)


@dataclass
class Talk:
    """A whole question, with a carrier that may change every frame.

    Attributes:
        crossed: kind and length of every frame that left its author, in order.
        frames: the frames themselves, by kind.
        scores, passages: what the asker got.
        stopped: why it went no further.
    """

    crossed: list[tuple[str, int]] = field(default_factory=list)
    frames: dict[str, bytes] = field(default_factory=dict)
    scores: npt.NDArray[np.float64] | None = None
    passages: tuple[Passage | None, ...] | None = None
    stopped: str = ""


def talk(
    asker: Asker,
    shelf: Shelf | Callable[[bytes], bytes],
    change: Change = lambda kind, frame: frame,
    wanted: int = SMALL.fetched,
) -> Talk:
    """Play a question; ``shelf``: the silo's side, or a hostile one's ``handle``."""
    found = Talk()
    handle = shelf.handle if isinstance(shelf, Shelf) else shelf

    def carried(kind: str, frame: bytes) -> bytes:
        found.crossed.append((kind, len(frame)))
        found.frames[kind] = frame
        arrived = change(kind, frame)
        if arrived is None:
            raise ProtocolError(f"{kind}: no answer in time")
        return arrived

    try:
        answered = handle(carried("question", asker.ask()))
        found.scores = asker.take_scores(carried("scores", answered))
        best = np.argsort(-found.scores, kind="stable")[:wanted]
        served = handle(carried("selection", asker.select(best.tolist())))
        found.passages = asker.take_blocks(carried("blocks", served))
    except SecureFedCoLLMError as error:
        found.stopped = error.message
    return found


def resigned(frame: bytes, kind: type[Signable], key: SigningKey, **fields: object) -> bytes:
    """A frame with other fields, signed anew by its author."""
    message = msgspec.msgpack.decode(frame, type=kind)
    changed = msgspec.structs.replace(message, signature=UNSIGNED, **fields)
    return sign(changed, key).encode()


def hostile(
    pair: Pair, kind: type[Encryption], before: bytes, number: bytes, rows: bytes, seed: bytes
) -> bytes:
    """A question or selection of any polynomials, in order otherwise."""
    return sign(kind(before, UNSIGNED, number, seed, rows), pair.keys[pair.asker]).encode()


def refusals(tries: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """What each of these ended with: the error's words, or nothing if there was none."""
    ended = {}
    for name, attempt in tries.items():
        try:
            attempt()
            ended[name] = ""
        except SecureFedCoLLMError as error:
            ended[name] = error.message
    return ended
