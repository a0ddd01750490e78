"""The coordinator's engine over FLARE: one FLARE job after another carries one run.

A FLARE job ends when any of its processes is killed, and a silo that comes back cannot enter it. So
the run is not the job. When a job is gone, the engine submits the next one, with the silos that are
there, and delivers unfinished requests again. A silo repeats the answer that it has given.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from securefedcollm.errors import SecureFedCoLLMError, TransportError
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.engines.door import Door, Wire
from securefedcollm.federation.engines.flare.administration import Administration
from securefedcollm.federation.engines.flare.kit import Kit
from securefedcollm.federation.engines.flare.presence import Presence, Waits
from securefedcollm.federation.engines.flare.processes import (
    DOOR,
    FlareProcess,
    require_flare,
)
from securefedcollm.federation.engines.link import PATIENCE, Pulled, deliver, result_of
from securefedcollm.federation.engines.requests import Parcel, new_session
from securefedcollm.federation.messages import MAX_FRAME
from securefedcollm.federation.workload import Progress

log = logging.getLogger(__name__)

_JOB_START: Final = 60.0
_TRIES: Final = 3
_PAUSE: Final = 5.0
_CALL: Final = 60.0
"""Seconds for one call, the relay's own timeouts included."""
_ALIVE: Final = 20.0
"""Seconds since its last heartbeat (they come every 5) after which a silo counts as gone."""


class Kits(NamedTuple):
    """The installed start-up kits of the server's machine: its own, and that of whoever submits
    FLARE's jobs."""

    server: Kit
    lead: Kit


class FlareEngine:
    """See the module's docstring. Use as a context manager, in the main thread.

    Args:
        silos: their names on the roster, which are their names in FLARE.
        kits: the server's installed kit, and that of whoever submits jobs.
        waits: how many silos a job needs, and how long it waits for them.
        sign: (silo, parcel, frame) → the frame's header: :func:`~..requests.sign_request`.
        session: of this run of the process; greater than every one before (:func:`new_session`).
        progress: hears how many silos are connected.
        say: hears of every FLARE job that begins, and with whom.
        largest: silo → bytes of the largest reply that can make sense; else :data:`MAX_FRAME`.
    """

    def __init__(
        self,
        silos: tuple[str, ...],
        *,
        kits: Kits,
        waits: Waits,
        sign: Callable[[str, Parcel, bytes], bytes],
        session: bytes | None = None,
        progress: Progress,
        say: Callable[[str], None] = lambda text: None,
        largest: Mapping[str, int] | None = None,
    ) -> None:
        require_flare()
        self._largest = largest or {}
        self._sign = sign
        self._say = say
        self._flare = Administration(kits.lead, self._require_open)
        self._presence = Presence(
            silos,
            waits,
            connected=self._connected,
            end_job=self._end_job,
            progress=progress,
            say=say,
        )
        self._session = session or new_session()
        self._closed = False
        self._number = 0
        self._changed = threading.Condition()
        self._job: str = ""
        self._members: frozenset[str] = frozenset()
        self._lost: dict[str, float] = {}
        """Silo → when it could no longer be reached; a later heartbeat brings it back."""
        self._wires: dict[str, _SiloWire] = {}
        self._job_wire: Wire | None = None
        self._restarting = threading.Lock()
        self._admitting = threading.Lock()
        self._gave_up = -_PAUSE
        """When a job last failed to begin: the other deliveries do not each try again."""
        self._door = Door(self._visit, visitors=512)
        self._process = FlareProcess(
            "server",
            kits.server.workspace,
            name=kits.server.name,
            org=kits.server.org,
            env={DOOR: str(self._door.path)},
        )

    @property
    def running(self) -> bool:
        """Whether FLARE's server runs."""
        return self._process.running

    def require_running(self) -> None:
        """Raises: TransportError, if FLARE's server has ended."""
        self._process.require_running()

    # ---- the engine ----

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        """See :class:`securefedcollm.federation.engines.Engine`. Several threads may call it at
        once, for different silos.

        Raises:
            TransportError: too few silos are connected for a FLARE job at all.
        """
        if not frames:
            return {}
        deadline = time.monotonic() + timeout
        with self._admitting:
            self._number += 1
            parcel = Parcel(self._session, self._number)
            self._admit(frames)
        with ThreadPoolExecutor(len(frames)) as pool:
            replies = pool.map(
                lambda silo: self._deliver(silo, frames[silo], parcel, deadline), frames
            )
            try:
                return dict(zip(frames, replies, strict=True))
            except BaseException:  # Ctrl-C: the threads end with their next call
                self._closed = True
                self._lose(self._job)
                raise

    def _deliver(self, silo: str, frame: bytes, parcel: Parcel, deadline: float) -> bytes | Failure:
        began = time.monotonic()
        with self._changed:
            if self._job_wire is not None and silo not in self._members:
                return Failure("is not connected", waited=0.0)
        link = _Reconnecting(self, silo)
        try:
            limit = self._largest.get(silo, MAX_FRAME)
            header = self._sign(silo, parcel, frame)
            return deliver(link, parcel, frame, deadline, header=header, limit=limit)
        except TransportError as error:
            with self._changed:
                self._lost[silo] = link.last_try
                self._members -= {silo}  # until the next job
                if wire := self._wires.pop(silo, None):
                    wire.over.set()
            return Failure(error.message, waited=time.monotonic() - began)

    def _admit(self, frames: Mapping[str, bytes]) -> None:
        """Begin a new job if there is none, or one of the silos asked is there and not in it."""
        with self._changed:
            running, members = self._job_wire is not None, self._members
            missing = set(frames) - members
        if not self._presence.began:
            self.begin_job(set(frames))
        elif not running:
            self.begin_job(set(frames) & (members | self._connected()))
        elif missing and (back := missing & self._connected()):
            log.info("a new FLARE job, to admit %s", ", ".join(sorted(back)))
            self.begin_job(set(frames) & (members | back))

    # ---- FLARE jobs ----

    def begin_job(self, wanted: set[str] | frozenset[str], gone: str | None = None) -> None:
        """Submit a job for the silos that are connected, and wait until it runs.

        Args:
            wanted: silos to wait for, for a while.
            gone: the job that was found to be gone; if another has begun since, all is well.

        Raises:
            TransportError: FLARE's server has ended, or fewer than the minimum came.
        """
        with self._restarting:
            with self._changed:
                if gone is not None and (self._job != gone and self._job_wire is not None):
                    return
            if time.monotonic() - self._gave_up < _PAUSE:
                raise TransportError("too few silos are connected")
            try:
                self._begin_job(wanted)
            except TransportError:
                self._gave_up = time.monotonic()
                raise

    def _begin_job(self, wanted: set[str] | frozenset[str]) -> None:
        self._end_job()
        present = self._presence.wait_for(wanted)
        for _ in range(_TRIES):
            if self._started(self._flare.submit(present), present):
                self._require_open()
                self._presence.began = True
                self._say(f"connected: {', '.join(sorted(present))}")
                return
            self._end_job()  # somebody in it had just gone; now FLARE knows
            present = self._presence.wait_for(frozenset())
        raise TransportError(
            f"no FLARE job began within {_TRIES * _JOB_START:.0f} s",
            hint="see flare.log at the server and at the silos",
        )

    def rejoined(self, silos: Set[str], count: int, most: float = math.inf) -> bool:
        """See :meth:`~.presence.Presence.rejoined`."""
        return self._presence.rejoined(silos, count, most)

    def arrived(self, silos: Set[str], most: float) -> Set[str]:
        """See :meth:`~.presence.Presence.arrived`."""
        return self._presence.arrived(silos, most)

    def _started(self, job: str, members: set[str]) -> bool:
        """Wait until the job's relay has come, with a connection for each of its silos."""
        with self._changed:
            self._job, self._members = job, frozenset(members)
            return self._changed.wait_for(
                lambda: (
                    self._closed
                    or (self._job_wire is not None and set(self._wires) >= self._members)
                ),
                _JOB_START,
            )

    def _end_job(self) -> None:
        """Let the running job end: its relay returns when it hears anything."""
        with self._changed:
            wire, job = self._job_wire, self._job
            for silo in self._wires.values():
                silo.over.set()
            self._job_wire, self._wires = None, {}
            self._job, self._members = "", frozenset()
        if not job:
            return
        if wire is None:
            self._flare.abort(job)
        else:
            with contextlib.suppress(OSError):
                wire.send(["end"])
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # the silos' places are free once it is over
            if self._flare.finished(job):
                return
            time.sleep(0.3)

    def _connected(self) -> set[str]:
        seen, now = self._flare.seen(), time.time()
        return {
            name
            for name, last in seen.items()
            if now - last < _ALIVE and last > self._lost.get(name, 0.0)
        }

    def _require_open(self) -> None:
        if self._closed:
            raise _ClosedError("the engine is closed")
        self._process.require_running()

    # ---- the relay of the job, behind the door ----

    def _visit(self, wire: Wire) -> None:
        match wire.receive():
            case ["job", str(job), list()]:
                with self._changed:
                    self._changed.wait_for(lambda: self._job == job, 30)
                    if self._job != job:
                        return
                    self._job_wire = wire
                    self._changed.notify_all()
                try:
                    wire.receive()
                finally:
                    self._lose(job)
            case ["silo", str(job), str(name)]:
                with self._changed:
                    self._changed.wait_for(lambda: self._job == job, 30)
                    if self._job != job or name not in self._members:
                        return
                    wire.give_up_after(_CALL)
                    silo = self._wires[name] = _SiloWire(wire)
                    self._changed.notify_all()
                silo.over.wait()

    def _lose(self, job: str) -> None:
        with self._changed:
            if self._job == job:
                self._job_wire = None
                for silo in self._wires.values():
                    silo.over.set()
                self._wires = {}
            self._changed.notify_all()

    def reach(self, silo: str) -> _SiloWire:
        """The connection to ``silo`` in the running job, beginning another job if that is gone.

        Raises:
            TransportError: it is not connected.
        """
        with self._changed:
            job, running = self._job, self._job_wire is not None
        self._require_open()
        if not running:
            self.begin_job(frozenset(), gone=job)
        with self._changed:
            wire = self._wires.get(silo)
        if wire is None:
            raise TransportError("is not connected")
        return wire

    def close(self) -> None:
        """End the job and FLARE's server; at once, if an exchange was interrupted."""
        try:
            self._end_job()
        except SecureFedCoLLMError as error:
            log.info("%s", error)
        self._closed = True
        self._flare.close()
        self._process.stop()
        self._door.close()

    def __enter__(self) -> FlareEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ClosedError(SecureFedCoLLMError):
    """No further call: the coordinator was interrupted."""


class _SiloWire:
    """The relay's connection for one silo; one call at a time."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.Lock()
        self.over = threading.Event()

    def call(self, *call: Any) -> list[Any]:
        try:
            with self._lock:
                self._wire.send(list(call))
                answer = self._wire.receive()
        except (OSError, EOFError, TransportError):
            # Adversary: a silo whose answer is longer than any may be. Its rest is still to come.
            self.over.set()
            raise TransportError("the connection broke") from None
        return result_of(answer)


class _Reconnecting:
    """A :class:`~..link.SiloLink` that goes on in the next job."""

    def __init__(self, engine: FlareEngine, silo: str) -> None:
        self._engine = engine
        self._silo = silo
        self.last_try = time.time()
        """When the newest call began. Had it failed: the silo was gone by the end of it."""

    def push(self, parcel: Parcel, total: int, offset: int, chunk: bytes) -> int:
        self.last_try = time.time()
        wire = self._engine.reach(self._silo)
        values = wire.call("push", parcel.session, parcel.number, total, offset, chunk)
        match values:
            case [int(there)]:
                return there
        raise TransportError("answered something else than it was asked")

    def pull(self, parcel: Parcel, offset: int, patience: float) -> Pulled:
        self.last_try = time.time()
        wire = self._engine.reach(self._silo)
        values = wire.call("pull", parcel.session, parcel.number, offset, min(patience, PATIENCE))
        match values:
            case [int(total), bytes(chunk)]:
                return Pulled(total, chunk)
        raise TransportError("answered something else than it was asked")
