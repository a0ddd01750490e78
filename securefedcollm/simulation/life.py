"""A life on one machine: studies in sequence, each from what the one before released.

The silos keep their ledgers from study to study, so a record's budget counts over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from securefedcollm.federation.consent import refuse_skipping
from securefedcollm.federation.continuing import continued, with_chain
from securefedcollm.federation.workload import Progress
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.simulation.simulate import Say, Simulation
from securefedcollm.study import Study, load_study, study_from_tree

LEDGERS = "ledgers"

Finished = Callable[[Study, Path, dict[str, Any]], None]
"""``finished(study, run, results)``: one study of the life is over."""


def play(
    trees: Sequence[dict[str, Any]],
    plan: SimulationPlan,
    progress: Progress,
    say: Say,
    finished: Finished = lambda study, run, results: None,
) -> list[dict[str, Any]]:
    """Run the studies one after another into ``plan.out``; returns the results of each.

    A study that is finished there is not run again, and one that was killed goes on, if the plan
    says ``resume``. If it says ``overwrite``, the studies' older runs and their ledgers go when the
    first study has started, and not before.

    Args:
        trees: as :func:`securefedcollm.study.life.load_life` gives them.

    Raises:
        SecureFedCoLLMError: with the life in a state that ``resume`` continues.
    """
    if plan.records == "skip":
        refuse_skipping(any(tree.get("validation") for tree in trees))
    results: list[dict[str, Any]] = []
    before: Path | None = None
    ledgers = plan.ledgers or plan.out / LEDGERS
    runs = [plan.out / str(tree["study"]) for tree in trees]
    # Newest first: killed in between, what is left is a shorter life, with all that it has spent.
    replaced = [*reversed(runs), *([] if plan.ledgers else [ledgers])] if plan.overwrite else []
    for tree, run in zip(trees, runs, strict=True):
        begun = (run / "study.yaml").is_file() and plan.resume
        if begun:
            study = load_study(run / "study.yaml")  # it has its chain already
        elif before is None:
            study = study_from_tree(tree)
        else:
            study = _next(tree, before)
        say(f"study {study.study}")
        own = replace(plan, out=run, resume=begun, baselines=(), ledgers=ledgers, replaced=replaced)
        results.append(Simulation(study, own).run(progress, say))
        replaced = []
        finished(study, run, results[-1])
        before = run
    return results


def _next(tree: dict[str, Any], before: Path) -> Study:
    """The study ``tree``, from what the run in ``before`` released.

    The run's name is enough, since the next one lies beside it. The study is signed and shown to
    others, so it has no path of this machine.
    """
    _, chain = continued(before, before.name)
    orthogonal = bool((tree.get("continue") or {}).get("orthogonal", False))
    return study_from_tree(with_chain(tree, chain, orthogonal))
