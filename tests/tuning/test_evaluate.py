"""Accuracy and gold log-probability, by group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from securefedcollm.errors import DataError
from securefedcollm.tuning.evaluate import evaluate
from securefedcollm.tuning.questions import choice_scores


def test_scores_by_group(toy: Any) -> None:
    model, data = toy.model(), toy.encoded(11)
    result = evaluate(model, data, batch_size=4)
    with torch.no_grad():
        log_probs = choice_scores(model, data).log_softmax(-1)
    right = log_probs.argmax(1) == data.answers
    gold = log_probs[torch.arange(11), data.answers]
    assert result.correct.tolist() == right.tolist()
    assert result.gold_log_prob.tolist() == pytest.approx(gold.tolist(), abs=1e-4)
    groups = result.by_group()
    assert list(groups) == ["even", "odd"]
    assert groups["even"].count == 6
    assert groups["even"].accuracy == pytest.approx(float(right[::2].float().mean()))
    assert groups["odd"].gold_log_prob == pytest.approx(float(gold[1::2].mean()), abs=1e-4)
    assert result.score().count == 11
    assert 0 < result.score().accuracy < 1


def test_a_test_question_needs_an_answer(toy: Any) -> None:
    with pytest.raises(DataError, match="a test question has no answer"):
        evaluate(toy.model(), toy.encoded(3, labelled=False))


def test_progress_and_mode(toy: Any) -> None:
    model, seen = toy.model().train(), []
    evaluate(model, toy.encoded(5), batch_size=2, progress=lambda *report: seen.append(report))
    assert [done for done, _, _ in seen] == [2, 4, 5]
    assert model.training
