"""Frames in pieces, over a carrier that may break: both ends of a silo's long-running port.

A carrier between organisations (:mod:`.flare`) loses connections, restarts its own processes and
takes an hour's reply for a dead peer. So a frame travels as a *parcel*: pushed in chunks, processed
once, its reply pulled in chunks. Every call is small, short and safe to repeat; a silo repeats an
answer that it has given, and never works it out twice.

:class:`SiloInbox` is the silo's end, :func:`deliver` the coordinator's; neither knows the carrier.
Calls reach the inbox through a :class:`~.door.Door`.

Adversary of :class:`SiloInbox`: the server, which chooses every argument.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar

import msgspec

from securefedcollm.errors import CryptoError, SecureFedCoLLMError, StateError, TransportError
from securefedcollm.federation.engines import SiloPort
from securefedcollm.federation.engines.door import LONGEST, Wire
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.engines.requests import (
    HEADER_BYTES,
    SESSION_BYTES,
    Followed,
    Parcel,
)
from securefedcollm.federation.messages import MAX_FRAME
from securefedcollm.primitives import sha256

log = logging.getLogger(__name__)

CHUNK: Final = LONGEST - 4096
"""The most bytes that a call carries, 2 MiB; the carrier holds a few copies of each."""

SLOWEST: Final = 125_000
"""Bytes a second at which a reply must come once it has begun: 1 Mbit/s."""
PATIENCE: Final = 10.0
"""Seconds that one pull waits for a reply that is still being worked out."""

GRACE: Final = 20.0
"""Seconds during which to retry a silo that cannot be reached."""

_T = TypeVar("_T")


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

    It holds nothing, and displaces nothing, before it has checked the server's signature on a
    request's header. A pull is not signed: it changes nothing, and the carrier sees replies anyway.

    Args:
        port: what answers the frames. Only :meth:`serve`'s thread touches it.
        limit: bytes of the largest frame that can make sense.
        check: (parcel, length of the frame, header) → the frame's SHA-256, or CryptoError:
            :func:`~.requests.check_header`.
        followed: what was begun before, in earlier processes too.
        pace: while a request is being worked out, nothing is answered but at its ticks; None where
            the time of replies is not hidden.
    """

    def __init__(
        self,
        port: SiloPort,
        limit: int,
        check: Callable[[Parcel, int, bytes], bytes],
        followed: Followed,
        pace: Pace | None = None,
    ) -> None:
        self._port, self._pace = port, pace
        self._check = check
        self._limit = limit
        self._followed = followed
        self._changed = threading.Condition()
        self._parcel = Parcel(b"", -1)
        self._digest = b""
        self._frame = bytearray()
        self._total = 0
        """Bytes of the request that is arriving, with its header; 0: none is."""
        self._reply: bytes | None = None
        self._attending = 0
        self._pending: tuple[Parcel, bytes] | None = None
        """At most one: a request that is superseded before it begins is forgotten."""
        self._working = False
        self._arrived = 0
        """How many requests were complete."""

    @property
    def _busy(self) -> bool:
        return self._working or self._pending is not None

    def quiet(self) -> None:
        """While a request is being worked out, wait for its reply, or for a tick.

        Every call does, before it is answered or refused: in a time that the server did not choose.
        """
        if self._pace is None:
            return
        came = time.monotonic()
        with self._changed:
            arrived = self._arrived
            while self._busy and arrived == self._arrived:
                left = self._pace.after(came) - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def push(self, parcel: Parcel, total: int, offset: int, chunk: bytes) -> int:
        """See :class:`SiloLink`. It ignores a chunk that is there already, or comes too early."""
        self.quiet()
        length = total - HEADER_BYTES
        if not 0 <= length <= self._limit or len(parcel.session) != SESSION_BYTES:
            raise TransportError(
                f"the server announced a frame of {length} bytes, {self._limit} are the most",
                hint="nothing was received; do both sides run the same study?",
            )
        with self._changed:
            if parcel != self._parcel:
                self._require_newest(parcel)
                if offset:
                    return 0
                self._turn_to(parcel, total, chunk[:HEADER_BYTES])
                self._frame += chunk[HEADER_BYTES:total]
            elif offset == self._received and total == self._total:
                self._frame += chunk[: total - offset]
            if self._total and self._received == self._total:
                self._complete()
            return self._received if self._total else total

    @property
    def _received(self) -> int:
        return HEADER_BYTES + len(self._frame)

    def _require_newest(self, parcel: Parcel) -> None:
        # Adversary: somebody who has recorded requests, to have them worked out again.
        newest = max(self._parcel, self._followed.newest)
        if parcel.session < newest.session:
            raise TransportError(
                "has followed a later session of this server than the one that asks",
                hint="was the server's home restored, and its clock set back?",
            )
        if parcel < newest:
            raise Unknown(f"request {parcel.number} is over")

    def _turn_to(self, parcel: Parcel, total: int, header: bytes) -> None:
        try:
            digest = self._check(parcel, total - HEADER_BYTES, header)
        except CryptoError:
            log.warning("refused a request that the server of the study did not sign")
            raise TransportError(
                "refuses a request that the server of the study did not sign"
            ) from None
        self._parcel, self._digest, self._total = parcel, digest, total
        self._frame, self._reply, self._pending = bytearray(), None, None

    def _complete(self) -> None:
        frame, self._frame = bytes(self._frame), bytearray()
        if sha256(frame) != self._digest:
            raise TransportError("received another request than the server signed")
        self._total, self._pending = 0, (self._parcel, frame)
        self._arrived += 1
        if self._pace is not None:
            self._pace.begin()
        self._changed.notify_all()

    def pull(self, parcel: Parcel, offset: int, patience: float) -> Pulled:
        """See :class:`SiloLink`."""
        self.quiet()
        deadline = time.monotonic() + min(patience, PATIENCE)
        with self._changed:
            while parcel == self._parcel and not self._total and self._reply is None:
                if self._pace is not None and self._busy:  # a tick came first
                    break
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            if parcel != self._parcel or self._total:
                raise Unknown("no such request is here")
            if self._reply is None:
                return Pulled(-1, b"")
            begin = max(0, offset)
            return Pulled(len(self._reply), self._reply[begin : begin + CHUNK])

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
        """Answer requests in this thread, one after another, until ``stop()``.

        Raises:
            StateError: one could not be worked out, for an outside cause: no memory, no disk.
        """
        while not stop():
            with self._changed:
                if self._pending is None:
                    self._changed.wait(0.2)
                work, self._pending = self._pending, None
                self._working = work is not None
            if work is None:
                continue
            parcel, frame = work
            reply: bytes | None = None
            try:
                reply = self._worked_out(parcel, frame)
            finally:
                del work, frame
                with self._changed:
                    self._working = False
                    if parcel == self._parcel:
                        self._reply = reply
                    self._changed.notify_all()

    def _worked_out(self, parcel: Parcel, frame: bytes) -> bytes:
        try:
            self._followed.begin(parcel)
            return self._port.step(frame)
        except StateError as error:
            log.error("%s", error)
            return b""
        except SecureFedCoLLMError:
            raise
        except Exception as error:
            raise _ended_by(error) from None


def _ended_by(error: Exception) -> StateError:
    """For the operator. A foreign error's text may quote a record, so we only give its kind."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.info("%s in:\n%s", type(error).__name__, where)
    of_machine = isinstance(error, MemoryError | OSError | sqlite3.Error)
    said = f" ({error})" if of_machine else ""
    ended = StateError(
        f"the request of the server could not be answered: {type(error).__name__}{said[:200]}",
        hint="nothing is lost: mend the cause, and start the same command again; -v says where",
    )
    ended.again = of_machine
    return ended


def deliver(
    link: SiloLink,
    parcel: Parcel,
    frame: bytes,
    deadline: float,
    *,
    header: bytes = b"",
    limit: int = MAX_FRAME,
    grace: float = GRACE,
) -> bytes:
    """Bring ``frame`` to a silo and its reply back, even if the connection breaks meanwhile.

    Args:
        deadline: on the monotonic clock.
        header: goes before the frame; by itself, since one frame may be for many silos.
        limit: bytes of the largest reply that can make sense.
        grace: seconds during which to retry a silo that cannot be reached.

    Raises:
        TransportError: it could not be reached, or had not answered by then.
    """
    heard = _Heard(link)
    while True:
        try:
            _push(heard, parcel, header, frame, deadline)
            return _pull(heard, parcel, deadline, limit)
        except Unknown:  # it was restarted, and gets the request again
            if time.monotonic() > deadline:
                raise TransportError("no reply in time") from None
        except TransportError as error:
            now = time.monotonic()
            if now > deadline or now - heard.last > grace:
                raise
            log.info("%s", error)
        time.sleep(0.2)


class _Heard:
    """A link that knows when the silo was last heard of."""

    def __init__(self, link: SiloLink) -> None:
        self._link = link
        self.last = time.monotonic()

    def push(self, parcel: Parcel, total: int, offset: int, chunk: bytes) -> int:
        return self._noting(lambda: self._link.push(parcel, total, offset, chunk))

    def pull(self, parcel: Parcel, offset: int, patience: float) -> Pulled:
        return self._noting(lambda: self._link.pull(parcel, offset, patience))

    def _noting(self, call: Callable[[], _T]) -> _T:
        try:
            answer = call()
        except Unknown:
            self.last = time.monotonic()
            raise
        self.last = time.monotonic()
        return answer


def _push(link: SiloLink, parcel: Parcel, header: bytes, frame: bytes, deadline: float) -> None:
    view, there, total = memoryview(frame), 0, len(header) + len(frame)
    while there < total:
        if time.monotonic() > deadline:
            raise TransportError("did not take the request in time")
        end = (there or HEADER_BYTES) + CHUNK  # the header comes whole, with the first piece
        chunk = header[there:end] + view[max(0, there - len(header)) : max(0, end - len(header))]
        there = link.push(parcel, total, there, chunk)
        if not 0 <= there <= total:
            raise TransportError("claims more of the request than there is")


def _pull(link: SiloLink, parcel: Parcel, deadline: float, limit: int) -> bytes:
    """The reply, which must begin by the ``deadline``, and then come at :data:`SLOWEST` or faster.

    Adversary: a silo that gives its reply a byte at a time, or announces a large one, and so has a
    round never end.
    """
    reply, total = bytearray(), -1
    while total < 0 or len(reply) < total:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TransportError("no reply in time")
        pulled = link.pull(parcel, len(reply), min(PATIENCE, left))
        if total < 0 <= pulled.total <= limit:
            deadline = max(deadline, time.monotonic() + pulled.total / SLOWEST)
            total = pulled.total
        wanted = max(0, min(CHUNK, total - len(reply)))
        if pulled.total > limit or pulled.total != total or len(pulled.chunk) != wanted:
            raise TransportError("its reply is too large, or breaks off")
        reply += pulled.chunk
    return bytes(reply)


# ---- the calls, through a door ----


def answer_calls(inbox: SiloInbox) -> Callable[[Wire], None]:
    """A visit in which ``[method, …]`` is answered from ``inbox``: ``["ok", …]`` or a refusal."""

    def visit(wire: Wire) -> None:
        while True:
            try:
                call = wire.receive()
            except TransportError:  # the other end sees when the connection ends
                inbox.quiet()
                raise
            if call == ["attend"]:
                with inbox.attendance():
                    wire.receive()  # until the carrier's job is over
            wire.send(_answer(inbox, call))

    return visit


def _answer(inbox: SiloInbox, call: Any) -> list[Any]:
    try:
        match call:
            case ["push", bytes(session), int(number), int(total), int(offset), bytes(chunk)]:
                return ["ok", inbox.push(Parcel(session, number), total, offset, chunk)]
            case ["pull", bytes(session), int(number), int(offset), int() | float() as patience]:
                pulled = inbox.pull(Parcel(session, number), offset, patience)
                return ["ok", pulled.total, pulled.chunk]
        inbox.quiet()
        return ["error", "no such call"]
    except Unknown as error:
        return ["unknown", error.message]
    except TransportError as error:
        return ["error", error.message]
    except MemoryError:
        return ["error", "has no memory for the request"]


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
    raise TransportError("a malformed answer")
