"""Runs whose masks are on a random graph: from the study to evidence that verifies."""

from __future__ import annotations

import json

import pytest
from securefedcollm_audits.verification.case import fewest, needed
from securefedcollm_audits.verification.verify import verify

from securefedcollm.aggregation.header import MOST_ATTEMPTS
from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import make_bundle, read_members
from securefedcollm.federation.plan import round_header
from securefedcollm.study import study_from_tree
from tests.support.arithmetic import NAMES, ROSTER, make_study
from tests.support.bundles import Lost as Losing
from tests.support.bundles import bundle_of
from tests.support.client_level import study as silo_study
from tests.support.forge import by_name, doctor
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


def lost_unopened(f):
    """The server's log has no opening of round 1."""
    f.remove("server", "opening")
    assert f.what("server", "opening")["round"] == 1


def lost_without_uploads(f):
    lost_unopened(f)
    for name in NAMES:
        said = ("uploaded", "agreed", "unmasked")
        f.logs[name] = [
            entry
            for entry in f.logs[name]
            if entry["what"]["kind"] not in said or entry["what"]["round"]
        ]


def agreed_twice(f):
    """The first silo agrees in a second attempt at round 1 too."""
    log = f.logs[NAMES[0]]
    first = [f.find(NAMES[0], kind) for kind in ("round", "uploaded", "agreed")]
    place = log.index(f.find(NAMES[0], "round", 1))
    log[place:place] = [entry | {"what": entry["what"] | {"attempt": 1}} for entry in first]


@pytest.mark.parametrize(
    ("edit", "check", "fault"),
    [
        (lost_without_uploads, "lost", "too few silos had uploaded"),
        (agreed_twice, "step-order", "agrees to a second list in one round"),
    ],
)
def test_what_a_log_on_a_graph_cannot_say(spoilt, tmp_path, edit, check, fault) -> None:
    verdict = verify(doctor(spoilt, tmp_path / "forged.zip", edit))
    assert fault in str(by_name(verdict)[check].faults)


def test_a_sum_may_be_lost_before_it_is_opened(spoilt, tmp_path) -> None:
    """Control: silos that have uploaded may have agreed, so an honest server gives the sum up."""
    verdict = verify(doctor(spoilt, tmp_path / "forged.zip", lost_unopened))
    assert not by_name(verdict)["lost"].faults
    assert not by_name(verdict)["step-order"].faults


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
    assert (study.noise_shares(), study.noise_shares(12)) == (11, 12)
    # By no list that a silo is shown: one silo's own check of it may be passed by chance.
    assert (graph.noise_shares(), graph.noise_shares(12)) == (8, 8)
    said = "8 (11 on its list, of which a lying server may leave out 3)"
    assert (fewest(study), fewest(graph)) == ("11", said)
    assert needed(graph) == {
        "fewest silos in a sum": said,
        "threshold of agreements": 7,
        "threshold of shares": "5 of the 8 neighbours of each",
    }


def test_a_run_of_more_attempts_than_the_bounds_allow_is_refused() -> None:
    plan = {"clip_norm": 20.0, "graph": {"neighbours": 8}}
    sizes = {"silos": {"count": 12, "minimum": 11}, "aggregation": plan, "privacy": None}
    study = make_study(rounds=10_000, **sizes)
    assert -41 < study.graph_bounds.whole_run(MOST_ATTEMPTS, study.sums) <= -40
    with pytest.raises(ConfigError, match=r"64 attempts at each of 20000 sums .* 2\^-39") as caught:
        make_study(rounds=10_000, validation={"share": 0.1}, **sizes)
    assert caught.value.where == "aggregation.graph"


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
