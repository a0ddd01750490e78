"""Two honest bundles, made once: record-level privacy, and client-level with a dropout."""

from __future__ import annotations

import pytest

from securefedcollm.evidence.bundle import make_bundle

from ..evidence.runs import NAMES, SILO_PRIVACY, RecordedRun, recorded_study
from ..federation.test_rounds import Cut


def bundle_of(directory, study, wrap=lambda e: e):
    directory.mkdir()
    RecordedRun(directory, study, wrap=wrap).go()
    path = directory / "evidence.zip"
    path.write_bytes(make_bundle(directory))
    return path


@pytest.fixture(scope="session")
def record_bundle(tmp_path_factory):
    return bundle_of(tmp_path_factory.mktemp("record") / "run", recorded_study(rounds=2))


@pytest.fixture(scope="session")
def silo_bundle(tmp_path_factory):
    """silo-4 is lost at the upload of round 2, and back for nothing."""
    study = recorded_study(rounds=2, privacy=SILO_PRIVACY)
    directory = tmp_path_factory.mktemp("silo") / "run"
    return bundle_of(directory, study, wrap=lambda e: Cut(e, NAMES[3:], 10))
