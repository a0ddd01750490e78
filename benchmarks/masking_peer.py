"""The peer of ``benchmarks.masking``: Flower's SecAgg+ steps, timed.

It runs in ``.venv-bench`` (``make bench``), never in the project's environment: its pins are its
own. It calls the functions that Flower's SecAgg+ client and server call, in their order, and prints
one JSON object. Arguments: values, peers, repeats.
"""

from __future__ import annotations

import json
import sys
import time

import flwr
import numpy as np
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

CLIPPING, TARGET, MODULUS = 8.0, 1 << 16, 1 << 32  # 16-bit values in Flower's default ring


def client(vector: np.ndarray, own: bytes, publics: list[bytes]) -> int:
    """Stage 2 of a client: quantise, mask, reduce, serialise; bytes to upload."""
    quantised = factor_combine(1, quantize([vector], CLIPPING, TARGET))
    shapes = [array.shape for array in quantised]
    quantised = parameters_addition(quantised, pseudo_rand_gen(bytes(32), MODULUS, shapes))
    for number, public in enumerate(publics):
        key = generate_shared_key(bytes_to_private_key(own), bytes_to_public_key(public))
        mask = pseudo_rand_gen(key, MODULUS, shapes)
        apply = parameters_addition if number % 2 else parameters_subtraction
        quantised = apply(quantised, mask)
    quantised = parameters_mod(quantised, MODULUS)
    return sum(len(ndarray_to_bytes(array)) for array in quantised)


def dropout(total: list[np.ndarray], own: bytes, publics: list[bytes]) -> None:
    """The server's share of unmasking one dropout with these neighbours."""
    shapes = [array.shape for array in total]
    for number, public in enumerate(publics):
        key = generate_shared_key(bytes_to_private_key(own), bytes_to_public_key(public))
        mask = pseudo_rand_gen(key, MODULUS, shapes)
        apply = parameters_addition if number % 2 else parameters_subtraction
        total = apply(total, mask)
    parameters_mod(total, MODULUS)


def main() -> None:
    values, peers, repeats = map(int, sys.argv[1:])
    pairs = [generate_key_pairs() for _ in range(peers + 1)]
    own = private_key_to_bytes(pairs[0][0])
    publics = [public_key_to_bytes(public) for _, public in pairs[1:]]
    vector = np.random.default_rng(0).normal(0.0, 0.02, values).astype(np.float32)
    total = [np.array([1]), np.zeros(values, dtype=np.int64)]
    times: dict[str, list[float]] = {}
    uploaded = 0
    for _ in range(repeats):
        for name in ("client", "dropout"):
            cpu, wall = time.process_time(), time.perf_counter()
            if name == "client":
                uploaded = client(vector, own, publics)
            else:
                dropout(total, own, publics)
            times.setdefault(f"{name}_cpu_s", []).append(time.process_time() - cpu)
            times.setdefault(f"{name}_wall_s", []).append(time.perf_counter() - wall)
    best = {name: min(series) for name, series in times.items()}
    print(json.dumps(best | {"bytes_per_value": uploaded / values, "flwr": flwr.__version__}))


if __name__ == "__main__":
    main()
