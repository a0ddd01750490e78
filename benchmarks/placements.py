"""The cost in accuracy of where the noise is added: joint, local and silo-level privacy.

``python -m benchmarks.placements --json`` tunes the built-in SLM on the embedded world, without the
server's distillation, once for every placement, ε, consortium size and seed. Clipping, sampling,
noise shares, quantisation and calibration are the real ones; the masks are left out, because they
cancel bit for bit (tests). All silos together have ``--records`` records, whatever their number.
Settings were chosen on a world of another seed (7). It skips cells that ``--cells FILE`` holds
already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks._machine import machine
from securefedcollm.federation import cotuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.plan import joint_step, quantiser, silo_unit
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study, load_study

CONFIG = Path("configs/quickstart-joint.yaml")
ROUNDS, STEPS = 3, 20
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided Student t, by number of seeds
LOCAL_BATCH = {4: 256, 10: 128}


def study_of(
    placement: str, epsilon: float, silos: int, seed: int, records: int, overrides: list[str]
) -> Study:
    """One cell's study."""
    per_silo = records // silos
    changes = [
        f"seed={seed}",
        f"rounds={ROUNDS}",
        f"silos.count={silos}",
        f"task.data.per_silo={per_silo}",
        f"privacy.epsilon={epsilon}",
    ]
    if placement == "joint":
        changes += [f"local.sampling_rate={512 / records}", "local.batch_size=512"]
        changes.append("local.learning_rate=2e-2")
    else:
        changes += ["local.sampling_rate=null", f"local.batch_size={LOCAL_BATCH[silos]}"]
    changes.append(f"local.steps={STEPS}")
    changes += {
        "joint": [],
        "local": ["privacy.noise=local", "aggregation.clip_norm=8"],
        "silo": ["privacy.unit=silo", "privacy.clip_norm=8", "aggregation.clip_norm=8"],
        "none": ["privacy=null", "aggregation.clip_norm=8"],
    }[placement]
    return load_study(CONFIG, changes + overrides)


def run(study: Study) -> dict[str, float]:
    """Accuracies of the SLM after all rounds, by question group."""
    dealt = deal(study, None)
    silos = [cotuning.SiloTuning(study, name, records) for name, records in dealt.silos.items()]
    server = cotuning.ServerTuning(study, public=(), test=dealt.test, distillation=False)
    size = server.update_size(0)
    step = joint_step(study, size)
    unit = silo_unit(study, server.update_size, 0)
    for sum_ in range(study.sums):
        adapter = server.adapter()
        if step:
            rate = step.sampling_rate
            shares = (step.protect(s.gradients(adapter, 0, rate), NoiseSource()) for s in silos)
            server.descend(step.decode(sum(shares)), 0)
            continue
        updates = [silo.fit(adapter, sum_, silent) for silo in silos]
        if unit:
            total = sum(unit.protect(update, NoiseSource()) for update in updates)
            mean = unit.decode(total, len(silos)).mean
        else:
            quantise = quantiser(study, size)
            total = sum(quantise.encode(update).integers for update in updates)
            mean = quantise.decode(total, len(silos))
        server.absorb(mean, sum_)
    return server.evaluate()


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean private accuracy in %, with a 95 % interval over the seeds."""
    rows = []
    keys = sorted({(c["silos"], c["placement"], c["epsilon"] or 0.0) for c in cells})
    for silos, placement, epsilon in keys:
        found = [
            100 * c["private"]
            for c in cells
            if (c["silos"], c["placement"], c["epsilon"] or 0.0) == (silos, placement, epsilon)
        ]
        spread = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        rows.append(
            {
                "silos": silos,
                "placement": placement,
                "epsilon": epsilon or None,
                "private": round(statistics.mean(found), 1),
                "half_width": round(T_95.get(len(found), 2.6) * spread, 1),
                "seeds": len(found),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--silos", type=int, nargs="+", default=[4, 10], choices=sorted(LOCAL_BATCH)
    )
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 3.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--placements", nargs="+", default=["joint", "local", "silo", "none"], metavar="NAME"
    )
    parser.add_argument("--records", type=int, default=12_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=Path("runs/placements.jsonl"))
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="to choose",
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cotuning.set_threads(given.threads)
    given.cells.parent.mkdir(parents=True, exist_ok=True)
    cells = []
    if given.cells.exists():
        cells = [json.loads(line) for line in given.cells.read_text().splitlines()]
    done = {(c["placement"], c["epsilon"], c["silos"], c["seed"]) for c in cells}
    grid = product(given.seeds, given.silos, given.placements, given.epsilon)
    for seed, silos, placement, wanted in grid:
        epsilon = None if placement == "none" else wanted
        if (placement, epsilon, silos, seed) in done:
            continue
        done.add((placement, epsilon, silos, seed))
        started = time.monotonic()
        study = study_of(placement, epsilon or 1.0, silos, seed, given.records, given.overrides)
        found = run(study)
        cell = {"placement": placement, "epsilon": epsilon, "silos": silos, "seed": seed}
        cell |= {key.removeprefix("slm/"): value for key, value in found.items()}
        cell["seconds"] = round(time.monotonic() - started, 1)
        cells.append(cell)
        with given.cells.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        if not given.json:
            print(cell, flush=True)
    rows = table(cells)
    if given.json:
        print(json.dumps({"benchmark": "placements", "rows": rows, "machine": machine()}))
        return
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
