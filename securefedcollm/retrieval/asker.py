"""The asker's side of one question to one silo.

Its key is fresh for each exchange. What it sends has a length, number and order that follow from
the terms: k blocks are fetched whatever was found, if need be none of them wanted. So a silo never
learns whether it had anything of use, and a wrong answer provokes no other frame than a right one.

Not protected against: a silo that gives its passages wrong scores, or serves another index than it
committed to. Its scores are clipped to [−1, 1]. Whoever uses the passages should embed them again
and compare.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.messages import UNSIGNED, decode, sign
from securefedcollm.errors import CryptoError, LocalProtocolError, RemoteProtocolError
from securefedcollm.primitives import KEY_BYTES, RandomSource, SigningKey, equal, verify
from securefedcollm.retrieval import messages as m
from securefedcollm.retrieval.passages import Passage, from_block, from_digits
from securefedcollm.retrieval.product import Encrypted
from securefedcollm.retrieval.reduction import normalised
from securefedcollm.retrieval.terms import (
    BLOCK_BITS,
    DIGIT_BITS,
    DIGIT_SCALE,
    ENTRY_SCALE,
    PRIME,
    QUERY_SCALE,
    SCORE_BITS,
    Product,
)

_SCORE_UNIT = PRIME / 2**SCORE_BITS / (ENTRY_SCALE * QUERY_SCALE)
_DIGIT_SHIFT = BLOCK_BITS - DIGIT_BITS

A = TypeVar("A", bound=m.Answer)


class AskerStep(enum.Enum):
    """What this side does next."""

    ASK = "ask"
    SCORES = "scores"
    SELECT = "select"
    BLOCKS = "blocks"
    DONE = "done"
    FAILED = "failed"


class Asker:
    """Asks one silo one question: :meth:`ask`, :meth:`take_scores`, :meth:`select`,
    :meth:`take_blocks`, in this order, once each.

    Args:
        header: from the asker's own study.
        silo: its name, for errors.
        key: this asker's identity.
        query: [d], the question's embedding after the reduction. Scaled to unit norm.
        random: of keys, errors and the question's number.

    Raises:
        LocalProtocolError: the header is for another asker, or the query is not [d].
        DataError: the query is zero or not finite.
    """

    def __init__(
        self,
        *,
        header: m.Header,
        silo: str,
        key: SigningKey,
        query: npt.ArrayLike,
        random: RandomSource = os.urandom,
    ) -> None:
        if header.asker != key.public:
            raise LocalProtocolError("this header is for another asker", hint="use its identity")
        (unit,) = normalised(np.atleast_2d(np.asarray(query, dtype=np.float64)))
        if unit.shape != (header.terms.dimension,):
            raise LocalProtocolError(
                f"an embedding of {len(unit)} numbers, not {header.terms.dimension}",
                hint="use the study's encoder and reduction",
            )
        self._header, self._silo, self._key, self._random = header, silo, key, random
        self._query = unit
        self._number = random(m.NUMBER_BYTES)
        self._step = AskerStep.ASK
        self._before = header.digest
        self._receipts: list[m.Receipt] = []
        self._secret: Encrypted
        self._wanted: list[int] = []

    def __repr__(self) -> str:
        return f"Asker({self._step.value})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Asker is neither copied nor pickled")

    @property
    def step(self) -> AskerStep:
        return self._step

    @property
    def transcript(self) -> bytes:
        """32 bytes that stand for the header and all frames so far. The silo's are the same."""
        return self._before

    @property
    def receipts(self) -> tuple[m.Receipt, ...]:
        """Of the frames so far, in order: question, scores, selection, blocks. For evidence."""
        return tuple(self._receipts)

    def ask(self) -> bytes:
        """The question's frame."""
        self._advance(AskerStep.ASK, AskerStep.SCORES)
        vector = np.rint(self._query * QUERY_SCALE).astype(np.int64)
        return self._encrypt(m.Question, self._header.terms.scoring, vector[None])

    def take_scores(self, frame: bytes) -> npt.NDArray[np.float64]:
        """A score of every document, [documents] in [−1, 1]. Their error has an SD of about 1.6e-4.

        Documents that only pad the shelf have scores about zero.

        Raises:
            RemoteProtocolError: the silo, or a relay, sent something else.
        """
        self._advance(AskerStep.SCORES, AskerStep.FAILED)
        (found,) = self._decrypt(m.Scores, frame, self._header.terms.scoring)
        self._step = AskerStep.SELECT
        return np.asarray(np.clip(found * _SCORE_UNIT, -1.0, 1.0))

    def select(self, documents: Sequence[int]) -> bytes:
        """The selection's frame: of at most k documents, always padded to k.

        Raises:
            LocalProtocolError: too many, one twice, or one that is not on the shelf.
        """
        terms = self._header.terms
        wanted = [int(document) for document in documents]
        fits = len(wanted) <= terms.fetched and len(set(wanted)) == len(wanted)
        if not fits or not all(0 <= document < terms.documents for document in wanted):
            raise LocalProtocolError(
                f"a selection is up to {terms.fetched} different documents",
                hint="choose from the scores",
            )
        self._advance(AskerStep.SELECT, AskerStep.BLOCKS)
        self._wanted = wanted
        hot = np.zeros((terms.fetched, terms.documents), dtype=np.int64)
        hot[np.arange(len(wanted)), wanted] = DIGIT_SCALE
        return self._encrypt(m.Selection, terms.fetching, hot)

    def take_blocks(self, frame: bytes) -> tuple[Passage | None, ...]:
        """The selected passages, in order; None for a document that only pads the shelf.

        Raises:
            RemoteProtocolError: the silo, or a relay, sent something else, or a block is damaged.
        """
        self._advance(AskerStep.BLOCKS, AskerStep.FAILED)
        found = self._decrypt(m.Blocks, frame, self._header.terms.fetching)
        half = 1 << (_DIGIT_SHIFT - 1)
        blocks = from_digits((found[: len(self._wanted)] + half) >> _DIGIT_SHIFT)
        try:
            passages = tuple(from_block(block.tobytes()) for block in blocks)
        except ValueError:
            raise self._refusal("served a block that holds no passage") from None
        self._step = AskerStep.DONE
        return passages

    def _encrypt(
        self, kind: type[m.Encryption], product: Product, vectors: npt.NDArray[np.int64]
    ) -> bytes:
        seed = self._random(KEY_BYTES)
        self._secret = Encrypted(product, vectors, seed, self._random)
        rows = bytes(self._secret.rows)
        message = sign(kind(self._before, UNSIGNED, self._number, seed, rows), self._key)
        self._before = m.digest(self._header, message)
        self._receipts.append(m.receipt(message))
        return message.encode()

    def _decrypt(self, kind: type[A], frame: bytes, product: Product) -> npt.NDArray[np.int64]:
        """Adversary: a relay that answers in the silo's place, or with another question's answer;
        the silo, which may send any bytes."""
        message = decode(kind, frame, self._silo, m.limit(product.answer_bytes))
        if not equal(message.before, self._before):
            raise self._refusal("sent an answer to another question, or it was altered on the way")
        try:
            verify(self._header.silo, message.CONTEXT, message.signed(), message.signature)
            found = self._secret.decrypt(message.content)
        except CryptoError as error:
            raise self._refusal(
                f"sent a bad answer, or it was altered on the way: {error.message}"
            ) from None
        del self._secret
        self._before = m.digest(self._header, message)
        self._receipts.append(m.receipt(message))
        return found

    def _advance(self, expected: AskerStep, then: AskerStep) -> None:
        if self._step is not expected:
            raise LocalProtocolError(
                f"out of order: the next step is {self._step.value}", hint="one Asker, one question"
            )
        self._step = then

    def _refusal(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(what, peer=self._silo, hint="ask again; report this silo")
