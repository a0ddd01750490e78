"""What a server can compute from everything it has seen of rounds on a random graph.

As :mod:`~.spy`. A silo masks with those that it drew and those whose letters the server showed it,
so masks that only one end has never cancel. Of two uploads of one silo, masked with the same peers
but for one, the difference is the mask of that pair.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Draw,
    Letters,
    Members,
    Post,
    Shares,
    Survivors,
)
from securefedcollm.aggregation.masking.messages import Advertise
from securefedcollm.aggregation.masking.upload import HEAD_BYTES, MAGIC
from securefedcollm.aggregation.messages import Ask
from securefedcollm.errors import CryptoError, ProtocolError, SecureFedCoLLMError
from securefedcollm.primitives import AgreementKey, RandomSource, unseal

Words = npt.NDArray[np.uint64]
_NOTED = Ask | Advertise | Members | Draw | Letters | Post | Survivors | Shares


class GraphSpy:
    """Collects frames, rebuilds secrets, opens sums."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._colluders: dict[tuple[bytes, int], tuple[bytes, bytes, bytes]] = {}
        self._headers: dict[bytes, RoundHeader] = {}
        self._adverts: dict[tuple[bytes, int], Advertise] = {}
        self._rolls: dict[bytes, tuple[bytes, tuple[int, ...]]] = {}
        self._draws: dict[tuple[bytes, int], tuple[int, ...]] = {}
        self._deals: dict[tuple[bytes, int], Letters] = {}
        self._dealers: dict[bytes, tuple[bytes, tuple[int, ...]]] = {}
        self._senders: dict[tuple[bytes, int], tuple[int, ...]] = {}
        self._lists: dict[bytes, tuple[bytes, frozenset[int]]] = {}
        self._uploads: dict[bytes, dict[int, bytes]] = defaultdict(dict)
        self._pairs: dict[bytes, dict[tuple[int, int], Words]] = defaultdict(dict)
        self._shares: list[Shares] = []
        self._masked_for: dict[tuple[bytes, int], tuple[int, ...]] = {}
        self._asked: dict[int, bytes] = {}
        self._rolled: dict[int, bytes] = {}
        self._last: dict[int, tuple[int, ...]] = {}

    def collude(self, index: int, header: RoundHeader, random: RandomSource) -> None:
        """A silo hands over the source of its secrets: mask secret, share secret, seed."""
        self._colluders[header.digest, index] = random(32), random(32), random(32)

    def senders(self, index: int) -> tuple[int, ...]:
        """The dealers whose letters this silo was shown last."""
        return self._last.get(index, ())

    def note(self, frame: bytes, holder: int) -> None:
        """Keep the content of one frame; ``holder``: the silo that it went to, or 0."""
        if frame.startswith(MAGIC):
            self._note_upload(frame[40:72], int.from_bytes(frame[72:80], "little"), frame)
            return
        try:
            message = msgspec.msgpack.decode(frame, type=_NOTED)
        except (msgspec.MsgspecError, SecureFedCoLLMError, UnicodeDecodeError):
            return
        match message:
            case Ask(header=header):
                self._headers[header.digest] = header
                self._asked[holder] = header.digest
            case Advertise(header=digest, index=index):
                self._adverts[digest, index] = message
            case Members(members=packed):
                digest = self._asked[holder]
                roll = self._rolled[holder] = choice.roll_digest(digest, packed)
                self._rolls[roll] = digest, choice.read_set(packed, len(self._roster)) or ()
            case Draw(roll=roll, index=index, secret=secret):
                digest, members = self._rolls[roll]
                count = choice.graph_of(self._headers[digest]).neighbours
                drawn = choice.neighbours_of(secret, roll, members, index, count)
                self._draws[roll, index] = drawn
            case Letters(roll=roll, index=index):
                self._deals[roll, index] = message
            case Post():
                self._note_post(message, holder)
            case Survivors(survivors=packed):
                for delivery, (_, dealers) in self._dealers.items():
                    survivors = choice.read_set(packed, len(self._roster))
                    if survivors and {*survivors} <= {*dealers}:
                        lists = choice.survivors_digest(delivery, packed)
                        self._lists[lists] = delivery, frozenset(survivors)
            case Shares():
                self._shares.append(message)

    def _note_upload(self, delivery: bytes, index: int, frame: bytes) -> None:
        """Keep the first upload of a silo; another one may show what it shares with one peer."""
        first = self._uploads[delivery].setdefault(index, frame)
        shown = self._last.get(index, ())
        before = self._masked_for.setdefault((delivery, index), shown)
        differ = {*before} ^ {*shown}
        if len(differ) == 1:
            (peer,) = differ
            more, less = (first, frame) if peer in before else (frame, first)
            mask = _words(more) - _words(less)
            self._pairs[delivery].setdefault((index, peer), mask)
            self._pairs[delivery].setdefault((peer, index), np.uint64(0) - mask)

    def _note_post(self, post: Post, holder: int) -> None:
        dealers = choice.read_set(post.dealers, len(self._roster)) or ()
        self._last[holder] = tuple(sender.index for sender in post.senders)
        roll = self._rolled[holder]
        delivery = choice.delivery_digest(roll, post.dealers)
        self._dealers[delivery] = roll, dealers
        self._senders.setdefault((delivery, holder), self._last[holder])

    def leaks(self, least: int = 2) -> list[str]:
        """The knowledge beyond one sum a round over ``least`` honest silos, in words."""
        leaks: list[str] = []
        rounds: dict[bytes, set[frozenset[int]]] = defaultdict(set)
        for scope, members in self.opened():
            honest = members - {index for _, index in self._colluders}
            if 0 < len(honest) < least:
                names = ", ".join(self._roster.name(index) for index in sorted(honest))
                leaks.append(f"the sum of {names} alone")
            if honest:
                rounds[scope].add(honest)
        leaks += [f"{len(sets)} sums in one round" for sets in rounds.values() if len(sets) > 1]
        return leaks

    def opened(self) -> list[tuple[bytes, frozenset[int]]]:
        """(round, members) of every sum that follows from the notes."""
        return [
            (self._headers[self._rolls[self._dealers[delivery][0]][0]].round_scope, members)
            for delivery in self._uploads
            if delivery in self._dealers
            for members in self._open(delivery)
        ]

    def _open(self, delivery: bytes) -> list[frozenset[int]]:
        roll, dealers = self._dealers[delivery]
        digest = self._rolls[roll][0]
        header = self._headers[digest]
        seeds = self._secrets("seed", roll, dealers)
        known = {i: AgreementKey(s) for i, s in self._secrets("key", roll, dealers).items()}
        uploads = self._uploads[delivery]
        masked = {
            i: ({*self._draws.get((roll, i), ())} | {*self._senders.get((delivery, i), ())})
            & {*dealers}
            for i in uploads
        }
        found, pairs = [], self._pairs[delivery]
        for group in _groups({*uploads} & {*seeds}, masked, {*known}, {*pairs}):
            words = np.zeros(header.parameters.words, dtype="<u8")
            add: list[bytes] = []
            subtract = [keys.self_mask_key(seeds[i], digest, delivery, i) for i in group]
            for i in group:
                words += _words(uploads[i])
                for j in masked[i]:
                    if j in group and i in masked[j]:
                        continue  # it cancels
                    if (i, j) in pairs:
                        words -= pairs[i, j]
                        continue
                    own, peer = (known[i], j) if i in known else (known[j], i)
                    public = self._adverts[digest, peer].mask_public
                    key = keys.pair_mask_key(own, public, digest, delivery, i, j)
                    (subtract if i < j else add).append(key)
            masks.apply(words, add=add, subtract=subtract)
            with contextlib.suppress(ProtocolError):
                packing.unpack(words, header.parameters, len(group))
                found.append(frozenset(group))
        return found

    def _secrets(self, kind: keys.Kind, roll: bytes, dealers: tuple[int, ...]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        digest = self._rolls[roll][0]
        threshold = choice.graph_of(self._headers[digest]).shares
        for dealer in dealers:
            if (digest, dealer) in self._colluders:
                mask_secret, _, seed = self._colluders[digest, dealer]
                found[dealer] = seed if kind == "seed" else mask_secret
                continue
            shares = self._shares_of(kind, roll, dealer)
            holders = sorted(shares)[:threshold]
            if len(holders) == threshold:
                with contextlib.suppress(CryptoError):
                    lagrange = shamir.weights(holders)
                    secret = shamir.rebuild([shares[holder] for holder in holders], lagrange)
                    if self._is_secret(kind, roll, dealer, secret):
                        found[dealer] = secret
        return found

    def _is_secret(self, kind: keys.Kind, roll: bytes, dealer: int, secret: bytes) -> bool:
        digest = self._rolls[roll][0]
        if kind == "key":
            return AgreementKey(secret).public == self._adverts[digest, dealer].mask_public
        published = self._deals[roll, dealer].seed_commitment
        return keys.seed_commitment(digest, dealer, secret) == published

    def _shares_of(self, kind: keys.Kind, roll: bytes, dealer: int) -> dict[int, bytes]:
        """Shares of one dealer's secret: from answers, and from letters to colluders."""
        shares: dict[int, bytes] = {}
        for answer in self._shares:
            delivery, survivors = self._lists.get(answer.lists, (b"", frozenset()))
            senders = self._senders.get((delivery, answer.index), ())
            here = self._dealers.get(delivery, (b"",))[0] == roll
            given = "seed" if dealer in survivors else "key"
            if here and dealer in senders and given == kind:
                shares[answer.index] = answer.shares[senders.index(dealer)]
        deal, digest = self._deals.get((roll, dealer)), self._rolls[roll][0]
        drawn = self._draws.get((roll, dealer), ())
        for holder, dealt in zip(drawn, deal.dealt if deal else (), strict=False):
            if (digest, holder) in self._colluders:
                own = AgreementKey(self._colluders[digest, holder][1])
                public = self._adverts[digest, dealer].share_public
                key = keys.box_key(own, public, digest, roll, dealer, holder)
                associated = keys.box_associated(digest, roll, dealer, holder)
                with contextlib.suppress(CryptoError):
                    both = unseal(key, keys.ZERO_NONCE, dealt.box, associated)
                    size = shamir.SHARE_BYTES
                    shares[holder] = both[:size] if kind == "seed" else both[size:]
        return shares


def _words(frame: bytes) -> Words:
    return np.frombuffer(frame, dtype="<u8", offset=HEAD_BYTES)


def _groups(
    nodes: set[int],
    masked: dict[int, set[int]],
    known: set[int],
    pairs: set[tuple[int, int]],
) -> list[frozenset[int]]:
    """Sets of uploads whose unknown pairwise masks all cancel inside the set."""
    left, groups = {*nodes}, []
    while left:
        group, frontier = set(), {left.pop()}
        possible = True
        while frontier and possible:
            index = frontier.pop()
            group.add(index)
            unknown = masked.get(index, set()) - known if index not in known else set[int]()
            for peer in unknown:
                if (index, peer) in pairs:
                    continue
                possible = possible and peer in nodes and index in masked[peer]
                frontier |= {peer} - group
        if possible:
            groups.append(frozenset(group))
            left -= group
    return groups
