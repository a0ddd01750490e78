"""Bounds on what can go wrong with a random graph; no assumption beyond its draws.

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
from scipy.special import bdtrc, gammaln

from securefedcollm.aggregation.header import RingParameters
from securefedcollm.aggregation.masking.graph.choice import SECURITY_BITS, Graph
from securefedcollm.errors import ConfigError, LocalProtocolError

RUN_BITS: Final = 40
"""A bound on the chance of a server that tries again and again is 2^-40 in a whole run."""

AVAILABILITY_BITS: Final = 30
"""η: with losses that do not depend on the graph an attempt fails with a chance below 2^-η."""

Floats = npt.NDArray[np.float64]
NEVER: Final = -math.inf
_NEGLIGIBLE: Final = 250.0  # natural logarithm: 10,000 terms of e^-250 are below 2^-347


class Bounds(msgspec.Struct, frozen=True):
    """log2 of upper bounds on probabilities, in one attempt; -inf where it cannot happen.

    Args:
        lists: g neighbours of some silo are fooled about the survivors. The number of signatures
            that a silo asks for follows from this bound (:func:`~.choice.samples`).
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
    lists: float = -SECURITY_BITS

    def whole_run(self, attempts: int, sums: int) -> float:
        """log2 of the chance that a server succeeds once in a run: a union bound, 0 at most.

        Adversary: a server that sees what silos drew, lets the attempt fail, and tries again.

        Args:
            attempts: as many as a silo takes part in, at one sum.
            sums: of the run: rounds, steps and validations.
        """
        chances = [self.corrupt, self.lists, self.cut]
        once = math.log2(sum(2.0**chance for chance in chances))
        return min(0.0, once + math.log2(attempts) + math.log2(sums))

    def check_run(self, attempts: int, sums: int) -> None:
        """Raises: ConfigError where :meth:`whole_run` is above 2^-40."""
        found = self.whole_run(attempts, sums)
        if found > -RUN_BITS:
            raise ConfigError(
                f"in {attempts} attempts at each of {sums} sums a server succeeds with a chance of "
                f"2^{found:.1f}, and may with 2^-{RUN_BITS}",
                where="aggregation.graph",
                hint="fewer rounds, or fewer steps in a round",
            )

    def check(self) -> None:
        """Raises: ConfigError where the bound of one attempt is above what is asked of it."""
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


def check_graph(parameters: RingParameters, graph: Graph) -> None:
    """A silo's own check of a graph that its header names: one computation a process.

    Losses are not its concern: if too many neighbours are lost, it answers no more.

    Raises:
        LocalProtocolError: colluders surround a silo, or survivors can be cut in two, more often
            than in one of 2^60 attempts; or a sum could be of one honest silo.
    """
    n, c, quorum = parameters.silos, parameters.colluders, parameters.quorum
    found = bounds(n, c, quorum, graph)
    worst = max(found.corrupt, found.cut)
    if worst > -SECURITY_BITS or quorum - c - found.hidden < 2:
        raise LocalProtocolError(
            f"{graph.neighbours} neighbours and {graph.shares} shares are too few for {n} silos of "
            f"which {c} may collude and {quorum} make a sum: an attempt is safe but for a chance "
            f"of 2^{worst:.1f}, and sums may have {quorum - c - found.hidden} honest silos",
            hint="take derive(silos, colluders, quorum); do not join a study that asks for less",
        )


@lru_cache(maxsize=64)
def most_senders(parameters: RingParameters, graph: Graph) -> int:
    """The most letters that a silo reads: more honest silos draw no silo but for a chance of
    2^-60, and all colluders may.

    An honest silo draws another one with a chance of at most k / (Q − 1), each for itself.
    """
    n, chance = parameters.silos, graph.neighbours / (parameters.quorum - 1)
    counts = np.arange(n)
    rare = n * bdtrc(counts, n - 1, min(1.0, chance)) <= 2.0**-SECURITY_BITS
    return min(n - 1, int(np.argmax(rare)) + parameters.colluders)


def _at_least(population: int, marked: int, drawn: int, least: int) -> tuple[int, int]:
    """P[at least ``least`` of ``drawn`` are ``marked``] as numerator and denominator."""
    ways = sum(
        math.comb(marked, j) * math.comb(population - marked, drawn - j)
        for j in range(max(0, least), min(marked, drawn) + 1)
    )
    return ways, math.comb(population, drawn)


def _log2(numerator: int, denominator: int) -> float:
    return math.log2(numerator) - math.log2(denominator) if numerator else NEVER


@lru_cache(maxsize=64)
def bounds(silos: int, colluders: int, quorum: int, graph: Graph) -> Bounds:
    """The bounds of one attempt, for ``silos`` n, ``colluders`` c and ``quorum`` Q > k."""
    n, c, k, t = silos, colluders, graph.neighbours, graph.shares
    dropped = math.log2(n) + _log2(*_at_least(n - 1, n - quorum, k, k - t + 1))
    # The bound holds for whatever β it was computed; the least is looked for by bisection.
    low, hidden = -1, _most_hidden(n, c, quorum, graph)
    chance = cut(n, c, quorum, graph, hidden)
    while chance <= -SECURITY_BITS and hidden - low > 1:
        middle = (low + hidden) // 2
        found = cut(n, c, quorum, graph, middle)
        if found <= -SECURITY_BITS:
            hidden, chance = middle, found
        else:
            low = middle
    return Bounds(_corrupt(n, c, quorum, graph), dropped, chance, hidden)


def _corrupt(silos: int, colluders: int, quorum: int, graph: Graph) -> float:
    """Worst on the smallest roll, since the server may keep honest silos off it."""
    k, marked = graph.neighbours, min(colluders, quorum - 1)
    return math.log2(silos) + _log2(*_at_least(quorum - 1, marked, k, 2 * graph.shares - k))


def _most_hidden(silos: int, colluders: int, quorum: int, graph: Graph) -> int:
    """The greatest β that is tried: a hundredth of the silos, and 2β < Q − c."""
    return min(max(graph.kept, silos // 100), (quorum - colluders - 1) // 2)


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
    ways = _log_comb(most, part) + _log_comb(most - part, others)
    terms = ways + part * _avoids(n - 1, others, k)
    # What avoiding the b alone makes negligible needs no better bound.
    near = terms > -_NEGLIGIBLE
    chance = _inside(n, quorum, part[near], others[near], graph)
    terms[near] = np.minimum(terms[near], ways[near] + part[near] * chance)
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
    # Doubled until it is enough, then by bisection; and a few fewer are tried, since t is a whole
    # number and one neighbour more may keep less.
    low, high = 7, min(16, quorum - 1)
    while (found := _keeping(silos, colluders, quorum, high)) is None and high < quorum - 1:
        low, high = high, min(2 * high, quorum - 1)
    while found and high - low > 1:
        middle = (low + high) // 2
        graph = _keeping(silos, colluders, quorum, middle)
        low, high, found = (low, middle, graph) if graph else (middle, high, found)
    for k in range(max(8, high - 6), high):
        if graph := _keeping(silos, colluders, quorum, k):
            return graph
    if found:
        return found
    raise ConfigError(
        f"no graph of {silos} silos stands {colluders} colluders and {silos - quorum} losses",
        where="aggregation.graph",
        hint="a higher silos.minimum or fewer silos.colluders",
    )


def _keeping(silos: int, colluders: int, quorum: int, neighbours: int) -> Graph | None:
    """The graph of so many neighbours, if it keeps all bounds."""
    graph = Graph(neighbours, shares_for(silos, colluders, quorum, neighbours))
    most = _most_hidden(silos, colluders, quorum, graph)
    ways, whole = _at_least(silos - 1, silos - quorum, neighbours, graph.honest)
    if silos * ways << AVAILABILITY_BITS > whole:
        return None
    if _corrupt(silos, colluders, quorum, graph) > -SECURITY_BITS:
        return None
    return graph if cut(silos, colluders, quorum, graph, most) <= -SECURITY_BITS else None
