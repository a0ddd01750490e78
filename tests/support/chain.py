"""Studies of tiny models that go on from each other, as whole simulations in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from securefedcollm_cli.audit import write_bundle

from securefedcollm.federation.continuing import continued, next_tree
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import Study, load_study

PLAIN = ("privacy=none",)


def simulated(study: Study, inputs: Path, name: str, **options) -> Path:
    """Run ``study`` into ``inputs/NAME``, where the next one finds it; returns that directory."""
    out = inputs / name
    plan = SimulationPlan(out=out, data=inputs, workers=0, baselines=(), **options)
    Simulation(study, plan).run(silent, lambda text: None)
    write_bundle(out, out / "evidence.zip", [])
    return out


def next_study(run: Path, changes: Sequence[str] = (), *, orthogonal: bool = False) -> Study:
    """The study that goes on from ``run``, whose directory lies among the inputs."""
    before, chain = continued(run, run.name)
    return load_study(next_tree(before, chain, orthogonal), list(changes))
