"""The silo's side of one question: scores of all documents, then k blocks, each once.

What the silo learns: that this asker asked, when, and how often. Every frame it gets has a length
that follows from the terms, and holds nothing but ring-LWE samples under keys that it lacks.

What the asker learns: a score of every document and k blocks of its choice. **Scores are not
harmless.** A question may be any vector. One that is a coordinate axis is told that coordinate of
every embedding on the shelf, and d independent questions tell all of them, with an error of about
2^−12. An embedding tells much of its passage. An asker that encrypts other things than one vector,
several columns in one polynomial for instance, needs fewer: an answer tells at most
``terms.scoring.capacity`` bits (about 13) of each document, whatever was encrypted, and an
embedding has some nine bits a coordinate. So a shelf's embeddings must be thought of as public
after some d questions, and the number of questions of each asker is what the silo can limit
(:mod:`~.quota`).

Blocks: a hostile selection is any linear function of the shelf modulo q. Its answer has the length
and noise of k blocks: at most ``terms.fetching.capacity`` bits (about 15) for each of their 12-bit
digits. A sum of many blocks tells no more than that.
"""

from __future__ import annotations

import enum
import os

import numpy as np

from securefedcollm.aggregation.messages import UNSIGNED, decode, sign
from securefedcollm.errors import CryptoError, LocalProtocolError, RemoteProtocolError
from securefedcollm.primitives import RandomSource, SigningKey, equal, verify
from securefedcollm.retrieval import messages as m
from securefedcollm.retrieval.index import Index, misfit
from securefedcollm.retrieval.passages import to_digits
from securefedcollm.retrieval.product import Prepared
from securefedcollm.retrieval.quota import Quota
from securefedcollm.retrieval.terms import Product, Terms


class PreparedShelf:
    """An index padded to the terms and transformed for answering; serves any number of questions.

    Takes about ``documents · (8·d + 16/3·block_bytes)`` bytes of memory. Not thread-safe.

    Raises:
        LocalProtocolError: the index does not fit the terms.
    """

    def __init__(self, index: Index, terms: Terms) -> None:
        n, d = index.entries.shape
        problem = misfit((n, d, index.blocks.shape[1]), index.space, terms)
        if problem:
            raise LocalProtocolError(problem, hint="build the index with this study")
        self.terms = terms
        self.fingerprint = index.fingerprint
        self.scores = Prepared(terms.scoring, index.entries)
        blocks = np.zeros((terms.documents, terms.block_bytes), dtype=np.uint8)
        blocks[:n] = index.blocks
        self.blocks = Prepared(terms.fetching, to_digits(blocks).T)

    def __repr__(self) -> str:
        return f"PreparedShelf({self.fingerprint.hex()[:16]}…)"

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self.scores.close()
        self.blocks.close()


class ShelfStep(enum.Enum):
    """What this side waits for."""

    QUESTION = "question"
    SELECTION = "selection"
    DONE = "done"
    FAILED = "failed"


class Shelf:
    """Answers one asker's question and then its selection, once each; nothing after a failure.

    Args:
        shelf: of this silo.
        header: from this silo's own study.
        asker: the asker's name, which its questions are counted under.
        key: this silo's identity.
        quota: counts the question before it is answered.
        random: of what hides everything but the answer.

    Raises:
        LocalProtocolError: the header is for other terms or another silo.
    """

    def __init__(
        self,
        shelf: PreparedShelf,
        *,
        header: m.Header,
        asker: str,
        key: SigningKey,
        quota: Quota,
        random: RandomSource = os.urandom,
    ) -> None:
        if header.terms != shelf.terms or header.silo != key.public:
            raise LocalProtocolError(
                "this header is for another silo or other terms", hint="make it from the study"
            )
        self._shelf, self._header, self._asker = shelf, header, asker
        self._key, self._quota, self._random = key, quota, random
        self._step = ShelfStep.QUESTION
        self._before = header.digest
        self._receipts: list[m.Receipt] = []
        self._number = b""

    def __repr__(self) -> str:
        return f"Shelf({self._step.value})"

    @property
    def step(self) -> ShelfStep:
        return self._step

    @property
    def transcript(self) -> bytes:
        """32 bytes that stand for the header and all frames so far. The asker's are the same."""
        return self._before

    @property
    def receipts(self) -> tuple[m.Receipt, ...]:
        """Of the frames so far, in order: question, scores, selection, blocks. For evidence."""
        return tuple(self._receipts)

    def handle(self, frame: bytes) -> bytes:
        """The answer to the next frame.

        Raises:
            RemoteProtocolError: the asker, or a relay, sent what must not be answered.
            BudgetExceeded: the asker has no question left.
        """
        step, self._step = self._step, ShelfStep.FAILED
        if step is ShelfStep.QUESTION:
            answer, then = self._on_question(frame), ShelfStep.SELECTION
        elif step is ShelfStep.SELECTION:
            answer, then = self._on_selection(frame), ShelfStep.DONE
        else:
            # Adversary: an asker that wants more than k blocks, or an answer with other noise.
            raise self._refusal(f"sent a frame although its question is {step.value}")
        self._step = then
        return answer

    def _on_question(self, frame: bytes) -> bytes:
        product = self._shelf.terms.scoring
        question = decode(m.Question, frame, self._asker, m.limit(product.query_bytes))
        self._check(question, product)
        # Adversary: an asker or relay that repeats a question, after a restart or to a clone of
        # this process, so that the average of the answers has less noise.
        if not self._quota.spend(self._asker, question.number):
            raise self._refusal("asked this very question before")
        self._number = question.number
        content = self._compute(question, self._shelf.scores)
        self._receipts.append(m.receipt(question))
        scores = m.Scores(m.digest(self._header, question), UNSIGNED, content)
        return self._say(scores)

    def _on_selection(self, frame: bytes) -> bytes:
        product = self._shelf.terms.fetching
        selection = decode(m.Selection, frame, self._asker, m.limit(product.query_bytes))
        self._check(selection, product)
        if selection.number != self._number:
            raise self._refusal("selects for another question")
        content = self._compute(selection, self._shelf.blocks)
        self._receipts.append(m.receipt(selection))
        blocks = m.Blocks(m.digest(self._header, selection), UNSIGNED, content)
        return self._say(blocks)

    def _check(self, message: m.Encryption, product: Product) -> None:
        """The frame is the asker's, and the next one of this very conversation.

        Adversary: a relay that invents questions in the asker's name, or carries one to another
        silo, another run or another study; checked before anything is counted.
        """
        if not equal(message.before, self._before):
            raise self._refusal("sent a frame of another question, silo, run or study")
        try:
            verify(self._header.asker, message.CONTEXT, message.signed(), message.signature)
        except CryptoError:
            raise self._refusal("sent a frame with a bad signature") from None
        if len(message.rows) != product.query_bytes:
            raise self._refusal("sent polynomials of another length than the study's")

    def _compute(self, message: m.Encryption, prepared: Prepared) -> bytes:
        # Adversary: the asker. Its polynomials may be anything; what an answer tells is bounded.
        try:
            rows = prepared.read(message.rows)
        except CryptoError as error:
            raise self._refusal(error.message) from None
        return prepared.answer(rows, message.seed, self._random)

    def _say(self, message: m.Answer) -> bytes:
        signed = sign(message, self._key)
        self._before = m.digest(self._header, signed)
        self._receipts.append(m.receipt(signed))
        return signed.encode()

    def _refusal(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(what, peer=self._asker, hint="ask a new question")
