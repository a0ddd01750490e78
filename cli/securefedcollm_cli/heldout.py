"""``client --test``: what the newest adapter is worth on a silo's own held-out records.

Adversary: the server, which sees when a silo answers. How long these records take says how many
there are, and how long. So a process of its own measures, and stands still from when a request is
there until its answer is made. It has the lowest priority, and goes on after the run's end, when
nobody listens any more. What it finds goes to the operator's screen and disk.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from securefedcollm.errors import SecureFedCoLLMError, StateError
from securefedcollm.federation.engines import SiloPort
from securefedcollm.federation.files import PrivateDirectory, write_durably
from securefedcollm.federation.roles import ADAPTER, newest_adapter

log = logging.getLogger(__name__)

FOUND: Final = "held-out.jsonl"
"""In a silo's directory of a study: one line a round, round 0 being the base model."""

_CHILD: Final = """
import os, sys
from securefedcollm.federation.engines.flare.processes import end_with
end_with(int(sys.argv.pop(1)))
os.nice(19)
from securefedcollm_cli.main import main
main()
"""

Tell = Callable[[int, dict[str, dict[str, float]]], None]
"""``tell(round, scores)``: as ``model evaluate --json`` prints them."""


class HeldOut:
    """Measures the base model, and then what every round ended with. Use as a context manager.

    Args:
        run: the silo's directory of the study.
        test: the held-out records, already found to be readable.
        models: where the study's ``path:`` models are.
        warn: is told why a round could not be measured; the run goes on.
    """

    def __init__(
        self, run: Path, test: Path, models: Path | None, tell: Tell, warn: Callable[[str], None]
    ) -> None:
        self._run, self._test, self._models = run, test, models
        self._tell, self._warn = tell, warn
        self._lines = _found(run / FOUND)
        self._seen = max((line["round"] for line in self._lines), default=0)
        self._place = PrivateDirectory(run, ".held-out-")
        self._waiting: list[int] = [] if self._lines else [0]
        self._process: subprocess.Popen[bytes] | None = None
        self._out, self._err = (self._place.path / name for name in ("out", "err"))

    def look(self) -> None:
        """Between two requests: go on, begin with the next, or tell what was found."""
        try:
            newest = newest_adapter(self._run)
        except SecureFedCoLLMError as error:
            log.warning("%s", error)
            newest = 0
        if newest > self._seen:  # the next round's takes its place
            shutil.copytree(self._run / ADAPTER, self._place.path / str(newest))
            self._waiting.append(newest)
            self._seen = newest
        if self._process is None:
            if self._waiting:
                self._begin(self._waiting[0])
        elif self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGCONT)
        else:
            self._end()

    def pause(self) -> None:
        """Until the next :meth:`look`."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def finish(self) -> None:
        """Measure what is still to be measured."""
        self.look()
        while self._process is not None or self._waiting:
            time.sleep(0.1)
            self.look()

    def _begin(self, round_: int) -> None:
        words = ["--run", str(self._run), "--role", "slm", "--test", str(self._test), "--json"]
        words += ["--adapter", str(self._place.path / str(round_))] if round_ else ["--base"]
        words += ["--data", str(self._models)] if self._models else []
        python = [sys.executable, "-P", "-c", _CHILD, str(os.getpid())]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*python, "model", "evaluate", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def _end(self) -> None:
        assert self._process is not None
        code, self._process, round_ = self._process.returncode, None, self._waiting.pop(0)
        shutil.rmtree(self._place.path / str(round_), ignore_errors=True)
        if code:
            said = self._err.read_text(errors="replace").strip().splitlines()
            why = (said or [f"code {code}"])[-1]
            self._warn(f"your held-out records could not be measured after round {round_}: {why}")
            return
        scores = json.loads(self._out.read_bytes())
        self._lines.append({"round": round_, **scores})
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        write_durably(self._run / FOUND, text.encode())
        self._tell(round_, scores)

    def __enter__(self) -> HeldOut:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._place.remove()


def _found(path: Path) -> list[dict[str, Any]]:
    """What earlier processes found, by round."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if all(isinstance(line["round"], int) for line in lines):
            return lines
        raise ValueError("a line names no round")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path}: cannot be read ({error})", hint="move it away") from None


class Undisturbed:
    """A port that answers while nothing is measured."""

    def __init__(self, port: SiloPort, held_out: HeldOut) -> None:
        self._port, self._held_out = port, held_out

    def step(self, frame: bytes) -> bytes:
        """See :class:`~securefedcollm.federation.engines.SiloPort`."""
        self._held_out.pause()
        return self._port.step(frame)
