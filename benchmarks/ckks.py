"""CKKS aggregation against NVFlare's parameters in one run: ``python -m benchmarks.ckks --json``.

Ours: a whole round in this process, all silos and the coordinator, with every signature, digest and
check; a silo's CPU is the mean over silos, the coordinator's is divided by their number.
``authority_…``: the same round under the keys of one authority, which is a separate party.
NVFlare: ``CKKSVector`` with N = 8192, primes of [60, 40, 40] bits, scale 2^40 and a symmetric key
that every client holds; a client encrypts, serialises, loads the sum and decrypts it, and nothing
is signed or checked. One thread of CPU each, microseconds per value; the best of ``--repeats``.

``rms`` is the error of the decrypted sum before it is rounded to integers, in units of the
integers that are summed (``bound`` of them are the clip range); for NVFlare, in the values' units.
``--parallel`` times the encryption of one vector in one and in two processes instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from benchmarks._machine import machine
from benchmarks.masking import _Journal
from securefedcollm.aggregation import (
    AUTHORITY_SUITES,
    CKKS_SUITES,
    Authority,
    AuthoritySide,
    RingParameters,
    Roster,
    RoundHeader,
    SiloSide,
    Step,
    authority_side,
    coordinator_side,
    silo_side,
)
from securefedcollm.aggregation.ckks import messages as ckks_messages
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.authority import messages as ckks_authority_messages
from securefedcollm.aggregation.ckks.parameters import CkksRing, CkksSet, derive
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm.aggregation.ckks.secrets import CkksSecrets
from securefedcollm.aggregation.masking.packing import Field
from securefedcollm.aggregation.messages import decode
from securefedcollm.aggregation.steps import SchemeName
from securefedcollm.primitives import SigningKey

VALUE_BITS = 16
_OFFICE = "authority"
SIGMA = 0.02  # of NVFlare's values; ours are integers over the whole range


class _Round:
    """One round of ``silos`` vectors, and its cost; ``keyed``: under an authority's key."""

    def __init__(self, values: int, silos: int, kind: CkksSet, keyed: bool = False) -> None:
        names = [f"silo-{i:03d}" for i in range(1, silos + 1)]
        keys = {name: SigningKey.generate() for name in names}
        roster = Roster({name: key.public for name, key in keys.items()})
        field = Field.fit(VALUE_BITS, silos, fill=False)
        threshold = (silos + 1) // 2 + 1
        header = RoundHeader(
            study_digest=bytes(32),
            run_id=bytes(16),
            round=0,
            attempt=0,
            model_digest=bytes(32),
            parameters=RingParameters(
                values=values,
                bound=field.bound,
                field_bits=field.bits,
                silos=silos,
                min_silos=threshold,
                threshold=threshold,
                colluders=1,
            ),
            roster_root=roster.root,
            suite=(AUTHORITY_SUITES if keyed else CKKS_SUITES)[kind],
        )
        rng = np.random.default_rng(0)
        self.ring = ckks_messages.ring_of(header)
        self.expected = np.zeros(values, dtype=np.int64)
        self.silo_cpu = self.server_cpu = self.authority_cpu = 0.0
        self.sent: dict[Step, int] = {}
        self.received: dict[Step, int] = {}
        office = SigningKey.generate()
        authority = Authority(_OFFICE, office.public) if keyed else None
        self._decrypted = np.zeros((ckks_messages.shape_of(header).chunks, 4096), dtype=np.uint64)
        scheme: SchemeName = "ckks-authority" if keyed else "ckks"
        sides: dict[str, SiloSide | AuthoritySide] = {}
        for name in names:
            vector = rng.integers(-field.bound, field.bound + 1, values)
            self.expected += vector
            with self._silo():
                sides[name] = silo_side(
                    scheme,
                    header=header,
                    roster=roster,
                    name=name,
                    signing_key=keys[name],
                    vector=vector,
                    vector_id=bytes(32),
                    journal=_Journal(),
                    authority=authority,
                )
        if keyed:
            with self._authority():
                sides[_OFFICE] = authority_side(
                    header=header, roster=roster, signing_key=office, journal=_Journal()
                )
        with self._server():
            self.coordinator = coordinator_side(
                scheme, header=header, roster=roster, authority=authority
            )
        self._play(sides)

    def _play(self, sides: dict[str, SiloSide | AuthoritySide]) -> None:
        more = True
        while more:
            step = self.coordinator.step
            with self._server():
                requests = self.coordinator.requests()
            while requests:
                name, request = requests.popitem()
                with self._authority() if name == _OFFICE else self._silo():
                    reply = sides[name].handle(request)
                self.sent[step], self.received[step] = len(reply), len(request)
                self._add(step, reply)
                with self._server():
                    self.coordinator.receive(name, reply)
            with self._server():
                more = self.coordinator.advance()

    def _add(self, step: Step, reply: bytes) -> None:
        """Add what the coordinator adds, to see the decrypted sum before it is rounded."""
        keyed = self.ring.holders == 1
        if step is Step.UPLOAD:
            delivery = ckks_authority_messages.CipherDelivery
            kind = delivery if keyed else ckks_messages.CipherUpload
            first = decode(kind, reply, "", len(reply)).first
            polynomials.accumulate(self._decrypted, first, self.ring)
        if step is Step.UNMASK:
            answer = ckks_authority_messages.Opened if keyed else ckks_messages.Partial
            share = decode(answer, reply, "", len(reply)).share
            polynomials.accumulate(self._decrypted, share, self.ring)

    def rms(self) -> float:
        """Root mean square error before rounding, in integers."""
        with Seal(self.ring) as seal:
            found = polynomials.centred(seal.coefficients(self._decrypted), self.ring)
        exact = self.expected << self.ring.scale_bits
        error = (found.reshape(-1)[: len(exact)] - exact) / 2.0**self.ring.scale_bits
        return float(np.sqrt(np.mean(error**2)))

    @contextmanager
    def _silo(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.silo_cpu += time.process_time() - start

    @contextmanager
    def _authority(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.authority_cpu += time.process_time() - start

    @contextmanager
    def _server(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.server_cpu += time.process_time() - start


def ours(values: int, silos: int, kind: CkksSet) -> dict[str, float]:
    """Run a round and return its figures."""
    played = _Round(values, silos, kind)
    error = played.coordinator.result.sum - played.expected
    if played.ring.exact and error.any():
        raise SystemExit("the sum is wrong")
    return {
        "client_us_per_value": 1e6 * played.silo_cpu / silos / values,
        "server_us_per_value_per_silo": 1e6 * played.server_cpu / silos / values,
        "bytes_up_per_value": (played.sent[Step.UPLOAD] + played.sent[Step.SHARE]) / values,
        "bytes_share_per_value": played.sent[Step.UNMASK] / values,
        "bytes_down_per_value": sum(played.received.values()) / values,
        "rms": played.rms(),
        "rms_predicted": played.ring.rms,
        "rms_rounded": float(np.sqrt(np.mean(error.astype(float) ** 2))),
    }


def keyed(values: int, silos: int, kind: CkksSet) -> dict[str, float]:
    """The same under an authority's key."""
    played = _Round(values, silos, kind, keyed=True)
    error = played.coordinator.result.sum - played.expected
    if played.ring.exact and error.any():
        raise SystemExit("the sum is wrong")
    of_silos = (Step.ENCRYPT, Step.UPLOAD, Step.NOTE)
    of_office = (Step.ADVERTISE, Step.UNMASK)
    return {
        "authority_client_us_per_value": 1e6 * played.silo_cpu / silos / values,
        "authority_server_us_per_value_per_silo": 1e6 * played.server_cpu / silos / values,
        "authority_us_per_value_per_silo": 1e6 * played.authority_cpu / silos / values,
        "authority_bytes_up_per_value": sum(played.sent[s] for s in of_silos) / values,
        "authority_bytes_down_per_value": sum(played.received[s] for s in of_silos) / values,
        "authority_receives_bytes_per_value": sum(played.received[s] for s in of_office) / values,
        "authority_sends_bytes_per_value": sum(played.sent[s] for s in of_office) / values,
        "authority_rms": played.rms(),
        "authority_rms_predicted": played.ring.rms,
    }


def nvflare(values: int, silos: int) -> dict[str, float]:
    """The same sum with NVFlare's parameters."""
    with _quiet():
        import tenseal

        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        )
        context.global_scale = 2.0**40
        rng = np.random.default_rng(0)
        vectors = rng.normal(scale=SIGMA, size=(silos, values))
        client = server = 0.0
        total = None
        for vector in vectors:
            start = time.process_time()
            sent = tenseal.ckks_vector(context, vector).serialize()
            client += time.process_time() - start
            start = time.process_time()
            loaded = tenseal.ckks_vector_from(context, sent)
            total = loaded if total is None else total.add_(loaded)
            server += time.process_time() - start
        summed = total.serialize()
        start = time.process_time()
        found = tenseal.ckks_vector_from(context, summed).decrypt()
        client = client / silos + time.process_time() - start
    error = np.asarray(found) - vectors.sum(axis=0)
    return {
        "nvflare_client_us_per_value": 1e6 * client / values,
        "nvflare_server_us_per_value_per_silo": 1e6 * server / silos / values,
        "nvflare_bytes_up_per_value": len(sent) / values,
        "nvflare_rms": float(np.sqrt(np.mean(error**2))),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The library prints warnings on file descriptor 1, which is for our result."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def compare(values: int, silos: int, kind: CkksSet, repeats: int) -> dict[str, object]:
    """Best of ``repeats`` runs of each, alternating; ratios ours / NVFlare's."""
    runs = [
        ours(values, silos, kind) | keyed(values, silos, kind) | nvflare(values, silos)
        for _ in range(repeats)
    ]
    best = {key: min(run[key] for run in runs) for key in runs[0] if "_us_" in key}
    found = runs[0] | best
    upload = found["nvflare_bytes_up_per_value"]
    both = found["bytes_up_per_value"] + found["bytes_share_per_value"]
    ring = derive(kind, silos=silos, bound=Field.fit(VALUE_BITS, silos, fill=False).bound)
    return {
        "values": values,
        "silos": silos,
        "set": kind,
        **found,
        "bytes_ratio": found["bytes_up_per_value"] / upload,
        "bytes_ratio_with_share": both / upload,
        "cpu_ratio": found["client_us_per_value"] / found["nvflare_client_us_per_value"],
        "rms_ratio": found["rms"] / found["rms_predicted"],
        "authority_bytes_ratio": found["authority_bytes_up_per_value"] / upload,
        "authority_cpu_ratio": found["authority_client_us_per_value"]
        / found["nvflare_client_us_per_value"],
        "authority_rms_ratio": found["authority_rms"] / found["authority_rms_predicted"],
        "scale_bits": ring.scale_bits,
        "flood_bits": ring.flood_bits,
        "bound": ring.bound,
    }


def _encrypt(ring: CkksRing, vector: np.ndarray) -> int:
    common, shape = polynomials.hash_to_ring(b"benchmark", ring), ring.shape(len(vector), 1)
    secrets = CkksSecrets(ring, shape, vector, common, os.urandom)
    joint = np.broadcast_to(common, (shape.committees, shape.keys, common.shape[1]))
    return len(secrets.encrypt(joint).first)


def parallel(values: int) -> dict[str, object]:
    """Wall seconds to encrypt one vector here, and in two processes, their start included."""
    ring = derive("precise", silos=10, bound=2**15 - 1)
    vector = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, values)
    start = time.perf_counter()
    _encrypt(ring, vector)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_encrypt, [(ring, half) for half in np.array_split(vector, 2)])
    both = time.perf_counter() - start
    return {"values": values, "encrypt_wall_s": alone, "encrypt_2_processes_wall_s": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--silos", type=int, default=10)
    parser.add_argument("--set", choices=("precise", "compact"), default="precise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parallel", action="store_true", help="one process against two")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    arguments = parser.parse_args()
    figures = (
        parallel(arguments.values)
        if arguments.parallel
        else compare(arguments.values, arguments.silos, arguments.set, arguments.repeats)
    )
    report = figures | {"machine": machine("tenseal", "numpy")}
    json.dump(report, sys.stdout, indent=None if arguments.json else 2)
    print()


if __name__ == "__main__":
    main()
