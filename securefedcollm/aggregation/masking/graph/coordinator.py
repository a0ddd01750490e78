"""The server's side of one attempt at one round of masking on a random graph.

As :mod:`~.masking.coordinator`: this code is the honest server, and the adversary here is up to c
malicious silos and attackers on the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import shamir
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Dealt,
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
from securefedcollm.aggregation.masking.masked_coordinator import MaskedRound
from securefedcollm.aggregation.masking.messages import Advertise, Agreement
from securefedcollm.aggregation.messages import Ask, decode
from securefedcollm.aggregation.steps import GRAPH_TRANSITIONS, Step
from securefedcollm.errors import ProtocolError


class GraphCoordinatorRound(MaskedRound):
    """Makes the requests, takes the replies, opens the sum.

    Args:
        header: as there; its suite names k and t.
        narrow: give the sum as int32 where that holds it.

    Raises:
        LocalProtocolError: the header is for another roster or graph.
    """

    def __init__(
        self, *, header: RoundHeader, roster: Roster, threads: int = 1, narrow: bool = False
    ) -> None:
        super().__init__(header, roster, GRAPH_TRANSITIONS, threads=threads, narrow=narrow)
        self._graph = choice.graph_of(header)
        self._members: tuple[int, ...] = ()
        self._draws: dict[int, bytes] = {}
        self._drawn: dict[int, tuple[int, ...]] = {}
        self._deals: dict[int, Letters] = {}
        self._letters: dict[int, dict[int, Dealt]] = {}
        """Holder -> dealer -> its shares and their commitments, by ascending dealer."""
        self._tally = Tally(b"", bytes(32))
        self._tally_digest = b""
        self._tree: list[list[bytes]] = []
        self._challenges: dict[int, Challenge] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        """Responder -> dealer -> share."""

    def _dealers(self) -> Sequence[int]:
        return tuple(self._deals)

    def _what_next(self) -> str:
        if self._step in {Step.AGREE, Step.CHALLENGE, Step.UNMASK}:
            return "go on with the next round: silos that have agreed open no other sum of this one"
        return super()._what_next()

    def _near(self, dropout: int) -> Sequence[int]:
        both = {*self._drawn[dropout], *self._letters.get(dropout, {})}
        return sorted(both & {*self._uploads})

    def requests(self) -> dict[str, bytes]:
        """One frame for every silo that takes part in this step and has not replied yet."""
        self._check_running()
        frames: dict[Step, Callable[[], Callable[[int], bytes]]] = {
            Step.ADVERTISE: lambda: _same(Ask(self._header).encode()),
            Step.DRAW: lambda: _same(Members(self._packed(self._members)).encode()),
            Step.SHARE: lambda: self._neighbours,
            Step.UPLOAD: lambda: self._post,
            Step.AGREE: lambda: _same(Survivors(self._packed(self._survivors)).encode()),
            Step.CHALLENGE: lambda: _same(self._tally.encode()),
            Step.UNMASK: lambda: self._proof,
        }
        frame = frames[self._step]()
        return {name: frame(self._roster.index(name)) for name in self._waiting()}

    def _packed(self, indices: tuple[int, ...]) -> bytes:
        return choice.pack_set(indices, self._parameters.silos)

    def _neighbours(self, index: int) -> bytes:
        return Neighbours(tuple(map(self._peer, self._drawn[index]))).encode()

    def _post(self, holder: int) -> bytes:
        letters = self._letters.get(holder, {})
        return Post(
            dealers=self._packed(tuple(self._deals)),
            senders=tuple(map(self._peer, letters)),
            letters=tuple(Letter(dealt.box, dealt.digest) for dealt in letters.values()),
        ).encode()

    def _peer(self, index: int) -> Peer:
        return Peer.of(self._advertisements[index])

    def _proof(self, index: int) -> bytes:
        signers = sorted(self._agreements)
        count = choice.samples(self._parameters, self._graph, len(signers))
        secret = self._challenges[index].secret
        places = choice.challenged(secret, self._tally_digest, len(signers), count)
        kept = (j for j in self._letters.get(index, {}) if j in self._uploads)
        return Proof(
            signatures=tuple(self._agreements[signers[place]].signature for place in places),
            nodes=tuple(choice.nodes_for(self._tree, places)),
            uploads=tuple(
                Uploaded(self._uploads[j].words, self._uploads[j].signature) for j in kept
            ),
        ).encode()

    def _take(self, name: str, frame: bytes | memoryview) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._on_advertise(name, decode(Advertise, frame, name))
            case Step.DRAW:
                self._on_draw(name, decode(Draw, frame, name))
            case Step.SHARE:
                self._on_letters(name, decode(Letters, frame, name))
            case Step.UPLOAD:
                self._on_upload(name, frame)
            case Step.AGREE:
                self._on_agreement(name, decode(Agreement, frame, name))
            case Step.CHALLENGE:
                self._on_challenge(name, decode(Challenge, frame, name))
            case _:
                self._on_shares(name, decode(Shares, frame, name))

    def _close(self) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._advertisements = self._quorum(self._advertisements)
                self._members = tuple(self._advertisements)
                packed = self._packed(self._members)
                self._roll_digest = choice.roll_digest(self._header_digest, packed)
            case Step.DRAW:
                self._draws = self._quorum(self._draws)
            case Step.SHARE:
                self._close_share()
            case Step.UPLOAD:
                self._close_upload()
            case Step.AGREE:
                self._close_agree()
            case Step.CHALLENGE:
                self._enough(len(self._challenges), self._graph.shares)
                self._ask(sorted(self._challenges))
            case _:
                self._open()

    def _forget(self) -> None:
        self._deals.clear()
        self._letters.clear()
        self._shares.clear()
        self._sum = np.zeros(0, dtype="<u8")

    # G1 ---------------------------------------------------------------------------------------

    def _on_draw(self, name: str, draw: Draw) -> None:
        index = self._check_signed(name, draw)
        if draw.roll != self._roll_digest:
            self._blame(name, "drew its neighbours from another roll")
        self._draws[index] = draw.secret
        self._drawn[index] = choice.neighbours_of(
            draw.secret, self._roll_digest, self._members, index, self._graph.neighbours
        )

    # G2 ---------------------------------------------------------------------------------------

    def _on_letters(self, name: str, deal: Letters) -> None:
        index = self._check_signed(name, deal)
        if deal.roll != self._roll_digest or len(deal.dealt) != len(self._drawn[index]):
            self._blame(name, "sent a dealing that does not fit its draw")
        self._deals[index] = deal

    def _close_share(self) -> None:
        self._deals = self._quorum(self._deals)
        self._check_kept(tuple(self._deals))
        for dealer, deal in self._deals.items():
            for holder, dealt in zip(self._drawn[dealer], deal.dealt, strict=True):
                self._letters.setdefault(holder, {})[dealer] = dealt
        self._delivery_digest = choice.delivery_digest(
            self._roll_digest, self._packed(tuple(self._deals))
        )
        self._sum = np.zeros(self._parameters.words, dtype="<u8")

    def _check_kept(self, alive: tuple[int, ...]) -> None:
        """Silos refuse to go on where one of them has lost too many neighbours."""
        flags = choice.flags_of(alive, self._parameters.silos)
        for index in alive:
            left = int(flags[list(self._drawn[index])].sum())
            if left < self._graph.shares:
                raise ProtocolError(
                    f"{self._roster.name(index)} has {left} neighbours left after step "
                    f"{self._step.value}; {self._graph.shares} are needed{self._reasons()}",
                    hint=f"nothing was opened; {self._what_next()}",
                )

    # G3 ---------------------------------------------------------------------------------------

    def _close_upload(self) -> None:
        self._split_dealers()
        self._check_kept(self._survivors)
        self._lists_digest = choice.survivors_digest(
            self._delivery_digest, self._packed(self._survivors)
        )
        self._ask(self._survivors)

    # G4, G5 -----------------------------------------------------------------------------------

    def _close_agree(self) -> None:
        self._enough(len(self._agreements), self._parameters.threshold)
        signers = tuple(sorted(self._agreements))
        self._tree = choice.tree([self._agreements[i].signature for i in signers])
        (root,) = self._tree[-1]
        self._tally = Tally(self._packed(signers), root)
        self._tally_digest = choice.tally_digest(self._lists_digest, self._tally.signers, root)
        self._ask(signers)

    def _on_challenge(self, name: str, challenge: Challenge) -> None:
        index = self._check_signed(name, challenge)
        if challenge.tally != self._tally_digest:
            self._blame(name, "challenges another tally")
        self._challenges[index] = challenge

    # G6 ---------------------------------------------------------------------------------------

    def _on_shares(self, name: str, sent: Shares) -> None:
        index = self._check_signed(name, sent)
        held = self._letters.get(index, {})
        if sent.lists != self._lists_digest or len(sent.shares) != len(held):
            self._blame(name, "opened other lists")
        for (dealer, dealt), share in zip(held.items(), sent.shares, strict=True):
            committed = dealt.seed_share_commitment, dealt.key_share_commitment
            self._check_share(dealer, index, share, *committed)
        self._shares[index] = dict(zip(held, sent.shares, strict=True))

    def _open(self) -> None:
        self._unmask({dealer: self._rebuilt(dealer) for dealer in self._deals})

    def _rebuilt(self, dealer: int) -> bytes:
        needed = self._graph.shares
        responders = [i for i in self._drawn[dealer] if i in self._shares][:needed]
        if len(responders) < needed:
            raise ProtocolError(
                f"only {len(responders)} neighbours of {self._roster.name(dealer)} answered; "
                f"{needed} are needed{self._reasons()}",
                hint=self._what_next(),
            )
        shares = [self._shares[i][dealer] for i in responders]
        committed = self._deals[dealer].seed_commitment
        return self._secret(dealer, shares, shamir.weights(responders), committed)


def _same(frame: bytes) -> Callable[[int], bytes]:
    return lambda index: frame
