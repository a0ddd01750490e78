"""F1, AUROC and confusion against values worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from securefedcollm.tuning.class_scores import area, class_scores


def test_three_classes_by_hand() -> None:
    # Predictions 0 0 1 1 2 0 of the classes 0 0 0 1 1 2.
    scores = np.array(
        [[5, 1, 0], [4, 3, 1], [1, 2.5, 0], [0, 3, 2], [0, 1, 4], [3, 2, 1]], dtype=np.float64
    )
    found = class_scores(scores, np.array([0, 0, 0, 1, 1, 2]))
    assert found.confusion == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    # F1 = 2 TP / (2 TP + FP + FN): 4/6, 2/4, 0/2.
    assert found.f1 == pytest.approx([2 / 3, 1 / 2, 0])
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 3)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    gold = [0, 0, 0, 1, 1, 2]
    for c in range(3):  # the definition: pairs of one inside and one outside
        pairs = [
            (p[i, c] > p[j, c]) + 0.5 * (p[i, c] == p[j, c])
            for i, j in itertools.product(range(6), range(6))
            if gold[i] == c != gold[j]
        ]
        assert found.auroc[c] == pytest.approx(np.mean(pairs))
    assert 0 < found.auroc[0] < 1


def test_ties_count_half() -> None:
    scores = np.array([1.0, 2.0, 2.0, 3.0])
    # Positives 2, 3 against 1, 2: wins 2>1, 3>1, 3>2 and one tie of four pairs.
    assert area(scores, np.array([False, True, False, True])) == 3.5 / 4
    assert area(np.zeros(4), np.array([True, False, True, False])) == 0.5


def test_two_classes_have_one_auroc_and_sure_models_are_not_rounded_to_ties() -> None:
    scores = np.array([[0.0, 100.0], [0.0, 90.0], [0.0, 80.0], [0.0, 120.0]])
    found = class_scores(scores, np.array([0, 1, 0, 1]))  # as probabilities all are 1
    # Class 1: 90 and 120 against 100 and 80 wins three of four.
    assert found.auroc == [3 / 4, 3 / 4]


def test_a_class_that_is_not_there_is_not_defined() -> None:
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [3.0, 1.0, 0.0]])
    found = class_scores(scores, np.array([0, 1, 0]))
    assert found.confusion == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert found.f1 == [1, 1, None]
    assert found.auroc == [1, 1, None]
    assert found.macro_f1 == found.macro_auroc == 1
    # Never there, but predicted: a false positive, so F1 is 0 and defined.
    wrong = class_scores(np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]), np.array([1, 0]))
    assert wrong.f1 == [1, 0, 0]
    alone = class_scores(scores[:1], np.array([0]))
    assert alone.auroc == [None, None, None]
    assert alone.macro_auroc is None
    assert alone.macro_f1 == 1
