"""Whether what was released is covered by what was reserved for it.

A ledger reserves events before anything is released, and settles on what really happened. The
settlement stands only if the reserved events dominate the actual ones, run for run.
"""

from __future__ import annotations

from collections.abc import Sequence

from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    Gaussian,
    LayeredGaussian,
    PoissonGaussian,
    times,
)


def dominates(reserved: Sequence[Event], actual: Sequence[Event]) -> bool:
    """Whether ``actual`` is something, and is covered by ``reserved``.

    Every actual run must be charged to a reserved run that is at least as bad in every parameter;
    runs that did not take place need no cover. So the ε of ``actual`` is at most that of
    ``reserved`` under every accountant that applies to both. (RDP of discrete noise at the coarsest
    shares may be a few percent below PLD of the same noise, rounded. A run has sums of one kind.)
    """
    covers = [[_no_worse(event, worst) for worst in reserved] for event in actual]
    charged = [[0] * len(reserved) for _ in actual]
    free = [times(worst) for worst in reserved]
    for index, event in enumerate(actual):
        need = times(event)
        while need:
            moved = _charge(index, need, covers, charged, free)
            if not moved:
                return False
            need -= moved
    return bool(actual)


def _charge(
    start: int, need: int, covers: list[list[bool]], charged: list[list[int]], free: list[int]
) -> int:
    """Charge up to ``need`` runs of actual event ``start``, moving earlier charges if it must.

    One augmenting path of a bipartite flow (Ford and Fulkerson), breadth first. Returns the number
    of runs charged; 0 if there is no cover for even one.
    """
    came_from: dict[int, int | None] = {start: None}  # actual event -> reserved one it gives up
    takes: dict[int, int] = {}  # reserved event -> actual one that would take runs of it
    queue = [start]
    for event in queue:
        for worst in range(len(free)):
            if not covers[event][worst] or worst in takes:
                continue
            takes[worst] = event
            if free[worst]:
                return _move(worst, need, came_from, takes, charged, free)
            for holder in range(len(charged)):
                if charged[holder][worst] and holder not in came_from:
                    came_from[holder] = worst
                    queue.append(holder)
    return 0


def _move(
    worst: int,
    need: int,
    came_from: dict[int, int | None],
    takes: dict[int, int],
    charged: list[list[int]],
    free: list[int],
) -> int:
    path = []  # (actual, takes from, gives up)
    at: int | None = worst
    while at is not None:
        taker = takes[at]
        path.append((taker, at, came_from[taker]))
        at = came_from[taker]
    runs = min([need, free[worst], *(charged[a][up] for a, _, up in path if up is not None)])
    free[worst] -= runs
    for taker, taken, given_up in path:
        charged[taker][taken] += runs
        if given_up is not None:
            charged[taker][given_up] -= runs
    return runs


def _no_worse(actual: Event, worst: Event) -> bool:
    match actual, worst:
        case Gaussian(), Gaussian():
            return actual.noise_multiplier >= worst.noise_multiplier
        case PoissonGaussian(), PoissonGaussian():
            return actual.q <= worst.q and actual.noise_multiplier >= worst.noise_multiplier
        case DiscreteGaussian(), DiscreteGaussian():
            # What may be charged as rounded noise may be charged without that, too.
            layers = isinstance(actual, LayeredGaussian) or isinstance(worst, LayeredGaussian)
            return (
                isinstance(actual, type(worst))
                and (not layers or _layers(actual) == _layers(worst))
                and actual.share_sigma >= worst.share_sigma
                and actual.sensitivity <= worst.sensitivity
                and actual.values <= worst.values
                and actual.shares >= worst.shares
                and actual.colluders == worst.colluders
                and actual.q <= worst.q
            )
        case _:
            return False


def _layers(event: DiscreteGaussian) -> tuple[int, int, int] | None:
    if isinstance(event, LayeredGaussian):
        return event.design, event.least, event.most
    return None
