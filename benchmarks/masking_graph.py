"""Masking on a random graph: ``python -m benchmarks.masking --graph --silos 1000 --values 11000``.

A whole round in one process with real keys, shares and masks: CPU seconds of all silos and of the
server, bytes a silo. A tenth of the silos work with the server in the plan, and a tenth is lost:
in equal parts at every step, or all at ``--lost-at STEP``.

``--one`` plays one silo with its neighbours and all others' advertisements, so that a silo's cost
can be measured among 10,000. With the peer's environment (``make bench``) Flower's SecAgg+ client
runs at the same number of neighbours.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from securefedcollm.aggregation import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.inmemory import MemoryJournal
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.bounds import derive
from securefedcollm.aggregation.masking.graph.coordinator import GraphCoordinatorRound
from securefedcollm.aggregation.masking.graph.messages import (
    Letter,
    Letters,
    Members,
    Neighbours,
    Peer,
    Post,
    Proof,
    Survivors,
    Tally,
    Uploaded,
)
from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
from securefedcollm.aggregation.masking.messages import Advertise, Agreement
from securefedcollm.aggregation.masking.packing import Field
from securefedcollm.aggregation.masking.upload import Upload
from securefedcollm.aggregation.messages import UNSIGNED, Ask, Message, decode, sign
from securefedcollm.aggregation.steps import GRAPH_TRANSITIONS
from securefedcollm.primitives import AgreementKey, SigningKey, merkle_root

ROOT = Path(__file__).resolve().parent.parent
PEER = (".venv-bench/bin/python", "benchmarks/masking_graph_peer.py")
VALUE_BITS = 11  # one of a silo's values, so that three fields share a word among 1,000 silos


class Setting:
    """n silos, a tenth of them colluding and a tenth lost, and the graph that follows."""

    def __init__(self, silos: int, values: int) -> None:
        names = [f"silo-{i:05d}" for i in range(1, silos + 1)]
        self.keys = {name: SigningKey.generate() for name in names}
        self.roster = Roster({name: key.public for name, key in self.keys.items()})
        packed = Field.fit(VALUE_BITS, silos)
        colluders, quorum = silos // 10, silos - silos // 10
        self.graph = derive(silos, colluders, quorum)
        self.header = RoundHeader(
            study_digest=bytes(32),
            run_id=bytes(16),
            round=0,
            attempt=0,
            model_digest=bytes(32),
            parameters=RingParameters(
                values=values,
                bound=packed.bound,
                field_bits=packed.bits,
                silos=silos,
                min_silos=quorum,
                threshold=(silos + colluders) // 2 + 1,
                colluders=colluders,
            ),
            roster_root=self.roster.root,
            suite=self.graph.suite,
        )

    def silo(self, name: str, vector: np.ndarray, draw: bytes = b"") -> GraphSiloRound:
        """A silo; with ``draw`` it reveals that."""
        calls = itertools.count()
        return GraphSiloRound(
            header=self.header,
            roster=self.roster,
            name=name,
            signing_key=self.keys[name],
            vector=vector,
            vector_id=bytes(32),
            journal=MemoryJournal(),
            random=lambda count: draw if draw and next(calls) == 3 else os.urandom(count),
        )


def whole_round(silos: int, values: int, lost_at: str) -> dict[str, object]:
    """One round of everybody; CPU seconds, one thread."""
    setting = Setting(silos, values)
    bound = setting.header.parameters.bound
    rng = np.random.default_rng(0)
    vectors = {name: rng.integers(-bound, bound + 1, values) for name in setting.roster}
    steps = [step for step in GRAPH_TRANSITIONS if lost_at in ("every", step.value)]
    share = silos // 10 // len(steps)
    begun = time.process_time()
    sides = {name: setting.silo(name, vectors[name]) for name in setting.roster}
    made = time.process_time() - begun
    side = GraphCoordinatorRound(header=setting.header, roster=setting.roster)
    spent = traffic = server = 0.0
    more = True
    while more:
        began, of_silos = time.process_time(), 0.0
        frames = side.requests()
        gone = rng.permutation(list(frames))[:share] if side.step in steps else ()
        for name in gone:
            side.lost(str(name), "lost")
            del frames[str(name)]
        for name, frame in frames.items():
            start = time.process_time()
            reply = sides[name].handle(frame)
            of_silos += time.process_time() - start
            traffic += len(frame) + len(reply)
            side.receive(name, reply)
        more = side.advance()
        server += time.process_time() - began - of_silos
        spent += of_silos
    result = side.result
    if not np.array_equal(result.sum, sum(vectors[name] for name in result.survivors)):
        raise SystemExit("the sum is wrong")
    return {
        "silos": silos,
        "values": values,
        "neighbours": setting.graph.neighbours,
        "shares": setting.graph.shares,
        "lost_at": lost_at,
        "lost": share * len(steps),
        "survivors": len(result.survivors),
        "round_cpu_s": made + spent + server,
        "server_cpu_s": server,
        "silo_cpu_s": (made + spent) / silos,
        "bytes_per_silo": traffic / silos,
    }


class _One:
    """One silo, to which real frames come; the rest of the cohort exists as far as it needs."""

    def __init__(self, setting: Setting, values: int) -> None:
        self.setting = setting
        header, roster = setting.header, setting.roster
        self.count = len(roster)
        everyone = tuple(range(1, self.count + 1))
        self.members = choice.pack_set(everyone, self.count)
        roll = choice.roll_digest(header.digest, self.members)
        k = setting.graph.neighbours
        draws = {i: os.urandom(32) for i in everyone}
        self.drawn = {i: choice.neighbours_of(draws[i], roll, everyone, i, k) for i in everyone}
        self.near = [j for j in everyone if 1 in self.drawn[j]]
        zeros = np.zeros(values, dtype=np.int64)
        self.others = {j: setting.silo(roster.name(j), zeros, draws[j]) for j in self.near}
        self.adverts = {i: self._advert(i) for i in everyone}
        self.draw = draws[1]
        self.bytes = self.cpu = 0.0

    def _advert(self, index: int) -> Advertise:
        name = self.setting.roster.name(index)
        if index in self.others:
            frame = self.others[index].handle(Ask(self.setting.header).encode())
            return decode(Advertise, frame, name)
        made = Advertise(
            header=self.setting.header.digest,
            index=index,
            signature=UNSIGNED,
            mask_public=AgreementKey(os.urandom(32)).public,
            share_public=AgreementKey(os.urandom(32)).public,
        )
        return sign(made, self.setting.keys[name])

    def letters(self, index: int) -> Letters:
        side = self.others[index]
        side.handle(Members(self.members).encode())
        return decode(Letters, side.handle(Neighbours(self.peers(self.drawn[index])).encode()), "")

    def peers(self, indices: Iterable[int]) -> tuple[Peer, ...]:
        return tuple(Peer.of(self.adverts[index]) for index in indices)

    def measured(self, side: GraphSiloRound, message: Message) -> bytes:
        frame = message.encode()
        start = time.process_time()
        reply = side.handle(frame)
        self.cpu += time.process_time() - start
        self.bytes += len(frame) + len(reply)
        return reply


def one_silo(silos: int, values: int) -> dict[str, object]:
    """CPU seconds and bytes of one silo in a round in which nobody is lost."""
    setting = Setting(silos, values)
    one, header = _One(setting, values), setting.header
    names, digest = setting.roster.names, setting.header.digest
    vector = np.zeros(values, dtype=np.int64)
    start = time.process_time()
    side = setting.silo(names[0], vector, one.draw)
    one.cpu += time.process_time() - start
    one.adverts[1] = decode(Advertise, one.measured(side, Ask(header)), names[0])
    one.measured(side, Members(one.members))
    one.measured(side, Neighbours(one.peers(one.drawn[1])))
    mine = [one.letters(j).dealt[one.drawn[j].index(1)] for j in one.near]
    letters = tuple(Letter(dealt.box, dealt.digest) for dealt in mine)
    one.measured(side, Post(one.members, one.peers(one.near), letters))
    delivery = choice.delivery_digest(choice.roll_digest(digest, one.members), one.members)
    own = decode(Agreement, one.measured(side, Survivors(one.members)), names[0])
    signed = [
        sign(
            Agreement(header=digest, index=i, signature=UNSIGNED, lists=own.lists),
            setting.keys[name],
        ).signature
        for i, name in enumerate(names, start=1)
    ]
    tree = choice.tree(signed)
    (root,) = tree[-1]
    assert root == merkle_root(signed)
    one.measured(side, Tally(one.members, root))
    uploads = (
        sign(
            Upload(header=digest, index=j, signature=UNSIGNED, delivery=delivery, words=bytes(32)),
            setting.keys[names[j - 1]],
        )
        for j in one.near
    )
    shown = tuple(signed[place] for place in side._challenged)
    nodes = tuple(choice.nodes_for(tree, side._challenged))
    proof = Proof(shown, nodes, tuple(Uploaded(u.words, u.signature) for u in uploads))
    one.measured(side, proof)
    return {
        "silos": silos,
        "values": values,
        "neighbours": setting.graph.neighbours,
        "shares": setting.graph.shares,
        "silo_cpu_s": one.cpu,
        "bytes_per_silo": one.bytes,
    }


def peer(values: int, neighbours: int, shares: int) -> dict[str, float]:
    """Flower's client at these sizes; nothing without its environment."""
    command = [str(ROOT / part) for part in PEER]
    if not Path(command[0]).exists():
        return {}
    arguments = [*command, str(values), str(neighbours), str(shares)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(silos: int, values: int, *, lost_at: str, one: bool) -> dict[str, object]:
    """All figures, with the peer's and their quotients."""
    figures = one_silo(silos, values) if one else whole_round(silos, values, lost_at)
    theirs = peer(values, int(str(figures["neighbours"])), int(str(figures["shares"])))
    for name in ("silo_cpu_s", "bytes_per_silo"):
        if name in theirs:
            figures[f"{name}_ratio"] = float(str(figures[name])) / theirs[name]
    return figures | {f"peer_{name}": figure for name, figure in theirs.items()}
