"""What a round of very many simulated silos takes, with everything but the training.

``python -m benchmarks.cohort --silos 1000 --values 11000 --json`` simulates one round: real keys,
shares, masks and noise on a random graph, a ledger, a journal and an evidence log of every silo.
Then it makes the bundle of all logs, and verifies it. A twentieth of the silos may collude and a
tenth may be lost. ``--workers`` is the number of processes for the silos, ``--rounds`` that of
rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from securefedcollm_audits.verification.verify import verify

from benchmarks._idle import Idle
from benchmarks._machine import machine
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.files import copy_tree, make_directory, write_durably
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.simulation.cohort import Cohort
from securefedcollm.study import Study, digest, dump_study, study_from_tree

CLIP = 1.0


def study_of(silos: int, *, rounds: int = 1, colluders: int | None = None, **silo: Any) -> Study:
    """A study that protects whole silos, on a random graph.

    Args:
        colluders: None: a twentieth of the silos.
        silo: more keys of ``silos``.
    """
    model = {"source": "builtin:hospital-slm"}
    count = max(1, silos // 20) if colluders is None else colluders
    return study_from_tree(
        {
            "study": "cohort-benchmark",
            "rounds": rounds,
            "task": {"data": {"builtin": "hospitals"}},
            "models": {"slm": model},
            "silos": {"count": silos, "colluders": count, **silo},
            "local": {"steps": 1, "batch_size": 1, "learning_rate": 1.0},
            "privacy": {
                "unit": "silo",
                "noise": "distributed",
                "epsilon": 8.0,
                "delta": 1e-5,
                "clip_norm": CLIP,
                "adaptive": {},
            },
            "aggregation": {"clip_norm": CLIP, "graph": {}},
        }
    )


def run(
    directory: Path,
    study: Study,
    *,
    values: int = 11,
    workers: int = 0,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    **options: Any,
) -> Path:
    """Run the study, or go on with it; returns the bundle of its evidence.

    Args:
        options: more for :class:`.Cohort`.
    """
    resume = (directory / "server" / "state.json").exists()
    store = RunStore(make_directory(directory), digest(study), resume=resume)
    write_durably(directory / "study.yaml", dump_study(study).encode())
    Cohort(study, silo_names(study), directory, workers=workers, **options).run(
        store, Idle(values), partial(_silo, values=values), silent, on_round
    )
    copy_tree(store.adapters, directory / "adapters")
    path = directory / "evidence.zip"
    path.write_bytes(make_bundle(directory))
    return path


def _silo(name: str, progress: Progress, *, values: int) -> Idle:
    return Idle(values)


def measure(directory: Path, study: Study, values: int, workers: int) -> dict[str, Any]:
    """The run's cost, and that of verifying its evidence."""
    records: list[dict[str, Any]] = []
    clock = _Clock()
    bundle = run(directory, study, values=values, workers=workers, on_round=records.append)
    took = clock.taken("run")
    verdict = verify(bundle)
    took |= clock.taken("verify")
    sent = [record[way] for record in records for way in ("bytes_up", "bytes_down")]
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "silos": study.silos.count,
        "values": values,
        "rounds": study.rounds,
        "workers": workers,
        "neighbours": study.graph.neighbours if study.graph else None,
        **took,
        "round_s": [round(sum(record["seconds"].values()), 1) for record in records],
        "bytes_per_silo": sum(sum(ways.values()) for ways in sent) / study.silos.count,
        "bundle_mb": bundle.stat().st_size / 1e6,
        "disk_mb": sum(path.stat().st_size for path in files) / 1e6,
        "checks_passed": verdict.passed,
        "checks_failed": [result.name for result in verdict.failed],
        "machine": machine("cryptography", "numpy"),
    }


class _Clock:
    """Wall and CPU seconds since the last look, of this process and its children, and memory."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), _cpu()

    def taken(self, name: str) -> dict[str, float]:
        wall, cpu = time.monotonic(), _cpu()
        found = {f"{name}_wall_s": wall - self._wall, f"{name}_cpu_s": cpu - self._cpu}
        self._wall, self._cpu = wall, cpu
        own, children = (resource.getrusage(who).ru_maxrss / 1024 for who in _WHO)
        return found | {f"{name}_peak_mb": own, f"{name}_worker_peak_mb": children}


_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _cpu() -> float:
    used = [resource.getrusage(who) for who in _WHO]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--silos", type=int, default=1000)
    parser.add_argument("--values", type=int, default=11_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the run in this directory")
    parser.add_argument("--json", action="store_true", help="one line for docs/scale.md")
    options = parser.parse_args()
    study = study_of(options.silos, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as directory:
        place = options.out or Path(directory) / "run"
        found = measure(place, study, options.values, options.workers)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
