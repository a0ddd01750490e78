"""A bundle, arranged for checking: logs by role, keys, and each participant's `opened` entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar

from msgspec import structs

from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.errors import CryptoError
from securefedcollm.evidence.bundle import Bundle
from securefedcollm.evidence.entries import Entry, Finished, Keyed, Opened, Round
from securefedcollm.evidence.merkle import Frontier
from securefedcollm.evidence.note import Checkpoint, origin
from securefedcollm.federation.keeping import ended
from securefedcollm.federation.plan import AUTHORITY, round_header
from securefedcollm.study import Study, digest

SERVER = "server"

_What = TypeVar("_What")


class NotCovered(Exception):  # noqa: N818 - not an error: the bundle is silent on this
    """The bundle does not cover a check; the text says why."""


class Case:
    """The content that the checks examine.

    The keys are those of the signed study; in a study without a roster (a simulation), those that
    the logs agree on.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.study: Study = bundle.study
        self.digest = digest(bundle.study)
        self.logs: Mapping[str, list[Entry]] = bundle.logs
        self.server: list[Entry] = bundle.logs.get(SERVER, [])
        self.authority: list[Entry] = bundle.logs.get(AUTHORITY, []) if self.keyed else []
        offices = {SERVER, AUTHORITY} if self.keyed else {SERVER}
        self.silos = {name: log for name, log in bundle.logs.items() if name not in offices}
        self.opened: dict[str, Opened] = {
            name: log[0].what
            for name, log in bundle.logs.items()
            if log and isinstance(log[0].what, Opened)
        }
        self._roots: dict[str, list[bytes]] = {}

    @property
    def keyed(self) -> bool:
        """Whether one party, the authority, holds the decryption key."""
        return self.study.scheme == "ckks-authority"

    @cached_property
    def keys(self) -> dict[str, bytes]:
        """Participant → Ed25519 public key."""
        if self.study.roster:
            return {p.name: bytes.fromhex(p.key) for p in self.study.roster}
        first = next(iter(self.opened.values()), None)
        return {} if first is None else {m.name: bytes.fromhex(m.key) for m in first.roster}

    @cached_property
    def roster(self) -> Roster:
        """The silos.

        Raises:
            ConfigError: the keys make no roster.
        """
        offices = {self.server_name, self.authority_name}
        return Roster({name: key for name, key in self.keys.items() if name not in offices})

    @cached_property
    def witnesses(self) -> dict[str, tuple[str, bytes]]:
        """Name of the key by which a silo vouches for a head → the silo, and its Ed25519 key."""
        roster = self.roster
        pairs = zip(roster.names, roster.keys, strict=True)
        return {origin(self.digest, name): (name, key) for name, key in pairs}

    @cached_property
    def server_name(self) -> str:
        """The server's name: logs and signed heads call it ``server`` in every study."""
        named = [p.name for p in self.study.roster if p.role == "server"]
        return named[0] if named else SERVER

    @cached_property
    def authority_name(self) -> str:
        """The key holder's name, likewise; empty if nobody holds the key."""
        named = [p.name for p in self.study.roster if p.role == "authority"]
        return (named[0] if named else AUTHORITY) if self.keyed else ""

    @property
    def run(self) -> bytes:
        """The run's id, 16 bytes; empty if no log says."""
        first = next(iter(self.opened.values()), None)
        return b"" if first is None else bytes.fromhex(first.run)

    def key(self, name: str) -> bytes | None:
        """The key under which ``name``'s log is signed."""
        if self.keyed and name == AUTHORITY:
            name = self.authority_name
        return self.keys.get(self.server_name if name == SERVER else name)

    def log_name(self, name: str) -> str | None:
        """The one name under which a participant has its log; None if ``name`` is nobody's.

        Adversary: whoever uses a roster's name for the server beside ``server``, to be two.
        """
        if self.key(name) is None:
            return None
        if name == SERVER or (self.keyed and name == AUTHORITY):
            return name
        return {self.server_name: SERVER, self.authority_name: AUTHORITY}.get(name, name)

    def header(self, entry: Round | Keyed) -> RoundHeader:
        """The round header that follows from the study, roster and run for this attempt."""
        return round_header(
            self.study,
            roster=self.roster,
            run_id=self.run,
            round_=entry.round,
            attempt=entry.attempt,
            model=bytes.fromhex(entry.model),
            values=entry.values,
        )

    def roots(self, name: str) -> list[bytes]:
        """RFC 9162 roots of the first 0, 1, 2 … entries of a log."""
        if name not in self._roots:
            tree = Frontier()
            self._roots[name] = [tree.root]
            for leaf in self.bundle.leaves[name]:
                tree.append(leaf)
                self._roots[name].append(tree.root)
        return self._roots[name]

    def rounds_done(self) -> int:
        """Rounds that the server's log calls finished."""
        return len({e.what.round for e in self.server if isinstance(e.what, Finished)})

    @property
    def scores(self) -> list[float | None]:
        """The server's scores of every finished round for the study's ``keep``, in order."""
        found = {e.what.round: e.what.score for e in self.server if isinstance(e.what, Finished)}
        return [found[round_] for round_ in sorted(found)]

    @property
    def over(self) -> bool:
        """Whether the server's log says that no round is left to run.

        Adversary: somebody who cuts a log short and calls that the end of the study's patience.
        Only the scores say so, which silos vouched for with the rest of the log.
        """
        return ended(self.study, self.scores)

    def vouched(self, head: Checkpoint, line: tuple[str, bytes]) -> int:
        """When the silo whose signature line of ``head`` this is vouched for it, seconds.

        Raises:
            CryptoError: it is no silo's, or does not verify.
        """
        if line[0] not in self.witnesses:
            raise CryptoError("a signature of no silo")
        return structs.replace(head, lines=(line,)).verify_cosigned(
            line[0], self.witnesses[line[0]][1]
        )

    def need_server(self) -> list[Entry]:
        """The server's log.

        Raises:
            NotCovered: it is not in the bundle.
        """
        if not self.server:
            raise NotCovered("the server's log is not in this bundle")
        return self.server

    def need_silos(self) -> dict[str, list[Entry]]:
        """The silos' logs.

        Raises:
            NotCovered: none is in the bundle.
        """
        if not self.silos:
            raise NotCovered("no silo's log is in this bundle")
        return self.silos


def of(log: list[Entry], kind: type[_What]) -> Iterator[tuple[Entry, _What]]:
    """Entries of one kind, with their content."""
    for entry in log:
        if isinstance(entry.what, kind):
            yield entry, entry.what


def fewest(study: Study) -> str:
    """How many silos are in a sum at least, in words."""
    least, listed = study.noise_shares(), study.quorum
    if least == listed:
        return f"{least}"
    return f"{least} ({listed} on its list, of which a lying server may leave out {listed - least})"


def needed(study: Study) -> dict[str, Any]:
    """How many silos a sum has, and how many open it, by what they do."""
    found: dict[str, Any] = {"fewest silos in a sum": fewest(study)}
    if study.graph is None:
        return found | {"threshold of shares and agreements": study.threshold}
    shares = f"{study.graph.shares} of the {study.graph.neighbours} neighbours of each"
    return found | {"threshold of agreements": study.threshold, "threshold of shares": shares}


def count(number: int, noun: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
