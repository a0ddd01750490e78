"""Masking against Flower's SecAgg+ in one run: ``python -m benchmarks.masking --json``.

Client: quantise, mask, sign and serialise one vector (Flower: quantise, mask, serialise), both with
their key agreements. Dropout: the server's work to take one dropout's pairwise masks off the sum.
CPU figures are single-threaded, wall figures with ``--threads`` threads; the best of ``--repeats``
runs, alternating with the peer's process. Memory is what our calls allocate beyond their arguments
(tracemalloc), in units of 10^6 bytes.

``--round`` times a whole round in one process instead: all silos, the coordinator and dropouts.
``--graph`` does so on a random graph (:mod:`benchmarks.masking_graph`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks import masking_graph
from benchmarks._machine import machine
from securefedcollm.aggregation import RingParameters, Roster, RoundHeader, Step
from securefedcollm.aggregation.masking import keys, masks
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.packing import Field
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.primitives import AgreementKey, Keystream, SigningKey
from securefedcollm.privacy.quantise import Quantiser

ROOT = Path(__file__).resolve().parent.parent
PEER = (".venv-bench/bin/python", "benchmarks/masking_peer.py")
VALUE_BITS = 16
CLIP_NORM = 100.0  # Σv² of the benchmark's vectors stays below: Flower clips per value, not by norm

T = TypeVar("T")


class _Journal:
    """Keeps its records in memory: the benchmark measures computing, not a disk."""

    def __init__(self) -> None:
        self._entries: dict[bytes, bytes] = {}

    def record(self, key: bytes, value: bytes) -> bytes:
        return self._entries.setdefault(key, value)


class _Stopwatch:
    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.peak = 0
        self.quantise_cpu = 0.0

    def run(self, work: Callable[[], T]) -> T:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        return result


class _Setting:
    """Silos, identities and a header for vectors of ``values`` 16-bit values."""

    def __init__(self, values: int, silos: int) -> None:
        names = [f"silo-{i:03d}" for i in range(1, silos + 1)]
        self.keys = {name: SigningKey.generate() for name in names}
        self.roster = Roster({name: key.public for name, key in self.keys.items()})
        packed = Field.fit(VALUE_BITS, silos)
        threshold = (silos + 1) // 2 + 1
        self.parameters = RingParameters(
            values=values,
            bound=packed.bound,
            field_bits=packed.bits,
            silos=silos,
            min_silos=threshold,
            threshold=threshold,
            colluders=1,
        )
        self.header = RoundHeader(
            study_digest=bytes(32),
            run_id=bytes(16),
            round=0,
            attempt=0,
            model_digest=bytes(32),
            parameters=self.parameters,
            roster_root=self.roster.root,
        )

    def silo(self, name: str, vector: np.ndarray, threads: int = 1) -> SiloRound:
        return SiloRound(
            header=self.header,
            roster=self.roster,
            name=name,
            signing_key=self.keys[name],
            vector=vector,
            vector_id=bytes(32),
            journal=_Journal(),
            threads=threads,
        )

    def coordinator(self, threads: int = 1) -> CoordinatorRound:
        return CoordinatorRound(header=self.header, roster=self.roster, threads=threads)


def client(vector: np.ndarray, peers: int, threads: int, memory: bool = False) -> _Stopwatch:
    """Quantise, pack, mask, sign and serialise ``vector`` among ``peers`` others."""
    setting = _Setting(len(vector), peers + 1)
    quantiser = Quantiser(len(vector), CLIP_NORM, setting.parameters.bound)
    coordinator = setting.coordinator()
    zeros = np.zeros(len(vector), dtype=np.int64)
    name, *others = setting.roster
    watch = _Stopwatch()
    integers = watch.run(lambda: quantiser.encode(vector).integers)
    watch.quantise_cpu = watch.cpu
    if memory:
        tracemalloc.start()
    own = watch.run(lambda: setting.silo(name, integers, threads))
    peak = tracemalloc.get_traced_memory()[1] if memory else 0
    silos = {name: own} | {other: setting.silo(other, zeros) for other in others}
    for _ in range(2):
        for silo, frame in coordinator.requests().items():
            coordinator.receive(silo, silos[silo].handle(frame))
        coordinator.advance()
    delivery = coordinator.requests()[name]
    del silos, coordinator
    if memory:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
    watch.run(lambda: own.handle(delivery))
    if memory:
        packed = 8 * setting.parameters.words  # allocated by the silo before this call
        peak = max(peak, packed + tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
    watch.peak = peak
    return watch


def dropout(values: int, peers: int, threads: int) -> _Stopwatch:
    """Take the pairwise masks of one dropout with ``peers`` survivors off a packed sum."""
    setting = _Setting(values, peers + 1)
    total = np.zeros(setting.parameters.words, dtype="<u8")
    own = AgreementKey(os.urandom(32))
    publics = [AgreementKey(os.urandom(32)).public for _ in range(peers)]

    def work() -> None:
        derived = [
            keys.pair_mask_key(own, public, bytes(32), bytes(32), 1, index)
            for index, public in enumerate(publics, start=2)
        ]
        masks.apply(total, add=derived[::2], subtract=derived[1::2], threads=threads)

    watch = _Stopwatch()
    watch.run(work)
    return watch


def keystream_fraction(values: int, peers: int) -> float:
    """Mask expansion (generate and add) against generating the same keystream and discarding it."""
    words = _Setting(values, peers + 1).parameters.words
    target, drawn = np.zeros(words, dtype="<u8"), [os.urandom(32) for _ in range(peers + 1)]
    scratch = np.empty(masks.CHUNK_WORDS, dtype="<u8")

    def raw() -> None:
        for key in drawn:
            stream = Keystream(key)
            for start in range(0, words, len(scratch)):
                stream.into(scratch[: words - start].data)

    bare, full = [], []
    for _ in range(5):
        watch = _Stopwatch()
        watch.run(raw)
        bare.append(watch.cpu)
        watch = _Stopwatch()
        watch.run(lambda: masks.apply(target, add=drawn))
        full.append(watch.cpu)
    return min(bare) / min(full)


def server_peak(values: int, silos: int) -> int:
    """The coordinator's peak memory in a round of ``silos``, without the current frame."""
    setting = _Setting(values, silos)
    vector = np.zeros(values, dtype=np.int64)
    sides = {name: setting.silo(name, vector) for name in setting.roster}
    held = peak = 0
    tracemalloc.start()

    def measured(work: Callable[[], T]) -> T:
        nonlocal held, peak
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = work()
        now, highest = tracemalloc.get_traced_memory()
        peak = max(peak, held + highest - before)
        held += now - before
        return result

    coordinator = measured(setting.coordinator)
    more = True
    while more:
        for name, frame in coordinator.requests().items():
            reply = sides[name].handle(frame)
            measured(lambda name=name, reply=reply: coordinator.receive(name, reply))
            del reply
        more = measured(coordinator.advance)
    tracemalloc.stop()
    return peak


def whole_round(values: int, silos: int, dropouts: int) -> dict[str, object]:
    """One round in this process, ``dropouts`` silos lost at upload; CPU seconds, one thread."""
    setting = _Setting(values, silos)
    rng = np.random.default_rng(0)
    bound = setting.parameters.bound
    expected = np.zeros(values, dtype=np.int64)
    start = time.process_time()
    setup = 0.0
    sides: dict[str, SiloRound] = {}
    for number, name in enumerate(setting.roster):
        began = time.process_time()
        vector = rng.integers(-bound, bound + 1, values)
        expected += vector if number >= dropouts else 0
        setup += time.process_time() - began
        sides[name] = setting.silo(name, vector)
    coordinator = setting.coordinator()
    lost = setting.roster.names[:dropouts]
    more = True
    while more:
        for name, frame in coordinator.requests().items():
            if coordinator.step is Step.UPLOAD and name in lost:
                coordinator.lost(name, "dropped")
            else:
                coordinator.receive(name, sides[name].handle(frame))
        more = coordinator.advance()
    cpu = time.process_time() - start - setup
    if not np.array_equal(coordinator.result.sum, expected):
        raise SystemExit("the sum is wrong")
    return {
        "silos": silos,
        "values": values,
        "dropouts": dropouts,
        "round_cpu_s": cpu,
        "key_work_s_per_silo": _key_work(silos),
    }


def _key_work(silos: int) -> float:
    """CPU of one silo's keys, shares and signatures in all five steps: a round of one value."""
    setting = _Setting(1, silos)
    sides = {name: setting.silo(name, np.zeros(1, dtype=np.int64)) for name in setting.roster}
    coordinator = setting.coordinator()
    watch = _Stopwatch()
    more = True
    while more:
        for name, frame in coordinator.requests().items():
            reply = watch.run(lambda name=name, frame=frame: sides[name].handle(frame))
            coordinator.receive(name, reply)
        more = coordinator.advance()
    return watch.cpu / silos


def peer(values: int, peers: int) -> dict[str, float]:
    """The peer's figures, from its own environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / PEER[0]), str(ROOT / PEER[1]), str(values), str(peers), "1"]
    if not Path(command[0]).exists():
        raise SystemExit("the peer's environment is missing: run `make bench` once")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(values: int, peers: int, threads: int, repeats: int) -> dict[str, object]:
    """All figures of the comparison, ours and the peer's in turn."""
    vector = np.random.default_rng(0).normal(0.0, 0.02, values).astype(np.float32)
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    quantise: list[float] = []
    for _ in range(repeats):
        for name, run in (
            ("client", lambda threads: client(vector, peers, threads)),
            ("dropout", lambda threads: dropout(values, peers, threads)),
        ):
            single = run(1)
            ours.setdefault(f"{name}_cpu_s", []).append(single.cpu)
            if name == "client":
                quantise.append(single.quantise_cpu)
            ours.setdefault(f"{name}_wall_s", []).append(run(threads).wall)
        for name, figure in peer(values, peers).items():
            theirs.setdefault(name, []).append(figure)
    best = {name: min(series) for name, series in ours.items()}
    best_peer = {f"peer_{name}": min(series) for name, series in theirs.items() if name != "flwr"}
    parameters = _Setting(values, peers + 1).parameters
    return {
        "values": values,
        "peers": peers,
        "threads": threads,
        **best,
        "client_quantise_cpu_s": min(quantise),
        **best_peer,
        **{f"{name[:-2]}_ratio": best[name] / best_peer[f"peer_{name}"] for name in best},
        "bytes_per_value": (144 + 8 * parameters.words) / values,
        "keystream_fraction": keystream_fraction(values, peers),
        "client_peak_mb": client(vector, peers, 1, memory=True).peak / 1e6,
        "server_peak_mb": server_peak(values, peers + 1) / 1e6,
        "server_peak_mb_4_silos": server_peak(values, 4) / 1e6,
        "peer": f"flwr {theirs['flwr'][0]}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--peers", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--round", action="store_true", help="a whole round in one process")
    parser.add_argument("--graph", action="store_true", help="a round on a random graph")
    parser.add_argument("--one", action="store_true", help="with --graph: one silo of the round")
    parser.add_argument("--lost-at", default="every", help="with --graph: step, or every")
    parser.add_argument("--silos", type=int, default=100, help="with --round or --graph")
    parser.add_argument("--dropouts", type=int, default=10, help="with --round")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    arguments = parser.parse_args()
    if arguments.graph:
        at, one = arguments.lost_at, arguments.one
        figures = masking_graph.report(arguments.silos, arguments.values, lost_at=at, one=one)
    else:
        figures = _on_complete_graph(arguments)
    report = figures | {"machine": machine("cryptography", "numpy")}
    json.dump(report, sys.stdout, indent=None if arguments.json else 2)
    print()


def _on_complete_graph(arguments: argparse.Namespace) -> dict[str, object]:
    return (
        whole_round(arguments.values, arguments.silos, arguments.dropouts)
        if arguments.round
        else compare(arguments.values, arguments.peers, arguments.threads, arguments.repeats)
    )


if __name__ == "__main__":
    main()
