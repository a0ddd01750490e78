"""What ``study check`` says of masks on a random graph."""

from __future__ import annotations

from securefedcollm_cli.study_reading import derived

from tests.support.arithmetic import make_study


def test_every_bound_is_said_of_an_attempt_and_of_the_run() -> None:
    plan = {"clip_norm": 20.0, "graph": {"neighbours": 8}}
    study = make_study(silos={"count": 12, "minimum": 11}, aggregation=plan)
    said = derived(study)
    bounds = study.graph_bounds
    facts = said["graph"]
    assert (facts["lists"], facts["cut"]) == (bounds.lists, None)  # None: it cannot happen
    assert facts["whole_run"] == bounds.whole_run(64, study.sums) > bounds.lists
    sentence = said["reading"]["graph"]
    assert f"fooled about the survivors 2^{bounds.lists:.1f}" in sentence
    assert "in two never" in sentence
    assert f"of 3 sums with up to 64 attempts: 2^{facts['whole_run']:.1f}" in sentence
    assert "at least 7 honest silos" in sentence
    assert said["reading"]["a sum opens with"].startswith(
        "11 survivors, 7 of them agreeing and 5 of the 8 neighbours of each unmasking"
    )
