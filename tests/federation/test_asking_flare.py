"""``shelf serve``, ``shelf relay`` and ``ask`` as processes over mutual TLS, with kills."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle
from tests.support.asking import TEXTS
from tests.support.consortium import make_homes
from tests.support.network import SILOS, Signed

pytestmark = [pytest.mark.timeout(600), pytest.mark.soak]

COMMAND = "from securefedcollm_cli.main import main; main()"


class Processes:
    """Everybody's, by name; :meth:`kill` is kill -9."""

    def __init__(self, signed: Signed, stack: contextlib.ExitStack) -> None:
        self.signed, self._stack = signed, stack
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        home = self.signed.homes[name]
        words = ["relay"] if name == "server" else ["serve", "--yes"]
        if name != "server":
            words += ["--index", str(self.signed.members.indexes[name])]
        words += [str(self.signed.file), "--home", str(home)]
        output = self._stack.enter_context((home / "shelf.log").open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "shelf", *words],
            stdout=output,
            stderr=output,
            env=os.environ,
        )
        self.running[name] = process
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def ask(self, name: str, words: str) -> dict[str, Any]:
        """What ``ask --home`` prints; empty if there was nothing to print."""
        signed = self.signed
        line = [sys.executable, "-c", COMMAND, "ask", "-", "--study", str(signed.file), "--json"]
        line += ["--data", str(signed.members.data), "--home", str(signed.homes[name])]
        done = subprocess.run(
            line, input=words.encode(), capture_output=True, timeout=200, check=False
        )
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def until_answered(self, name: str, words: str, silos: set[str]) -> dict[str, Any]:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            answer = self.ask(name, words)
            if set(answer.get("answered", [])) == silos:
                return answer
            time.sleep(2)
        logs = {n: (home / "shelf.log").read_text() for n, home in self.signed.homes.items()}
        raise AssertionError(logs)


def test_members_ask_each_other_through_kills(tmp_path: Path) -> None:
    homes = make_homes(tmp_path / "homes")
    signed = Signed(tmp_path / "place", homes=homes, questions=60)
    with contextlib.ExitStack() as stack:
        processes = Processes(signed, stack)
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
