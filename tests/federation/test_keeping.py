"""The best round and the end of patience follow from the records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.federation.keeping import best_round, describe_best, is_over
from securefedcollm.study import load_study

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def study(keep):
    return load_study(QUICKSTART, ["rounds=6", f"keep={keep}"])


def history(*values, key="slm/loss"):
    return [{"round": i, "validation": {key: v}} for i, v in enumerate(values, start=1)]


def test_the_least_loss_or_the_greatest_accuracy_is_best_and_the_first_of_equals():
    assert best_round(study("{}"), history(0.5, 0.3, 0.4, 0.3)) == 2
    by_accuracy = study("{best: llm, metric: accuracy}")
    found = history(0.5, 0.7, 0.7, 0.2, key="llm/accuracy")
    assert best_round(by_accuracy, found) == 2
    assert describe_best(by_accuracy, found) == {
        "round": 2,
        "model": "llm",
        "metric": "accuracy",
        "value": 0.7,
    }
    assert best_round(by_accuracy, history(1.0)) is None  # of the other model
    assert best_round(study("null"), history(0.5)) is None
    assert best_round(study("{}"), [{"round": 1}]) is None


def test_patience_counts_rounds_since_the_best_one():
    patient = study("{patience: 2}")
    ends = [is_over(patient, history(*[0.5, 0.4, 0.45, 0.41, 0.3][:n])) for n in range(6)]
    assert ends == [False, False, False, False, True, False]
    assert not is_over(study("{}"), history(0.1, 0.2, 0.3, 0.4, 0.5))
    assert is_over(study("{}"), history(*[0.1] * 6))
    assert is_over(study("null"), [{"round": i} for i in range(6)])


def test_a_model_that_diverged_is_never_the_best():
    """And the round counts as one without a better one."""
    patient = study("{patience: 2}")
    nan, inf = float("nan"), float("inf")
    assert best_round(patient, history(nan, 0.5, inf, -inf)) == 2
    assert [is_over(patient, history(*[nan, 0.5, inf, nan][:n])) for n in range(5)] == [
        *(False, False, False, False, True)
    ]
    assert best_round(patient, history(nan, nan)) is None


def test_impossible_wishes_are_refused():
    one = ["models.llm=none", "distillation={}", "keep={best: llm}"]
    with pytest.raises(ConfigError, match=r"keep\.best: this study has no large model"):
        load_study(QUICKSTART, one)
