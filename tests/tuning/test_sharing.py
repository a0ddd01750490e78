"""Silos of one process of a simulation tune one model in turn: nothing passes between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import SiloPlan
from securefedcollm.simulation.simulate import silo_tuning
from securefedcollm.study import load_study

NAMES = ("silo-1", "silo-2")
SMALL = ["task.data.per_silo=24", "local.steps=1", "local.batch_size=8", "privacy=null"]


def test_a_shared_model_gives_each_silo_the_update_of_its_own(tmp_path) -> None:
    study = load_study("quickstart", SMALL)
    plan = SiloPlan(study=study, planned=dict.fromkeys(NAMES), threads=1, run=tmp_path)
    first, second = (silo_tuning(name, silent, plan=plan) for name in NAMES)
    assert first._tuned is second._tuned
    adapter = first.adapter()
    shared = [silo.fit(adapter, 0, silent) for silo in (first, second, first)]
    alone = SiloTuning(study, NAMES[0], deal(study, None).silos[NAMES[0]])
    own = alone.fit(adapter, 0, silent)
    assert np.array_equal(shared[0], own)
    assert np.array_equal(shared[2], own)
    assert not np.array_equal(shared[1], own)
    assert replace(plan, noisy=1).shared == {}  # other records than these
