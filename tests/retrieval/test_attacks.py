"""The attacks on private questions succeed without what stops them, and are then told.

``tests/aggregation/test_attacks.py`` plays them against the product as it is.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol import asker_attacks, shelf_attacks
from securefedcollm_audits.protocol.cases import ASKER_CASES, RETRIEVAL, adversary
from securefedcollm_audits.protocol.retrieval_cohort import (
    Pair,
    embedding,
    index_of,
    talk,
    text_of,
)

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.messages import UNSIGNED
from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.federation.questions import inquiry
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.retrieval import Asker, Shelf, ShelfStep
from securefedcollm.retrieval import shelf as shelf_module
from securefedcollm.retrieval.messages import NUMBER_BYTES, Blocks, Selection, digest
from securefedcollm.retrieval.passages import to_digits
from securefedcollm.retrieval.product import Prepared, Protection

BARE = Protection(mask_bits=0, flooded=False)


def test_an_unread_passage_is_read_where_answers_have_no_noise():
    outcome = asker_attacks.summed_blocks(BARE)
    assert not outcome.held
    assert outcome.learnt == (
        "100% of an unread block's digits, exactly: 'The second rule, which nobody fetched. T'",
    )


def test_two_coordinates_fit_a_score_where_answers_have_no_noise():
    outcome = asker_attacks.two_coordinates(BARE)
    assert not outcome.held
    assert float(outcome.learnt[0].split()[0]) > 6


def test_a_narrow_u_is_told_by_a_malformed_key_row():
    outcome = asker_attacks.malformed_key_row(Protection(mask_bits=0))
    assert not outcome.held


def unchecked(monkeypatch):
    """Nobody looks at signatures."""
    for side in ("shelf", "asker"):
        monkeypatch.setattr(f"securefedcollm.retrieval.{side}.verify", lambda *any_signature: None)


def unbound(monkeypatch):
    """Nor at what a frame follows."""
    for side in ("shelf", "asker"):
        monkeypatch.setattr(f"securefedcollm.retrieval.{side}.equal", lambda *any_digests: True)


def forgetful(monkeypatch):
    """The silo counts nothing."""
    monkeypatch.setattr(StoredQuota, "take", lambda quota, asker, number: 1)


def trusting(monkeypatch):
    """The asker believes what a silo claims."""
    real = inquiry.judge

    def judge(fetched, query, embed, most):
        found = real(fetched, query, embed, most)
        claims = {
            (silo, passage): claim
            for silo, fetch in fetched.fetches.items()
            for passage, claim in zip(fetch.passages, fetch.claimed, strict=True)
        }
        found.hits.sort(key=lambda hit: -claims[hit.silo, hit.passage])
        found.suspect.clear()
        return found

    monkeypatch.setattr(shelf_attacks, "judge", judge)


COHORT = "securefedcollm_audits.protocol.retrieval_cohort"


class Stateless(Shelf):
    """Answers whatever comes, as often as it comes: no state machine."""

    def handle(self, frame):
        tag = msgspec.msgpack.decode(frame)[0]
        self._step = ShelfStep(tag)
        return super().handle(frame)


class Numberless(Shelf):
    """Takes a selection for any question."""

    def _on_selection(self, frame):
        self._number = msgspec.msgpack.decode(frame, type=Selection).number
        return super()._on_selection(frame)


class Neither(Stateless, Numberless):
    """Both."""


class Lengthless(Shelf):
    """Reads as many vectors of a selection as there are."""

    def _on_selection(self, frame):
        selection = msgspec.msgpack.decode(frame, type=Selection)
        if selection.number != self._number:
            raise self._refusal("selects for another question")
        terms, index = self._shelf.terms, index_of("clinic")
        product = terms.fetching
        vectors = len(selection.rows) * product.vectors // product.query_bytes
        blocks = np.zeros((terms.documents, terms.block_bytes), dtype=np.uint8)
        blocks[: len(index)] = index.blocks
        longer = msgspec.structs.replace(product, vectors=vectors)
        content = self._compute(selection, Prepared(longer, to_digits(blocks).T))
        return self._say(Blocks(digest(self._header, selection), UNSIGNED, content))


class Padding(Shelf):
    """Takes polynomials of any length, cut or filled up with zeros."""

    def _check(self, message, product):
        pass

    def _compute(self, message, prepared):
        size = self._shelf.terms.scoring.query_bytes
        rows = message.rows[:size].ljust(size, b"\0")
        return super()._compute(msgspec.structs.replace(message, rows=rows), prepared)


def instead(shelf):
    """The silo has this state machine."""
    return lambda monkeypatch: monkeypatch.setattr(f"{COHORT}.Shelf", shelf)


def unranged(monkeypatch):
    """A residue may be above q: it is reduced, or SEAL would not load it."""
    real = polynomials.unpack

    def unpack(data, ring, rows):
        return real(data, SimpleNamespace(prime=2**60 - 1), rows) % np.uint64(ring.prime)

    monkeypatch.setattr(polynomials, "unpack", unpack)


def careless(monkeypatch):
    """The silo reads the first half of what comes."""
    real = shelf_module.decode
    monkeypatch.setattr(
        shelf_module,
        "decode",
        lambda kind, frame, peer, limit: real(kind, frame[: len(frame) // 2], peer, limit),
    )


class Forgetting(Asker):
    """Keeps nothing of what a silo signed."""

    @property
    def receipts(self):
        return super().receipts[:1]


def unkept(monkeypatch):
    monkeypatch.setattr(f"{COHORT}.Asker", Forgetting)


@pytest.mark.parametrize(
    ("case", "weaken"),
    [
        (asker_attacks.all_the_shelf, forgetful),
        (asker_attacks.in_anothers_name, unchecked),
        (asker_attacks.repeated_questions, forgetful),
        (shelf_attacks.high_scores, trusting),
        (shelf_attacks.swapped_documents, trusting),
        (shelf_attacks.altered_frames, unchecked),
        (shelf_attacks.dropped_frames, forgetful),
        (shelf_attacks.two_answers, unkept),
        (shelf_attacks.exchanged_askers, lambda patch: (unchecked(patch), unbound(patch))),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_without_what_stops_it_an_attack_is_told(monkeypatch, case, weaken):
    assert case().held
    weaken(monkeypatch)
    outcome = case()
    assert not outcome.held
    assert outcome.learnt


FOURTH = repr(text_of("clinic", 3))
"""What a fourth block says."""


@pytest.mark.parametrize(
    ("weaken", "ways"),
    [
        (instead(Lengthless), ["a longer selection"]),
        (instead(Stateless), ["a second selection"]),
        (instead(Numberless), ["another question's number"]),
        (
            instead(Neither),
            ["a second selection", "a selection at first", "another question's number"],
        ),
    ],
)
def test_a_fourth_block_is_read_in_every_way_that_is_not_closed(monkeypatch, weaken, ways):
    weaken(monkeypatch)
    outcome = asker_attacks.more_than_k()
    assert not outcome.held
    assert outcome.learnt == tuple(f"{FOURTH}, by {way}" for way in ways)


@pytest.mark.parametrize(
    ("weaken", "shapes"),
    [
        (instead(Padding), ["polynomials that are cut", "a byte too many", "no polynomials"]),
        (unranged, ["a residue above q"]),
        (careless, ["two frames"]),
    ],
)
def test_what_no_check_refuses_is_computed_with(monkeypatch, weaken, shapes):
    weaken(monkeypatch)
    outcome = asker_attacks.malformed_ciphertexts()
    assert outcome.learnt == tuple(f"an answer to {shape}" for shape in shapes)


def without_binding(side):
    """This side does not look at what a frame follows."""
    return lambda monkeypatch: monkeypatch.setattr(
        f"securefedcollm.retrieval.{side}.equal", lambda *any_digests: True
    )


def same_keys(monkeypatch):
    """The asker encrypts every question under the same keys, and takes any answer."""
    without_binding("asker")(monkeypatch)
    real = Asker

    def asker(**fields):
        return real(**fields, random=lambda n: os.urandom(n) if n == NUMBER_BYTES else bytes(n))

    monkeypatch.setattr(f"{COHORT}.Asker", asker)


def unordered(monkeypatch):
    """A silo without a state machine, which looks at no number and nothing before."""
    instead(Neither)(monkeypatch)
    without_binding("shelf")(monkeypatch)


@pytest.mark.parametrize(
    ("weaken", "through"),
    [
        (forgetful, {"the same question"}),
        (without_binding("shelf"), {"at another silo"}),
        (unordered, {"at another silo", "a selection"}),
        (without_binding("asker"), {"older scores"}),
        (same_keys, {"older scores", "older blocks"}),
    ],
)
def test_each_replay_gets_through_without_what_stops_it(monkeypatch, weaken, through):
    weaken(monkeypatch)
    outcome = shelf_attacks.replayed_frames()
    assert not outcome.held
    assert set(outcome.learnt) == through


class Silent(Shelf):
    """As strict as ever, but says nothing where the product names its reason."""

    def handle(self, frame):
        try:
            return super().handle(frame)
        except SecureFedCoLLMError:
            return b""


@pytest.mark.parametrize(
    "case",
    [
        asker_attacks.malformed_ciphertexts,
        asker_attacks.more_than_k,
        asker_attacks.repeated_questions,
        asker_attacks.in_anothers_name,
        shelf_attacks.replayed_frames,
    ],
)
def test_silence_is_no_answer(monkeypatch, case):
    """Or the controls above would show no more than that nothing was raised."""
    instead(Silent)(monkeypatch)
    outcome = case()
    assert outcome.learnt == ()
    assert outcome.held


def impatient(pair: Pair, text, change):
    """An asker that fetches nothing where nothing scored well: no fixed k."""
    found = talk(pair.ask(text), pair.answer(), change)
    if found.scores is None or found.scores.max() < 0.9:
        del found.crossed[2:]
        found.frames.pop("selection", None)
    return found


@pytest.mark.parametrize("case", [shelf_attacks.tagged_asker, shelf_attacks.carried_view])
def test_without_a_fixed_k_questions_are_told_apart(case):
    assert case().held
    assert not case(impatient).held


def test_a_key_that_is_used_twice_is_seen():
    """Positive control of the comparison of bytes: an asker without randomness."""

    def twice(pair: Pair, text, change):
        asker = Asker(
            header=pair.header(),
            silo=pair.silo,
            key=pair.keys[pair.asker],
            query=embedding(text),
            random=bytes,
        )
        return talk(asker, pair.answer(), change)

    outcome = shelf_attacks.carried_view(twice)
    assert not outcome.held
    assert "question" in outcome.learnt


def test_the_table_says_who_attacks():
    assert {adversary(case.__name__) for case in ASKER_CASES} == {"asker"}
    assert {adversary(case.__name__) for case in RETRIEVAL} == {"asker", "server", "silo"}
    assert len({case.__name__ for case in RETRIEVAL}) == len(RETRIEVAL) == 27
