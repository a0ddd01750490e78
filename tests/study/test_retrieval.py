"""The section ``retrieval`` of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.study import digest, load_study, study_from_tree

CONFIGS = Path(__file__).parents[2] / "configs"
HEX = "0" * 64
ROSTER = [
    {"name": name, "role": "server" if name == "server" else "silo", "key": f"{i:064x}"}
    for i, name in enumerate(["server", "a", "b", "c", "d"])
]


def test_a_study_without_the_section_keeps_its_digest():
    study = load_study(CONFIGS / "quickstart.yaml")
    assert "retrieval" not in study.tree
    asking = load_study(CONFIGS / "retrieval.yaml")
    assert digest(study_from_tree(asking.tree)) == digest(asking)
    assert digest(load_study(CONFIGS / "retrieval.yaml", ["retrieval=null"])) != digest(asking)
    for change in ("questions=41", "encoder.layer=1", "documents=65"):
        assert digest(load_study(CONFIGS / "retrieval.yaml", [f"retrieval.{change}"])) != digest(
            asking
        )


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"retrieval.encoder.source": "own:mine"}, "retrieval.encoder.source"),
        ({"retrieval.encoder.source": "elsewhere"}, "retrieval.encoder.source"),
        ({"retrieval.encoder.source": "hub:org/name"}, "retrieval.encoder.revision"),
        ({"retrieval.block_bytes": 100}, "retrieval.block_bytes"),
        ({"retrieval.fetched": 15}, "retrieval.fetched"),
        ({"retrieval.mode": "else"}, "retrieval.mode"),
        ({"retrieval.mode": "answers"}, "retrieval.threshold"),
        ({"retrieval.threshold": 0.9}, "retrieval.threshold"),
        ({"retrieval.epsilon": 1.0}, "retrieval.epsilon"),
        ({"retrieval.questions": -1}, "retrieval.questions"),
        (
            {"retrieval.reduction": {"source": "map", "sha256": HEX}},
            "retrieval.reduction.source",
        ),
        ({"retrieval.reduction": {"source": "path:map"}}, "retrieval.reduction.sha256"),
        ({"task.data": {}}, "retrieval.reduction"),
        ({"roster": ROSTER}, "retrieval.encoder.sha256"),
        ({"roster": ROSTER, "retrieval.encoder.sha256": HEX}, "retrieval.reduction"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(changes, where):
    with pytest.raises(ConfigError) as refused:
        load_study(CONFIGS / "retrieval.yaml", changes)
    assert refused.value.where == where
    assert refused.value.hint


def test_a_roster_with_both_pins_is_taken():
    pins = {
        "roster": ROSTER,
        "retrieval.encoder.sha256": HEX,
        "retrieval.reduction": {"source": "path:map", "sha256": HEX},
    }
    assert load_study(CONFIGS / "retrieval.yaml", pins).retrieval is not None


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"privacy": None}, "privacy"),
        ({"privacy.unit": "subject", "privacy.subject": "patient"}, "privacy"),
        ({"retrieval.threshold": None}, "retrieval.threshold"),
        ({"retrieval.threshold": 1.1}, "retrieval.threshold"),
        ({"retrieval.questions": 0}, "retrieval.questions"),
        ({"retrieval.votes": 0}, "retrieval.votes"),
        ({"retrieval.reader": "else"}, "retrieval.reader"),
        ({"aggregation.scheme": "ckks"}, "aggregation.scheme"),
    ],
)
def test_a_study_whose_records_cannot_vote_is_refused_with_its_key(changes, where):
    with pytest.raises(ConfigError) as refused:
        load_study(CONFIGS / "answers.yaml", changes)
    assert refused.value.where == where
    assert refused.value.hint


def test_the_keys_of_answers_left_the_digests_of_older_studies_alone():
    asking = load_study(CONFIGS / "retrieval.yaml")
    assert not {"threshold", "reader", "votes", "epsilon"} & asking.tree["retrieval"].keys()
    voting = load_study(CONFIGS / "answers.yaml")
    assert digest(study_from_tree(voting.tree)) == digest(voting)
    for change in ("threshold=0.8", "votes=3", "epsilon=2", "reader=model"):
        assert digest(load_study(CONFIGS / "answers.yaml", [f"retrieval.{change}"])) != digest(
            voting
        )
