"""How the server asks several parties at once, and what it counts while it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.federation.engines import Engine, Failure
from securefedcollm.federation.messages import (
    Aggregated,
    Delivered,
    Ended,
    Layers,
    Ready,
    Refused,
    Request,
    Trained,
    Witnessed,
    decode_reply,
    encode,
)
from securefedcollm.foreign import printable

Answer = Trained | Ready | Aggregated | Layers | Witnessed | Delivered | Ended


class Traffic:
    """Bytes that crossed between server and each other party in one attempt."""

    def __init__(self, silos: tuple[str, ...]) -> None:
        self.up = dict.fromkeys(silos, 0)
        self.down = dict.fromkeys(silos, 0)

    def add_to(self, record: dict[str, Any]) -> None:
        """Add what crossed to the round's ``bytes_up`` and ``bytes_down``."""
        for key, counts in (("bytes_up", self.up), ("bytes_down", self.down)):
            before = record.get(key, {})
            record[key] = {silo: before.get(silo, 0) + count for silo, count in counts.items()}


class Asking:
    """Typed requests over an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.away: set[str] = set()
        """Those who could not be reached when last asked."""

    def ask(
        self,
        requests: Mapping[str, Request],
        timeout: float,
        traffic: Traffic,
        lost: dict[str, str],
    ) -> dict[str, Answer]:
        """Exchange typed messages; those who fail or refuse go to ``lost`` with the reason."""
        encoded: dict[int, bytes] = {}
        frames = {}
        for silo, request in requests.items():
            frame = encoded.setdefault(id(request), b"") or encode(request)
            encoded[id(request)] = frame
            frames[silo] = frame
            traffic.down[silo] += len(frame)
        answers: dict[str, Answer] = {}
        for silo, reply in self._engine.exchange(frames, timeout).items():
            if isinstance(reply, Failure):
                lost[silo] = printable(reply.reason)
                self.away.add(silo)
                continue
            self.away.discard(silo)
            traffic.up[silo] += len(reply)
            try:
                message = decode_reply(reply, silo)
            except SecureFedCoLLMError as error:
                lost[silo] = printable(error.message)
                continue
            if isinstance(message, Refused):
                # Adversary: a silo whose words move the operator's cursor or forge a line of a log.
                hint = f" ({printable(message.hint)})" if message.hint else ""
                lost[silo] = printable(message.message) + hint
            else:
                answers[silo] = message
        return answers
