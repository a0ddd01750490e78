"""Bounds on what can go wrong with a random graph in one attempt; no assumption beyond its draws.

n silos, of which c, fixed before the attempt, work with the server; a roll and a sum have at least
Q of them. Every silo draws k others of the roll uniformly. Worst cases are taken over every roll
that silos accept, and over every choice of survivors that the server can make after it has seen the
graph. Hypergeometric tails are exact (integers); the sum over cuts is in floating point, of terms
whose logarithms are exact to 1e-9.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from securefedcollm.aggregation.masking.graph.choice import SECURITY_BITS, Graph
from securefedcollm.errors import ConfigError

AVAILABILITY_BITS: Final = 30
"""η: with losses that do not depend on the graph an attempt fails with a chance below 2^-η."""

Floats = npt.NDArray[np.float64]
NEVER: Final = -math.inf


class Bounds(msgspec.Struct, frozen=True):
    """log2 of upper bounds on probabilities, in one attempt; -inf where it cannot happen.

    Args:
        corrupt: some silo drew 2t − k or more colluders: they and half of the others have both its
            secrets.
        dropped: some silo has fewer than t neighbours left when n − Q silos, whichever they are,
            are lost independently of the graph.
        cut: the server finds survivors of which some, each with m honest neighbours among them
            (:attr:`~.choice.Graph.kept`), drew none of the other honest survivors, and those are
            more than ``hidden``.
        hidden: β, honest survivors that a lying server may leave out of the sum unnoticed. Their
            vectors stay secret; what is lost is their share of the noise.
    """

    corrupt: float
    dropped: float
    cut: float
    hidden: int

    def check(self) -> None:
        """Raises: ConfigError where a bound is above what is asked of it."""
        for name, what, bits in (
            ("corrupt", "a silo draws too many colluders", SECURITY_BITS),
            ("cut", "the server can cut the survivors in two", SECURITY_BITS),
            ("dropped", "a silo loses too many neighbours", AVAILABILITY_BITS),
        ):
            found = getattr(self, name)
            if found > -bits:
                raise ConfigError(
                    f"the chance that {what} is 2^{found:.1f} an attempt, and may be 2^-{bits}",
                    where="aggregation.graph.neighbours",
                    hint="more neighbours, a higher silos.minimum or fewer silos.colluders; leave "
                    "the key out for the fewest neighbours that keep the bounds",
                )


def _at_least(population: int, marked: int, drawn: int, least: int) -> tuple[int, int]:
    """P[at least ``least`` of ``drawn`` are ``marked``] as numerator and denominator."""
    ways = sum(
        math.comb(marked, j) * math.comb(population - marked, drawn - j)
        for j in range(max(0, least), min(marked, drawn) + 1)
    )
    return ways, math.comb(population, drawn)


def _log2(numerator: int, denominator: int) -> float:
    return math.log2(numerator) - math.log2(denominator) if numerator else NEVER


def bounds(silos: int, colluders: int, quorum: int, graph: Graph) -> Bounds:
    """The three bounds, for ``silos`` n, ``colluders`` c and ``quorum`` Q > k."""
    n, c, k, t = silos, colluders, graph.neighbours, graph.shares
    # Corrupt: worst on the smallest roll, since the server may keep honest silos off it.
    corrupt = _log2(*_at_least(quorum - 1, min(c, quorum - 1), k, 2 * t - k))
    dropped = _log2(*_at_least(n - 1, n - quorum, k, k - t + 1))
    chance, hidden = NEVER, 0
    for hidden in range(min(max(graph.kept, n // 100), (quorum - c - 1) // 2) + 1):
        chance = cut(n, c, quorum, graph, hidden)
        if chance <= -SECURITY_BITS:
            break
    return Bounds(math.log2(n) + corrupt, math.log2(n) + dropped, chance, hidden)


def cut(silos: int, colluders: int, quorum: int, graph: Graph, hidden: int) -> float:
    """log2 of Σ_a C(H, a) · C(H − a, b) · p(a, b)^a over part sizes a: a union bound.

    H = n − c honest silos. A part of a honest survivors that leaves more than ``hidden`` β of them
    out leaves at least b = max(β + 1, Q − c − a) out. p(a, b) bounds the chance that one silo of
    the part draws m or more others of it (:attr:`~.choice.Graph.kept`) and none of the b; the
    silos' draws are independent. Two parts cannot both leave out at most β: 2β < Q − c.
    """
    n, c, k, m = silos, colluders, graph.neighbours, graph.kept
    most = n - c
    part = np.arange(m + 1, most - hidden, dtype=np.float64)
    if not len(part):
        return NEVER
    others = np.maximum(hidden + 1.0, quorum - c - part)
    chance = np.minimum(_avoids(n - 1, others, k), _inside(n, quorum, part, others, graph))
    terms = _log_comb(most, part) + _log_comb(most - part, others) + part * chance
    greatest = float(terms.max())
    if greatest == NEVER:
        return NEVER
    return (greatest + math.log(np.exp(terms - greatest).sum())) / math.log(2)


def _avoids(population: int, others: Floats, k: int) -> Floats:
    """log P[k draws avoid the ``others``]: grows with the population, so the largest roll's."""
    return _log_falling(population - others, k) - _log_falling(np.full(1, float(population)), k)


def _inside(n: int, quorum: int, part: Floats, others: Floats, graph: Graph) -> Floats:
    """log of a bound on P[m or more of k draws in the part, none of the others], for every roll.

    P[j draws are in the part] = C(k, j) (a−1)_j / (N)_j · (N − a + 1 − b)_{k−j} / (N − j)_{k−j} on
    a roll of N + 1, in falling factorials. The first quotient falls with N and the second grows, so
    the smallest roll is taken in the one and the largest in the other.
    """
    k, least, largest = graph.neighbours, quorum - 1.0, n - 1.0
    total = np.full(len(part), NEVER)
    for j in range(graph.kept, k + 1):
        first = _log_falling(part - 1, j) - _log_falling(np.full(1, least), j)
        second = _log_falling(largest - part + 1 - others, k - j)
        second = second - _log_falling(np.full(1, largest - j), k - j)
        total = np.logaddexp(total, _log_comb(k, np.full(1, float(j))) + first + second)
    return total


def _log_falling(x: Floats, j: int) -> Floats:
    """log of x (x − 1) … (x − j + 1); -inf where that is not positive."""
    possible = x >= j
    safe = np.where(possible, x, j)
    return np.where(possible, gammaln(safe + 1) - gammaln(safe - j + 1), NEVER)


def _log_comb(n: float | Floats, k: Floats) -> Floats:
    found: Floats = gammaln(np.asarray(n) + 1.0) - gammaln(k + 1) - gammaln(np.asarray(n) - k + 1)
    return np.where(k <= n, found, NEVER)


def shares_for(silos: int, colluders: int, quorum: int, neighbours: int) -> int:
    """The fewest shares t of ``neighbours`` k that keep the bound on colluders."""
    population, k = quorum - 1, neighbours
    marked = min(colluders, population)
    whole, ways = math.comb(population, k), 0
    worst = min(marked, k) + 1
    while worst > 0:
        more = math.comb(marked, worst - 1) * math.comb(population - marked, k - worst + 1)
        if silos * (ways + more) << SECURITY_BITS > whole:
            break
        ways, worst = ways + more, worst - 1
    # The chance of ``worst`` or more colluders is small enough: 2t − k >= worst, and 2t > k.
    return min(k, max(2, (k + max(1, worst) + 1) // 2))


@lru_cache(maxsize=64)
def derive(silos: int, colluders: int, quorum: int, neighbours: int | None = None) -> Graph:
    """The graph for ``neighbours``, or the one of the fewest neighbours that keeps the bounds.

    Raises:
        ConfigError: none does.
    """
    if neighbours is not None:
        if not 3 <= neighbours < quorum:
            raise ConfigError(
                f"{neighbours} neighbours of {silos} silos of which {quorum} may be all there are",
                where="aggregation.graph.neighbours",
                hint=f"between 3 and {quorum - 1}",
            )
        return Graph(neighbours, shares_for(silos, colluders, quorum, neighbours))
    for k in range(8, quorum):
        graph = Graph(k, shares_for(silos, colluders, quorum, k))
        ways, whole = _at_least(silos - 1, silos - quorum, k, graph.honest)
        if silos * ways << AVAILABILITY_BITS <= whole:
            found = bounds(silos, colluders, quorum, graph)
            if found.cut <= -SECURITY_BITS and found.corrupt <= -SECURITY_BITS:
                return graph
    raise ConfigError(
        f"no graph of {silos} silos stands {colluders} colluders and {silos - quorum} losses",
        where="aggregation.graph",
        hint="a higher silos.minimum or fewer silos.colluders",
    )
