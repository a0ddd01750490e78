"""Make the test vectors of masking on a graph: ``python -m tests.vectors.generate_graph``.

They are version 2: files of their own, beside those of the complete graph, which stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from securefedcollm_audits.protocol.cohort import play
from securefedcollm_audits.protocol.graph_cohort import GraphCohort

from securefedcollm.aggregation.header import RingParameters
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.bounds import bounds, derive
from securefedcollm.aggregation.masking.graph.coordinator import GraphCoordinatorRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.primitives import sha256
from tests.vectors.generate import Recorder, header_json

HERE = Path(__file__).parent / "v2"


def draws() -> list[dict[str, Any]]:
    """Neighbours and challenged places from their secrets."""
    secret, roll = sha256(b"draw"), sha256(b"roll")
    cases: list[dict[str, Any]] = []
    for members, index, count in (([1, 2, 3, 5, 8], 3, 3), (list(range(1, 201)), 77, 40)):
        found = choice.neighbours_of(secret, roll, members, index, count)
        places = choice.challenged(secret, roll, len(members), count)
        cases.append(
            {
                "secret": secret.hex(),
                "digest": roll.hex(),
                "members": members,
                "packed": choice.pack_set(members, max(members)).hex(),
                "index": index,
                "count": count,
                "neighbours": list(found),
                "challenged": places,
            }
        )
    return cases


def sizes() -> list[dict[str, Any]]:
    """k, t, their bounds, and the number of signatures that a silo asks to see."""
    cases: list[dict[str, Any]] = []
    for silos, colluders, quorum, neighbours in (
        (12, 1, 11, 8),
        (16, 1, 15, 14),
        (200, 10, 180, 80),
    ):
        graph = derive(silos, colluders, quorum, neighbours)
        found = bounds(silos, colluders, quorum, graph)
        parameters = RingParameters.smallest(values=1, bound=1, silos=silos, colluders=colluders)
        case = {"silos": silos, "colluders": colluders, "quorum": quorum}
        case |= {"neighbours": neighbours, "shares": graph.shares, "hidden": found.hidden}
        least = parameters.threshold
        case["challenged"] = {
            str(n): choice.samples(parameters, graph, n) for n in (least, quorum, silos)
        }
        cases.append(case)
    return cases


def played() -> dict[str, Any]:
    """A round of six silos in which one is lost after dealing, with every frame."""
    cohort = GraphCohort(
        silos=6, neighbours=4, shares=3, minimum=5, values=5, label="graph vectors"
    )
    frames: list[dict[str, str]] = []
    given: dict[str, Recorder] = {}
    silos = {}
    for name in cohort.names:
        given[name] = Recorder(cohort.randomness(name, cohort.header))
        silos[name] = cohort.member(name, random=given[name])

    def noted(way: str):
        def hook(step: Step, name: str, frame: bytes) -> bytes | None:
            if way == "reply" and (step, name) == (Step.UPLOAD, cohort.names[1]):
                return None
            frames.append({"way": way, "step": step.value, "silo": name, "frame": frame.hex()})
            return frame

        return hook

    side = GraphCoordinatorRound(header=cohort.header, roster=cohort.roster)
    result = play(silos, side, request=noted("request"), reply=noted("reply"))
    return {
        "header": header_json(cohort.header),
        "identities": {name: cohort.keys[name].seed().hex() for name in cohort.names},
        "vectors": {name: cohort.vectors[name].tolist() for name in cohort.names},
        "random": {name: "".join(recorder.given) for name, recorder in given.items()},
        "frames": frames,
        "lists": result.transcript.hex(),
        "survivors": list(result.survivors),
        "sum": result.sum.tolist(),
    }


def documents() -> dict[str, Any]:
    """File name → content."""
    return {"draws.json": draws(), "sizes.json": sizes(), "round.json": played()}


def text(document: Any) -> str:
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for file, document in documents().items():
        (HERE / file).write_text(text(document))
