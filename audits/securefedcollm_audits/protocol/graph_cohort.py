"""A cohort on a random graph, a scripted server for it, and the server's notebook.

As :mod:`~.cohort` and :mod:`~.spy` for the complete graph. A leak is also a sum of fewer honest
silos than the graph's bounds promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from securefedcollm.aggregation.header import RoundHeader
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Draw,
    Letter,
    Letters,
    Members,
    Neighbours,
    Peer,
    Post,
    Proof,
    Shares,
    Survivors,
    Tally,
    Uploaded,
)
from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
from securefedcollm.aggregation.masking.messages import Advertise, Agreement, Refusal
from securefedcollm.aggregation.masking.upload import HEAD_BYTES, split
from securefedcollm.aggregation.messages import Ask, Message, decode
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import RandomSource, sha256
from securefedcollm_audits.protocol.cohort import Cohort
from securefedcollm_audits.protocol.graph_spy import GraphSpy

M = TypeVar("M", bound=Message)


class SmallGraphSilo(GraphSiloRound):
    """The library's silo, but for graphs of a dozen silos: no such graph keeps the bounds.

    What is attacked here is what silos say and check; :func:`~.graph_attacks.graph_weak_sizes`
    attacks the sizes, with the library's own silo.
    """

    def _check_sizes(self) -> None:
        pass


@dataclass
class GraphCohort(Cohort):
    """n silos of which the last c tell the server everything, on a graph with k and t.

    Args:
        side: the class of the silos.
        minimum: Q, silos of a roll or a sum.
    """

    silos: int = 12
    neighbours: int = 8
    shares: int = 5
    minimum: int = 9
    side: type[GraphSiloRound] = SmallGraphSilo

    @property
    def graph(self) -> choice.Graph:
        return choice.Graph(self.neighbours, self.shares)

    def _minimum(self) -> int:
        return self.minimum

    def _suite(self) -> str:
        return self.graph.suite

    def member(
        self,
        name: str,
        *,
        header: RoundHeader | None = None,
        incarnation: str = "",
        random: RandomSource | None = None,
    ) -> GraphSiloRound:
        """A silo at the start of the attempt; the same ``incarnation`` has the same secrets."""
        header = header or self.header
        return self.side(
            header=header,
            roster=self.roster,
            name=name,
            signing_key=self.keys[name],
            vector=self.vectors[name],
            vector_id=sha256(self.vectors[name].tobytes()),
            journal=self.journals[name],
            random=random or self.randomness(name, header, incarnation),
        )

    def notebook(self) -> GraphSpy:
        """A spy that knows the colluders' secrets of this attempt."""
        spy = GraphSpy(self.roster)
        self.betray(spy, self.header)
        return spy


class GraphPuppet:
    """A server that sends what a script tells it and keeps every reply."""

    def __init__(
        self,
        cohort: GraphCohort,
        silos: Mapping[str, GraphSiloRound] | None = None,
        spy: GraphSpy | None = None,
    ) -> None:
        self.cohort = cohort
        self.silos = silos or {name: cohort.member(name) for name in cohort.names}
        self.refused: dict[str, str] = {}
        self.spy = spy or cohort.notebook()
        self.adverts: dict[int, Advertise] = {}
        self.drawn: dict[int, tuple[int, ...]] = {}
        self.deals: dict[int, Letters] = {}
        self.uploads: dict[int, Uploaded] = {}

    def call(self, name: str, message: Message) -> bytes | None:
        frame = message.encode()
        self.spy.note(frame, self.cohort.roster.index(name))
        try:
            answer = self.silos[name].handle(frame)
        except RemoteProtocolError as error:
            self.refused.setdefault(name, error.message)
            return None
        self.spy.note(answer, 0)
        return answer

    def all(self, messages: Mapping[str, Message], kind: type[M]) -> dict[str, M]:
        """One request to each silo; the decoded replies of those that answered."""
        answers = {name: self.call(name, message) for name, message in messages.items()}
        return {name: decode(kind, answer, name) for name, answer in answers.items() if answer}

    def packed(self, names: Iterable[str]) -> bytes:
        return choice.pack_set(map(self.cohort.roster.index, names), self.cohort.silos)

    def name(self, index: int) -> str:
        return self.cohort.roster.name(index)

    def ask(
        self, header: RoundHeader | None = None, names: Iterable[str] | None = None
    ) -> dict[int, Advertise]:
        message = Ask(header or self.cohort.header)
        answers = self.all(dict.fromkeys(names or self.cohort.names, message), Advertise)
        self.adverts = {entry.index: entry for entry in answers.values()}
        return self.adverts

    def roll(self, names: Sequence[str], members: Sequence[str] | None = None) -> None:
        """Show ``names`` this roll, and take their draws."""
        indices = sorted(map(self.cohort.roster.index, members or names))
        message = Members(self.packed(members or names))
        for draw in self.all(dict.fromkeys(names, message), Draw).values():
            self.drawn[draw.index] = choice.neighbours_of(
                draw.secret, draw.roll, indices, draw.index, self.cohort.neighbours
            )

    def neighbours(self, name: str) -> Neighbours:
        """The honest answer to a draw."""
        index = self.cohort.roster.index(name)
        return Neighbours(tuple(Peer.of(self.adverts[j]) for j in self.drawn[index]))

    def deal(self, messages: Mapping[str, Neighbours]) -> None:
        """Take the letters of these silos, each of which is told of its neighbours so."""
        self.deals |= {deal.index: deal for deal in self.all(messages, Letters).values()}

    def post(self, name: str, dealers: Sequence[str], hidden: Iterable[str] = ()) -> Post:
        """The honest delivery of these dealers' letters; those of the ``hidden`` are withheld."""
        index = self.cohort.roster.index(name)
        shown = sorted(map(self.cohort.roster.index, {*dealers} - {*hidden}))
        shown = [j for j in shown if index in self.drawn.get(j, ()) and j in self.deals]
        dealt = [self.deals[j].dealt[self.drawn[j].index(index)] for j in shown]
        return Post(
            dealers=self.packed(dealers),
            senders=tuple(Peer.of(self.adverts[j]) for j in shown),
            letters=tuple(Letter(one.box, one.digest) for one in dealt),
        )

    def deliver(self, posts: Mapping[str, Post]) -> None:
        parameters = self.cohort.header.parameters
        for name, post in posts.items():
            frame = self.call(name, post)
            if frame and len(frame) == HEAD_BYTES + 8 * parameters.words:
                upload, _ = split(frame, parameters, name)
                self.uploads[upload.index] = Uploaded(upload.words, upload.signature)
            elif frame:
                accused = self.name(decode(Refusal, frame, name).accused)
                self.refused.setdefault(
                    name, f"a letter that {accused} has not made, or made badly"
                )

    def through_upload(self) -> None:
        """G0 to G3 as an honest server would."""
        names = self.cohort.names
        self.ask()
        self.roll(names)
        self.deal({name: self.neighbours(name) for name in names})
        self.deliver({name: self.post(name, names) for name in names})

    def survey(self, names: Iterable[str], survivors: Sequence[str]) -> dict[str, Agreement]:
        return self.all(dict.fromkeys(names, Survivors(self.packed(survivors))), Agreement)

    def open(
        self,
        names: Iterable[str],
        survivors: Sequence[str],
        signed: Mapping[str, bytes],
        lists: bytes,
    ) -> dict[str, Shares]:
        """G5 and G6, with ``signed`` (signer → signature, whatever it is) as the tally."""
        signers = sorted(signed)
        tree = choice.tree([signed[name] for name in signers])
        (root,) = tree[-1]
        tally = Tally(self.packed(signers), root)
        digest = choice.tally_digest(lists, tally.signers, root)
        challenges = self.all(dict.fromkeys(names, tally), Challenge)
        if not challenges:
            return {}
        count = choice.samples(self.cohort.header.parameters, self.cohort.graph, len(signers))
        proofs = {}
        for name, challenge in challenges.items():
            places = choice.challenged(challenge.secret, digest, len(signers), count)
            index = self.cohort.roster.index(name)
            mine = [j for j in sorted(self.spy.senders(index)) if self.name(j) in survivors]
            proofs[name] = Proof(
                tuple(signed[signers[place]] for place in places),
                tuple(choice.nodes_for(tree, places)),
                tuple(self.uploads[j] for j in mine),
            )
        return self.all(proofs, Shares)
