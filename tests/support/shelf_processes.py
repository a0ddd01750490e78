"""``shelf serve``, ``shelf relay`` and ``ask --home`` as processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "from securefedcollm_cli.main import main; main()"


class Processes:
    """Everybody's, by name; :meth:`kill` is kill -9.

    Args:
        signed: has the study's file and everybody's homes.
        data: directory of the study's files.
        serves: silo → what its ``shelf serve`` is given.
    """

    def __init__(
        self,
        signed: Any,
        data: Path,
        serves: Mapping[str, Sequence[str]],
        stack: contextlib.ExitStack,
    ) -> None:
        self.signed, self.data, self._serves, self._stack = signed, data, serves, stack
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        home = self.signed.homes[name]
        words = ["relay"] if name == "server" else ["serve", "--yes"]
        if name != "server":
            words += self._serves[name]
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
        line += ["--data", str(self.data), "--home", str(signed.homes[name])]
        done = subprocess.run(
            line, input=words.encode(), capture_output=True, timeout=200, check=False
        )
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def until_answered(
        self, name: str, words: str, silos: set[str], key: str = "answered"
    ) -> dict[str, Any]:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            answer = self.ask(name, words)
            if set(answer.get(key, [])) == silos:
                return answer
            time.sleep(2)
        logs = {n: (home / "shelf.log").read_text() for n, home in self.signed.homes.items()}
        raise AssertionError(logs)
