"""Members of a signed study that ask each other through a server, with the test as the carrier."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.evidence.entries import Entry
from securefedcollm.federation import roles
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.questions.counter import Counter, Result
from securefedcollm.federation.questions.inquiry import Found, judge
from securefedcollm.federation.questions.port import QuestionPort
from securefedcollm.federation.questions.relay import Relay
from securefedcollm.federation.roles import Member
from securefedcollm.federation.silo import Clock
from securefedcollm.study import load_study, study_from_tree
from tests.support.asking import TEXTS, Members
from tests.support.members import make_identities, write_signed

SILOS = tuple(TEXTS)
ARITHMETIC = {
    "privacy": {"epsilon": 8.0, "delta": 1e-5},
    "local": {"steps": 5, "batch_size": 8, "learning_rate": 0.1},
}
"""What the trainings of :mod:`.arithmetic` charge."""


class Signed:
    """A study that everybody signed, homes, and an index of every silo.

    Args:
        homes: of participants that are there already.
        changes: of the section ``retrieval``.
    """

    def __init__(
        self, directory: Path, homes: dict[str, Path] | None = None, **changes: object
    ) -> None:
        first = Members(directory, **changes)
        file = directory / "map"
        file.write_bytes(first.space.reduction.encode())
        pins = {"source": "path:map", "sha256": first.space.reduction.digest.hex()}
        encoder = {"source": "path:slm", "layer": 0, "sha256": first.space.encoder.digest}
        self.members = Members(directory, **changes, encoder=encoder, reduction=pins)
        self.space = self.members.space
        self.homes = homes or make_identities(directory / "homes", SILOS)
        agreed = study_from_tree(self.members.study.tree | ARITHMETIC)
        self.file = write_signed(agreed, self.homes, directory / "study.yaml")
        self.study = load_study(self.file)


class Wire:
    """An engine in this process: silo → port, and a log of all that crosses.

    ``meddle``: (silo, "in" or "out", frame) → the frame as it arrives, or None to lose it.
    """

    def __init__(self, ports: Mapping[str, QuestionPort]) -> None:
        self.ports = ports
        self.seen: list[tuple[str, str, bytes]] = []
        self.meddle: Callable[[str, str, bytes], bytes | None] = lambda silo, way, frame: frame

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        return {silo: self._one(silo, frame) for silo, frame in frames.items()}

    def _one(self, silo: str, frame: bytes) -> bytes | Failure:
        arriving = self.meddle(silo, "in", frame)
        if silo not in self.ports or arriving is None:
            return Failure("is not connected")
        self.seen.append((silo, "in", frame))
        reply = self.meddle(silo, "out", self.ports[silo].step(arriving))
        if reply is None:
            return Failure("no reply in time")
        self.seen.append((silo, "out", reply))
        return reply


class Network:
    """Everybody's processes, started; :meth:`restart` kills one and starts it again.

    Args:
        shelves: silo → its index.
    """

    silos: tuple[str, ...] = SILOS

    def __init__(self, signed: Any, homes: Mapping[str, Path], shelves: Mapping[str, Any]):
        self.signed, self.homes, self.shelves = signed, homes, shelves
        self.stacks: dict[str, contextlib.ExitStack] = {}
        self.counters: dict[str, Counter] = {}
        self.members: dict[str, Member] = {}
        self.ports: dict[str, QuestionPort] = {}
        self.now = 0.0
        self.waited: list[float] = []
        self.most: int | None = None
        """The silos' own limit, from when they start."""
        self.wire = Wire(self.ports)
        self.relay: Relay
        for name in (*self.silos, "server"):
            self.start(name)

    def start(self, name: str) -> None:
        stack = self.stacks[name] = contextlib.ExitStack()
        role = "server" if name == "server" else "silo"
        entered = roles.take_part(
            self.signed.study, self.signed.file, self.homes[name], role, lambda: ""
        )
        member = self.members[name] = stack.enter_context(entered)
        counter = self.counters[name] = Counter()
        own = self.own(member, stack)
        port = roles.question_port(member, counter, own, clock=Clock(lambda: self.now, self.wait))
        if name == "server":
            self.relay = roles.question_relay(member, self.wire, port)
            self.relay.clock = lambda: self.now
        self.ports[name] = port

    def wait(self, seconds: float) -> None:
        """Of members that let a slot pass."""
        self.waited.append(seconds)
        self.now += seconds

    def own(self, member: Member, stack: contextlib.ExitStack) -> Any:
        """What a member answers from."""
        if member.name not in self.shelves:
            return None
        own = roles.open_shelf(member, self.shelves[member.name], self.most)
        stack.callback(own.close)
        return own.stock

    def kill(self, name: str) -> None:
        """As kill -9: nothing that was only in memory is left."""
        self.stacks.pop(name).close()
        del self.ports[name]

    def restart(self, name: str) -> None:
        self.kill(name)
        self.start(name)

    def hand_in(self, asker: str, words: str) -> Future[Result]:
        (query,) = self.signed.space.embed([words])
        return self.counters[asker].hand_in(query)

    def turns(self, waiting: Future[Any], most: int = 12) -> Any:
        for _ in range(most):
            if waiting.done():
                break
            self.relay.turn()
        return waiting.result(0)

    def ask(self, asker: str, words: str) -> Found:
        result = self.turns(self.hand_in(asker, words))
        (query,) = self.signed.space.embed([words])
        most = self.signed.members.study.retrieval.fetched
        return judge(result.fetched, query, self.signed.space.embed, most)

    def bundles(self, directory: Path) -> list[Path]:
        """Everybody's evidence, one file each."""
        made = []
        for name, member in self.members.items():
            path = directory / f"{name}.zip"
            path.write_bytes(make_bundle(member.run))
            made.append(path)
        return made

    def close(self) -> None:
        for stack in self.stacks.values():
            stack.close()


def shape(frame: bytes) -> object:
    """What a carrier can tell of a frame without a key: kinds, names and lengths, in order."""
    match msgspec.msgpack.decode(frame):
        case [tag, *_, list(letters)]:
            inner = [
                (who, kind, len(content), [len(part) for part in msgspec.msgpack.decode(content)])
                for who, _, kind, content in letters
                if kind != "declined"
            ]
            return tag, len(frame), inner
    raise AssertionError(frame)


def log_of(network: Network, name: str) -> list[Entry]:
    log = network.ports[name]._log
    assert log is not None
    return log.entries


def kinds(network: Network, name: str) -> list[type]:
    return [type(entry.what) for entry in log_of(network, name)[1:]]


def verified(network: Network, directory: Path) -> None:
    """Everybody's evidence by itself, and all of it together."""
    bundles = network.bundles(directory)
    whole = directory / "all.zip"
    whole.write_bytes(merge(bundles))
    for bundle in (*bundles, whole):
        verdict = verify(bundle)
        assert verdict.holds, [(check.name, check.faults) for check in verdict.failed]
