"""The coordinator's durable state: which round is done, and the adapters after it.

``server/state.json`` is replaced atomically. It points at one directory of adapters, which is
complete before it is pointed at, so a kill at any moment leaves a run that ``--resume`` continues.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.workload import ServerWorkload, Vector


@dataclass
class RunState:
    """What ``state.json`` holds.

    ``round`` is the round to run next (from 0); ``attempt`` the number of aggregation attempts
    already begun for it; ``opening`` whether silos were ever asked to unmask it, after which only
    that same sum can be opened; ``opened`` the sum's survivors once the sum is out, so that it is
    never asked for again; ``barred`` silos that spoilt an opening and why; ``history`` one record
    per finished round.
    """

    run_id: str
    study: str
    round: int = 0
    attempt: int = 0
    opening: bool = False
    opened: list[str] = field(default_factory=list)
    barred: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class RunStore:
    """Durable memory of the coordinator."""

    def __init__(self, directory: Path, study_digest: bytes, *, resume: bool) -> None:
        """Start a new run in ``directory``, or take up the one that is there.

        Raises:
            ConfigError: there is a run already and ``resume`` is off; or none, or one of another
                study, and it is on.
            StateError: the state cannot be read or written.
        """
        self._server = make_directory(directory / "server")
        self._path = self._server / "state.json"
        if self._path.exists():
            self.state = self._read()
            if not resume:
                raise ConfigError(
                    "there is a run in this directory already",
                    where=str(directory),
                    hint="continue it with --resume, replace it with --overwrite, or choose --out",
                )
            if self.state.study != study_digest.hex():
                raise ConfigError(
                    "the run in this directory belongs to another study "
                    f"({self.state.study[:12]}…, this one is {study_digest.hex()[:12]}…)",
                    where=str(directory),
                    hint="resume with the study.yaml that lies in it, or choose another --out",
                )
        else:
            self.state = RunState(run_id=os.urandom(16).hex(), study=study_digest.hex())
            self._write()

    @property
    def run_id(self) -> bytes:
        return bytes.fromhex(self.state.run_id)

    def begin_attempt(self) -> int:
        """Count one more attempt for this round, durably, before any silo hears of it."""
        number = self.state.attempt
        self.state.attempt += 1
        self._write()
        return number

    def begin_opening(self) -> None:
        """Note, durably, that silos are about to unmask this round's sum."""
        self.state.opening = True
        self._write()

    def bar(self, silo: str, reason: str) -> None:
        """Keep ``silo`` out of the rest of the run."""
        self.state.barred[silo] = reason
        self._write()

    def save_mean(self, mean: Vector, survivors: list[str]) -> None:
        """Keep the opened mean, so that a crash during distillation does not ask for it again."""
        path = self._server / "mean.npy"
        with (self._server / ".mean.npy.tmp").open("wb") as file:
            np.save(file, mean, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        (self._server / ".mean.npy.tmp").replace(path)
        self.state.opened = survivors
        self._write()

    def load_mean(self) -> Vector:
        """The opened mean of this round."""
        path = self._server / "mean.npy"
        try:
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)
        except (OSError, ValueError) as error:
            raise StateError(
                f"{path}: the round's mean cannot be read ({error})",
                hint="start again with --overwrite",
            ) from None

    def finish_round(self, workload: ServerWorkload, record: dict[str, Any]) -> None:
        """Save the adapters, then move on to the next round in one atomic step."""
        self.save_adapters(workload, self.state.round + 1)
        self.state.history.append(record)
        self.state.round += 1
        self.state.attempt = 0
        self.state.opening = False
        self.state.opened = []
        self._write()
        shutil.rmtree(self._adapters(self.state.round - 2), ignore_errors=True)

    def save_adapters(self, workload: ServerWorkload, round_: int) -> None:
        target = self._adapters(round_)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        make_directory(temporary)
        workload.save(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        temporary.replace(target)

    def load_adapters(self, workload: ServerWorkload) -> None:
        """Bring ``workload`` to the state after the last finished round."""
        workload.load(self._adapters(self.state.round))

    @property
    def adapters(self) -> Path:
        """The directory with the adapters after the last finished round."""
        return self._adapters(self.state.round)

    def _adapters(self, round_: int) -> Path:
        return self._server / f"round-{round_:05d}"

    def _read(self) -> RunState:
        try:
            return RunState(**json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StateError(
                f"{self._path}: the run's state cannot be read ({error})",
                hint="start again with --overwrite, or restore the file",
            ) from None

    def _write(self) -> None:
        write_durably(self._path, json.dumps(asdict(self.state), indent=1).encode())
