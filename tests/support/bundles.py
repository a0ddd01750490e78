"""Two honest bundles, made once: record-level privacy, and client-level with a dropout."""

from __future__ import annotations

import shutil

import msgspec
import pytest
from securefedcollm_audits.privacy.finding import Finding, write_down

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.engines import Failure
from tests.support.rounds import Cut
from tests.support.runs import (
    ALL_KEYS,
    CKKS,
    JOINT,
    NAMES,
    SILO_PRIVACY,
    RecordedRun,
    recorded_study,
)
from tests.support.validated import VALIDATED, AskedRecordedSilo


def bundle_of(directory, study, wrap=lambda e: e, losses=(), **silo):
    directory.mkdir(exist_ok=True)
    RecordedRun(directory, study, wrap=wrap, losses=losses, **silo).go()
    path = directory / "evidence.zip"
    path.write_bytes(make_bundle(directory))
    return path


@pytest.fixture(scope="session")
def joint_bundle(tmp_path_factory):
    """Joint DP-SGD: every step a sum; silo-4 is lost at the upload of the second step."""
    directory = tmp_path_factory.mktemp("joint") / "run"
    return bundle_of(directory, recorded_study(**JOINT), wrap=Lost)


@pytest.fixture(scope="session")
def patience_bundle(tmp_path_factory):
    """Round 2 of 5 is the best, and no round after the fourth is run."""
    study = recorded_study(rounds=5, keep={"patience": 2})
    directory = tmp_path_factory.mktemp("patience") / "run"
    return bundle_of(directory, study, losses=(0.5, 0.4, 0.45, 0.41, 0.1))


@pytest.fixture(scope="session")
def joint_patience_bundle(tmp_path_factory):
    """Joint DP-SGD, where what a step cost is settled later; the second round of 4 is the last."""
    study = recorded_study(**JOINT | {"rounds": 4, "keep": {"patience": 1}})
    directory = tmp_path_factory.mktemp("joint-patience") / "run"
    return bundle_of(directory, study, losses=(0.4, 0.45, 0.1, 0.1))


@pytest.fixture(scope="session")
def validated_bundle(tmp_path_factory):
    """Records set aside, under each silo's own noise; rounds are compared by the noised counts."""
    study = recorded_study(**VALIDATED | {"keep": {"metric": "private"}})
    directory = tmp_path_factory.mktemp("validated") / "run"
    return bundle_of(directory, study, workload=AskedRecordedSilo)


@pytest.fixture(scope="session")
def joint_validated_bundle(tmp_path_factory):
    """The same after steps of joint DP-SGD, with noise of all silos together."""
    study = recorded_study(**JOINT | VALIDATED)
    directory = tmp_path_factory.mktemp("joint-validated") / "run"
    return bundle_of(directory, study, workload=AskedRecordedSilo)


ADAPTIVE = SILO_PRIVACY | {"adaptive": {"quantile": 0.5, "learning_rate": 0.2, "count_noise": 10.0}}


@pytest.fixture(scope="session")
def adaptive_bundle(tmp_path_factory):
    """The clip norm follows the updates: it is another one in the second round."""
    study = recorded_study(rounds=2, privacy=ADAPTIVE)
    return bundle_of(tmp_path_factory.mktemp("adaptive") / "run", study)


FINDING = Finding(
    audit="mechanism",
    study=recorded_study(rounds=2),
    setting="one DP-SGD step",
    claimed=2.0,
    bound=1.0,
    delta=1e-5,
    faults=[],
    figures={"noise charged": 1.0, "noise measured": 1.01},
)


@pytest.fixture(scope="session")
def audited_bundle(record_bundle, tmp_path_factory):
    """The record-level run, after two participants audited its code."""
    directory = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(record_bundle.parent, directory)
    other = msgspec.structs.replace(
        FINDING,
        audit="inversion",
        study=recorded_study(rounds=3),
        claimed=None,
        bound=None,
        figures={"raw update": 1.0, "noised sum": 0.1, "noised sum, by chance": 0.1},
    )
    for name, finding in (("silo-2", FINDING), ("server", other)):
        write_down(finding, directory, name, ALL_KEYS[name])
    path = directory / "evidence.zip"
    path.write_bytes(make_bundle(directory))
    return path


@pytest.fixture(scope="session")
def ckks_bundle(tmp_path_factory):
    """Threshold CKKS; silo-4 is lost in round 1, and the others repeat."""
    study = recorded_study(rounds=2, aggregation=CKKS)
    directory = tmp_path_factory.mktemp("ckks") / "run"
    return bundle_of(directory, study, wrap=lambda e: Lost(e, 3, 12))


@pytest.fixture(scope="session")
def authority_bundle(tmp_path_factory):
    """CKKS under an authority's key; silo-4 is lost at the upload of round 2."""
    plan = CKKS | {"key_model": "authority"}
    study = recorded_study(rounds=2, privacy=SILO_PRIVACY, aggregation=plan)
    directory = tmp_path_factory.mktemp("authority") / "run"
    return bundle_of(directory, study, wrap=lambda e: Lost(e, 11, 13))


class Lost:
    """An engine that loses silo-4 after some exchanges and until some later one; by default for the
    rest of the second of the sums."""

    def __init__(self, engine, after=9, until=12):
        self.engine, self.count, self.after, self.until = engine, 0, after, until

    def exchange(self, frames, timeout):
        self.count += 1
        gone = NAMES[3:] if self.after < self.count <= self.until else ()
        here = {name: frame for name, frame in frames.items() if name not in gone}
        lost = {name: Failure("cut off") for name in frames if name in gone}
        return self.engine.exchange(here, timeout) | lost


class Alone:
    """An engine that hands a request on to silo-4 alone, its first to unmask, and then loses it for
    the rest of the round: the others go on without it, in another attempt."""

    def __init__(self, engine):
        self.engine, self.count = engine, 0

    def exchange(self, frames, timeout):
        self.count += 1
        there = NAMES[3:] if self.count == 6 else NAMES[:3] if 6 < self.count <= 12 else NAMES
        here = {name: frame for name, frame in frames.items() if name in there}
        lost = {name: Failure("cut off") for name in frames if name not in there}
        return self.engine.exchange(here, timeout) | lost


@pytest.fixture(scope="session")
def alone_bundle(tmp_path_factory):
    """silo-4 unmasked a sum of four that nobody else did; the others opened one of three."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    return bundle_of(directory, recorded_study(rounds=2), wrap=Alone)


@pytest.fixture(scope="session")
def record_bundle(tmp_path_factory):
    return bundle_of(tmp_path_factory.mktemp("record") / "run", recorded_study(rounds=2))


@pytest.fixture(scope="session")
def silo_bundle(tmp_path_factory):
    """silo-4 is lost at the upload of round 2, and back for nothing."""
    study = recorded_study(rounds=2, privacy=SILO_PRIVACY)
    directory = tmp_path_factory.mktemp("silo") / "run"
    return bundle_of(directory, study, wrap=lambda e: Cut(e, NAMES[3:], 10))
