"""The door between a participant's own process and the thin one that its carrier starts.

It is a socket that only the same user of the same machine can open; it carries whole messages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from securefedcollm.errors import TransportError
from securefedcollm.federation.files import PrivateDirectory

log = logging.getLogger(__name__)

LONGEST: Final = (2 << 20) + 4096
"""The most bytes of a message; a longer one is not read."""

_PLACE_BYTES: Final = 80
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


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
        if length > LONGEST:
            raise TransportError(f"a message of {length} bytes, {LONGEST} are the most")
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

    @property
    def gone(self) -> bool:
        """Whether the other end has closed the connection, and sent nothing more before."""
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def give_up_after(self, seconds: float) -> None:
        """From here on a send or receive that takes longer ends the connection."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Door:
    """A socket in a directory that only this user can enter; every visitor gets a thread.

    Adversary: other users of the machine. A visitor of another user id is turned away as well.
    """

    def __init__(self, visit: Callable[[Wire], None], visitors: int = 64) -> None:
        self._visit = visit
        self._room = threading.BoundedSemaphore(visitors)
        self._closed = False
        self._directory = PrivateDirectory(_short_place(), "sfcollm-")
        self.path = self._directory.path / "door"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self._socket.listen(64)
        self._wires: set[Wire] = set()
        threading.Thread(target=self._welcome, name="door", daemon=True).start()

    def _welcome(self) -> None:
        while not self._closed:
            try:
                self._admit(self._socket.accept()[0])
            except (OSError, RuntimeError) as error:  # too many open files or threads: they pass
                if not self._closed:
                    log.warning("at the local door: %s", error)
                    time.sleep(0.1)

    def _admit(self, connection: socket.socket) -> None:
        if _user_of(connection) != os.getuid():
            connection.close()
            return
        # Whoever comes when the house is full waits. Adversary: a server that parks many calls and
        # makes more: turned away at once, they would tell how busy this process is meanwhile.
        self._room.acquire()
        visit = threading.Thread(target=self._meet, args=(Wire(connection),), daemon=True)
        try:
            if self._closed:
                raise ConnectionAbortedError("the door has closed")
            visit.start()
        except (OSError, RuntimeError):
            connection.close()
            self._room.release()
            raise

    def _meet(self, wire: Wire) -> None:
        self._wires.add(wire)
        try:
            self._visit(wire)
        except (EOFError, OSError, TransportError) as error:
            log.debug("a local connection ended: %s", error)
        finally:
            self._wires.discard(wire)
            wire.close()
            self._room.release()

    def close(self) -> None:
        """Turn everybody out and remove the socket."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for wire in list(self._wires):
            wire.close()
        self._directory.remove()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _short_place() -> Path:
    """Where this user's sockets go: the system's place for them, else one for temporary files.

    A socket's path must be short (107 bytes), so a long TMPDIR is passed over.
    """
    for place in (Path(os.environ.get("XDG_RUNTIME_DIR", "")), Path(tempfile.gettempdir())):
        short = len(os.fsencode(place)) <= _PLACE_BYTES
        if short and place.is_absolute() and _nobody_elses(place) and os.access(place, os.W_OK):
            return place
    return Path("/tmp")  # noqa: S108 - a fresh private directory in it


def _nobody_elses(place: Path) -> bool:
    # Adversary: another user, who owns the place and puts a door of theirs where ours was.
    try:
        found = place.stat()
    except OSError:
        return False
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in {os.getuid(), 0} and bool(not shared or found.st_mode & stat.S_ISVTX)


@contextlib.contextmanager
def knock(path: str) -> Iterator[Wire]:
    """Connect to a :class:`Door`.

    Adversary: another user of the machine, who puts a socket where ours was before, to be told
    what was meant for us.

    Raises:
        OSError: nobody is behind it, or another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    wire = Wire(connection)
    try:
        connection.connect(path)
        if _user_of(connection) != os.getuid():
            raise ConnectionRefusedError("another user is behind this door")
        yield wire
    finally:
        wire.close()


def _user_of(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])
