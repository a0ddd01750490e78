"""What ``study check`` says of masks on a random graph."""

from __future__ import annotations

from securefedcollm_cli.simulate import _silo_table
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


def test_of_many_silos_those_that_spent_most_are_printed() -> None:
    def table(count: int):
        spent = {"epsilon_budget": 3, "delta": 1e-5, "records": 1, "bytes_up": 1, "bytes_down": 1}
        silos = [{"name": f"s{i}", "epsilon_spent": i / 100, **spent} for i in range(count)]
        return _silo_table({"silos": silos})

    assert (table(24).row_count, table(24).title) == (24, "What it cost each silo")
    many = table(1000)
    assert many.row_count == 24
    assert many.title == "What it cost the 24 silos that spent most"
    assert next(iter(many.columns[0].cells)) == "s999"
