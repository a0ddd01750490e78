"""The peer of ``benchmarks.masking_graph``: one client of Flower's SecAgg+, timed.

It runs in ``.venv-bench`` (``make bench``). It calls the functions that Flower's client calls in
its four stages, in their order, and prints one JSON object. Arguments: values, neighbours,
threshold.
Bytes are those of keys, ciphertexts, vector and shares, without any framing.
"""

from __future__ import annotations

import json
import os
import sys
import time

import flwr
import numpy as np
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

CLIPPING, TARGET, MODULUS = 8.0, 1 << 16, 1 << 32


def main() -> None:
    values, neighbours, threshold = map(int, sys.argv[1:])
    peers = [generate_key_pairs() for _ in range(neighbours - 1)]
    publics = [public_key_to_bytes(public) for _, public in peers]
    vector = np.random.default_rng(0).normal(0.0, 0.02, values).astype(np.float32)
    start = time.process_time()
    pairs = [generate_key_pairs() for _ in range(2)]
    own = [private_key_to_bytes(private) for private, _ in pairs]
    mine = [public_key_to_bytes(public) for _, public in pairs]
    seed = os.urandom(32)
    seed_shares = create_shares(seed, threshold, neighbours)
    key_shares = create_shares(own[0], threshold, neighbours)
    keys = []
    boxes = []
    for number, public in enumerate(publics):
        key = generate_shared_key(bytes_to_private_key(own[1]), bytes_to_public_key(public))
        text = share_keys_plaintext_concat(1, 2, seed_shares[number], key_shares[number])
        keys.append(key)
        boxes.append(encrypt(key, text))
    held = [
        share_keys_plaintext_separate(decrypt(key, box))
        for key, box in zip(keys, boxes, strict=True)  # as many, as long, as its neighbours' boxes
    ]
    masked = factor_combine(1, quantize([vector], CLIPPING, TARGET))
    shapes = [array.shape for array in masked]
    masked = parameters_addition(masked, pseudo_rand_gen(seed, MODULUS, shapes))
    for number, public in enumerate(publics):
        key = generate_shared_key(bytes_to_private_key(own[0]), bytes_to_public_key(public))
        mask = pseudo_rand_gen(key, MODULUS, shapes)
        masked = (parameters_addition if number % 2 else parameters_subtraction)(masked, mask)
    upload = [ndarray_to_bytes(array) for array in parameters_mod(masked, MODULUS)]
    spent = time.process_time() - start
    size = sum(map(len, mine)) + 2 * sum(map(len, publics)) + 2 * sum(map(len, boxes))
    size += sum(map(len, upload)) + sum(len(seed_share) for _, _, seed_share, _ in held)
    print(json.dumps({"silo_cpu_s": spent, "bytes_per_silo": size, "flwr": flwr.__version__}))


if __name__ == "__main__":
    main()
