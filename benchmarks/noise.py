"""Speed of the exact discrete Gaussian sampler, compared with OpenDP's.

    python -m benchmarks.noise --json

The peer runs in a virtual environment of its own (``--peer .venv-bench/bin/python``, which has
``opendp==0.16.0``); without one its figure is null. Both draw on one thread. Figures are medians of
several runs, in process CPU time, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._machine import machine
from securefedcollm.primitives import Keystream
from securefedcollm.privacy import discrete_gaussian
from securefedcollm.privacy.quantise import Quantiser

PEER = """
import json, statistics, sys, time
import opendp.prelude as dp
from importlib.metadata import version
sigma, count, runs = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dp.enable_features("contrib")
space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
measure = dp.m.make_gaussian(*space, scale=sigma)
zeros, rates = [0] * count, []
for _ in range(runs):
    start = time.process_time()
    measure(zeros)
    rates.append(count / (time.process_time() - start))
print(json.dumps({"rate": statistics.median(rates), "version": version("opendp")}))
"""


def ours(sigma: float, count: int, runs: int) -> float:
    """Samples per CPU second, after the table is built."""
    discrete_gaussian.build(sigma)
    stream, rates = Keystream(bytes(32)), []
    for _ in range(runs):
        start = time.process_time()
        discrete_gaussian.sample(stream, sigma, count)
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def table_seconds(sigma: float) -> float:
    discrete_gaussian.build.cache_clear()
    start = time.process_time()
    discrete_gaussian.build(sigma)
    return time.process_time() - start


def quantise_ms(values: int, runs: int) -> float:
    """Clip, scale, round and check ``values`` floats, CPU milliseconds."""
    import numpy as np

    vector = np.random.default_rng(0).standard_normal(values, dtype=np.float32)
    quantiser, times = Quantiser(values, 1.0, 2**20), []
    for _ in range(runs):
        start = time.process_time()
        quantiser.encode(vector)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def peer(python: Path, sigma: float, count: int) -> dict[str, Any] | None:
    if not python.exists():
        return None
    words = [str(python), "-c", PEER, str(sigma), str(count), "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sigma", type=float, default=2.0**15)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--peer", type=Path, default=Path(".venv-bench/bin/python"))
    asked = parser.parse_args()
    described = machine("numpy", "cryptography")
    rival = peer(asked.peer, asked.sigma, 50_000)
    result = {
        "benchmark": "noise",
        "sigma": asked.sigma,
        "samples_per_s": round(ours(asked.sigma, asked.samples, asked.runs)),
        "opendp_samples_per_s": None if rival is None else round(rival["rate"]),
        "opendp_version": None if rival is None else rival["version"],
        "by_sigma": {
            f"{sigma:g}": round(ours(sigma, asked.samples, 3))
            for sigma in (4.0, 40.0, 1000.0, 2.0**20, 2.0**46)
        },
        "table_s": round(table_seconds(asked.sigma), 3),
        "quantise_10m_ms": round(quantise_ms(10_000_000, asked.runs), 1),
        "threads": 1,
        "machine": described,
    }
    if asked.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
