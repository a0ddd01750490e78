"""What FLARE's client process is stripped of before it starts.

FLARE asks its authorization policy only about requests whose *sender* says that it should; without
that, a server or another silo could have files of this machine sent to it by a shell command. So
the commands that no job of ours needs are not there at all, and the rest are the server's alone.

Adversary: the server, its administrators, and other silos, whose messages the server passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.defs import CellChannel
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

NEEDED: Final = frozenset(
    {
        "AbortAppProcessor",
        "CancelResourceProcessor",
        "CheckResourceProcessor",
        "ClientStatusProcessor",
        "DeleteRunNumberProcessor",
        "DeployProcessor",
        "NotifyJobStatusProcessor",
        "StartJobProcessor",
    }
)
"""To deploy, start, watch, end and remove a job; none of them reads a file or runs a command."""

_GUARDED: Final = frozenset({CellChannel.CLIENT_MAIN, "_net_manager"})
"""Commands to this process, and FLARE's own network diagnosis, which can stop it."""


def strip_client(name: str) -> None:
    """Leave FLARE's client of ``name`` only what a job of ours needs."""
    kept = [p for p in ClientRequestProcessors.request_processors if type(p).__name__ in NEEDED]
    ClientRequestProcessors.request_processors[:] = kept
    register = CoreCell.register_request_cb

    def guarded(
        cell: Any, channel: str, topic: str, cb: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if channel in _GUARDED:
            cb = _from_server(cb, name)
        return register(cell, channel, topic, cb, *args, **kwargs)

    CoreCell.register_request_cb = guarded


def _from_server(cb: Callable[..., Any], name: str) -> Callable[..., Any]:
    def answer(request: Any, *args: Any, **kwargs: Any) -> Any:
        origin = str(request.get_header(MessageHeaderKey.ORIGIN) or "").split(".")[0]
        if origin not in {"server", name}:
            return make_reply(ReturnCode.UNAUTHENTICATED, "commands are taken from the server only")
        return cb(request, *args, **kwargs)

    return answer
