"""Memory of silo and server where the vector is long: all weights of a model.

``python -m benchmarks.vectors --values 10000000 --json`` runs a masked round with its delivery, but
without training: a server's process and one for every silo, on this machine. Memory is each
process's peak resident memory beyond what it had before the round, in units of the vector itself
(float32). It includes all that the round needs: the global vector, the update, frames, stores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._idle import Idle, server_record
from benchmarks._machine import machine
from benchmarks.engine import local_silo, study_tree
from securefedcollm.aggregation import Roster
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.hooks import NO_HOOKS
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import SigningKey
from securefedcollm.study import study_from_tree


class Memory:
    """Peak resident memory of a process, from now on."""

    def __init__(self, process: int | str = "self") -> None:
        self._process = process
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._read("VmRSS")

    def peak(self) -> int:
        """The peak in bytes, beyond those at the start."""
        return self._read("VmHWM") - self._before

    def _read(self, field: str) -> int:
        lines = Path(f"/proc/{self._process}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(values: int, silos: int, directory: Path) -> dict[str, Any]:
    """One round among ``silos``, and its cost."""
    names = tuple(f"silo-{i + 1}" for i in range(silos))
    study = study_from_tree(study_tree() | {"rounds": 1, "silos": {"count": silos}})
    keys = {name: SigningKey.generate().seed() for name in names}
    roster = Roster({name: SigningKey(seed).public for name, seed in keys.items()})
    factory = partial(
        local_silo, study=study, roster=roster, keys=keys, values=values, directory=directory
    )
    with EmbeddedEngine(names, factory, workers=silos, progress=silent) as engine:
        own = Memory()
        others = [Memory(p.pid) for p in multiprocessing.active_children() if p.pid]
        store = RunStore(directory / "run", study.digest, resume=False)
        coordinator = Coordinator(
            study=study,
            roster=roster,
            engine=engine,
            workload=Idle(values),
            store=store,
            evidence=server_record(study, roster, directory / "run"),
            hooks=NO_HOOKS,
        )
        started = time.monotonic()
        coordinator.run()
        coordinator.end()
        seconds = time.monotonic() - started
        server, silo = own.peak(), max(other.peak() for other in others)
    record = store.state.history[-1]
    return {
        "values": values,
        "silos": silos,
        "vector_mb": 4 * values / 1e6,
        "upload_mb": record["bytes_up"][names[0]] / 1e6,
        "download_mb": record["bytes_down"][names[0]] / 1e6,
        "seconds": round(seconds, 2),
        "silo_peak_mb": round(silo / 1e6, 1),
        "silo_peak_vectors": round(silo / (4 * values), 2),
        "server_peak_mb": round(server / 1e6, 1),
        "server_peak_vectors": round(server / (4 * values), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--silos", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    arguments = parser.parse_args()
    rows = []
    for values in arguments.values:
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(values, arguments.silos, Path(place)))
    report = {"benchmark": "vectors", "sizes": rows, "machine": machine("msgspec", "numpy")}
    json.dump(report, sys.stdout, indent=None if arguments.json else 2)
    print()


if __name__ == "__main__":
    main()
