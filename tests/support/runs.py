"""Runs with evidence at every participant, with arithmetic in place of training: no torch."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path

from securefedcollm.evidence.ledger import LoggedLedger
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.federation.authority import AuthoritySession
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.hooks import Hooks
from securefedcollm.federation.keeping import BEST, best_round
from securefedcollm.federation.plan import AUTHORITY, authority_of, silo_unit, stated
from securefedcollm.federation.records import SERVER, AuthorityRecord, ServerRecord, SiloRecord
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study, digest, dump_study
from tests.support.arithmetic import (
    AUTHORITY_KEY,
    KEYS,
    NAMES,
    ROSTER,
    SIZE,
    ArithmeticServer,
    ArithmeticSilo,
    make_study,
    parties,
)

SERVER_KEY = SigningKey(hashlib.sha256(SERVER.encode()).digest())
ALL_KEYS = {SERVER: SERVER_KEY, AUTHORITY: AUTHORITY_KEY, **KEYS}
LOCAL = {"steps": 5, "batch_size": 8, "learning_rate": 0.1}
SILO_PRIVACY = {
    "epsilon": 8.0,
    "delta": 1e-5,
    "unit": "silo",
    "noise": "distributed",
    "clip_norm": 20.0,
}
CKKS = {"clip_norm": 20.0, "scheme": "ckks"}
JOINT = {
    "rounds": 2,
    "local": {"steps": 2, "batch_size": 20, "learning_rate": 0.1, "sampling_rate": 0.5},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "noise": "distributed"},
    "aggregation": {"value_bits": 20},
}


class RecordedSilo(ArithmeticSilo):
    """Its charge follows from the study, as that of a real silo does."""

    def __init__(self, name: str, study: Study, fails: bool = False) -> None:
        record = study.privacy is not None and study.privacy.unit == "record"
        super().__init__(name, private=record, fails=fails)
        self.steps = study.local.steps

    def events(self):
        event = PoissonGaussian(q=0.1, noise_multiplier=1.0, steps=self.steps)
        return (event,) if self.private else ()


def recorded_study(**changes) -> Study:
    return make_study(**({"local": LOCAL} | changes))


def office_of(study):
    """The authority's public key; empty where nobody holds the key."""
    return AUTHORITY_KEY.public if study.scheme == "ckks-authority" else b""


def make_authority(study, home):
    log = EvidenceLog(home / FILE_NAME, study=digest(study), owner=AUTHORITY, key=AUTHORITY_KEY)
    evidence = AuthorityRecord(
        log, key=AUTHORITY_KEY.public, roster=ROSTER, server=SERVER_KEY.public
    )
    return AuthoritySession(
        study=study, roster=ROSTER, key=AUTHORITY_KEY, store=SiloStore(home), evidence=evidence
    )


def make_silo(name, progress, *, study, directory, fails=(), workload=RecordedSilo):
    if name not in NAMES:
        (Path(directory) / AUTHORITY).mkdir(exist_ok=True)
        return make_authority(study, Path(directory) / AUTHORITY)
    home = Path(directory) / "silos" / name
    home.mkdir(parents=True, exist_ok=True)
    log = EvidenceLog(home / FILE_NAME, study=digest(study), owner=name, key=KEYS[name])
    ledger = LoggedLedger(home / "ledger.sqlite", name, log, **stated(study))
    return SiloSession(
        Seat(study, name, ROSTER, KEYS[name], AUTHORITY_KEY.public),
        ChargedTraining(
            study,
            name,
            workload(name, study, name in fails),
            SiloStore(home),
            ledger,
            progress=progress,
        ),
        SiloRecord(
            log,
            key=KEYS[name],
            roster=ROSTER,
            server=SERVER_KEY.public,
            authority=office_of(study),
        ),
    )


class RecordedRun:
    """One life of a coordinator and its silos; made again on the same directory, it resumes.

    Args:
        wrap: engine → what stands between it and the coordinator.
        losses: what the small model's is said to be on public questions, round by round.
        party: (name, what starts its session) → who answers in its name.
        on_round: as the coordinator's.
        silo: more for :func:`make_silo`.
    """

    def __init__(
        self,
        directory,
        study,
        *,
        resume=False,
        wrap=lambda e: e,
        losses=(),
        party=lambda name, start: start(),
        on_round=lambda record: None,
        **silo,
    ):
        self.directory = directory
        self.study = study
        self.store = RunStore(directory, digest(study), resume=resume)
        write_durably(directory / "study.yaml", dump_study(study).encode())
        self.server = ArithmeticServer(losses)
        make = partial(make_silo, study=study, directory=directory, **silo)

        def factory(name, progress):
            return party(name, partial(make, name, progress))

        self.engine = EmbeddedEngine(parties(study), factory, workers=0, progress=silent)
        self.log = server_log(directory, study, SERVER_KEY)
        self.coordinator = Coordinator(
            study=study,
            roster=ROSTER,
            engine=wrap(self.engine),
            workload=self.server,
            store=self.store,
            hooks=Hooks(on_round=on_round),
            evidence=ServerRecord(
                self.log,
                key=SERVER_KEY,
                roster=ROSTER,
                quorum=study.threshold,
                authority=office_of(study),
            ),
            authority=authority_of(study, AUTHORITY_KEY.public),
        )

    def go(self):
        try:
            self.coordinator.run()
            self.coordinator.end()
        finally:
            self.engine.close()
        made = {"adapters": self.store.adapters}
        best = best_round(self.study, self.store.state.history)
        if best is not None:
            made[BEST] = self.store.best_adapters(best)
        for name, place in made.items():
            shutil.rmtree(self.directory / name, ignore_errors=True)
            shutil.copytree(place, self.directory / name)
        return self.server.theta


def server_log(directory, study, key=None):
    path = directory / "server" / FILE_NAME
    return EvidenceLog(path, study=digest(study), owner=SERVER, key=key)


def silo_log(directory, study, name, key=None):
    path = directory / "silos" / name / FILE_NAME
    return EvidenceLog(path, study=digest(study), owner=name, key=key)


def kinds(log):
    """The kinds of a log's entries, in order."""
    return [type(entry.what).__name__.lower() for entry in log.entries]


def unit_of(study):
    return silo_unit(study, lambda round_: SIZE, 0)
