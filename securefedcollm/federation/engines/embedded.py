"""The engine for one machine: silos in this process, or spread over worker processes.

Each silo is built inside the process that runs it, so its keys, data and updates never exist in the
coordinator's process when ``workers > 0``. Replies come back over a pipe; a worker that dies takes
its silos' exchanges with it, which the protocol treats as dropouts.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Final

from securefedcollm.aggregation.header import MAX_SILOS
from securefedcollm.errors import SecureFedCoLLMError, StateError, TransportError
from securefedcollm.federation.engines import Failure, SiloPort
from securefedcollm.federation.files import allow_open_files
from securefedcollm.federation.workload import Progress
from securefedcollm.foreign import log_to_stderr

log = logging.getLogger(__name__)

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
"""glibc, in child processes: keep a step's freed tensors for the next (a fifth of its time)."""

_GRACE = 2.0  # seconds

OPEN_FILES: Final = 12
"""Of one silo: journal, ledger, evidence and a lock, three files each at most."""

_FEW: Final = MAX_SILOS + 1
"""Parties of a study without a graph. They have always run with what systems allow a process."""
_NAMED: Final = 5
"""The most silos that a message names."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

SiloFactory = Callable[[str, Progress], SiloPort]
"""Builds the silo of that name; picklable when workers are used."""


class EmbeddedEngine:
    """See the module's docstring. Use as a context manager."""

    def __init__(
        self,
        silos: Sequence[str],
        factory: SiloFactory,
        *,
        workers: int,
        progress: Progress,
        context: BaseContext | None = None,
    ) -> None:
        """
        Args:
            silos: their names.
            factory: called once for each silo, in the process that will run it.
            workers: number of processes; 0 runs the silos here, one after another.
            progress: receives the silos' progress, prefixed with their names.
            context: how processes start, see :func:`process_context`; None: spawn.

        Raises:
            SecureFedCoLLMError: what the factory raised for a silo (bad data, say).
        """
        self._progress = progress
        self._local: dict[str, SiloPort] = {}
        self._workers: list[_Worker] = []
        self._home: dict[str, _Worker] = {}
        if workers == 0:
            _allow_files(silos)
            self._local = {name: factory(name, _prefixed(progress, name)) for name in silos}
            return
        try:
            for index in range(min(workers, len(silos))):
                mine = list(silos[index::workers])
                worker = _Worker(mine, factory, context or multiprocessing.get_context("spawn"))
                self._workers.append(worker)
                self._home.update(dict.fromkeys(mine, worker))
            for worker in self._workers:
                worker.wait_until_ready(progress)
        except BaseException:
            self.close()
            raise

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        """See :class:`securefedcollm.federation.engines.Engine`."""
        if self._local:
            return {name: self._local[name].step(frame) for name, frame in frames.items()}
        replies: dict[str, bytes | Failure] = {}
        pending: dict[_Worker, deque[str]] = {}  # the first is at work
        due: dict[_Worker, float] = {}
        for name in frames:
            pending.setdefault(self._home[name], deque()).append(name)

        def send_next(worker: _Worker) -> None:
            """One frame at a time: a worker that cannot get rid of its reply reads no other.

            Its silos take turns, so each has the whole time.
            """
            due[worker] = time.monotonic() + timeout
            while (names := pending[worker]) and not worker.send(names[0], frames[names[0]]):
                replies[names.popleft()] = Failure("its worker process has ended")

        for worker in pending:
            send_next(worker)
        while busy := {worker.pipe: worker for worker, names in pending.items() if names}:
            soonest = min(due[worker] for worker in busy.values())
            ready = set(wait(list(busy), timeout=max(0.0, soonest - time.monotonic())))
            for pipe, worker in busy.items():
                if pipe in ready:
                    found = worker.receive(self._progress, pending[worker])
                elif due[worker] <= time.monotonic():
                    worker.stop()  # a late reply must not be taken for the next exchange's
                    late = Failure(f"no reply in {timeout:.0f} s")
                    found = [(name, late) for name in pending[worker]]
                else:
                    continue
                for name, reply in found:
                    replies[name] = reply
                    pending[worker].remove(name)
                if found:
                    send_next(worker)
        return replies

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> EmbeddedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def process_context(preload: Sequence[str]) -> BaseContext:
    """Start processes from a clean one that has imported ``preload`` (modules), where possible.

    Importing torch and transformers takes seconds; each of a simulation's many workers starts with
    it done, and shares the memory. The clean process has no threads, keys or data to copy.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    forkserver.ensure_running()
    return context


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, silos: list[str], factory: SiloFactory, context: BaseContext) -> None:
        self.silos = silos
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(theirs, silos, factory, (logging.root.level, log.getEffectiveLevel())),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def wait_until_ready(self, progress: Progress) -> None:
        while True:
            try:
                message = self.pipe.recv()
            except EOFError:
                raise TransportError(
                    f"the worker process of {_some(self.silos)} ended while starting",
                    hint="is there enough memory? try --workers 1",
                ) from None
            match message:
                case ("ready",):
                    return
                case ("error", error):
                    raise error
                case ("progress", done, total, text):
                    progress(done, total, text)

    def send(self, silo: str, frame: bytes) -> bool:
        try:
            self.pipe.send(silo)
            self.pipe.send_bytes(frame)  # as it is: a pickled one would be there twice
        except (OSError, ValueError):
            return False
        return True

    def receive(
        self, progress: Progress, pending: Iterable[str]
    ) -> list[tuple[str, bytes | Failure]]:
        """What has arrived: at most one reply, or the failure of all silos that are ``pending``."""
        try:
            message = self.pipe.recv()
            if message[0] == "reply":
                return [(message[1], self.pipe.recv_bytes())]
        except (EOFError, OSError):
            self.stop()
            return [(silo, Failure("its worker process ended")) for silo in pending]
        match message:
            case ("progress", done, total, text):
                progress(done, total, text)
                return []
            case ("failed", silo, reason):
                return [(silo, Failure(reason))]
        raise TransportError(f"the worker of {_some(self.silos)} sent an unknown message")

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=_GRACE)  # idle, it ends by itself and leaves nothing behind
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(timeout=10)


def _serve(
    pipe: Connection[Any, Any],
    silos: list[str],
    factory: SiloFactory,
    log_levels: tuple[int, int],
) -> None:
    """A worker's life: build its silos, then answer until the pipe closes.

    ``log_levels``: the parent's, of everything and of this package.
    """
    log_to_stderr(log_levels[0], LOG_FORMAT)
    logging.getLogger("securefedcollm").setLevel(log_levels[1])

    def report(done: int, total: int, text: str) -> None:
        pipe.send(("progress", done, total, text))

    try:
        _allow_files(silos)
        ports = {name: factory(name, _prefixed(report, name)) for name in silos}
    except SecureFedCoLLMError as error:
        pipe.send(("error", error))
        return
    pipe.send(("ready",))
    answer: tuple[str, ...]
    while True:
        try:
            silo, frame = pipe.recv(), pipe.recv_bytes()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            answer, reply = ("reply", silo), ports[silo].step(frame)
        except KeyboardInterrupt:
            return
        except Exception as error:  # a bug in one silo is that silo's dropout, not the run's end
            log.error("%s failed: %s", silo, traceback.format_exc())
            answer, reply = ("failed", silo, f"internal error {type(error).__name__}"), b""
        del frame
        try:
            pipe.send(answer)
            if answer[0] == "reply":
                pipe.send_bytes(reply)
        except OSError:  # nobody waits for it any more
            return
        del reply


def _allow_files(silos: Sequence[str]) -> None:
    """Raises: StateError, if this process may open too few files for so many parties."""
    try:
        allow_open_files(OPEN_FILES * len(silos))
    except StateError:
        if len(silos) > _FEW:
            raise


def _some(names: Sequence[str]) -> str:
    """The first of them, for a message."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _prefixed(progress: Progress, silo: str) -> Progress:
    def report(done: int, total: int, text: str) -> None:
        progress(done, total, f"{silo}: {text}")

    return report
