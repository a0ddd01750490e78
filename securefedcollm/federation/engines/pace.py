"""When a silo's inbox says anything while a request is being worked out: at ticks.

Adversary: the server, which calls again and again meanwhile. The process that works on records
also answers, so the moment of every answer would tell how far that work is.
"""

from __future__ import annotations

import time
from typing import Final

MOST: Final = 10.0
"""Seconds between ticks, at most: a carrier takes a call that lasts much longer for a dead peer."""


class Pace:
    """Ticks that depend on no record. One is shared by a port and the inbox before it.

    Args:
        slot: seconds, at whose multiples the port's replies leave.
    """

    def __init__(self, slot: float) -> None:
        self._tick = min(slot, MOST)
        self._began = time.monotonic()

    def begin(self) -> None:
        """Count from now: a request came, or the work on records begins."""
        self._began = time.monotonic()

    def after(self, since: float) -> float:
        """The first tick after ``since``, both in seconds on the monotonic clock."""
        past = max(0.0, since - self._began)
        return self._began + self._tick * (past // self._tick + 1)
