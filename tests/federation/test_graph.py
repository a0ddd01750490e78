"""Runs whose masks are on a random graph: from the study to evidence that verifies."""

from __future__ import annotations

import json

import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import make_bundle, read_members
from securefedcollm.federation.plan import round_header
from securefedcollm.study import study_from_tree
from tests.support.arithmetic import NAMES, ROSTER, make_study
from tests.support.bundles import Lost as Losing
from tests.support.bundles import bundle_of
from tests.support.client_level import study as silo_study
from tests.support.rounds import Dies, Killed
from tests.support.runs import RecordedRun, recorded_study

ALL = {"silos": {"count": 4, "minimum": 4}}
GRAPH = ALL | {"aggregation": {"clip_norm": 20.0, "graph": {"neighbours": 3}}}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """silo-4 is lost in round 1 after it has uploaded, and before it agrees."""
    directory = tmp_path_factory.mktemp("graph") / "run"
    study = recorded_study(**GRAPH | {"rounds": 2})
    return bundle_of(directory, study, wrap=lambda engine: Losing(engine, 5, 6))


def test_a_run_on_a_graph_leaves_evidence_that_verifies(spoilt) -> None:
    verdict = verify(spoilt)
    assert verdict.failed == []
    passed = {result.name for result in verdict.results if result.status == "pass"}
    assert {"agreements", "quorum", "one-sum", "one-kind", "lost", "mechanism"} <= passed


def test_a_round_that_fails_after_its_survivors_are_signed_is_lost(spoilt) -> None:
    """Silos bind themselves to one list: no second attempt opens the round."""
    members = read_members(spoilt)

    def rounds(owner: str, kind: str) -> list[int]:
        lines = members[f"logs/{owner}.jsonl"].splitlines()
        whats = [json.loads(line)["what"] for line in lines]
        return [what["round"] for what in whats if what["kind"] == kind]

    # It is not tried: all would train and upload again, and then refuse.
    assert rounds("server", "failed") == [0]

    assert rounds("server", "lost") == [0]
    assert rounds("server", "summed") == [1]
    assert rounds(NAMES[0], "agreed") == [0, 1]


def test_a_server_that_stops_after_silos_have_agreed_gives_the_round_up(tmp_path) -> None:
    study = recorded_study(**GRAPH | {"rounds": 1})
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda engine: Dies(engine, 6, before=True)).go()
    run = RecordedRun(tmp_path, study, resume=True)
    run.go()
    (record,) = run.store.state.history
    assert record["lost"] == "the server stopped after silos had agreed to the survivors"
    assert run.store.state.attempt == 0  # of the next sum: there was no second of this one
    bundle = tmp_path / "evidence.zip"
    bundle.write_bytes(make_bundle(tmp_path))
    assert verify(bundle).failed == []


def test_old_studies_keep_their_digest() -> None:
    assert "graph" not in make_study().tree["aggregation"]
    assert make_study(**GRAPH).tree["aggregation"]["graph"] == {"neighbours": 3}


def test_the_header_names_the_graph() -> None:
    study = make_study(**GRAPH)
    header = round_header(
        study, roster=ROSTER, run_id=bytes(16), round_=0, attempt=0, model=bytes(32), values=5
    )
    assert header.suite == "securefedcollm-masking-graph-v1/3/3"
    assert study.scheme == "masking-graph"
    assert study.masked


def test_fewest_neighbours_are_derived() -> None:
    plan = {"clip_norm": 20.0, "graph": {}}
    study = make_study(silos={"count": 100, "colluders": 5}, aggregation=plan)
    assert study.minimum == 90
    assert study.graph is not None
    study.graph_bounds.check()
    fewer = {**plan, "graph": {"neighbours": study.graph.neighbours - 2}}
    with pytest.raises(ConfigError, match=r"2\^-"):
        make_study(silos={"count": 100, "colluders": 5}, aggregation=fewer)


def test_noise_is_planned_without_the_silos_that_a_server_may_leave_out() -> None:
    plan = {"graph": {"neighbours": 8}}
    study = silo_study(silos={"count": 12, "minimum": 11, "colluders": 1})
    graph = study_from_tree(study.tree | {"aggregation": study.tree["aggregation"] | plan})
    assert graph.graph_bounds.hidden == 3
    assert (study.noise_shares(), graph.noise_shares(), graph.noise_shares(12)) == (11, 8, 9)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"scheme": "ckks"}, "aggregation.scheme"),
        ({"graph": {"neighbours": 11}}, "aggregation.graph.neighbours"),
        ({"graph": {"neighbours": 5}}, "aggregation.graph.neighbours"),
    ],
)
def test_graphs_that_a_server_could_use_are_refused(changes, where) -> None:
    plan = {"clip_norm": 20.0, "graph": {"neighbours": 8}} | changes
    with pytest.raises(ConfigError) as caught:
        make_study(silos={"count": 12, "minimum": 11}, aggregation=plan)
    assert caught.value.where == where
    assert caught.value.hint
