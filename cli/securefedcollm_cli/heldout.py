"""``client --test``, ``--training-loss``: the newest adapter on a silo's own records.

Adversary: the server, which sees when a silo answers. The time that these records take shows how
many there are, and how long they are. So a separate process measures. It is stopped from the
arrival of a request until the answer is made. It has the lowest priority, and goes on after the
run's end, when nobody listens any more. Its results go to the operator's screen and disk.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from securefedcollm.errors import SecureFedCoLLMError, StateError
from securefedcollm.federation.engines import SiloPort
from securefedcollm.federation.files import PrivateDirectory, write_durably
from securefedcollm.federation.roles import ADAPTER, newest_adapter

log = logging.getLogger(__name__)

HELD_OUT: Final = "held-out"
TRAINING: Final = "training"
"""Which records: each has its ``.jsonl`` in a silo's directory of a study, one line a round, round
0 being the base model."""

_CHILD: Final = """
import os, sys
from securefedcollm.federation.engines.flare.processes import end_with
end_with(int(sys.argv.pop(1)))
os.nice(19)
from securefedcollm_cli.main import main
main()
"""

Tell = Callable[[str, int, dict[str, dict[str, float]]], None]
"""``tell(which, round, scores)``: as ``model evaluate --json`` prints them."""


class HeldOut:
    """Measures the base model, and then every round's adapter. Use as a context manager.

    Args:
        run: the silo's directory of the study.
        files: of :data:`HELD_OUT` and :data:`TRAINING` records, already found to be readable.
        models: where the study's ``path:`` models are.
        warn: is told why a round could not be measured; the run goes on.
        parts: file → which of its records count; of any other file all do.
    """

    def __init__(
        self,
        run: Path,
        files: Mapping[str, Path],
        models: Path | None,
        tell: Tell,
        warn: Callable[[str], None],
        parts: Mapping[str, Sequence[bool]] | None = None,
    ) -> None:
        self._run, self._files, self._models = run, files, models
        self._tell, self._warn = tell, warn
        self._lines = {which: _found(_place_of(run, which)) for which in files}
        self._seen = {
            which: max((line["round"] for line in lines), default=-1)
            for which, lines in self._lines.items()
        }
        self._place = PrivateDirectory(run, ".held-out-")
        self._parts = {which: self._place.path / f"part-{which}" for which in parts or {}}
        for which, part in (parts or {}).items():
            write_durably(self._parts[which], bytes(b"01"[counts] for counts in part))
        self._waiting: list[tuple[int, str]] = []
        self._add(0)
        self._process: subprocess.Popen[bytes] | None = None
        self._out, self._err = (self._place.path / name for name in ("out", "err"))

    def look(self) -> None:
        """Between two requests: go on, begin with the next, or report the results."""
        try:
            newest = newest_adapter(self._run)
        except SecureFedCoLLMError as error:
            log.warning("%s", error)
            newest = 0
        self._add(newest)
        if self._process is None:
            if self._waiting:
                self._begin(*self._waiting[0])
        elif self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGCONT)
        else:
            self._end()

    def pause(self) -> None:
        """Until the next :meth:`look`."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def finish(self) -> None:
        """Measure everything that is still due."""
        self.look()
        while self._process is not None or self._waiting:
            time.sleep(0.1)
            self.look()

    def _add(self, round_: int) -> None:
        """Measure this round's adapter, unless that is done or will be."""
        new = [which for which, seen in self._seen.items() if round_ > seen]
        if new and round_:  # the next round's takes its place
            shutil.copytree(self._run / ADAPTER, self._place.path / str(round_))
        for which in new:
            self._waiting.append((round_, which))
            self._seen[which] = round_

    def _begin(self, round_: int, which: str) -> None:
        words = ["--run", str(self._run), "--role", "slm", "--test", str(self._files[which])]
        words += ["--json"]
        words += ["--adapter", str(self._place.path / str(round_))] if round_ else ["--base"]
        words += ["--data", str(self._models)] if self._models else []
        words += ["--part", str(self._parts[which])] if which in self._parts else []
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
        code, self._process = self._process.returncode, None
        round_, which = self._waiting.pop(0)
        if round_ not in (later for later, _ in self._waiting):
            shutil.rmtree(self._place.path / str(round_), ignore_errors=True)
        if code:
            said = self._err.read_text(errors="replace").strip().splitlines()
            why = (said or [f"code {code}"])[-1]
            self._warn(f"your {which} records could not be measured after round {round_}: {why}")
            return
        scores = json.loads(self._out.read_bytes())
        lines = self._lines[which]
        lines.append({"round": round_, **scores})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_durably(_place_of(self._run, which), text.encode())
        self._tell(which, round_, scores)

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


def _place_of(run: Path, which: str) -> Path:
    return run / f"{which}.jsonl"


def _found(path: Path) -> list[dict[str, Any]]:
    """Results of earlier processes, by round."""
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
