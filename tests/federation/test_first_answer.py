"""The test of independence is over before a silo can be asked for anything."""

from __future__ import annotations

import pytest

from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study
from securefedcollm.tuning import independence
from tests.support.inputs import make_inputs

JOINT = ["privacy.noise=distributed", "local.sampling_rate=0.06", "aggregation.value_bits=20"]


# Each with a model that no other test has: what is known of one is not tested again.
@pytest.mark.parametrize(
    "changes",
    [
        ["adapter.rank=3"],
        ["adapter.rank=3", "adapter.method=rolora"],
        ["adapter.rank=5", *JOINT],
    ],
    ids=["local", "rolora", "joint"],
)
def test_no_answer_takes_longer_because_of_a_shape_that_occurs(tmp_path, monkeypatch, changes):
    """Adversary: the server, which times a silo's first answer."""
    make_inputs(tmp_path)
    study = load_study(tmp_path / "tiny.yaml", changes)
    questions = deal(study, tmp_path).silos
    tested = []

    def counted(*given):
        tested.append(given[1])
        return made_up(*given)

    made_up = independence.made_up
    monkeypatch.setattr(independence, "made_up", counted)
    silo = SiloTuning(study, "silo-1", questions["silo-1"], data=tmp_path)
    assert tested
    tested.clear()
    start = silo.adapter()
    for round_ in range(2):
        if study.joint:
            list(zip(range(2), silo.gradients(start, round_, 0.06), strict=False))
        else:
            silo.fit(start, round_, silent)
    assert tested == []
