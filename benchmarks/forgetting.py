"""How much three studies in sequence forget, with and without each protection against it.

    python -m benchmarks.forgetting OUT --seeds 3

Plays ``configs/continual.yaml`` under several seeds: three studies, each about other diseases, each
from what the one before released. Rows: naive continuation; the new adapter apart from the earlier
ones (``continue.orthogonal``); the earlier models as further teachers (``distillation.retain``);
both; and one study of all records at once, with as many rounds as all three together. The first
study is the same in the first four rows, so it runs once. Secure sums, DP-SGD and distillation are
all real. Studies that are finished in OUT do not run again.

It prints, with intervals over the seeds (Student's, level 95 %): the accuracy on every task after
every study; a task's accuracy when its own study ends (*learnt*); its accuracy at the end; and
*forgotten*, the mean difference of the two over all tasks except the last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks._machine import machine
from securefedcollm.experiment.intervals import Interval, interval, resampled_means
from securefedcollm.federation.continuing import continued, with_chain
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import Study, study_from_tree
from securefedcollm.study.life import load_life

Array = npt.NDArray[np.float64]
Scores = list[dict[str, dict[str, float]]]
"""After each study (the first: before any): model → group → accuracy."""

NAIVE: Final = "naive continuation"
AT_ONCE: Final = "all at once"
PROTECTIONS: Final = {
    NAIVE: (False, False),
    "+ orthogonal": (True, False),
    "+ retention": (False, True),
    "+ both": (True, True),
}
"""Row → (orthogonal, retention)."""


def run(study: Study, out: Path, workers: int) -> dict[str, Any]:
    """The results of a study in ``out``, run now unless it is finished."""
    if (out / "results.json").exists():
        found: dict[str, Any] = json.loads((out / "results.json").read_bytes())
        return found
    print(f"{out}", file=sys.stderr, flush=True)
    begun = (out / "server").exists()
    plan = SimulationPlan(out=out, workers=workers, baselines=(), resume=begun)
    return Simulation(study, plan).run(silent, lambda text: None)


def sequence(seed: int, out: Path, row: str, retain: float, asked: argparse.Namespace) -> Scores:
    """Accuracies along the three studies of a row."""
    trees = load_life(Path(asked.config), [*asked.set, f"seed={seed}"])
    orthogonal, retains = PROTECTIONS[row]
    before = out / f"{seed}" / "first"
    results = [run(study_from_tree(trees[0]), before, asked.workers)]
    for tree in trees[1:]:
        _, chain = continued(before, str(before.resolve()))
        keys = with_chain(tree, chain, orthogonal)
        keys["distillation"] = keys["distillation"] | {"retain": retain if retains else 0.0}
        before = out / f"{seed}" / row.replace(" ", "-").strip("+-") / str(tree["study"])
        results.append(run(study_from_tree(keys), before, asked.workers))
    return [_of(results[0], "zero-shot"), *(_of(result, "FedCoLLM") for result in results)]


def at_once(seed: int, out: Path, asked: argparse.Namespace) -> Scores:
    """One study of all tasks: as many records, rounds and steps as the three together."""
    trees = load_life(Path(asked.config), [*asked.set, f"seed={seed}"])
    first, many = trees[0], len(trees)
    data = {key: value for key, value in first["task"]["data"].items() if key != "part"}
    data["per_silo"] = many * (data.get("per_silo") or 3000)
    keys = first | {
        "study": "at-once",
        "rounds": many * first["rounds"],
        "task": first["task"] | {"data": data},
    }
    study = study_from_tree(keys)
    run(study, out / f"{seed}" / "at-once", asked.workers)
    return [_by_task(study, study_from_tree(first), out / f"{seed}" / "at-once" / "adapters")]


def _by_task(study: Study, first: Study, adapters: Path) -> dict[str, dict[str, float]]:
    """A study's accuracies on the test questions of the sequence, which are grouped by task."""
    from securefedcollm.federation.cotuning import ServerTuning
    from securefedcollm.federation.dealing import deal

    server = ServerTuning(study, public=deal(study, None).public, test=deal(first, None).test)
    server.load(adapters)
    found: dict[str, dict[str, float]] = {}
    for key, value in server.evaluate().items():
        model, _, group = key.partition("/")
        found.setdefault(model, {})[group] = value
    return found


def _of(result: dict[str, Any], method: str) -> dict[str, dict[str, float]]:
    rows = [row for row in result["table"] if row["method"] == method]
    return {row["model"]: row["accuracy"] for row in rows}


def figures(scores: Scores, model: str) -> tuple[Array, dict[str, float]]:
    """Accuracy matrix [studies, tasks] of one run, and the figures that follow from it."""
    tasks = sorted(group for group in scores[-1][model] if group != "general")
    matrix = np.array([[after[model][task] for task in tasks] for after in scores])
    end = {"at the end": float(matrix[-1].mean()), "general": scores[-1][model]["general"]}
    if len(scores) == 1:
        return matrix, end
    learnt = np.diagonal(matrix[1:])  # row 0 is before any study
    lost = learnt[:-1] - matrix[-1][:-1]
    return matrix, end | {"learnt": float(learnt.mean()), "forgotten": float(lost.mean())}


def over_seeds(values: Iterable[float]) -> Interval:
    """Mean and interval of one value per seed."""
    scores = np.array(list(values))[:, None]
    return interval(scores, resampled_means(scores[None])[0])


def show(found: dict[str, list[Scores]], model: str) -> str:
    """Two Markdown tables of one model, in per cent."""
    read = {row: [figures(scores, model) for scores in runs] for row, runs in found.items()}
    names = ("learnt", "at the end", "forgotten", "general")
    lines = [
        f"| {model.upper()} | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for row, runs in read.items():
        cells = []
        for name in names:
            values = [figure[name] for _, figure in runs if name in figure]
            cells.append(_cell(over_seeds(values)) if values else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append("")
    tasks = next(iter(read.values()))[0][0].shape[1]
    lines += [
        f"| {model.upper()}, mean of the seeds |"
        + "".join(f" task {k + 1} |" for k in range(tasks)),
        f"| --- |{' --- |' * tasks}",
    ]
    for row, runs in read.items():
        mean = np.mean([matrix for matrix, _ in runs], axis=0)
        times = ["at the end"] if len(mean) == 1 else _times(len(mean))
        for when, values in zip(times, mean, strict=True):
            cells = "".join(f" {100 * value:.1f} |" for value in values)
            lines.append(f"| {row}, {when} |{cells}")
    return "\n".join(lines)


def _times(rows: int) -> list[str]:
    return ["before", *(f"after study {t}" for t in range(1, rows))]


def _cell(value: Interval) -> str:
    return f"{100 * value.mean:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/continual.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retain", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    seeds = [2026 + number for number in range(asked.seeds)]
    found = {
        row: [sequence(seed, asked.out, row, asked.retain, asked) for seed in seeds]
        for row in PROTECTIONS
    }
    found[AT_ONCE] = [at_once(seed, asked.out, asked) for seed in seeds]
    if asked.json:
        about = {"machine": machine("torch", "peft"), "seeds": seeds, "retain": asked.retain}
        print(json.dumps(about | {"scores": found}, indent=2))
        return
    for model in ("slm", "llm"):
        print(show(found, model), end="\n\n")


if __name__ == "__main__":
    main()
