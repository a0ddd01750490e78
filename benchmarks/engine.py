"""The extra cost of a round over FLARE, compared with one machine.

``python -m benchmarks.engine --json`` runs the same rounds (server, three silos, masked sums; the
training is trivial) twice: with the embedded engine's worker processes, and with the real roles'
processes over mutual TLS on loopback. ``--values`` chooses the adapter sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks._idle import Idle, idle_session, server_record
from benchmarks._machine import machine
from securefedcollm.aggregation import Roster
from securefedcollm.federation import roles
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import Engine
from securefedcollm.federation.engines.door import Door
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits
from securefedcollm.federation.engines.flare.kit import (
    approve_request,
    create_consortium,
    install_kits,
    installed,
    request_certificate,
)
from securefedcollm.federation.engines.flare.presence import Waits
from securefedcollm.federation.engines.flare.processes import DOOR, FlareProcess
from securefedcollm.federation.engines.link import answer_calls
from securefedcollm.federation.engines.requests import sign_request
from securefedcollm.federation.hooks import Hooks
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.primitives import SigningKey
from securefedcollm.study import Study, load_study, study_from_tree
from securefedcollm.study.identity import create_identity, open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path

SILOS = ("silo-1", "silo-2", "silo-3")
ROUNDS = 4
PASSPHRASE = "for this benchmark"


def study_tree() -> dict[str, Any]:
    model = {"source": "builtin:hospital-slm"}
    return {
        "study": "engine-benchmark",
        "rounds": ROUNDS,
        "task": {"data": {"builtin": "hospitals"}},
        "models": {"llm": model, "slm": model},
        "silos": {"count": len(SILOS)},
        "local": {"steps": 1, "batch_size": 1, "learning_rate": 1.0},
        "aggregation": {"clip_norm": 1000.0},
    }


def run(
    study: Study, roster: Roster, engine: Engine, values: int, directory: Path
) -> dict[str, Any]:
    """Run all rounds over ``engine``; returns the median cost of a round, without the first."""
    store = RunStore(directory, study.digest, resume=False)
    started = time.monotonic()
    wire: list[int] = []
    coordinator = Coordinator(
        study=study,
        roster=roster,
        engine=engine,
        workload=Idle(values),
        store=store,
        evidence=server_record(study, roster, directory),
        hooks=Hooks(on_round=lambda record: wire.append(loopback_bytes())),
    )
    coordinator.run()
    coordinator.end()
    seconds = [record["seconds"]["silos_and_sum"] for record in store.state.history]
    last = store.state.history[-1]
    return {
        "round_s": statistics.median(seconds[1:]),
        "first_round_s": seconds[0],
        "all_s": round(time.monotonic() - started, 3),
        "bytes_up_per_silo": last["bytes_up"][SILOS[0]],
        "bytes_down_per_silo": last["bytes_down"][SILOS[0]],
        "loopback_bytes": round(statistics.median(np.diff(wire))),
    }


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself so far, TCP and TLS included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()
    return int(fields[8])


def local_silo(
    name: str,
    progress: Progress,
    *,
    study: Study,
    roster: Roster,
    keys: dict[str, bytes],
    values: int,
    directory: Path,
) -> SiloSession:
    home = directory / name
    seat = Seat(study, name, roster, SigningKey(keys[name]))
    return idle_session(seat, values, home)


def embedded(values: int, directory: Path) -> dict[str, Any]:
    study = study_from_tree(study_tree())
    keys = {name: SigningKey.generate().seed() for name in SILOS}
    roster = Roster({name: SigningKey(seed).public for name, seed in keys.items()})
    factory = partial(
        local_silo, study=study, roster=roster, keys=keys, values=values, directory=directory
    )
    with EmbeddedEngine(SILOS, factory, workers=len(SILOS), progress=silent) as engine:
        return run(study, roster, engine, values, directory / "run")


def consortium(directory: Path, silos: tuple[str, ...] = SILOS) -> dict[str, Path]:
    """Homes with kits and identities."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    profile = create_consortium(directory / "ca", "benchmark", "localhost", port, PASSPHRASE)
    homes = {}
    for name in (*silos, "server"):
        home = homes[name] = directory / name
        requests = request_certificate(
            home, profile, name, "server" if name == "server" else "silo"
        )
        signed = [
            approve_request(directory / "ca", request, PASSPHRASE, directory / "signed")
            for request in requests
        ]
        install_kits(home, profile, signed, name)
        create_identity(name, home / "identity.json", None)
    return homes


def signed_study(homes: dict[str, Path], path: Path) -> Study:
    identities = {name: read_identity(home / "identity.json") for name, home in homes.items()}
    roster = [
        {"name": name, "role": "server" if name == "server" else "silo", "key": identity.public}
        for name, identity in identities.items()
    ]
    path.write_text(yaml.safe_dump(study_tree() | {"roster": roster}))
    study = load_study(path)
    for name, identity in identities.items():
        sign_study(study, name, open_identity(identity, None), signatures_path(path))
    return study


def over_flare(values: int, homes: dict[str, Path], study_file: Path, out: Path) -> dict[str, Any]:
    study = signed_study(homes, study_file)
    key = open_identity(read_identity(homes["server"] / "identity.json"), None)
    with contextlib.ExitStack() as stack:
        processes = []
        for name in SILOS:
            words = ["silo", str(homes[name]), str(study_file), str(values)]
            silo = stack.enter_context(
                subprocess.Popen([sys.executable, "-m", "benchmarks.engine", *words])
            )
            stack.callback(silo.terminate)
            processes.append(silo.pid)
        engine = stack.enter_context(
            FlareEngine(
                SILOS,
                kits=Kits(
                    installed(homes["server"], "server"),
                    installed(homes["server"], "server", lead=True),
                ),
                waits=Waits(minimum=len(SILOS), patience=120),
                sign=partial(sign_request, key, study.digest),
                progress=silent,
            )
        )
        silos = {p.name: bytes.fromhex(p.key) for p in study.roster if p.role == "silo"}
        found = run(study, Roster(silos), engine, values, out)
        return found | {"silo_peak_mb": max(map(peak_memory, processes))}


def peak_memory(process: int) -> float:
    """Peak resident memory of a process so far, MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1000


def serve_silo(home: Path, study_file: Path, values: int) -> None:
    """One silo's process."""
    study = load_study(study_file)
    with roles.take_part(study, study_file, home, "silo", str) as member:
        kit = installed(home, member.name)
        place = Path(tempfile.mkdtemp(dir=home))
        seat = Seat(study, member.name, member.roster, member.key)
        session = idle_session(seat, values, place)
        inbox = roles.inbox_for(member, session, 1 << 31)
        with (
            Door(answer_calls(inbox)) as door,
            FlareProcess(
                "client", kit.workspace, name=kit.name, org=kit.org, env={DOOR: str(door.path)}
            ) as flare,
        ):
            inbox.serve(lambda: not flare.running or (session.over and not inbox.attended))


def measure(sizes: list[int]) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        homes = consortium(base / "consortium")
        for values in sizes:
            place = base / str(values)
            ours = embedded(values, place / "embedded")
            flare = over_flare(values, homes, base / "study.yaml", place / "flare")
            rows.append(
                {
                    "values": values,
                    "embedded": ours,
                    "flare": flare,
                    "overhead_s": round(flare["round_s"] - ours["round_s"], 3),
                    "overhead_bytes": flare["loopback_bytes"]
                    - len(SILOS) * (flare["bytes_up_per_silo"] + flare["bytes_down_per_silo"]),
                }
            )
    return {
        "benchmark": "engine",
        "silos": len(SILOS),
        "rounds": ROUNDS,
        "sizes": rows,
        "machine": machine("nvflare", "numpy"),
    }


def main() -> None:
    if sys.argv[1:2] == ["silo"]:
        home, study_file, values = sys.argv[2:]
        serve_silo(Path(home), Path(study_file), int(values))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, nargs="+", default=[1_000_000, 25_000_000])
    parser.add_argument("--json", action="store_true", help="(the only format)")
    print(json.dumps(measure(parser.parse_args().values)))


if __name__ == "__main__":
    main()
