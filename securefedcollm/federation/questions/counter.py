"""Where somebody at a member's own machine hands in a question, for the process on the network.

``ask`` and the member's long-running process are two processes of one user, so that a shelf is
served while its owner asks. The first has the encoder, the second the identity, the evidence log
and the connection. They meet at a :class:`~..engines.door.Door`.

Adversary: other users of the machine, whom the door keeps out.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from securefedcollm.errors import ConfigError, SecureFedCoLLMError, TransportError
from securefedcollm.federation.engines.door import Wire, knock
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.questions.inquiry import Fetch, Fetched
from securefedcollm.federation.questions.polling import Opinion
from securefedcollm.privacy.votes import Tally
from securefedcollm.retrieval import Passage
from securefedcollm.retrieval.reduction import Vectors

T = TypeVar("T")

_PLACE: Final = ".asking"
"""In a member's directory of a study: where its process has its door."""
MOST_WAITING: Final = 16
"""Questions of this machine that wait their turn."""
_LOOK: Final = 0.2
"""Seconds after which to see whether somebody still waits for the answer."""


class Result(NamedTuple):
    """``asked``: silo → questions that this member has put to it in the study, with this one."""

    fetched: Fetched
    asked: dict[str, int]

    def __repr__(self) -> str:
        return f"Result({self.fetched!r})"


class Handed(NamedTuple):
    """A question at the counter, and where the result goes.

    ``what``: to documents, the question's embedding [d]; to records, question and choices.
    """

    what: Any
    result: Future[Any]

    def __repr__(self) -> str:
        return "Handed(<redacted>)"


class Counter:
    """Questions from this machine, one after another. Thread-safe."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Handed] = queue.Queue(MOST_WAITING)

    def hand_in(self, what: Any) -> Future[Any]:
        """Raises: TransportError, if too many wait. ``what``: see :class:`Handed`."""
        handed = Handed(what, Future())
        try:
            self._waiting.put_nowait(handed)
        except queue.Full:
            raise TransportError("too many questions wait here", hint="ask again later") from None
        return handed.result

    def next(self) -> Handed | None:
        """The question whose turn it is, if there is one that somebody still waits for."""
        while True:
            try:
                handed = self._waiting.get_nowait()
            except queue.Empty:
                return None
            if handed.result.set_running_or_notify_cancel():
                return handed

    def visit(self, wire: Wire) -> None:
        """A visitor of the door: takes a question, and gives back what came of it."""
        what: Any
        match wire.receive():
            case ["ask", bytes(vector), int() | float() as patience] if not len(vector) % 8:
                what = np.frombuffer(vector, dtype="<f8")
            case ["poll", str(question), [*choices], int() | float() as patience] if all(
                isinstance(each, str) for each in choices
            ):
                what = question, tuple(choices)
            case _:
                return
        try:
            result = self._result(what, float(patience), wire)
        except LateError:
            wire.send(["late"])
        except SecureFedCoLLMError as error:
            wire.send(["error", error.message, error.hint])
        else:
            _send(result, wire)

    def _result(self, what: Any, patience: float, wire: Wire) -> Any:
        """Nobody's question leaves: it would count. One that has left goes on, for its evidence.

        Raises: LateError, SecureFedCoLLMError; EOFError if whoever asked has gone.
        """
        waiting, deadline = self.hand_in(what), time.monotonic() + patience
        try:
            while time.monotonic() < deadline:
                try:
                    return waiting.result(_LOOK)
                except LateError:
                    if wire.gone:
                        raise EOFError("whoever asked has gone") from None
            raise LateError
        finally:
            waiting.cancel()


def _send(result: Any, wire: Wire) -> None:
    if isinstance(result, Opinion):
        tally = [*result.tally]
        about = [list(result.survivors), dict(result.failed), result.sent, result.received]
        wire.send(["opinion", tally, *about])
        return
    for silo, fetch in result.fetched.fetches.items():
        texts = [None if each is None else list(each) for each in fetch.passages]
        wire.send(["silo", silo, texts, list(fetch.claimed)])
    fetched = result.fetched
    wire.send(["end", fetched.failed, fetched.sent, fetched.received, result.asked])


def open_for_questions(run: Path, door: Path) -> None:
    """Note in a member's directory of a study where its process has its door.

    Raises:
        StateError: it cannot be written.
    """
    write_durably(run / _PLACE, str(door).encode())


def ask_process(run: Path, query: Vectors, patience: float) -> Result:
    """Have the process that runs in ``run`` ask documents, and wait for what comes back.

    Args:
        run: a member's directory of the study.
        query: [d], the question's embedding.
        patience: seconds.

    Raises:
        ConfigError: no such process is there; or, in its words, what it could not do: an embedding
            of another length, evidence that cannot be written, too many questions that wait.
        TransportError: nothing came in time, or the process ended.
    """
    return _ask_at(run, ["ask", query.astype("<f8").tobytes()], patience, _result_of)


def poll_process(run: Path, question: str, choices: Sequence[str], patience: float) -> Opinion:
    """Have the process that runs in ``run`` ask records; as :func:`ask_process`."""
    return _ask_at(run, ["poll", question, [*choices]], patience, _opinion_of)


def _ask_at(
    run: Path, what: list[Any], patience: float, read: Callable[[Callable[[], Any]], T]
) -> T:
    try:
        place = (run / _PLACE).read_text("utf-8")
        with knock(place) as wire:
            wire.give_up_after(patience + 10)
            wire.send([*what, patience])
            return read(wire.receive)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ConfigError(
            "no process of this member is there to ask",
            where=str(run),
            hint="start `securefedcollm shelf serve` (at the server: `shelf relay`) with this home",
        ) from None
    except (OSError, EOFError, ValueError):
        raise TransportError(
            "the process that asks has ended",
            hint="start it again, and ask anew; a question that has left counts",
        ) from None


def _result_of(receive: Callable[[], Any]) -> Result:
    fetched = Fetched()
    while True:
        match receive():
            case ["silo", str(silo), list(passages), list(claimed)]:
                fetched.fetches[silo] = Fetch(
                    tuple(None if each is None else Passage(*each) for each in passages),
                    tuple(claimed),
                )
            case ["end", dict(failed), int(sent), int(received), dict(asked)]:
                fetched.failed, fetched.sent, fetched.received = failed, sent, received
                return Result(fetched, asked)
            case other:
                raise _no(other)


def _opinion_of(receive: Callable[[], Any]) -> Opinion:
    match receive():
        case ["opinion", [votes, sigma, count], [*survivors], dict(failed), int(sent), int(got)]:
            return Opinion(Tally(votes, sigma, count), tuple(survivors), failed, sent, got)
        case other:
            raise _no(other)


def _no(said: Any) -> SecureFedCoLLMError:
    match said:
        case ["error", str(message), str(hint)]:
            return ConfigError(message, hint=hint)
    return TransportError(
        "the server does not carry questions now",
        hint="at the server: `securefedcollm shelf relay`; nothing has left yet, or it counts "
        "without an answer",
    )
