"""Frames in pieces, over a carrier that may break: both ends of a silo's long-running port.

A carrier between organisations (:mod:`.flare`) loses connections, restarts its own processes and
takes an hour's reply for a dead peer. So a frame travels as a *parcel*: pushed in chunks, processed
once, its reply pulled in chunks. Every call is small, short and safe to repeat; what a silo has
answered once it answers again, and never works out twice.

:class:`SiloInbox` is the silo's end, :func:`deliver` the coordinator's; neither knows the carrier.
:class:`Door` and :func:`knock` carry the calls between a participant's own process and the thin one
that the carrier starts, through a socket that only the same user of the same machine can open.

Adversary of :class:`SiloInbox`: the server, which chooses every argument.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from securefedcollm.errors import SecureFedCoLLMError, TransportError
from securefedcollm.federation.engines import SiloPort

log = logging.getLogger(__name__)

CHUNK: Final = 2 << 20
"""Bytes a call carries at most; the carrier holds a few copies of each."""

PATIENCE: Final = 10.0
"""Seconds that one pull waits for a reply that is still being worked out."""

GRACE: Final = 20.0
"""Seconds for which a silo that cannot be reached is tried again."""


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """Names one request: the coordinator's session (16 bytes), and its number in it."""

    session: bytes
    number: int


class Pulled(msgspec.Struct, frozen=True, array_like=True):
    """What a pull brought. ``total``: length of the whole reply, or -1 if it is not there yet."""

    total: int
    chunk: bytes


class Unknown(SecureFedCoLLMError):  # noqa: N818 - an answer, not a failure
    """The silo does not hold this parcel: it was restarted, or has turned to another."""


class SiloLink(Protocol):
    """The calls by which a coordinator reaches one silo.

    Raises (both):
        TransportError: the silo cannot be reached now.
        Unknown: it holds no such parcel.
    """

    def push(self, parcel: Parcel, total: int, offset: int, chunk: bytes) -> int:
        """Hand over a piece of a request; returns how many bytes of it the silo now has."""
        ...

    def pull(self, parcel: Parcel, offset: int, patience: float) -> Pulled:
        """Ask for the reply from ``offset``, waiting up to ``patience`` seconds for it."""
        ...


class SiloInbox:
    """The silo's end. Implements :class:`SiloLink`; :meth:`serve` does the work.

    Args:
        port: what answers the frames. Only :meth:`serve`'s thread touches it.
        limit: bytes of the largest request that can make sense; a longer one is refused before it
            is held.
    """

    def __init__(self, port: SiloPort, limit: int) -> None:
        self._port = port
        self._limit = limit
        self._changed = threading.Condition()
        self._parcel = Parcel(b"", -1)
        self._frame = bytearray()
        self._total = 0
        self._reply: bytes | None = None
        self._attending = 0
        self._work: queue.SimpleQueue[tuple[Parcel, bytes]] = queue.SimpleQueue()

    def push(self, parcel: Parcel, total: int, offset: int, chunk: bytes) -> int:
        """See :class:`SiloLink`. A chunk that is there already, or comes too early, is left."""
        if not 0 < total <= self._limit or len(parcel.session) != 16:
            raise TransportError(
                f"the server announced a frame of {total} bytes, {self._limit} are the most",
                hint="nothing was received; do both sides run the same study?",
            )
        with self._changed:
            self._turn_to(parcel, total)
            if offset == len(self._frame) < self._total == total:
                self._frame += chunk[: total - offset]
                if len(self._frame) == total:
                    self._work.put((parcel, bytes(self._frame)))
                    self._frame = bytearray()
                    self._total = 0
                    return total
            return len(self._frame) if self._total else total

    def _turn_to(self, parcel: Parcel, total: int) -> None:
        if parcel == self._parcel:
            return
        if parcel.session == self._parcel.session and parcel.number < self._parcel.number:
            raise Unknown(f"request {parcel.number} is over")
        self._parcel, self._frame, self._total, self._reply = parcel, bytearray(), total, None

    def pull(self, parcel: Parcel, offset: int, patience: float) -> Pulled:
        """See :class:`SiloLink`."""
        deadline = time.monotonic() + min(patience, PATIENCE)
        with self._changed:
            while parcel == self._parcel and not self._total and self._reply is None:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            if parcel != self._parcel or self._total:
                raise Unknown("no such request is here")
            if self._reply is None:
                return Pulled(-1, b"")
            return Pulled(len(self._reply), self._reply[max(0, offset) :][:CHUNK])

    @contextlib.contextmanager
    def attendance(self) -> Iterator[None]:
        """While the carrier has a job running here."""
        with self._changed:
            self._attending += 1
        try:
            yield
        finally:
            with self._changed:
                self._attending -= 1

    @property
    def attended(self) -> bool:
        """Whether the carrier has a job running here."""
        with self._changed:
            return self._attending > 0

    def serve(self, stop: Callable[[], bool]) -> None:
        """Answer requests in this thread, one after another, until ``stop()``."""
        while not stop():
            try:
                parcel, frame = self._work.get(timeout=0.2)
            except queue.Empty:
                continue
            if parcel != self._parcel:  # nobody waits for it any more
                continue
            reply = self._port.step(frame)
            del frame
            with self._changed:
                if parcel == self._parcel:
                    self._reply = reply
                self._changed.notify_all()


def deliver(
    link: SiloLink, parcel: Parcel, frame: bytes, deadline: float, *, grace: float = GRACE
) -> bytes:
    """Bring ``frame`` to a silo and its reply back, whatever becomes of the connection meanwhile.

    Args:
        deadline: on the monotonic clock.
        grace: seconds for which a silo that cannot be reached is tried again.

    Raises:
        TransportError: it could not be reached, or had not answered by then.
    """
    reachable = time.monotonic()
    while True:
        try:
            _push(link, parcel, frame, deadline)
            return _pull(link, parcel, deadline)
        except Unknown:
            reachable = time.monotonic()  # it was restarted, and gets the request again
        except TransportError as error:
            now = time.monotonic()
            if now > deadline or now - reachable > grace:
                raise
            log.info("%s", error)
        time.sleep(0.2)


def _push(link: SiloLink, parcel: Parcel, frame: bytes, deadline: float) -> None:
    view, there = memoryview(frame), 0
    while there < len(view):
        if time.monotonic() > deadline:
            raise TransportError("did not take the request in time")
        there = link.push(parcel, len(view), there, bytes(view[there : there + CHUNK]))
        if not 0 <= there <= len(view):
            raise TransportError("says that it has more of the request than there is")


def _pull(link: SiloLink, parcel: Parcel, deadline: float) -> bytes:
    from securefedcollm.federation.messages import MAX_FRAME

    parts: list[bytes] = []
    got, total = 0, -1
    while total < 0 or got < total:
        left = deadline - time.monotonic()
        if total < 0 and left <= 0:
            raise TransportError("no reply in time")
        pulled = link.pull(parcel, got, min(PATIENCE, max(0.0, left)))
        total = pulled.total
        if total > MAX_FRAME or (total > got and not pulled.chunk):
            raise TransportError("its reply is too large, or breaks off")
        parts.append(pulled.chunk)
        got += len(pulled.chunk)
    return b"".join(parts)


# ---- between a participant's own process and the thin one of the carrier ----

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_LONGEST: Final = CHUNK + 4096


class Wire:
    """Whole messages over a stream socket: four bytes of length, then msgpack."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        """Raises: OSError if the other end is gone."""
        raw = _encode(message)
        self._connection.sendall(struct.pack(">I", len(raw)) + raw)

    def receive(self) -> Any:
        """Raises: EOFError if the other end is gone; TransportError if it sent no message."""
        (length,) = struct.unpack(">I", self._exactly(4))
        if length > _LONGEST:
            raise TransportError(f"a message of {length} bytes, {_LONGEST} are the most")
        try:
            return _decode(self._exactly(length))
        except msgspec.DecodeError as error:
            raise TransportError(f"a message does not decode ({error})") from None

    def _exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        view, at = memoryview(buffer), 0
        while at < count:
            try:
                got = self._connection.recv_into(view[at:])
            except OSError as error:
                raise EOFError(str(error)) from None
            if not got:
                raise EOFError("the other end is gone")
            at += got
        return bytes(buffer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Door:
    """A socket in a directory that only this user can enter; every visitor gets a thread.

    Adversary: other users of the machine. A visitor of another user id is turned away as well.
    """

    def __init__(self, visit: Callable[[Wire], None]) -> None:
        self._visit = visit
        self._directory = Path(tempfile.mkdtemp(prefix="sfc-"))  # mode 0700, and a short path
        self.path = self._directory / "door"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self._socket.listen(64)
        self._wires: set[Wire] = set()
        threading.Thread(target=self._welcome, name="door", daemon=True).start()

    def _welcome(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if _user_of(connection) != os.getuid():
                connection.close()
                continue
            threading.Thread(target=self._meet, args=(Wire(connection),), daemon=True).start()

    def _meet(self, wire: Wire) -> None:
        self._wires.add(wire)
        try:
            self._visit(wire)
        except (EOFError, OSError, TransportError) as error:
            log.debug("a local connection ended: %s", error)
        finally:
            self._wires.discard(wire)
            wire.close()

    def close(self) -> None:
        """Turn everybody out and remove the socket."""
        self._socket.close()
        for wire in list(self._wires):
            wire.close()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def knock(path: str) -> Iterator[Wire]:
    """Connect to a :class:`Door`.

    Raises:
        OSError: nobody is behind it.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    wire = Wire(connection)
    try:
        connection.connect(path)
        yield wire
    finally:
        wire.close()


def _user_of(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


def answer_calls(inbox: SiloInbox) -> Callable[[Wire], None]:
    """A visit in which ``[method, …]`` is answered from ``inbox``: ``["ok", …]`` or a refusal."""

    def visit(wire: Wire) -> None:
        while True:
            call = wire.receive()
            if call == ["attend"]:
                with inbox.attendance():
                    wire.receive()  # until the carrier's job is over
            wire.send(_answer(inbox, call))

    return visit


def _answer(link: SiloLink, call: Any) -> list[Any]:
    try:
        match call:
            case ["push", bytes(session), int(number), int(total), int(offset), bytes(chunk)]:
                return ["ok", link.push(Parcel(session, number), total, offset, chunk)]
            case ["pull", bytes(session), int(number), int(offset), int() | float() as patience]:
                pulled = link.pull(Parcel(session, number), offset, patience)
                return ["ok", pulled.total, pulled.chunk]
        return ["error", "no such call"]
    except Unknown as error:
        return ["unknown", error.message]
    except TransportError as error:
        return ["error", error.message]


def result_of(answer: Any) -> list[Any]:
    """What a call brought.

    Raises:
        Unknown, TransportError: what the other end said.
    """
    match answer:
        case ["ok", *values]:
            return values
        case ["unknown", str(reason)]:
            raise Unknown(reason[:200])
        case ["error", str(reason)]:
            raise TransportError(reason[:200])
    raise TransportError("an answer that is none")
