"""Strips FLARE's processes before they start: parent and job, at both ends.

FLARE is built to be administered from afar: it runs commands and code, reads configuration in three
languages and connects to addresses that a message names. A carrier needs none of that. Its open
policy is not enough, since much of it never asks the policy, or asks only when the sender says so.

Adversary: at a silo the server, its administrators, and other silos; at the server every silo.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Final

import psutil
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers import grpc_driver
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.sfm.conn_manager import ConnManager
from nvflare.fuel.f3.sfm.constants import HandshakeKeys
from nvflare.fuel.f3.stream_cell import StreamCell
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.fuel.utils.fobs import lobs
from nvflare.fuel.utils.fobs.datum import Datum, DatumManager, DatumType
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.utils import job_launcher_utils

from securefedcollm.federation.engines.flare.job import is_job
from securefedcollm.federation.engines.flare.launching import launch_own, take_one_job

log = logging.getLogger(__name__)

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

_DIAGNOSIS: Final = "_net_manager"
"""FLARE's own network diagnosis: it stops processes, lists settings and threads."""
_SERVER: Final = "server"


def strip(role: str, name: str, *, job: bool, largest: int) -> None:
    """Leave FLARE's process only what a job of ours needs.

    Args:
        role: ``server`` or ``client``.
        name: the client's name in FLARE.
        job: whether it is the process that FLARE starts for a job.
        largest: the most bytes of a message.
    """
    _read_json_only()
    _name_jobs_by_uuid()
    _import_no_code()
    _carry_no_files()
    _connect_to_nobody_else()
    _believe_no_new_names(role)
    _look_at_no_processes()
    _limit_messages(largest)
    family = name if role == "client" else _SERVER
    _hear(family, role, job=job)
    _close_channels(family, role, job=job)
    if not job:
        launch_own(role, family)
    if role == "client" and not job:
        kept = [p for p in ClientRequestProcessors.request_processors if type(p).__name__ in NEEDED]
        ClientRequestProcessors.request_processors[:] = kept
        take_one_job()


@functools.cache
def strip_session(largest: int) -> None:
    """The same, once, for the session by which the server's own process submits jobs.

    Adversary: FLARE's server process, taken over. It is within the wall, and this one is not.
    """
    _read_json_only()
    _carry_no_files()
    _connect_to_nobody_else()
    _believe_no_new_names("client")
    _limit_messages(largest)
    _close_channels(_SERVER, "server", job=True)


def _limit_messages(largest: int) -> None:
    grpc_driver.GRPC_DEFAULT_OPTIONS[:] = [
        (f"grpc.max_{way}_message_length", largest) for way in ("send", "receive")
    ]


def _read_json_only() -> None:
    """Adversary: a HOCON or OmegaConf file, which may include any file of the machine."""
    loaders = ConfigFactory._fmt2Loader
    for language in set(loaders) - {ConfigFormat.JSON}:
        del loaders[language]


def _name_jobs_by_uuid() -> None:
    """Adversary: a job called like a directory of the kit, which is deployed over it or removed."""

    def check(job: Any) -> str:
        if not is_job(job):
            raise ValueError(f"{str(job)[:80]!r} is no job's number")
        return str(job)

    Workspace._check_job_id = staticmethod(check)


def _import_no_code() -> None:
    """A job's ``custom`` directory is on nobody's path."""
    job_launcher_utils.refresh_custom_dir_import_path = lambda folder: None
    job_launcher_utils.add_custom_dir_to_path = lambda folder, env: None


def _connect_to_nobody_else() -> None:
    """Adversary: a message that names an address. FLARE would connect to it in the clear, and take
    for the server whoever calls itself so there."""
    CoreCell._add_adhoc_connector = lambda cell, to_cell, url: None


def _carry_no_files() -> None:
    """FLARE's encoding has values that stand for a file: the encoder reads it, the decoder writes
    it. Other values are fetched, without limit, from whomever they name.

    Adversary: whoever sends a value that the other side passes on, as FLARE does with the cookies
    of a task and with what a silo says of its interface. It would come back with the file in it.
    """
    add = DatumManager.add_datum

    def add_bytes(manager: DatumManager, datum: Datum) -> None:
        if datum.datum_type not in {DatumType.TEXT, DatumType.BLOB} or datum.dot != 0:
            raise ValueError("a message that stands for a file, or is to be fetched")
        add(manager, datum)

    def nowhere() -> str:
        raise ValueError("a message that brings a file")

    DatumManager.add_datum = add_bytes
    lobs.get_datum_dir = nowhere


def _believe_no_new_names(role: str) -> None:
    """Whoever a silo's process has called over gRPC is the server, whatever it says it is; whoever
    calls the server over gRPC is no process of the server's, which are called from within; and
    nobody changes the name that a connection began with.

    Adversary: a server that calls itself as this silo's own process, whose certificate FLARE
    compares only where somebody connects to it; a silo with a certificate for the name of the
    server's host.
    """
    update = ConnManager.update_endpoint

    def named(manager: Any, connection: Any, data: dict[str, Any]) -> None:
        connector, known = connection.conn.connector, connection.sfm_endpoint
        name = data.get(HandshakeKeys.ENDPOINT_NAME)
        server = _family(FQCN.normalize(str(name))) == _SERVER
        false = server
        if role == "client":
            false = connector.mode == Mode.ACTIVE and not server
        over_grpc = str(connector.params.get(DriverParams.SCHEME.value)).startswith("grpc")
        if (false and over_grpc) or (known is not None and known.endpoint.name != name):
            connection.conn.close()
            raise CommError(CommError.BAD_DATA, f"a neighbour that calls itself {str(name)[:80]!r}")
        update(manager, connection, data)

    ConnManager.update_endpoint = named


def _look_at_no_processes() -> None:
    """A job's process must tell whether its parent is there without ``/proc``, which the wall
    hides; else FLARE's watching thread would end."""

    def exists(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    psutil.pid_exists = exists


def _hear(family: str, role: str, *, job: bool) -> None:
    """Drop messages that come by way of an impossible sender, or are for somebody else."""
    receive = CoreCell._process_received_msg

    def received(cell: Any, endpoint: Any, connection: Any, message: Any) -> None:
        message.remove_header(MessageHeaderKey.CONN_URL)
        by = _family(endpoint.name)
        origin = _family(message.get_header(MessageHeaderKey.ORIGIN))
        target = _family(message.get_header(MessageHeaderKey.DESTINATION))
        if role == "client":
            heard = _client_hears(family, by, origin, target)
        else:
            heard = _server_hears(by, origin, target, job=job)
        if heard:
            receive(cell, endpoint, connection, message)
        else:
            log.warning("refused a message of %r by way of %r for %r", origin, by, target)

    CoreCell._process_received_msg = received


def _family(name: Any) -> str:
    """Cells of one participant are called ``NAME``, ``NAME.JOB`` and so on."""
    return str(name).split(".", 1)[0][:80]


def _client_hears(me: str, by: str, origin: str, target: str) -> bool:
    """The neighbour's name is known (:func:`_believe_no_new_names`, and FLARE compares that of who
    connects with its certificate); who sent a message and to whom is a claim.

    Adversary: a server that speaks as this silo's other process; other silos by way of it.
    """
    if by == _SERVER:
        return origin == _SERVER and target == me
    return by == me and {origin, target} <= {me, _SERVER}


def _server_hears(by: str, origin: str, target: str, *, job: bool) -> bool:
    """Adversary: a silo that speaks as another, or to another."""
    if job:  # its one neighbour is the parent, which has judged already
        return by == target == _SERVER
    return origin == by and _SERVER in {by, target}


def _close_channels(family: str, role: str, *, job: bool) -> None:
    """The diagnosis answers nobody, and a job's process is commanded by its parent alone."""
    closed = {_DIAGNOSIS}
    if role == "client" and not job:
        closed.add(CellChannel.AUX_COMMUNICATION)  # events and streams for add-ons that we have not
    register, register_blob = CoreCell.register_request_cb, StreamCell.register_blob_cb

    def guarded(
        cell: Any, channel: str, topic: str, cb: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if channel in closed:
            return None
        if channel == CellChannel.CLIENT_COMMAND:
            cb = _from(family, cb)
        return register(cell, channel, topic, cb, *args, **kwargs)

    def blob_guarded(cell: Any, channel: str, topic: str, *args: Any, **kwargs: Any) -> Any:
        return None if channel in closed else register_blob(cell, channel, topic, *args, **kwargs)

    CoreCell.register_request_cb = guarded
    StreamCell.register_blob_cb = blob_guarded


def _from(commander: str, cb: Callable[..., Any]) -> Callable[..., Any]:
    def answer(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.get_header(MessageHeaderKey.ORIGIN) != commander:
            return make_reply(ReturnCode.UNAUTHENTICATED, f"commands come from {commander} only")
        return cb(request, *args, **kwargs)

    return answer
