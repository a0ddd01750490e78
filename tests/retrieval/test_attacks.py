"""The attacks on private questions succeed without what stops them, and are then told.

``tests/aggregation/test_attacks.py`` plays them against the product as it is.
"""

from __future__ import annotations

import pytest
from securefedcollm_audits.protocol import asker_attacks, shelf_attacks
from securefedcollm_audits.protocol.cases import ASKER_CASES, RETRIEVAL, adversary
from securefedcollm_audits.protocol.retrieval_cohort import Pair, embedding, talk

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.federation.questions import inquiry
from securefedcollm.retrieval import Asker, CountingQuota, Shelf
from securefedcollm.retrieval.product import Protection

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
    monkeypatch.setattr(CountingQuota, "spend", lambda quota, asker, number: True)


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


class Lax(Shelf):
    """Computes with whatever comes, as often as it comes."""

    def _check(self, message, product):
        pass

    def handle(self, frame):
        try:
            return super().handle(frame)
        except SecureFedCoLLMError:
            return b"an answer"


def lax(monkeypatch):
    monkeypatch.setattr("securefedcollm_audits.protocol.retrieval_cohort.Shelf", Lax)


class Forgetting(Asker):
    """Keeps nothing of what a silo signed."""

    @property
    def receipts(self):
        return super().receipts[:1]


def unkept(monkeypatch):
    monkeypatch.setattr("securefedcollm_audits.protocol.retrieval_cohort.Asker", Forgetting)


@pytest.mark.parametrize(
    ("case", "weaken"),
    [
        (asker_attacks.malformed_ciphertexts, lax),
        (asker_attacks.more_than_k, lax),
        (asker_attacks.all_the_shelf, forgetful),
        (asker_attacks.in_anothers_name, unchecked),
        (asker_attacks.repeated_questions, forgetful),
        (shelf_attacks.high_scores, trusting),
        (shelf_attacks.swapped_documents, trusting),
        (shelf_attacks.altered_frames, unchecked),
        (shelf_attacks.replayed_frames, forgetful),
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
    assert len({case.__name__ for case in RETRIEVAL}) == len(RETRIEVAL) == 17
