"""``shelf serve``, ``shelf relay`` and ``ask`` as processes over mutual TLS, with kills."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle
from tests.support.asking import TEXTS
from tests.support.consortium import make_homes
from tests.support.network import SILOS, Signed
from tests.support.shelf_processes import Processes

pytestmark = [pytest.mark.timeout(600), pytest.mark.soak, pytest.mark.long]


def test_members_ask_each_other_through_kills(tmp_path: Path) -> None:
    homes = make_homes(tmp_path / "homes")
    signed = Signed(tmp_path / "place", homes=homes, questions=60)
    with contextlib.ExitStack() as stack:
        words = {name: ["--index", str(path)] for name, path in signed.members.indexes.items()}
        processes = Processes(signed, signed.members.data, words, stack)
        for name in ("server", *SILOS):
            processes.start(name)
        others = set(SILOS) - {"silo-1"}
        answer = processes.until_answered("silo-1", TEXTS["silo-3"][2], others)
        assert (answer["passages"][0]["silo"], answer["passages"][0]["text"]) == (
            "silo-3",
            TEXTS["silo-3"][2],
        )
        assert processes.ask("server", TEXTS["silo-1"][0])["passages"][0]["silo"] == "silo-1"
        processes.kill("silo-3")
        answer = processes.ask("silo-1", "w1 w2")
        assert answer["answered"] == ["silo-2"]
        assert set(answer["failed"]) == {"silo-3"}
        processes.start("silo-3")
        processes.kill("server")
        processes.start("server")
        processes.until_answered("silo-1", "w1 w2", others)
        processes.kill("silo-1")  # who asks
        processes.start("silo-1")
        processes.until_answered("silo-1", "w1 w2", others)
    bundles = []
    for name, home in homes.items():
        (run,) = (home / "studies").iterdir()
        bundles.append(tmp_path / f"{name}.zip")
        bundles[-1].write_bytes(make_bundle(run))
        assert verify(bundles[-1]).holds
    (tmp_path / "all.zip").write_bytes(merge(bundles))
    verdict = verify(tmp_path / "all.zip")
    assert verdict.holds, [(check.name, check.faults) for check in verdict.failed]
    assert {row.name: row.status for row in verdict.results}["answers"] == "pass"
