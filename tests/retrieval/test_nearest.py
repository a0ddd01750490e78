"""Which records a question retrieves: each by itself, and never because of another record."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import DataError
from securefedcollm.retrieval.nearest import RecordIndex
from tests.support.shelves import unit


def test_similarities_are_exact_whatever_else_is_in_the_index():
    rows, query = unit(50, 24), unit(1, 24, seed=9)[0]
    whole = RecordIndex(rows).similarities(query)
    assert np.abs(whole / 2**24 - rows @ query).max() < 1e-3
    for at in (0, 17, 49):
        assert RecordIndex(rows[at : at + 1]).similarities(query)[0] == whole[at]
    shuffled = np.random.default_rng(1).permutation(50)
    assert (RecordIndex(rows[shuffled]).similarities(query) == whole[shuffled]).all()


def test_the_threshold_is_inclusive():
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    index = RecordIndex(rows)
    assert index.retrieved([1.0, 0.0], 1.0).tolist() == [True, False, False]
    assert index.retrieved([1.0, 0.0], 0.6).tolist() == [True, False, True]
    assert index.retrieved([1.0, 0.0], -1.0).tolist() == [True] * 3
    assert len(index) == 3


@pytest.mark.parametrize("row", [[0.0, 0.0], [np.nan, 1.0]])
def test_what_has_no_direction_is_refused(row):
    with pytest.raises(DataError):
        RecordIndex([row])


def answers(rows, queries, *, rule, budget=3):
    """Retrieved rows of every question; a record is retrieved ``budget`` times at most."""
    left = np.full(len(rows), budget)
    index = RecordIndex(rows)
    found = []
    for query in queries:
        chosen = rule(index, query, left > 0)
        left[chosen] -= 1
        found.append(chosen.copy())
    return np.array(found)


def threshold(index, query, allowed):
    return index.retrieved(query, 0.5) & allowed


def best_two(index, query, allowed):
    scores = np.where(allowed, index.similarities(query), -(2**60))
    chosen = np.zeros(len(index), dtype=np.bool_)
    chosen[np.argsort(-scores, kind="stable")[:2]] = True
    return chosen & allowed


def unpaid(rule, seed):
    """Questions that do not retrieve the added record, and whose answer differs because of it."""
    rows, queries = unit(12, 3, seed), unit(40, 3, seed + 1000)
    with_it = answers(rows, queries, rule=rule)
    without = answers(rows[1:], queries, rule=rule)
    differs = (with_it[:, 1:] != without).any(axis=1)
    return int((differs & ~with_it[:, 0]).sum())


def test_a_record_changes_only_answers_that_it_pays_for():
    """An individual filter's premise. Its control: with the best two of all records, an added one
    saves the budget of those that it pushes out, and they show up in answers much later."""
    assert sum(unpaid(best_two, seed) for seed in range(20)) > 50
    assert [unpaid(threshold, seed) for seed in range(20)] == [0] * 20
