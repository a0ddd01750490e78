"""What FLARE's encoding can be made to do, in a process that is stripped or, for comparison, not.

Words: PLACE client|server|session|as-it-comes. Prints a JSON object: attack → whether it worked.
"""

# ruff: noqa: E402 - stripped before FLARE is imported, as its processes are
from __future__ import annotations

import json
import sys
import threading
import uuid
from pathlib import Path

place, how = Path(sys.argv[1]), sys.argv[2]
if how == "session":
    from securefedcollm.federation.engines.flare.hardening import strip_session

    strip_session(16 << 20)
elif how != "as-it-comes":
    from securefedcollm.federation.engines.flare.hardening import strip

    strip(how, "silo-1", job=how == "client", largest=16 << 20)

from nvflare.apis.shareable import Shareable, make_copy
from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.grpc_driver import GrpcDriver, StreamConnection
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.sfm.conn_manager import ConnManager
from nvflare.fuel.f3.sfm.sfm_conn import SfmConnection
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import lobs
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

nvflare_fobs_initialize()
SECRET = b"private, of the silo"


class MadeUp:
    """Encoded as FLARE's own Datum, with what the sender likes in it."""

    def __init__(self, kind: object, value: object) -> None:
        self.datum_id, self.datum_type, self.dot, self.value = str(uuid.uuid4()), kind, 0, value


MadeUp.__module__, MadeUp.__qualname__, MadeUp.__name__ = (
    "nvflare.fuel.utils.fobs.datum",
    "Datum",
    "Datum",
)


def reads_a_file() -> bool:
    """A cookie of a task, which FLARE sends back; and the copy of a task that is asked for."""
    private = place / "records.jsonl"
    private.write_bytes(SECRET)
    task = Shareable()
    task.add_cookie("c", MadeUp("x", str(private)))
    received = fobs.loads(bytes(fobs.dumps(task)))
    reply = Shareable()
    reply.set_cookie_jar(received.get_cookie_jar())
    return any(SECRET in bytes(fobs.dumps(said)) for said in (reply, make_copy(received)))


def writes_a_file() -> bool:
    """A message that brings a file, which lands where its number says."""
    number = uuid.UUID("11111111-2222-4333-8444-555555555555")
    if how == "as-it-comes":
        lobs.DEFAULT_DATUM_DIR = str(place)
    header = lobs._Header(lobs.MARKER_DATUM_FILE, 0, 16 + len(SECRET))
    fobs.loads(lobs.dump_to_bytes({}, False) + header.to_bytes() + number.bytes + SECRET)
    return (place / f"{number}.dat").exists()


class Queue:
    def append(self, item: object) -> None: ...
    def close(self) -> None: ...


def connected(mode: Mode, peer: str, me: str, certified: dict[str, str], *names: str) -> bool:
    """Whether the one at the other end of a new connection is believed its names, in turn."""
    params = {"scheme": "grpc", "secure": True, DriverParams.CONNECTION_SECURITY.value: "mtls"}
    connector = ConnectorInfo("CH1", GrpcDriver(), params, mode, 0, 0, False, threading.Event())
    properties = {DriverParams.PEER_ADDR.value: "peer:8002", DriverParams.PEER_CN.value: peer}
    stream = StreamConnection(Queue(), connector, properties, "CLIENT")
    manager = ConnManager(Endpoint(me), CellIdentityResolver(me, certified))
    connection = SfmConnection(stream, manager.local_endpoint)
    for name in names:
        manager.update_endpoint(connection, {"endpoint_name": name})
    return bool(connection.sfm_endpoint.endpoint.name == names[-1].strip())


JOB = "11111111-2222-4333-8444-555555555555"


def is_believed() -> bool:
    """A server that first says its name and then this silo's."""
    return connected(Mode.ACTIVE, "N/A", f"silo-1.{JOB}", {}, "server", "silo-1")


def is_believed_as_the_server() -> bool:
    """A silo whose certificate bears the name of the server's host."""
    host = {"server": "fl.example.org"}
    return connected(Mode.PASSIVE, "fl.example.org", "server", host, f" server.{JOB}")


found = {}
for attack in (reads_a_file, writes_a_file, is_believed, is_believed_as_the_server):
    try:
        found[attack.__name__] = attack()
    except Exception as error:
        found[attack.__name__] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
sys.stdout.flush()
