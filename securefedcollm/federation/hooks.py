"""What the server's loop tells its caller, and asks of it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Final

from securefedcollm.federation.workload import Progress, silent

OnRound = Callable[[dict[str, Any]], None]
"""``on_round(record)``: a round is finished and durable; its record."""

Rejoined = Callable[[Set[str], int, float], bool]
"""``rejoined(silos, count, most)``: waits until ``count`` of these silos, which could not be
reached, are back. Returns whether they are, within ``most`` seconds and its own limit."""

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
    """All that the server's loop may tell its caller, or ask of it. By default, nothing."""

    progress: Progress = silent
    on_round: OnRound = tell_nobody
    rejoined: Rejoined = nobody_rejoins
    arrived: Arrived = nobody_arrives


NO_HOOKS: Final = Hooks()
