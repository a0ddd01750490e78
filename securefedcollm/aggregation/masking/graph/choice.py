"""Who shares with whom: every silo draws its own neighbours, after the roll is fixed.

Bell et al., CCS 2020, section 4: against a server that lies, nobody but a silo chooses the
neighbours that hold its shares. The silo reveals 32 random bytes once the roll is fixed, and its
neighbours follow from them. There is no common randomness to bias or to draw again: a silo that
does not reveal takes nobody else's neighbours with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import GRAPH_SUITE, RingParameters, RoundHeader
from securefedcollm.aggregation.messages import index_bytes
from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.primitives import Keystream, hkdf, sha256

SECURITY_BITS: Final = 60
"""σ: a bound on the server's chance in one attempt is 2^-σ. A server may let attempts fail and try
again: after 2^20 of them its chance is still below 2^-40 or so."""

_PREFIX: Final = b"securefedcollm/v2/"
Flags = npt.NDArray[np.bool_]


class Graph(msgspec.Struct, frozen=True):
    """The graph's sizes, from the signed study.

    Args:
        neighbours: k, silos that each silo draws; they hold its shares and add its masks.
        shares: t, of them that rebuild its secret.

    Raises:
        ConfigError: two sets of t neighbours need not meet, or t exceeds k.
    """

    neighbours: int
    shares: int

    def __post_init__(self) -> None:
        k, t = self.neighbours, self.shares
        if not (2 <= t <= k < 2 * t):
            raise ConfigError(
                f"{t} shares of {k} neighbours",
                where="aggregation.graph",
                hint="more than half of the neighbours, and not more than all",
            )

    @property
    def suite(self) -> str:
        """The header's suite: algorithms, k and t."""
        return f"{GRAPH_SUITE}/{self.neighbours}/{self.shares}"

    @property
    def honest(self) -> int:
        """k − t + 1: honest neighbours that must have answered before a secret is open.

        At most 2t − k − 1 of the k neighbours collude, but for a chance that the study bounds.
        """
        return self.neighbours - self.shares + 1

    @property
    def fooled(self) -> int:
        """g: fewer of a silo's neighbours are fooled about the survivors (:func:`samples`)."""
        return (self.honest + 1) // 2

    @property
    def kept(self) -> int:
        """m: honest survivors among the neighbours of every silo whose seed is opened."""
        return self.honest - self.fooled + 1


def graph_of(header: RoundHeader) -> Graph:
    """The graph that a party's own header names.

    Raises:
        LocalProtocolError: it names none, or a roll may have too few silos for it.
    """
    found = re.fullmatch(rf"{GRAPH_SUITE}/([1-9][0-9]{{0,4}})/([1-9][0-9]{{0,4}})", header.suite)
    if found is None or int(found[1]) >= header.parameters.quorum:
        raise LocalProtocolError(
            "the header is for no graph that a quorum of silos can have",
            hint="make it with Graph(k, t).suite; k must be below the quorum",
        )
    return Graph(int(found[1]), int(found[2]))


# Sets of silos -----------------------------------------------------------------------------------


def pack_set(indices: Iterable[int], silos: int) -> bytes:
    """Bit (i − 1) mod 8, from the lowest, of byte (i − 1) div 8 says whether index i is in it."""
    flags = np.zeros(silos, dtype=np.uint8)
    flags[np.fromiter(indices, dtype=np.int64) - 1] = 1
    return np.packbits(flags, bitorder="little").tobytes()


def read_set(packed: bytes, silos: int) -> tuple[int, ...] | None:
    """The indices, ascending; None if ``packed`` is no set of ``silos``."""
    if len(packed) != -(-silos // 8):
        return None
    flags = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    if flags[silos:].any():
        return None
    return tuple((np.flatnonzero(flags) + 1).tolist())


def flags_of(indices: Sequence[int], silos: int) -> Flags:
    """bool [silos + 1]; entry i: whether index i is in the set."""
    flags = np.zeros(silos + 1, dtype=np.bool_)
    flags[list(indices)] = True
    return flags


# Transcript --------------------------------------------------------------------------------------


def roll_digest(header: bytes, members: bytes) -> bytes:
    """R: the round, and who takes part (a packed set)."""
    return sha256(_PREFIX, b"roll\0", header, members)


def delivery_digest(roll: bytes, dealers: bytes) -> bytes:
    """D: who of them has dealt shares."""
    return sha256(_PREFIX, b"delivery\0", roll, dealers)


def masked_digest(delivery: bytes, mask_keys: Mapping[int, bytes]) -> bytes:
    """With whom one silo masks its vector: index → public mask key."""
    entries = (index_bytes(index) + key for index, key in sorted(mask_keys.items()))
    return sha256(_PREFIX, b"masked\0", delivery, *entries)


def survivors_digest(delivery: bytes, survivors: bytes) -> bytes:
    """L: whose vectors are in the sum."""
    return sha256(_PREFIX, b"lists\0", delivery, survivors)


def tally_digest(lists: bytes, signers: bytes, root: bytes) -> bytes:
    """What the server has committed to when it is challenged."""
    return sha256(_PREFIX, b"tally\0", lists, signers, root)


# Draws -------------------------------------------------------------------------------------------


def neighbours_of(
    secret: bytes, roll: bytes, members: Sequence[int], index: int, count: int
) -> tuple[int, ...]:
    """The ``count`` distinct members, ascending, that ``index`` draws from the others.

    Uniform over all such sets if ``secret`` is 32 random bytes that were unknown when the roll was
    fixed.

    Args:
        members: the roll, ascending, with ``index`` on it and more than ``count`` long.
    """
    key = hkdf(secret, salt=roll, info=_PREFIX + b"draw\0" + index_bytes(index))
    own = members.index(index)
    places = distinct(key, len(members) - 1, count)
    return tuple(sorted(members[place + (place >= own)] for place in places))


def challenged(secret: bytes, tally: bytes, population: int, count: int) -> list[int]:
    """The places among the signers whose signatures a silo has the server show, ascending."""
    key = hkdf(secret, salt=tally, info=_PREFIX + b"challenge\0")
    return sorted(distinct(key, population, count))


def distinct(key: bytes, population: int, count: int) -> list[int]:
    """The first ``count`` distinct values below ``population`` of a uniform stream."""
    stream = Keystream(key)
    limit = 2**64 - 2**64 % population  # reject above: each value has as many words as another
    found: dict[int, None] = {}
    while len(found) < count:
        for word in stream.words(2 * count).tolist():
            if word < limit:
                found.setdefault(word % population)
                if len(found) == count:
                    break
    return list(found)


# How many signatures a silo has to see -----------------------------------------------------------


@lru_cache(maxsize=64)
def samples(parameters: RingParameters, graph: Graph, signers: int) -> int:
    """The fewest of ``signers`` signatures that a silo checks, drawn after the server commits.

    A silo is *fooled* if all that it draws are valid although fewer than T (the header's threshold)
    are: with probability ε ≤ C(T − 1, s) / C(signers, s), each for itself. To open a secret
    otherwise than T silos agreed, the server must fool k − t + 1 of its k holders. s is the least
    number with which it fools half of these, g, with a chance of n · C(k, g) · ε^g ≤ 2^-60 at most.
    With s = T nobody is fooled.

    Args:
        signers: at least T.
    """
    most, needed = parameters.threshold - 1, graph.fooled
    budget = -SECURITY_BITS - math.log2(parameters.silos)
    budget -= math.log2(math.comb(graph.neighbours, needed))
    log_fooled = 0.0
    for drawn in range(most):
        if needed * log_fooled <= budget - 1e-6:
            return drawn
        log_fooled += math.log2((most - drawn) / (signers - drawn))
    return most + 1


# The tree of signatures --------------------------------------------------------------------------


def tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Levels of the RFC 9162 hash tree, from the leaves' hashes up to the root."""
    levels = [[sha256(b"\0", leaf) for leaf in leaves]]
    while len(level := levels[-1]) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        odd = level[-1:] if len(level) % 2 else []
        levels.append([sha256(b"\1", left, right) for left, right in pairs] + odd)
    return levels


def nodes_for(levels: Sequence[Sequence[bytes]], places: Iterable[int]) -> list[bytes]:
    """The nodes that lead from the leaves at ``places`` to the root: each level's, ascending.

    One node serves all leaves under it, and leaves that are shown serve each other. So few
    leaves take about log2(count) nodes each, and all leaves take none.
    """
    nodes: list[bytes] = []
    known = sorted(places)
    for level in levels[:-1]:
        here = {*known}
        nodes += [level[p ^ 1] for p in known if p ^ 1 not in here and p ^ 1 < len(level)]
        known = sorted({place >> 1 for place in known})
    return nodes


def root_of(leaves: Mapping[int, bytes], count: int, nodes: Sequence[bytes]) -> bytes | None:
    """The root of a tree of ``count`` leaves to which these ``leaves`` and ``nodes`` lead.

    Args:
        leaves: by place, at least one.
        nodes: as :func:`nodes_for` has them.

    Returns:
        32 bytes; None if there are no leaves, too few nodes, or too many.
    """
    if not leaves:
        return None
    known = {place: sha256(b"\0", leaf) for place, leaf in leaves.items()}
    rest = iter(nodes)
    while count > 1:
        above: dict[int, bytes] = {}
        for place in sorted(known):
            if place >> 1 in above:
                continue
            if place ^ 1 >= count:
                above[place >> 1] = known[place]
                continue
            other = known.get(place ^ 1) or next(rest, None)
            if other is None:
                return None
            pair = (other, known[place]) if place & 1 else (known[place], other)
            above[place >> 1] = sha256(b"\1", *pair)
        known, count = above, (count + 1) >> 1
    return known[0] if next(rest, None) is None else None
