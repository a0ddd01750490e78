"""Workloads without torch: a silo's update is a known function of its name and the round."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from securefedcollm.aggregation import Roster
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.authority import AuthoritySession
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.plan import authority_of
from securefedcollm.federation.records import AuthorityRecord, ServerRecord, SiloRecord
from securefedcollm.federation.silo import CLOCK, Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.study import Study, study_from_tree

SIZE = 101
NAMES = ("silo-1", "silo-2", "silo-3", "silo-4")
KEYS = {name: SigningKey(hashlib.sha256(name.encode()).digest()) for name in NAMES}
ROSTER = Roster({name: key.public for name, key in KEYS.items()})
AUTHORITY_KEY = SigningKey(hashlib.sha256(b"authority").digest())


def parties(study: Study) -> list[str]:
    """Everybody but the server."""
    office = authority_of(study, AUTHORITY_KEY.public)
    return [*NAMES, *([office.name] if office else [])]


def make_study(**changes) -> Study:
    tree = {
        "study": "arithmetic",
        "rounds": 3,
        "task": {"data": {"builtin": "hospitals"}},
        "models": {
            "llm": {"source": "builtin:hospital-llm"},
            "slm": {"source": "builtin:hospital-slm"},
        },
        "silos": {"count": 4},
        "local": {"steps": 1, "batch_size": 8, "learning_rate": 0.1},
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
        "aggregation": {"clip_norm": 20.0},
    }
    return study_from_tree(tree | changes)


def update_of(name: str, round_: int, adapter: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng([int(name[-1]), round_])
    return (rng.normal(size=SIZE) + 0.01 * adapter).astype(np.float32)


class ArithmeticSilo:
    base_digest = b"b" * 32
    also = ()

    def __init__(
        self, name: str, private: bool = True, fails: bool = False, norm: float | None = None
    ) -> None:
        self.name = name
        self.norm = norm
        self.dataset = hashlib.sha256(name.encode()).hexdigest()
        self.trained: list[int] = []
        self.private = private
        self.fails = fails

    def contents(self):
        return [(hashlib.sha256(f"{self.name} {i}".encode()).digest(), f"{i}") for i in range(10)]

    def layout(self, round_):
        return b"l" * 32

    def size(self, round_):
        return SIZE

    def update_size(self, round_):
        return SIZE

    def events(self):
        return (PoissonGaussian(q=0.1, noise_multiplier=1.0, steps=5),) if self.private else ()

    def fit(self, adapter, round_, progress):
        self.trained.append(round_)
        progress(1, 1, "fit")
        update = update_of(self.name, round_, adapter)
        if self.norm is not None:
            update *= np.float32(self.norm / np.linalg.norm(update))
        if self.fails:
            update[3] = np.nan
        return update

    def gradients(self, adapter, round_, q):
        """Ten records, all of whose gradients have norm 5 in the coordinate of the round."""
        self.trained.append(round_)
        gradient = np.zeros(SIZE)
        gradient[round_] = 5.0
        return [gradient] * sum(np.random.default_rng().random(10) < q)

    def save(self, adapter, directory, beside):
        directory.mkdir(exist_ok=True)
        np.save(directory / "theta.npy", adapter)
        for name, content in beside.items():
            (directory / name).write_bytes(content)


class ArithmeticServer:
    base_digest = b"b" * 32

    def __init__(self, losses: Sequence[float] = ()) -> None:
        """``losses``: what the small model's is said to be on public questions, round by round."""
        self.losses = losses
        self.theta = np.zeros(SIZE, dtype=np.float32)
        self.descents = 0
        self.distilled: list[int] = []

    def layout(self, round_):
        return b"l" * 32

    def update_size(self, round_):
        return SIZE

    def adapter(self):
        return self.theta.copy()

    def absorb(self, mean, round_):
        self.theta = self.theta + mean

    def descend(self, gradient, round_):
        self.theta = self.theta - gradient
        self.descents += 1

    def descent(self):
        return {"theta": self.theta, "count": np.float32([self.descents])}

    def restore_descent(self, state):
        self.theta = state["theta"]
        self.descents = int(state["count"][0])

    def distil(self, round_, progress):
        self.distilled.append(round_)
        self.theta = self.theta * np.float32(0.5)
        return {"loss": float(np.abs(self.theta).sum())}

    def measure(self):
        found = {"evaluation": {"slm/all": float(self.theta[0])}}
        if self.losses:
            found["validation"] = {"slm/loss": self.losses[self.distilled[-1]]}
        return found

    def save(self, directory: Path):
        (directory / "slm").mkdir()
        np.save(directory / "slm" / "theta.npy", self.theta)

    def load(self, directory: Path):
        self.theta = np.load(directory / "slm" / "theta.npy")


class Unwritten(EvidenceLog):
    """A log that keeps nothing: for tests of the loops alone."""

    def __init__(self, directory=Path()):
        self.study, self.leaves, self.entries = b"", [], []
        self.path = directory / "none"

    def append(self, what):
        pass

    def heads(self):
        return []


def silo_record(name):
    return SiloRecord(Unwritten(), key=KEYS[name], roster=ROSTER, server=b"")


def server_record(directory):
    return ServerRecord(Unwritten(directory), key=AUTHORITY_KEY, roster=ROSTER, quorum=1)


def authority_record():
    return AuthorityRecord(Unwritten(), key=AUTHORITY_KEY.public, roster=ROSTER, server=b"")


def make_silo(
    name,
    progress,
    *,
    study,
    directory,
    private=True,
    fails=(),
    budget=None,
    norms=None,
    workload=None,
    kind=ArithmeticSilo,
    clock=CLOCK,
    now=time.monotonic,
):
    home = Path(directory) / name
    if name not in NAMES:
        store = SiloStore(home)
        return AuthoritySession(
            study=study,
            roster=ROSTER,
            key=AUTHORITY_KEY,
            store=store,
            evidence=authority_record(),
            now=now,
        )
    return SiloSession(
        Seat(study, name, ROSTER, KEYS[name], AUTHORITY_KEY.public),
        ChargedTraining(
            study,
            name,
            workload or kind(name, private, name in fails, norms and norms[name]),
            SiloStore(home),
            Ledger(home / "ledger.sqlite", name),
            progress=progress,
            budget=None if budget is None else Budget(*budget),
        ),
        silo_record(name),
        clock=clock,
    )
