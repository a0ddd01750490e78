"""Which silos are connected to FLARE's server, and how long a job waits for the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Final

from securefedcollm.errors import TransportError
from securefedcollm.federation.workload import Progress

LATER: Final = 30.0
"""Seconds to wait for silos that were there before, if there are enough without them."""
_LOOK: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How many silos FLARE's jobs need, and how long to wait for them.

    Args:
        minimum: with fewer connected no job is begun.
        patience: seconds to wait for the silos before the first job.
        rejoin: seconds to wait later, when so few are left that nothing goes on without one.
    """

    minimum: int
    patience: float
    rejoin: float = LATER


@dataclass
class Presence:
    """Waits for silos on behalf of :class:`~.engine.FlareEngine`, whose arguments these are.

    Every method raises TransportError once FLARE's server has ended: ``connected`` does.

    Args:
        connected: names of those who are connected now, whoever they are.
        end_job: lets the running job end.
    """

    silos: tuple[str, ...]
    waits: Waits
    connected: Callable[[], set[str]]
    end_job: Callable[[], None]
    progress: Progress
    say: Callable[[str], None]
    began: bool = False
    """Whether a job has begun: from then on the wait for a silo is shorter."""

    def wait_for(self, wanted: Set[str]) -> set[str]:
        """Those who are there for the next job: ``wanted``, or enough others after a while.

        Raises:
            TransportError: fewer than the minimum came.
        """
        began, start = self.began, time.monotonic()
        most = self.waits.rejoin if began else self.waits.patience
        deadline, told = start + (min(most, LATER) if began else most), False
        while True:
            present = self.connected() & set(self.silos)
            self.progress(len(present), len(self.silos), "silos connected")
            if present >= wanted and len(present) >= self.waits.minimum:
                self.progress(1, 1, "silos connected")
                return present
            if time.monotonic() > deadline:
                if len(present) >= self.waits.minimum:
                    return present
                missing = set(self.silos) - present
                if time.monotonic() > start + most:
                    raise TransportError(
                        f"{len(present)} silos are connected, {self.waits.minimum} are needed; "
                        f"not there: {', '.join(sorted(missing))}",
                        hint="they run `securefedcollm client`; then start the server again",
                    )
                if not told:
                    self._say_waiting(missing, most)
                    told = True
            time.sleep(_LOOK)

    def rejoined(self, silos: Set[str], count: int, most: float = math.inf) -> bool:
        """Wait until ``count`` of these silos, which could not be reached, are connected again.

        Returns whether they are: not if that takes longer than ``most`` seconds, or ``rejoin``.
        """
        wait = min(self.waits.rejoin, most)
        deadline = time.monotonic() + wait
        self._say_waiting(silos, wait)
        while len(self.connected() & silos) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True

    def arrived(self, silos: Set[str], most: float) -> Set[str]:
        """When all sums are done: wait until one of these silos is connected.

        Returns those that are, or none after ``most`` seconds. All others may have left: from now
        on a job is for these silos, and begins with any one of them.
        """
        self.end_job()
        self.silos, self.began = tuple(sorted(silos)), True
        self.waits = replace(self.waits, minimum=1)
        deadline = time.monotonic() + most
        self._say_waiting(silos, most, "to come back and fetch the last adapter")
        while not (here := self.connected() & silos):
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK)
        return here

    def _say_waiting(self, silos: Set[str], wait: float, what: str = "to come back") -> None:
        limit = f"{wait / 60:.0f} minutes" if wait >= 120 else f"{wait:.0f} s"
        self.say(f"waiting up to {limit} for {', '.join(sorted(silos))} {what}")
