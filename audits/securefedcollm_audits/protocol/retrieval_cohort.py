"""One asker, two silos with shelves, and a carrier, for attacks on private retrieval.

Asker, shelf and the count on disk are the product's own. The carrier is :func:`talk`; the product's
letters, relay and processes are not played here. Embeddings are random directions, one for each
text, so that no model is needed.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.messages import UNSIGNED, Signable, sign
from securefedcollm.errors import CryptoError, ProtocolError, SecureFedCoLLMError
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.primitives import SigningKey, sha256, verify
from securefedcollm.retrieval import (
    Asker,
    Header,
    Index,
    Passage,
    PreparedShelf,
    Shelf,
    Terms,
)
from securefedcollm.retrieval.messages import Answer, Blocks, Encryption, Scores
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


class Stored:
    """The silo's count, in a file of its own, which every use opens anew: as after a restart."""

    def __init__(self, most: int) -> None:
        self._directory, self._most = Path(tempfile.mkdtemp()), most
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def spend(self, asker: str, number: bytes) -> bool:
        """As :meth:`securefedcollm.retrieval.Quota.spend`."""
        quota = self._opened()
        try:
            return quota.take(asker, number) is not None
        finally:
            quota.close()

    def spent(self, asker: str) -> int:
        """Questions of ``asker`` on disk."""
        quota = self._opened()
        try:
            return quota.spent(asker)
        finally:
            quota.close()

    def _opened(self) -> StoredQuota:
        return StoredQuota(self._directory / "count", self._most)


@dataclass
class Pair:
    """An asker and a silo, and all that the silo needs over several questions."""

    silo: str = "clinic"
    asker: str = "ann"
    terms: Terms = SMALL
    most: int = QUESTIONS
    index: Index | None = None
    quota: Stored = field(init=False)

    def __post_init__(self) -> None:
        self.keys = {
            name: SigningKey.generate(recorded(name)) for name in (self.silo, self.asker, "bob")
        }
        self.shelf = PreparedShelf(self.index or index_of(self.silo, self.terms), self.terms)
        self.quota = Stored(self.most)

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
        """The silo's side of one question; a fresh one is what a restarted process has, with the
        count that it finds on disk."""
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
        return self.quota.spent(asker or self.asker)


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


def answers(pair: Pair, reply: bytes) -> bool:
    """Whether these bytes are scores or blocks that this silo signed."""
    for kind in (Scores, Blocks):
        try:
            message: Answer = msgspec.msgpack.decode(reply, type=kind)
            silo = pair.keys[pair.silo].public
            verify(silo, kind.CONTEXT, message.signed(), message.signature)
        except (msgspec.MsgspecError, CryptoError):
            continue
        return True
    return False


def refused(attempt: Callable[[], bytes], pair: Pair) -> str:
    """Why there was no answer to this; "" if there was one.

    A silo that is silent, or sends anything else, has not answered.
    """
    try:
        return "" if answers(pair, attempt()) else "no answer"
    except SecureFedCoLLMError as error:
        return error.message
