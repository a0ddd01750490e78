"""Studies that set records aside: what is refused, with the place and the fix."""

from __future__ import annotations

import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.federation.feasible import planned
from securefedcollm.federation.plan import counting
from tests.support.arithmetic import make_study

ON = {"validation": {"share": 0.1}}
SILO = {"epsilon": 8.0, "delta": 1e-5, "unit": "silo", "noise": "distributed", "clip_norm": 20.0}
OWN = {
    "task": {"kind": "own", "data": {"builtin": None}},
    "models": {"slm": {"source": "own:mine"}},
}


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        (ON | {"privacy": SILO}, "validation", "none can be set aside"),
        (
            {"validation": {"noise_multiplier": 2.0}, "privacy": None},
            "validation.noise_multiplier",
            "has no noise",
        ),
        ({"keep": {"metric": "private"}}, "keep.metric", "no record is set aside"),
        (ON | {"keep": {"metric": "private", "best": "llm"}}, "keep.best", "do not have the large"),
        ({"validation": {"share": 0.0}}, "validation.share", "share"),
        ({"validation": {"share": 0.6}}, "validation.share", "share"),
        (
            {"validation": {"noise_multiplier": -1.0}},
            "validation.noise_multiplier",
            "noise_multiplier",
        ),
    ],
)
def test_a_validation_that_the_study_has_no_place_for_is_refused(changes, where, says):
    with pytest.raises(ConfigError, match=says) as refused:
        make_study(**changes)
    assert refused.value.where == where


def test_noise_that_does_not_keep_epsilon_is_refused_with_the_least_that_does():
    least = counting(make_study(**ON)).noise_multiplier
    low = make_study(validation={"noise_multiplier": 0.9 * least})
    with pytest.raises(ConfigError, match="costs more than the study's ε = 8") as refused:
        planned(low, [], None)
    assert f"at least {least:g}" in refused.value.hint
    more = make_study(validation={"noise_multiplier": 3.0})
    assert counting(more).noise_multiplier == 3.0
    planned(more, [], None)


def test_more_records_than_the_counts_have_room_for_are_refused_before_a_run():
    narrow = make_study(**ON, aggregation={"clip_norm": 20.0, "value_bits": 12})
    room = counting(narrow).most
    with pytest.raises(ConfigError, match="have room for") as refused:
        planned(narrow, [100 * room], None)
    assert refused.value.where == "validation.share"
    planned(narrow, [5 * room], None)


def test_a_study_that_chooses_by_private_counts_sets_no_public_question_aside():
    many = {"metric": "private", "rows": 1_000_000}
    assert make_study(**ON, keep=many).keep.rows == 1_000_000
