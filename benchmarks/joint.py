"""The cost of a step of joint DP-SGD for a silo, in addition to its gradients.

``python -m benchmarks.joint --json`` plays the steps of ``configs/quickstart-joint.yaml`` with real
silo sessions (protocol, noise, journal and ledger, all durable) whose batches are empty. It also
times the gradients of one real silo. One process, one thread; CPU time unless it says wall.
``--study`` takes another study, ``--data`` its files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._idle import Idle, idle_session, server_record
from benchmarks._machine import machine
from securefedcollm.aggregation import Roster
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.federation import cotuning
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.plan import joint_step, silo_names
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study, digest, load_study


class Clock:
    """CPU and wall seconds inside wrapped calls."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*words: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return call(*words)
            finally:
                self.cpu += time.process_time() - cpu
                self.wall += time.perf_counter() - wall

        return timed


def overhead(study: Study, values: int) -> dict[str, float]:
    """Milliseconds for one silo and step, without the calibration of the noise."""
    joint_step(study, values)
    names = silo_names(study)
    keys = {name: SigningKey.generate() for name in names}
    roster = Roster({name: key.public for name, key in keys.items()})
    session, protocol = Clock(), Clock()
    plain = SiloRound.handle
    with tempfile.TemporaryDirectory() as directory:

        def silo(name: str, progress: Progress) -> SiloSession:
            home = Path(directory) / name
            made = idle_session(Seat(study, name, roster, keys[name]), values, home)
            made.step = session.around(made.step)  # type: ignore[method-assign]
            return made

        SiloRound.handle = protocol.around(plain)  # type: ignore[method-assign]
        try:
            with EmbeddedEngine(names, silo, workers=0, progress=silent) as engine:
                Coordinator(
                    study=study,
                    roster=roster,
                    engine=engine,
                    workload=Idle(values),
                    store=RunStore(Path(directory), digest(study), resume=False),
                    evidence=server_record(study, roster, Path(directory)),
                ).run()
        finally:
            SiloRound.handle = plain  # type: ignore[method-assign]
    steps = study.sums * len(names) / 1e3
    return {
        "silo_ms": session.cpu / steps,
        "silo_wall_ms": session.wall / steps,
        "protocol_ms": protocol.cpu / steps,
    }


def gradient_ms(study: Study, data: Path | None, repeats: int) -> tuple[float, int]:
    """Median time of one silo's clipped and noised gradient sum, and the length of it."""
    name, *_ = silo_names(study)
    silo = cotuning.SiloTuning(study, name, deal(study, data).silos[name], data=data)
    values = silo.update_size(0)
    step = joint_step(study, values)
    if step is None:
        raise SystemExit("the study is not one of joint DP-SGD")
    found = []
    for _ in range(repeats):
        started = time.process_time()
        step.protect(silo.gradients(silo.adapter(), 0, step.sampling_rate), NoiseSource())
        found.append(1e3 * (time.process_time() - started))
    return statistics.median(found), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("configs/quickstart-joint.yaml"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cotuning.set_threads(1)
    study = load_study(given.study, [])
    gradients, values = gradient_ms(study, given.data, given.repeats)
    found = {"gradient_ms": gradients} | overhead(study, values)
    found["protocol_ratio"] = found["protocol_ms"] / gradients
    found["overhead_ratio"] = found["silo_ms"] / gradients
    rounded = {key: round(value, 3) for key, value in found.items()}
    about = {"benchmark": "joint", "study": study.study, "silos": study.silos.count}
    print(json.dumps(about | {"values": values} | rounded | {"machine": machine("torch", "numpy")}))


if __name__ == "__main__":
    main()
