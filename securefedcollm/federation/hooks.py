"""What the server's loop tells, and asks of, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Final

from securefedcollm.federation.workload import Progress, silent

OnRound = Callable[[dict[str, Any]], None]
"""``on_round(record)``: a round's record, when it is finished and durable."""

Rejoined = Callable[[Set[str], int, float], bool]
"""``rejoined(silos, count, most)``: waits until so many of these silos, which could not be reached,
are there again; returns whether they are, after ``most`` seconds or its own limit at last."""

Arrived = Callable[[Set[str], float], Set[str]]
"""``arrived(silos, most)``, when all rounds are done: waits until one of these silos is there;
returns those that are, or none after ``most`` seconds."""


def tell_nobody(record: dict[str, Any]) -> None:
    """Nobody hears of rounds."""


def nobody_rejoins(silos: Set[str], count: int, most: float) -> bool:
    """For an engine whose silos do not come back."""
    return False


def nobody_arrives(silos: Set[str], most: float) -> Set[str]:
    """Likewise."""
    return frozenset()


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Everything that whoever runs the server may be told or asked. By default, nothing."""

    progress: Progress = silent
    on_round: OnRound = tell_nobody
    rejoined: Rejoined = nobody_rejoins
    arrived: Arrived = nobody_arrives


NO_HOOKS: Final = Hooks()
