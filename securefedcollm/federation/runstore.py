"""The coordinator's durable state: which round is done, and the adapters after it.

``server/state.json`` is replaced atomically. It points at one directory of adapters, which is
complete before it is pointed at, so a kill at any moment leaves a run that ``--resume`` continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.files import LOCK, make_directory, sync_tree, write_durably
from securefedcollm.federation.workload import Opened, ServerWorkload, Vector
from securefedcollm.privacy.events import EARLIER_KIND, SUM_KIND, SUMS, SumKind
from securefedcollm.study import Study, digest

METRICS: Final = "metrics.jsonl"


@dataclass
class RunState:
    """What ``state.json`` holds.

    ``round`` is the round to run next (from 0), ``step`` how many of its secure sums are done
    already (joint DP-SGD; else 0) and ``partial`` the unfinished record; ``attempt`` the
    number of aggregation attempts already begun for the next sum; ``opening`` whether silos were
    ever asked to unmask it, after which only that same sum can be opened; ``opened`` the sum's
    survivors once it is out, so that it is never asked for again; ``clip_norm`` that of the next
    sum, if it adapts; ``barred`` silos that spoilt an opening and why; ``history`` one record per
    finished round; ``tuned`` whether the server's phase of the round is over, and only its
    validation is to come; ``sums`` as what noised sums are charged, absent in the runs of versions
    that knew one way only.
    """

    run_id: str
    study: str
    round: int = 0
    step: int = 0
    attempt: int = 0
    opening: bool = False
    opened: list[str] = field(default_factory=list)
    clip_norm: float | None = None
    barred: dict[str, str] = field(default_factory=dict)
    partial: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    tuned: bool = False
    sums: SumKind = EARLIER_KIND


class RunStore:
    """Durable memory of the coordinator."""

    def __init__(self, directory: Path, study_digest: bytes, *, resume: bool) -> None:
        """Start a new run in ``directory``, or continue the one that is there.

        Raises:
            ConfigError: ``resume`` is off and there is a run already; or it is on, and there is
                none, or one of another study.
            StateError: the state cannot be read or written.
        """
        self.directory = directory
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
            if not self.begun:
                self.state.sums = SUM_KIND  # it begins now, whoever wrote the file
        else:
            self.state = RunState(os.urandom(16).hex(), study_digest.hex(), sums=SUM_KIND)
            self._write()

    @property
    def begun(self) -> bool:
        """Whether any silo has heard of the run."""
        return bool(self.state.attempt or self.state.step or self.state.round)

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

    def save_mean(self, mean: Opened, survivors: list[str], clip_norm: float | None = None) -> None:
        """Keep the opened mean, so that nobody asks for it again after a crash during distillation.

        ``clip_norm``: that of the next sum, which follows from this one.
        """
        path = self._server / "mean.npy"
        with (self._server / ".mean.npy.tmp").open("wb") as file:
            np.save(file, mean, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        (self._server / ".mean.npy.tmp").replace(path)
        self.state.opened = survivors
        self.state.clip_norm = clip_norm
        self._write()

    def load_mean(self) -> Vector:
        """The opened mean of this round, float32."""
        return self.load_opened().astype(np.float32, copy=False)

    def load_opened(self) -> Opened:
        """What :meth:`save_mean` saved."""
        path = self._server / "mean.npy"
        try:
            found: Opened = np.asarray(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise StateError(
                f"{path}: the round's mean cannot be read ({error})",
                hint="start again with --overwrite",
            ) from None
        return found

    def finish_tuning(self, workload: ServerWorkload, record: dict[str, Any]) -> None:
        """Save the round's adapters, then move on to its validation in one atomic step."""
        state = self.state
        self.save_adapters(workload, state.round + 1)
        self._save_descent(workload, state.round, state.step + 1)
        state.step += 1
        state.tuned = True
        state.partial = record
        self._next_sum()
        self._forget_descents()

    def finish_step(self, workload: ServerWorkload, record: dict[str, Any]) -> None:
        """Save what one step of joint DP-SGD changed, then move on to the next one atomically."""
        state = self.state
        self._save_descent(workload, state.round, state.step + 1)
        state.step += 1
        state.partial = record
        self._next_sum()
        self._forget_descents()

    def finish_round(
        self,
        workload: ServerWorkload,
        record: dict[str, Any],
        *,
        remembers: bool = False,
        best: bool = False,
    ) -> None:
        """Save the adapters, then move on to the next round in one atomic step.

        Args:
            remembers: also save the state of the server's optimiser.
            best: keep these adapters until a later round is better.
        """
        state = self.state
        if not state.tuned:  # else they are there
            self.save_adapters(workload, state.round + 1)
        if best:
            self._copy_best(state.round + 1)
        if remembers:
            self._save_descent(workload, state.round + 1, 0)
        state.history.append(record)
        state.round += 1
        state.step = 0
        state.tuned = False
        state.partial = {}
        self._next_sum()
        shutil.rmtree(self._adapters(state.round - 2), ignore_errors=True)
        self._forget_descents()
        if best:
            for path in self._server.glob("best-*"):
                if path != self.best_adapters(state.round):
                    shutil.rmtree(path, ignore_errors=True)

    def best_adapters(self, round_: int) -> Path:
        """The directory with the adapters after ``round_`` (from 1), which was the best."""
        return self._server / f"best-{round_:05d}"

    def _copy_best(self, round_: int) -> None:
        target = self.best_adapters(round_)
        temporary = target.with_name(f".{target.name}.tmp")
        for path in (temporary, target):  # a kill may have left either
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self._adapters(round_), temporary)
        sync_tree(temporary)
        temporary.replace(target)

    def amend(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Add to the newest finished round's record what came after it."""
        change(self.state.history[-1])
        self._write()

    def write_metrics(self) -> None:
        """``metrics.jsonl`` in the run's directory: a line for every finished round.

        The server's own record: accuracy on its test questions, bytes, seconds, who took part.
        """
        lines = (json.dumps(record).encode() + b"\n" for record in self.state.history)
        write_durably(self.directory / METRICS, b"".join(lines))

    def _next_sum(self) -> None:
        self.state.attempt = 0
        self.state.opening = False
        self.state.opened = []
        self._write()

    def _save_descent(self, workload: ServerWorkload, round_: int, step: int) -> None:
        write_durably(self._descent(round_, step), safetensors.save(workload.descent()))

    def _forget_descents(self) -> None:
        current = self._descent(self.state.round, self.state.step)
        for path in self._server.glob("descent-*.safetensors"):
            if path != current:
                path.unlink(missing_ok=True)

    def _descent(self, round_: int, step: int) -> Path:
        return self._server / f"descent-{round_:05d}-{step:05d}.safetensors"

    def save_adapters(self, workload: ServerWorkload, round_: int) -> None:
        target = self._adapters(round_)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        make_directory(temporary)
        workload.save(temporary)
        sync_tree(temporary)
        temporary.replace(target)

    def load_adapters(self, workload: ServerWorkload, *, remembers: bool = False) -> None:
        """Bring ``workload`` to the state after the last finished round, or step of one.

        Args:
            remembers: every finished round left the state of the server's optimiser.

        Raises:
            StateError: a file is lost or damaged.
        """
        workload.load(self._adapters(self.state.round + self.state.tuned))
        path = self._descent(self.state.round, self.state.step)
        needed = self.state.step or (remembers and self.state.round)
        if not needed and not path.exists():
            return
        try:
            workload.restore_descent(safetensors.load(path.read_bytes()))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise StateError(
                f"{path}: the optimiser's state cannot be read ({error})",
                hint="start again with --overwrite, or restore the file",
            ) from None

    @property
    def adapters(self) -> Path:
        """The directory with the adapters after the last finished round."""
        return self._adapters(self.state.round)

    def _adapters(self, round_: int) -> Path:
        return self._server / f"round-{round_:05d}"

    def _read(self) -> RunState:
        try:
            found = RunState(**json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StateError(
                f"{self._path}: the run's state cannot be read ({error})",
                hint="start again with --overwrite, or restore the file",
            ) from None
        if found.sums not in list(SUMS):
            raise StateError(
                f"{self._path}: its sums are charged in a way that this version does not know",
                hint="go on with the version that began the run, or restore the file",
            )
        return found

    def _write(self) -> None:
        write_durably(self._path, json.dumps(asdict(self.state), indent=1).encode())


def check_directory(study: Study, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse what would harm an existing run or directory.

    Raises:
        ConfigError: with the fix.
    """
    if resume and overwrite:
        raise ConfigError(
            "a run is gone on with, or replaced",
            where="--resume, --overwrite",
            hint="leave one of them out",
        )
    if overwrite and out.exists():
        known = {"study.yaml", "server"}
        found = {p.name for p in out.iterdir()} - {LOCK}
        if found and not known & found:
            raise ConfigError(
                "is not a run directory; it will not be removed",
                where=str(out),
                hint="choose another --out",
            )
    known_run = (out / "server" / "state.json").exists()
    if resume and not known_run:
        raise ConfigError("there is no run to resume", where=str(out), hint="leave out --resume")
    if known_run and not (resume or overwrite):
        RunStore(out, digest(study), resume=False)  # refuses
