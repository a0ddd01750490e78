"""A workload that costs nothing, with real evidence, to benchmark everything around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from securefedcollm.aggregation import Roster
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.records import SERVER, ServerRecord, SiloRecord
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import Gradient, Progress, Vector
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study

SERVER_KEY = SigningKey(bytes(32))
"""Signs every benchmark's evidence."""


class Idle:
    """A silo without records and a server without models: only the overhead is left."""

    base_digest = b"b" * 32
    dataset = "00" * 32
    also = ()

    def __init__(self, values: int) -> None:
        self.values = values
        self.theta = np.zeros(values, dtype=np.float32)

    def contents(self) -> Iterator[tuple[bytes, str | None]]:
        return iter([(bytes(32), None)])

    def layout(self, round_: int) -> bytes:
        return bytes(32)

    def size(self, round_: int) -> int:
        return self.values

    update_size = size

    def events(self) -> tuple[()]:
        return ()

    def gradients(self, adapter: Vector, round_: int, q: float) -> Iterator[Gradient]:
        return iter(())

    def fit(self, adapter: Vector, round_: int, progress: Progress) -> Vector:
        return np.full(self.values, 1e-3, dtype=np.float32)  # zeros would take no memory

    def adapter(self) -> Vector:
        return self.theta.copy()

    def absorb(self, mean: Vector, round_: int) -> None:
        self.theta = self.theta + mean

    def descend(self, gradient: Vector, round_: int) -> None:
        self.theta = self.theta - gradient

    def descent(self) -> dict[str, Vector]:
        return {"adapter": self.theta}

    def restore_descent(self, state: Mapping[str, Vector]) -> None:
        self.theta = state["adapter"]

    def distil(self, round_: int, progress: Progress) -> dict[str, float]:
        return {}

    def measure(self) -> dict[str, dict[str, float]]:
        return {"evaluation": {}}

    def save(self, directory: Path) -> None:
        np.save(directory / "theta.npy", self.theta)

    def load(self, directory: Path) -> None:
        self.theta = np.load(directory / "theta.npy")


def idle_session(seat: Seat, values: int, home: Path) -> SiloSession:
    """A silo with nothing to train; everything else is real."""
    store, ledger = SiloStore(home), Ledger(home / "ledger.sqlite", seat.name)
    log = EvidenceLog(home / FILE_NAME, study=seat.study.digest, owner=seat.name, key=seat.key)
    return SiloSession(
        seat,
        ChargedTraining(seat.study, seat.name, Idle(values), store, ledger),
        SiloRecord(log, key=seat.key, roster=seat.roster, server=SERVER_KEY.public),
    )


def server_record(study: Study, roster: Roster, home: Path) -> ServerRecord:
    log = EvidenceLog(home / FILE_NAME, study=study.digest, owner=SERVER, key=SERVER_KEY)
    return ServerRecord(log, key=SERVER_KEY, roster=roster, quorum=study.threshold)
