"""What FLARE loads: objects that pass calls between its wire and our own process's door.

They live in the process that FLARE starts for a job. They know neither keys, models, data nor the
study, and take nothing from the job's arguments: they learn where the door is from the environment,
which the participant's own process set.

Adversary: the server, which wrote the job and every argument.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any, Final

from nvflare.collab import collab

from securefedcollm.errors import TransportError
from securefedcollm.federation.engines.door import Wire, knock
from securefedcollm.federation.engines.flare.processes import DOOR
from securefedcollm.federation.engines.pace import MOST

_CALL_TIMEOUT: Final = 20.0
"""Seconds for a chunk to cross and its answer to come: less than 1 Mbit/s is no connection."""
_NOT_PLAIN: Final = (TypeError, ValueError, OverflowError, RecursionError)
"""Errors from encoding a value that a silo made up."""


class SiloRelay:
    """At a silo: two calls, from the server only, passed on to the silo's own process.

    One more connection stays open as long as the job runs, so that the silo's process knows.
    """

    def __init__(self) -> None:
        threading.Thread(target=_attend, name="attend", daemon=True).start()

    @collab.publish
    def push(self, session: bytes, number: int, total: int, offset: int, chunk: bytes) -> list[Any]:
        """See :class:`securefedcollm.federation.engines.link.SiloLink`."""
        return _pass_on(["push", session, number, total, offset, chunk])

    @collab.publish
    def pull(self, session: bytes, number: int, offset: int, patience: float) -> list[Any]:
        """See :class:`securefedcollm.federation.engines.link.SiloLink`."""
        return _pass_on(["pull", session, number, offset, patience])


_attending = threading.Lock()


def _attend() -> None:
    if not _attending.acquire(blocking=False):  # a job may name the relay many times
        return
    with contextlib.suppress(OSError, EOFError), knock(os.environ[DOOR]) as wire:
        wire.send(["attend"])
        wire.receive()


def _pass_on(call: list[Any]) -> list[Any]:
    # Adversary: another silo. FLARE names the caller from its certificate.
    if collab.caller != "server":
        return ["error", "only the server may call"]
    try:
        with knock(os.environ[DOOR]) as wire:
            wire.send(call)
            answer = wire.receive()
            return list(answer)
    except (OSError, EOFError):
        return ["error", "the silo's own process does not run"]


class CoordinatorRelay:
    """At the server: passes the coordinator's calls on to the silos of this job, until told to end.

    It opens one connection per silo to the coordinator's door, and one for the job itself.
    """

    @collab.main
    def run(self) -> str:
        """The job."""
        silos = {proxy.name: proxy for proxy in collab.clients}
        with contextlib.ExitStack() as stack:
            door = os.environ[DOOR]
            job = stack.enter_context(knock(door))
            number = str(collab.fl_ctx.get_job_id())
            job.send(["job", number, sorted(silos)])
            for name, proxy in silos.items():
                wire = stack.enter_context(knock(door))
                wire.send(["silo", number, name])
                threading.Thread(target=_serve, args=(wire, proxy), daemon=True).start()
            with contextlib.suppress(EOFError):
                job.receive()  # whatever comes, or the end of the coordinator's process, ends it
        return "ended"


def _serve(wire: Wire, proxy: Any) -> None:
    try:
        while True:
            answer = _call(proxy, wire.receive())
            try:
                wire.send(answer)
            except _NOT_PLAIN:  # nothing was sent of it
                wire.send(["error", f"{proxy.name}: answered what is no list of plain values"])
    except (EOFError, OSError, TransportError):
        pass
    finally:
        wire.close()


def _call(proxy: Any, call: Any) -> list[Any]:
    method, *arguments = call
    # A silo at work answers whatever else is called at its next tick.
    patience = float(arguments[-1]) if method == "pull" else MOST
    try:
        return list(getattr(proxy(timeout=_CALL_TIMEOUT + patience), method)(*arguments))
    except Exception as error:  # FLARE has many kinds for what may happen on the way
        return ["error", f"{proxy.name}: {str(error)[:160]}"]
