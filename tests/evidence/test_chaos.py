"""Runs in which silos come and go, replies are lost and processes die, at moments drawn at random.

Whatever happens, every participant that is started again goes on, and the evidence that is left
verifies: no auditor is told that honest participants, unlucky as they were, broke the protocol.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import QuorumError
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.ledger import check_anchors
from securefedcollm.federation.engines import Failure
from securefedcollm.privacy.ledger import Ledger
from tests.support.rounds import Killed, expected_theta
from tests.support.runs import (
    CKKS,
    JOINT,
    NAMES,
    SILO_PRIVACY,
    RecordedRun,
    recorded_study,
    silo_log,
)

STUDIES = {
    "record": {},
    "silo": {"privacy": SILO_PRIVACY},
    "joint": JOINT,
    "ckks": {"aggregation": CKKS},
    "authority": {"aggregation": CKKS | {"key_model": "authority"}},
}
LIVES = 12
"""After so many deaths nothing goes wrong any more: a run is to end."""


class Party:
    """A party whose process may die: then a session on its directory, which forgot all else."""

    def __init__(self, start):
        self.start = start
        self.restart()

    def restart(self):
        self.session = self.start()

    def step(self, frame):
        return self.session.step(frame)


class Chaos:
    """An engine that loses requests and replies, and whose processes die, at random.

    Args:
        parties: everybody, by name.
        lose: the probability that a party goes away at an exchange, for one or some more.
        kill: that everything dies before an exchange; and after it; and that one party does.
    """

    def __init__(self, engine, parties, rng, lose, kill):
        self.engine, self.parties, self.rng = engine, parties, rng
        self.lose, self.kill = lose, kill
        self.away = set()

    def exchange(self, frames, timeout):
        self._die()
        self.away = {name for name in frames if self._chance(0.6 if name in self.away else 0.0)}
        self.away |= {name for name in frames if self._chance(self.lose)}
        replies = self.engine.exchange(
            {name: frame for name, frame in frames.items() if name not in self.away}, timeout
        )
        self._die()
        for name in frames:
            if self._chance(self.kill):
                self.parties[name].restart()
        unheard = self.away | {name for name in frames if self._chance(self.lose / 2)}
        return replies | {name: Failure("away") for name in frames if name in unheard}

    def _die(self):
        if self._chance(self.kill):
            raise Killed

    def _chance(self, probability):
        return self.rng.random() < probability


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("study", STUDIES)
def test_whatever_is_lost_and_whoever_dies_the_run_ends_and_its_evidence_holds(
    tmp_path, study, seed
):
    rng = random.Random(f"{study} {seed}")
    kind, study = study, recorded_study(**STUDIES[study])
    for life in range(2 * LIVES):
        lose, kill = (rng.choice([0, 0.05, 0.15]) if life < LIVES else 0 for _ in range(2))
        parties = {}
        try:
            run = RecordedRun(
                tmp_path,
                study,
                resume=life > 0,
                wrap=lambda engine, on=parties, lose=lose, kill=kill: Chaos(
                    engine, on, rng, lose, kill
                ),
                party=lambda name, start, on=parties: on.setdefault(name, Party(start)),
            )
            theta = run.go()
        except (Killed, QuorumError):
            continue
        break
    else:
        pytest.fail("the run did not end although nothing was lost any more")
    if kind in {"record", "ckks"}:  # the others add noise to their sums
        opened = [() if "lost" in r else r["survivors"] for r in run.store.state.history]
        np.testing.assert_array_equal(theta, expected_theta(study, opened))
    (tmp_path / "evidence.zip").write_bytes(make_bundle(tmp_path))
    assert verify(tmp_path / "evidence.zip").failed == []
    for name in NAMES:
        with Ledger(tmp_path / "silos" / name / "ledger.sqlite", name) as ledger:
            check_anchors(silo_log(tmp_path, study, name), ledger)
