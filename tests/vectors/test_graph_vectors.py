"""The vectors of masking on a graph: made anew, and replayed by both sides from the files."""

from __future__ import annotations

import itertools
import json

import pytest
from securefedcollm_audits.protocol.graph_cohort import GraphCohort

from securefedcollm.aggregation.masking.graph.coordinator import GraphCoordinatorRound
from tests.vectors.generate_graph import HERE, documents, text


@pytest.fixture(scope="module")
def made():
    return documents()


def test_the_files_are_what_the_generator_makes(made) -> None:
    assert {path.name for path in HERE.glob("*.json")} == {*made}
    for name, document in made.items():
        assert (HERE / name).read_text() == text(document), name


def _cohort() -> GraphCohort:
    return GraphCohort(silos=6, neighbours=4, shares=3, minimum=5, values=5, label="graph vectors")


def test_silos_replay_the_round() -> None:
    round_, cohort = json.loads((HERE / "round.json").read_text()), _cohort()
    for name in cohort.names:
        left = bytes.fromhex(round_["random"][name])
        given = [0]

        def read(count: int, left: bytes = left, given: list[int] = given) -> bytes:
            given[0] += count
            return left[given[0] - count : given[0]]

        silo = cohort.member(name, random=read)
        mine = [one for one in round_["frames"] if one["silo"] == name]
        for asked, answered in itertools.pairwise(mine):
            if (asked["way"], answered["way"]) == ("request", "reply"):
                assert silo.handle(bytes.fromhex(asked["frame"])).hex() == answered["frame"]


def test_the_coordinator_replays_the_round() -> None:
    round_, cohort = json.loads((HERE / "round.json").read_text()), _cohort()
    side = GraphCoordinatorRound(header=cohort.header, roster=cohort.roster)
    more = True
    while more:
        now = [one for one in round_["frames"] if one["step"] == side.step.value]
        sent = {one["silo"]: one["frame"] for one in now if one["way"] == "request"}
        assert {name: frame.hex() for name, frame in side.requests().items()} == sent
        for one in now:
            if one["way"] == "reply":
                side.receive(one["silo"], bytes.fromhex(one["frame"]))
        more = side.advance()
    assert list(side.result.survivors) == round_["survivors"]
    assert side.result.sum.tolist() == round_["sum"]
