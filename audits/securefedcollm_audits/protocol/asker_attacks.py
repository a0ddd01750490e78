"""A malicious asker against a silo's shelf: it looks for more than k scores and blocks a question.

Every case takes what protects an answer as an argument. Without it the same attack succeeds, which
the tests show.
"""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.retrieval import Asker, Index, Passage, Shelf, Terms
from securefedcollm.retrieval.messages import Blocks, Question, Scores, Selection
from securefedcollm.retrieval.passages import from_block, from_digits, to_digits
from securefedcollm.retrieval.product import Encrypted, Prepared, Protection, common
from securefedcollm.retrieval.terms import (
    DIGIT_BITS,
    DIGIT_SCALE,
    PRIME,
    SCORE_BITS,
    SCORE_FLOOD_BITS,
    Product,
)
from securefedcollm_audits.protocol.outcome import Outcome, observed
from securefedcollm_audits.protocol.retrieval_cohort import (
    SMALL,
    Pair,
    hostile,
    refused,
    resigned,
    text_of,
)

PROTECTED = Protection()
SEED = bytes(range(32))
Integers = npt.NDArray[np.int64]


def malformed_ciphertexts() -> Outcome:
    """Polynomials too few, too many, or with a residue that is not below q; bytes that are none."""
    pair = Pair()
    frame, key = pair.ask("x").ask(), pair.keys[pair.asker]
    rows = msgspec.msgpack.decode(frame, type=Question).rows
    changed = {
        "polynomials that are cut": rows[:-1],
        "a byte too many": rows + b"\0",
        "no polynomials": b"",
        "a residue above q": rows[:-8] + b"\xfe" + b"\xff" * 7,  # 2^60 - 2
    }
    frames = {
        name: resigned(frame, Question, key, number=bytes([at]) * 16, rows=made)
        for at, (name, made) in enumerate(changed.items())
    }
    frames |= {"no frame": rows, "two frames": frame + frame}
    ended = {
        name: refused(partial(pair.answer().handle, made), pair) for name, made in frames.items()
    }
    return _all_refused("malformed ciphertexts", ended, "the silo refuses each before it computes")


def more_than_k() -> Outcome:
    """Read a fourth block: by a longer selection, by a second one, by one without a question, or by
    one that another question pays for."""
    tries = {
        "a longer selection": _by_a_longer_selection,
        "a second selection": _by_a_second_selection,
        "a selection at first": _by_a_selection_at_first,
        "another question's number": _by_another_number,
    }
    learnt, words = [], ""
    for name, attempt in tries.items():
        try:
            learnt.append(f"{attempt()!r}, by {name}")
        except SecureFedCoLLMError as error:
            words = words or error.message
        except (msgspec.MsgspecError, ValueError):  # no blocks, or noise
            words = words or "no answer"
    return Outcome(
        "more than k blocks",
        tuple(learnt),
        f"one selection of k vectors a question: {words}",
        held=not learnt,
    )


def _by_a_longer_selection() -> str:
    shelf, asker, number = _scored(pair := Pair())
    return _read(pair, shelf, asker.transcript, number, [0, 1, 2, 3])


def _by_a_second_selection() -> str:
    shelf, asker, number = _scored(pair := Pair())
    asker.take_blocks(shelf.handle(asker.select([0, 1, 2])))
    return _read(pair, shelf, asker.transcript, number, [4, 5, 3])


def _by_a_selection_at_first() -> str:
    pair = Pair()
    return _read(pair, pair.answer(), pair.header().digest, b"n" * 16, [4, 5, 3])


def _by_another_number() -> str:
    pair = Pair()
    older = _scored(pair)[2]
    shelf, asker, _ = _scored(pair)
    return _read(pair, shelf, asker.transcript, older, [4, 5, 3])


def _scored(pair: Pair) -> tuple[Shelf, Asker, bytes]:
    """A question that has its scores, and its number."""
    shelf, asker = pair.answer(), pair.ask("x")
    question = asker.ask()
    asker.take_scores(shelf.handle(question))
    return shelf, asker, msgspec.msgpack.decode(question, type=Question).number


def _read(pair: Pair, shelf: Shelf, before: bytes, number: bytes, wanted: list[int]) -> str:
    """The text of the last of these documents, decrypted from the answer to a selection of them
    all, however many they are.

    Raises:
        SecureFedCoLLMError: the silo refused.
        ValueError: what came back is no block.
    """
    product = msgspec.structs.replace(pair.terms.fetching, vectors=len(wanted))
    hot = np.zeros((len(wanted), pair.terms.documents), dtype=np.int64)
    hot[np.arange(len(wanted)), wanted] = DIGIT_SCALE
    secret = Encrypted(product, hot, SEED)
    frame = hostile(pair, Selection, before, number, bytes(secret.rows), SEED)
    content = msgspec.msgpack.decode(shelf.handle(frame), type=Blocks).content
    shift = product.answer_bits - DIGIT_BITS
    digits = (secret.decrypt(content)[-1:] + (1 << shift - 1)) >> shift
    passage = from_block(from_digits(digits)[0].tobytes())
    if passage is None:
        raise ValueError("an empty block")
    return passage.text


def _all_refused(attack: str, ended: dict[str, str], rule: str) -> Outcome:
    answered = tuple(f"an answer to {name}" for name, words in ended.items() if not words)
    words = next((words for words in ended.values() if words), "nothing was refused")
    return Outcome(attack, answered, f"{rule}: {words}", held=not answered)


def repeated_questions() -> Outcome:
    """Ask the same question again, to average the noise away: at once, after a restart of the silo,
    and more often than was agreed."""
    pair = Pair(most=2)
    question = pair.ask("x").ask()
    pair.answer().handle(question)
    before = pair.counted()
    ended = {
        name: refused(lambda: pair.answer().handle(question), pair)
        for name in ("the same question", "it once more")
    }
    again = pair.counted() == before == 1
    pair.answer().handle(pair.ask("y").ask())
    third = pair.ask("z").ask()
    ended["a third of two questions"] = refused(lambda: pair.answer().handle(third), pair)
    outcome = _all_refused("repeated questions", ended, "each is counted, and answered once")
    return outcome if again else Outcome(outcome.attack, ("a wrong count",), outcome.defence, False)


def _weakened(pair: Pair, protection: Protection) -> Index:
    """Have the silo's answers protected like this; returns its index."""
    index = pair.index
    assert index is not None
    blocks = np.zeros((pair.terms.documents, pair.terms.block_bytes), dtype=np.uint8)
    blocks[: len(index)] = index.blocks
    pair.shelf.scores = Prepared(pair.terms.scoring, index.entries, protection)
    pair.shelf.blocks = Prepared(pair.terms.fetching, to_digits(blocks).T, protection)
    return index


def _in_the_clear(product: Product, sent: dict[int, int]) -> bytes:
    """A hostile encryption of a vector with these entries, in the clear: the key is zero, there is
    no error, and the key row is empty. So nothing of the asker's own hides what comes back."""
    rows = np.zeros((product.vectors * (product.groups + 1), DEGREE), dtype=np.int64)
    for column, value in sent.items():
        group, place = divmod(column, product.width)
        if place:
            rows[group, DEGREE - place] = -value  # X^-t is -X^(N-t)
        else:
            rows[group, 0] = value
    with Seal(product.ring) as seal:
        made = seal.transformed(polynomials.residues_of(rows, product.ring))
    return polynomials.pack(made, product.ring)


def _residues(product: Product, content: bytes) -> Integers:
    """An answer's residues modulo p, in order."""
    bits = product.answer_bits
    pairs = np.frombuffer(content, dtype=np.uint8).reshape(-1, bits // 4)
    words = np.zeros((len(pairs), 8), dtype=np.uint8)
    words[:, : bits // 4] = pairs
    joined = words.view("<u8").reshape(-1).astype(np.int64)
    return np.stack([joined & 2**bits - 1, joined >> bits], axis=1).reshape(-1)


def _firsts(product: Product, content: bytes) -> Integers:
    """The rows of T·m for the first vector, in units of q/p: all that a key of zero decrypts."""
    count = product.parts * DEGREE
    shape = product.parts, product.vectors, product.sent
    found = _residues(product, content)[count : count + np.prod(shape)].reshape(shape)[:, 0]
    half = 1 << product.answer_bits - 1
    return np.where(found >= half, found - 2 * half, found).reshape(-1)[: product.rows]


def summed_blocks(protection: Protection = PROTECTED) -> Outcome:
    """Have one answer hold two blocks, 2^48 times one plus 2^36 times another, and take the digits
    of the second, which was not paid for, out of the noise."""
    terms = Terms(documents=2, dimension=16, block_bytes=768, fetched=1)
    text = "The second rule, which nobody fetched. " * 15
    passages = [Passage("first", "The first rule."), Passage("second", text)]
    vectors = np.eye(16)[:2]
    index = Index.build(passages, vectors, block_bytes=terms.block_bytes, space=terms.space)
    pair = Pair(terms=terms, index=index)
    unread = to_digits(_weakened(pair, protection).blocks)[1]
    shelf, asker = pair.answer(), pair.ask("x")
    question = asker.ask()
    asker.take_scores(shelf.handle(question))
    number = msgspec.msgpack.decode(question, type=Question).number
    rows = _in_the_clear(terms.fetching, {0: 1 << 48, 1: 1 << 36})
    frame = hostile(pair, Selection, asker.transcript, number, rows, SEED)
    content = msgspec.msgpack.decode(shelf.handle(frame), type=Blocks).content
    second = (_firsts(terms.fetching, content) + 2048) % 4096 - 2048
    share = float(np.mean(second == unread))
    return observed(
        "two blocks in one answer",
        f"{share:.0%} of an unread block's digits, exactly: {_words(second)!r}",
        f"flooding noise: {share:.1%} of the unread block's digits come out right; an answer holds "
        f"{terms.fetching.capacity:.2f} bits for each of 12, whatever is asked",
        held=share < 0.02,
    )


def _words(digits: Integers) -> str:
    """The beginning of the passage in a block of these digits."""
    try:
        passage = from_block(from_digits(digits[None])[0].tobytes())
    except ValueError:
        return ""
    return "" if passage is None else passage.text[:40]


def two_coordinates(protection: Protection = PROTECTED) -> Outcome:
    """Have one score hold two coordinates of every embedding, to know all embeddings after half as
    many questions."""
    terms = Terms(documents=512, dimension=16, block_bytes=48, fetched=1)
    drawn = np.random.default_rng(1).normal(size=(512, 16))
    passages = [Passage(f"p{number}", "x") for number in range(512)]
    pair = Pair(
        terms=terms,
        index=Index.build(passages, drawn, block_bytes=terms.block_bytes, space=terms.space),
    )
    entries = _weakened(pair, protection).entries.astype(np.int64)
    product = terms.scoring
    rows = _in_the_clear(product, {0: 1 << 47, 1: 1 << 36})
    frame = hostile(pair, Question, pair.header().digest, b"n" * 16, rows, SEED)
    content = msgspec.msgpack.decode(pair.answer().handle(frame), type=Scores).content
    total = _firsts(product, content) * (PRIME / 2.0**SCORE_BITS)
    first = np.rint(total / 2.0**47)
    right = first == entries[:, 0]  # where nothing carried over from the other
    bits = _bits((total - first * 2.0**47)[right], entries[right, 1])
    return observed(
        "two coordinates in one score",
        f"{bits:.1f} bits of a second coordinate of every embedding",
        f"flooding noise: {bits:.1f} bits of a second coordinate; an answer holds "
        f"{product.capacity:.2f} bits a passage, whatever is asked",
        held=bits < 1,
    )


def _bits(guessed: npt.NDArray[np.float64], truth: Integers) -> float:
    """What a guess tells of each number: the capacity of a Gaussian channel with its
    correlation."""
    found = np.corrcoef(guessed, truth.astype(float))[0, 1]
    return float(-0.5 * np.log2(max(1 - found**2, 2.0**-30)))


def malformed_key_row(protection: Protection = PROTECTED) -> Outcome:
    """Send 2^56 + 2^50·X^-1 as the key row, so that first polynomials tell the silo's secret u. Who
    knows u takes the mask off second polynomials, and has linear equations in the whole shelf."""
    product = Product(2048, 4, 1, 2, 2048, 2048**2, SCORE_BITS, SCORE_FLOOD_BITS)
    table = np.random.default_rng(0).integers(-2048, 2048, (2048, 4)).astype(np.int16)
    prepared, ring = Prepared(product, table, protection), product.ring
    key = np.zeros((1, DEGREE), dtype=np.int64)
    key[0, [0, -1]] = 1 << 56, -(1 << 50)
    laid = table.reshape(2048, 2, 2).swapaxes(0, 1).reshape(2, DEGREE).astype(np.int64)
    with Seal(ring) as seal:
        rows = np.zeros((1, product.groups + 1, DEGREE), dtype=np.uint64)
        rows[0, -1] = seal.transformed(polynomials.residues_of(key, ring))
        answer = prepared.answer(rows, SEED)
        told = _firsts(product, answer) * (PRIME / 2.0**SCORE_BITS)
        even = np.rint(told / 2.0**56)
        odd = np.rint((told - even * 2.0**56) / 2.0**50)
        u = np.stack([even, odd], axis=1).reshape(1, DEGREE).astype(np.int64)
        made = seal.transformed(polynomials.residues_of(np.concatenate([laid, u]), ring))
        terms = [
            (factor, seal.load(row[None]))
            for factor, row in zip(seal.factors(made), common(product, SEED), strict=True)
        ]
        expected = seal.combinations(terms, np.zeros((1, DEGREE), np.uint64))
    shown = _residues(product, answer)[:DEGREE]
    seconds = np.array([[int(value) * PRIME >> SCORE_BITS for value in shown]], dtype=np.uint64)
    error = polynomials.centred(polynomials.subtract(seconds, expected, ring), ring)
    explained = bool(np.abs(error).max() < 2**42)
    return observed(
        "a malformed key row",
        "u, and so 4,096 linear equations in the shelf",
        f"u has 13-bit coefficients, of which an answer tells at most {1 - _hidden(product):.0%}",
        held=not explained,
    )


def _hidden(product: Product) -> float:
    return product.hidden / DEGREE


def in_anothers_name() -> Outcome:
    """Ask in another member's name, to spend its questions or to have a second limit."""
    pair = Pair()
    asker = pair.ask("x", "bob")
    frame = resigned(asker.ask(), Question, pair.keys["ann"])
    ended = {"a question in bob's name": refused(lambda: pair.answer("bob").handle(frame), pair)}
    outcome = _all_refused("another member's name", ended, "the roster's key")
    if pair.counted("bob"):
        return Outcome(outcome.attack, ("one of bob's questions",), outcome.defence, held=False)
    return outcome


def all_the_shelf() -> Outcome:
    """Fetch the whole shelf, k passages a question, until the silo answers no more."""
    pair, got, ended = Pair(most=2), set[str](), "nothing was refused"
    for first in range(0, SMALL.documents - SMALL.fetched, SMALL.fetched):
        texts, why = _fetched(pair.ask("x"), pair.answer(), range(first, first + SMALL.fetched))
        got |= set(texts)
        ended = why or ended
    most = 2 * SMALL.fetched
    return observed(
        "the whole shelf, question by question",
        f"{len(got)} passages with 2 questions",
        f"{ended}; it got {most} passages",
        held=got == {text_of(pair.silo, number) for number in range(most)},
    )


def _fetched(asker: Asker, shelf: Shelf, wanted: range) -> tuple[list[str], str]:
    """A question that fetches these documents: the texts, and why it went no further."""
    try:
        asker.take_scores(shelf.handle(asker.ask()))
        passages = asker.take_blocks(shelf.handle(asker.select(list(wanted))))
    except SecureFedCoLLMError as error:
        return [], error.message
    return [passage.text for passage in passages if passage is not None], ""


CASES = (
    malformed_ciphertexts,
    more_than_k,
    repeated_questions,
    summed_blocks,
    two_coordinates,
    malformed_key_row,
    in_anothers_name,
    all_the_shelf,
)
