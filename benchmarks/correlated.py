"""Would noise that is correlated between steps serve better than independent noise?

    python -m benchmarks.correlated --seeds 2026 2027 2028

Central DP-SGD on the built-in world: the records of all silos of ``configs/quickstart-joint.yaml``
in one place, the study's number of steps, batch, clip norm and δ, no distillation. Four methods
spend the same ε:

``adam``: independent noise in every step and Adam, as in the product (``local.optimizer``);
``sgd``: independent noise, SGD with momentum 0.9;
``banded``: SGD with momentum 0.9, and the noise C⁻¹Z for a banded lower-triangular Toeplitz matrix
C of ``--bands`` diagonals (Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", 2023).
Its records are dealt into as many classes as there are bands. Step t draws from class t mod b with
probability bq, so that no record comes twice within b steps: T/b Poisson-sampled Gaussians for the
accountant. C has the least mean squared error on the sums that momentum makes;
``adam-banded``: the same noise and Adam.

Every line has the accuracy of the small model on the private topic and on general questions, and
``error``: the root mean square error of the noise in the iterates of SGD, in units of that of
``sgd`` at the same ε. There is no noise at an infinite ε, which is printed as null. The noise comes
from a seeded generator: the records are made up.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize

from benchmarks._machine import machine
from securefedcollm.federation import cotuning
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.plan import silo_names
from securefedcollm.privacy.accountants import pld_epsilon
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study, load_study
from securefedcollm.tuning.adapters import load_vector
from securefedcollm.tuning.descent import Descent
from securefedcollm.tuning.local import records_of
from securefedcollm.tuning.recipe import evaluation_mode

Matrix = npt.NDArray[np.float64]
MOMENTUM = 0.9


def workload(steps: int, momentum: float) -> Matrix:
    """What T gradients add up to in T iterates of SGD with momentum, float64 [T, T]."""
    lag = np.subtract.outer(np.arange(steps), np.arange(steps))
    return np.tril(np.ones((steps, steps))) @ np.where(
        lag >= 0, momentum ** np.maximum(lag, 0), 0.0
    )


def error(bands: Matrix, wanted: Matrix) -> float:
    """RMS error of ``wanted`` C⁻¹ Z for the Toeplitz C of these ``bands``, scaled to norm 1."""
    steps = len(wanted)
    unit = np.concatenate([bands / np.linalg.norm(bands), np.zeros(steps - len(bands))])
    lag = np.subtract.outer(np.arange(steps), np.arange(steps))
    toeplitz = np.where(lag >= 0, unit[np.maximum(lag, 0)], 0.0)
    return float(np.linalg.norm(np.linalg.solve(toeplitz.T, wanted.T)) / np.sqrt(steps))


def best_bands(count: int, wanted: Matrix) -> Matrix:
    """The ``count`` bands of least :func:`error`, of norm 1: a record's sensitivity stays C."""
    start = 0.5 ** np.arange(1, count)
    if count > 1:
        start = minimize(lambda rest: np.log(error(np.concatenate([[1.0], rest]), wanted)), start).x
    found = np.concatenate([[1.0], start])
    unit: Matrix = found / np.linalg.norm(found)
    return unit


def multiplier(epsilon: float, delta: float, q: float, steps: int, bands: int) -> float:
    """σ/C for T/b Poisson-sampled Gaussians at rate bq, by PLD; 0 if ε is infinite."""
    if math.isinf(epsilon):
        return 0.0

    def over(sigma: float) -> float:
        event = PoissonGaussian(min(1.0, bands * q), sigma, -(-steps // bands))
        return pld_epsilon((event,), delta, 1e-3) - epsilon

    return float(brentq(over, 0.3, 30.0, xtol=1e-3))


class World:
    """The records of all silos in one place, and the small model."""

    def __init__(self, study: Study) -> None:
        privacy, local = study.privacy, study.local
        if privacy is None or privacy.clip_norm is None or local.sampling_rate is None:
            raise SystemExit("the study is not one of joint DP-SGD")
        dealt = deal(study, None)
        records = [record for name in silo_names(study) for record in dealt.silos[name]]
        records = records[: int(local.batch_size / local.sampling_rate)]
        self.silo = SiloTuning(study, silo_names(study)[0], records)
        self.tuned, self.test = self.silo._tuned, dealt.test
        self.layout, self.start = self.tuned.update_layout(0), self.silo.adapter().copy()
        self.n, self.steps = len(records), study.sums
        self.q, self.clip, self.delta = local.sampling_rate, privacy.clip_norm, privacy.delta
        self.batch, self.seed = local.batch_size, study.seed

    def clipped_sum(self, point: npt.NDArray[np.float32], taken: npt.NDArray[np.int64]) -> Matrix:
        """Sum of the clipped gradients of the records ``taken`` at ``point``, float64 [d]."""
        model, total = self.tuned.model, np.zeros(len(point))
        load_vector(model, self.layout, point)
        records = records_of(model, self.layout, self.silo._data, self.silo._loss)
        with evaluation_mode(model):
            for blocks in records.of_units(taken):
                flat = np.concatenate([np.asarray(b).reshape(len(b), -1) for b in blocks], axis=1)
                norms = np.linalg.norm(flat, axis=1)
                total += np.minimum(1.0, self.clip / np.maximum(norms, 1e-12)) @ flat
        return total

    def run(self, method: str, sigma: float, rate: float, bands: Matrix) -> dict[str, float]:
        """Scores of the small model after all steps."""
        draw = np.random.default_rng([self.seed, len(bands), round(1e3 * sigma)])
        classes = draw.permutation(self.n) % len(bands)
        point, speed, past = self.start.copy(), np.zeros(len(self.start)), list[Matrix]()
        adam = Descent("adam", rate)
        for step in range(self.steps):
            mine = np.flatnonzero(classes == step % len(bands))
            taken = mine[draw.random(len(mine)) < min(1.0, len(bands) * self.q)]
            noise = sigma * self.clip * draw.standard_normal(len(point))
            for lag in range(1, min(len(bands), step + 1)):  # C⁻¹, row by row
                noise -= bands[lag] * past[-lag]
            past.append(noise / bands[0])
            gradient = (self.clipped_sum(point, taken) + past[-1]) / self.batch
            if method.startswith("adam"):
                point = adam.step(point, gradient.astype(np.float32))
            else:
                speed = MOMENTUM * speed + gradient
                point = (point - rate * speed).astype(np.float32)
        load_vector(self.tuned.model, self.layout, point)
        return self.silo.evaluate(self.test)


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a seed, ε, method and rate."""
    rates = {"adam": given.adam, "sgd": given.sgd, "banded": given.sgd, "adam-banded": given.adam}
    for seed in given.seeds:
        world = World(load_study("quickstart-joint", {"seed": seed}))
        wanted = workload(world.steps, MOMENTUM)
        alone = np.ones(1)
        for epsilon in given.epsilon:
            plain = multiplier(epsilon, world.delta, world.q, world.steps, 1)
            for method in given.methods:
                bands = best_bands(given.bands, wanted) if "banded" in method else alone
                sigma = multiplier(epsilon, world.delta, world.q, world.steps, len(bands))
                ratio = sigma * error(bands, wanted) / ((plain or 1.0) * error(alone, wanted))
                for rate in rates[method]:
                    started = time.monotonic()
                    scores = world.run(method, sigma, rate, bands)
                    spent = None if math.isinf(epsilon) else epsilon
                    about = {"seed": seed, "epsilon": spent, "method": method, "rate": rate}
                    noise = {"bands": len(bands), "multiplier": sigma, "error": ratio}
                    seconds = time.monotonic() - started
                    yield about | noise | scores | {"s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[2026, 2027, 2028])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--bands", type=int, default=6)
    methods = ["adam", "sgd", "banded", "adam-banded"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--adam", type=float, nargs="*", default=[2e-2], help="rates for Adam")
    parser.add_argument("--sgd", type=float, nargs="*", default=[1.0], help="rates for SGD")
    given = parser.parse_args()
    cotuning.set_threads(1)
    print(json.dumps({"benchmark": "correlated", "machine": machine("torch", "numpy", "scipy")}))
    for row in rows(given):
        found = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
