"""A silo that is fooled about the survivors of a sum on a random graph: what its ledger records."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from securefedcollm_audits.verification.checks.budget import _fits

from securefedcollm.aggregation import Roster, Step, coordinator_side
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Post,
    Proof,
    Shares,
    Survivors,
    Tally,
    Uploaded,
)
from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.masking.upload import split
from securefedcollm.aggregation.messages import Message, decode
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    Ended,
    EndRun,
    Trained,
    decode_reply,
    encode,
    model_digest,
)
from securefedcollm.federation.plan import round_header
from securefedcollm.federation.records import SiloRecord
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.silo_unit import with_survivors
from securefedcollm.study import Study
from tests.support.arithmetic import SIZE, ArithmeticSilo, Unwritten
from tests.support.client_level import study as silo_study
from tests.support.client_level import unit_of
from tests.support.rounds import begin

NAMES = [f"silo-{i:02}" for i in range(1, 17)]
KEYS = {name: SigningKey(hashlib.sha256(name.encode()).digest()) for name in NAMES}
ROSTER = Roster({name: key.public for name, key in KEYS.items()})
VICTIM, LATE = NAMES[0], NAMES[12:]
STUDY = silo_study(
    rounds=1,
    silos={"count": 16, "minimum": 12, "colluders": 0},
    aggregation={"clip_norm": 20.0, "graph": {"neighbours": 11}},
)
RUN = b"r" * 16


class LyingServer:
    """Says to all but one silo that four are lost, and to the one that everybody is there."""

    def __init__(self, directory) -> None:
        self.directory = directory
        self.sessions = {name: self._session(name) for name in NAMES}
        unit = unit_of(STUDY)
        adapter = bytes(4 * SIZE)
        self.header = round_header(
            STUDY,
            roster=ROSTER,
            run_id=RUN,
            round_=0,
            attempt=0,
            model=model_digest(b"b" * 32, b"l" * 32, adapter, unit.identity),
            values=unit.values,
        )
        self.side = coordinator_side(STUDY.scheme, header=self.header, roster=ROSTER)
        self.uploads: dict[int, Uploaded] = {}
        self.dealers: tuple[int, ...] = ()

    def _session(self, name: str) -> SiloSession:
        home = self.directory / name
        training = ChargedTraining(
            STUDY,
            name,
            ArithmeticSilo(name, private=False),
            SiloStore(home),
            Ledger(home / "ledger.sqlite", name),
        )
        record = SiloRecord(Unwritten(), key=KEYS[name], roster=ROSTER, server=b"")
        return SiloSession(Seat(STUDY, name, ROSTER, KEYS[name]), training, record)

    def ask(self, name: str, frame: bytes) -> bytes:
        reply = decode_reply(self.sessions[name].step(encode(Aggregate(memoryview(frame)))), name)
        assert isinstance(reply, Aggregated), reply
        return bytes(reply.frame)

    def go(self) -> tuple[str, ...]:
        """The survivors of the sum that the server opened, with the victim's noise in it."""
        for name in NAMES:
            assert isinstance(decode_reply(self.sessions[name].step(begin()), name), Trained)
        while True:
            step, agreed = (
                self.side.step,
                self.side.step in {Step.AGREE, Step.CHALLENGE, Step.UNMASK},
            )
            for name, request in self.side.requests().items():
                if agreed and name == VICTIM:
                    continue
                answer = self.ask(name, request)
                if step is Step.UPLOAD:
                    self._note(name, decode(Post, request, "server"), answer)
                if not (step is Step.UPLOAD and name in LATE):
                    self.side.receive(name, answer)
            if not self.side.advance():
                break
        self._fool()
        for name in NAMES:
            ended = self.sessions[name].step(encode(EndRun(RUN)))
            assert isinstance(decode_reply(ended, name), Ended)
        return self.side.result.survivors

    def _note(self, name: str, post: Post, answer: bytes) -> None:
        upload, _ = split(answer, self.header.parameters, name)
        self.uploads[upload.index] = Uploaded(upload.words, upload.signature)
        if name == VICTIM:
            self.dealers = tuple(sender.index for sender in post.senders)

    def _fool(self) -> None:
        """The victim signs and opens a list of all 16, which nobody else has seen."""
        everyone = choice.pack_set(range(1, 17), 16)

        def say(message: Message) -> bytes:
            return self.ask(VICTIM, message.encode())

        # Its own signature is the only one in this tree of 16.
        own = decode(Agreement, say(Survivors(everyone)), VICTIM).signature
        tree = choice.tree([own, *[bytes(64)] * 15])
        say(Tally(everyone, tree[-1][0]))
        uploads = tuple(self.uploads[dealer] for dealer in self.dealers)
        decode(Shares, say(Proof((own,), tuple(choice.nodes_for(tree, [0])), uploads)), VICTIM)


class Paid(NamedTuple):
    """By the victim's ledger, beside what the sum has cost it."""

    counted: tuple[Event, ...]
    charged: float
    spent: float

    @property
    def fault(self) -> str:
        """What an auditor finds wrong with its settlement."""
        return _fits(SimpleNamespace(study=STUDY), 0, self.counted, len(NAMES))


def fooled(directory, monkeypatch: pytest.MonkeyPatch) -> Paid:
    """The victim answers for 16 silos, and the server opens a sum of 12 with its noise in it."""
    # With a thousand silos one silo asks for so few signatures that, with a chance of about 2^-14,
    # none of them is missing. With 16 it asks for all. Here it asks for one, and that is there.
    monkeypatch.setattr(choice, "samples", lambda parameters, graph, signers: 1)
    monkeypatch.setattr(choice, "challenged", lambda secret, tally, population, count: [0])
    server = LyingServer(directory)
    survivors = server.go()
    assert VICTIM in survivors
    assert len(survivors) == 12
    with Ledger(directory / VICTIM / "ledger.sqlite", VICTIM) as ledger:
        (entry,) = ledger.entries()
    assert entry.state == "settled"
    spent = [with_survivors(event, len(survivors)) for event in entry.reserved]
    return Paid(entry.counted, *(claim(e, 1e-5).epsilon for e in (entry.counted, spent)))


def test_a_fooled_silo_is_charged_for_the_least_noise(tmp_path, monkeypatch) -> None:
    paid = fooled(tmp_path, monkeypatch)
    assert paid.charged >= paid.spent
    assert STUDY.noise_shares(16) == STUDY.noise_shares() < 12
    assert not paid.fault


def test_charged_by_the_list_it_would_have_paid_less_than_it_spent(tmp_path, monkeypatch) -> None:
    """Control: the rule of the complete graph, where a silo sees every signature."""
    least = STUDY.noise_shares()

    def by_list(study: Study, survivors: int | None = None) -> int:
        return least if survivors is None else survivors - study.graph_bounds.hidden

    with monkeypatch.context() as older:
        older.setattr(Study, "noise_shares", by_list)
        paid = fooled(tmp_path, older)
    assert paid.charged < paid.spent
    assert paid.fault == "counts 13 noise shares; the sum has 9"
