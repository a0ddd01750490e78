"""What a server can compute from everything it has seen: the judge of the protocol audits.

The spy does not trust the protocol's own opinion of what is safe. It pools all shares it was ever
given, rebuilds every secret for which it has enough, and asks which sums of uploads it can then
strip of all masks: uploads with a known self mask, grouped by the pairwise masks it does not know
(those cancel inside a group). Each group it opens is one sum; more than one sum in a round, or a
sum with fewer than two honest vectors in it, is a leak.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.masks import WORD_BYTES
from securefedcollm.aggregation.masking.messages import (
    Advertise,
    Deal,
    Delivery,
    Opening,
    Parcel,
    Roll,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.masking.upload import HEAD_BYTES, MAGIC
from securefedcollm.aggregation.messages import Ask, lists_digest
from securefedcollm.errors import CryptoError, ProtocolError, SecureFedCoLLMError
from securefedcollm.primitives import AgreementKey, RandomSource, unseal

_NOTED = Advertise | Ask | Deal | Delivery | Opening | Roll | Survey | Unmask


@dataclass(frozen=True)
class Opened:
    """A sum that the spy can compute, with the indices of the silos in it."""

    round_scope: bytes
    members: frozenset[int]
    total: npt.NDArray[np.int64]


class Spy:
    """Collects frames, rebuilds secrets, opens sums."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._colluders: dict[tuple[bytes, int], tuple[bytes, bytes, bytes]] = {}
        self._headers: dict[bytes, RoundHeader] = {}
        self._rolls: dict[bytes, tuple[bytes, dict[int, Advertise]]] = {}
        self._deliveries: dict[bytes, tuple[bytes, Delivery]] = {}
        self._lists: dict[bytes, tuple[bytes, frozenset[int]]] = {}
        self._uploads: dict[bytes, dict[int, bytes]] = defaultdict(dict)
        self._deals: dict[tuple[bytes, int], Deal] = {}
        self._unmasks: list[Unmask] = []

    def collude(self, index: int, header: RoundHeader, random: RandomSource) -> None:
        """A silo hands over the source of its secrets: mask secret, share secret, seed."""
        self._colluders[header.digest, index] = random(32), random(32), random(32)

    def note(self, frame: bytes) -> None:
        """Keep the content of one frame, in either direction."""
        if frame.startswith(MAGIC):
            self._uploads[frame[40:72]][int.from_bytes(frame[72:80], "little")] = frame
            return
        try:
            message = msgspec.msgpack.decode(frame, type=_NOTED)
        except (msgspec.MsgspecError, SecureFedCoLLMError, UnicodeDecodeError):
            return  # altered on its way: nothing to learn from it
        match message:
            case Ask(header=header):
                self._headers[header.digest] = header
            case Roll(advertisements=entries) if entries:
                roll = keys.roll_digest(entries[0].header, entries)
                self._rolls[roll] = entries[0].header, {entry.index: entry for entry in entries}
            case Deal(statement=statement):
                self._deals[statement.roll, statement.index] = message
            case Delivery(statements=statements) if statements:
                digest = keys.delivery_digest(statements[0].roll, statements)
                self._deliveries[digest] = statements[0].roll, message
            case (
                Survey(survivors=survivors, dropouts=dropouts)
                | Opening(survivors=survivors, dropouts=dropouts)
            ):
                for delivery in self._deliveries:
                    lists = lists_digest(delivery, survivors, dropouts)
                    self._lists[lists] = delivery, frozenset(survivors)
            case Unmask():
                self._unmasks.append(message)
            case _:
                pass

    def opened(self) -> list[Opened]:
        """Every sum that follows from the notes."""
        return [
            opened
            for delivery in self._uploads
            if delivery in self._deliveries
            for opened in self._open(delivery)
        ]

    def leaks(self) -> list[str]:
        """The knowledge beyond one sum a round over at least two honest silos, in words."""
        leaks: list[str] = []
        rounds: dict[bytes, set[frozenset[int]]] = defaultdict(set)
        for opened in self.opened():
            honest = opened.members - {index for _, index in self._colluders}
            if len(honest) == 1:
                leaks.append(f"the vector of {self._names(honest)}")
            if honest:  # what colluders know of each other is nobody's loss
                rounds[opened.round_scope].add(honest)
        leaks += [
            f"{len(groups)} sums in one round, of {' and '.join(map(self._names, sorted(groups)))}"
            for groups in rounds.values()
            if len(groups) > 1
        ]
        return leaks

    def _names(self, members: frozenset[int]) -> str:
        return ", ".join(self._roster.name(index) for index in sorted(members))

    def _open(self, delivery: bytes) -> list[Opened]:
        roll_digest, frame = self._deliveries[delivery]
        header_digest, roll = self._rolls[roll_digest]
        header = self._headers[header_digest]
        dealers = [statement.index for statement in frame.statements]
        seeds = self._secrets("seed", roll_digest, dealers)
        known = {
            index: AgreementKey(secret)
            for index, secret in self._secrets("key", roll_digest, dealers).items()
        }
        size = HEAD_BYTES + WORD_BYTES * header.parameters.words
        uploads = {i: up for i, up in self._uploads[delivery].items() if len(up) == size}
        found = []
        for group in self._groups(set(uploads) & set(seeds), set(dealers), set(known)):
            words = np.zeros(header.parameters.words, dtype="<u8")
            add: list[bytes] = []
            subtract = [
                keys.self_mask_key(seeds[i], header_digest, delivery, i) for i in sorted(group)
            ]
            for i in group:
                words += np.frombuffer(uploads[i], dtype="<u8", offset=HEAD_BYTES)
                for j in set(dealers) - group:
                    own, peer = (known[i], j) if i in known else (known[j], i)
                    public = roll[peer].mask_public
                    key = keys.pair_mask_key(own, public, header_digest, delivery, i, j)
                    (subtract if i < j else add).append(key)
            masks.apply(words, add=add, subtract=subtract)
            try:
                total = packing.unpack(words, header.parameters, len(group))
            except ProtocolError:
                continue  # an upload that was altered on its way
            found.append(Opened(header.round_scope, frozenset(group), total.astype(np.int64)))
        return found

    @staticmethod
    def _groups(nodes: set[int], dealers: set[int], known: set[int]) -> list[set[int]]:
        """Sets of uploads whose unknown pairwise masks all cancel inside the set."""
        left, groups = set(nodes), []
        while left:
            group, frontier = set(), {left.pop()}
            while frontier:
                index = frontier.pop()
                group.add(index)
                if index not in known:
                    frontier |= dealers - known - group
            left -= group
            if group <= nodes:
                groups.append(group)
        return groups

    def _secrets(self, kind: keys.Kind, roll: bytes, dealers: list[int]) -> dict[int, bytes]:
        """Secrets of ``kind`` that the notes give away, by dealer."""
        found: dict[int, bytes] = {}
        header_digest = self._rolls[roll][0]
        threshold = self._headers[header_digest].parameters.threshold
        for dealer in dealers:
            if (header_digest, dealer) in self._colluders:
                mask_secret, _, seed = self._colluders[header_digest, dealer]
                found[dealer] = seed if kind == "seed" else mask_secret
                continue
            shares = self._shares(kind, roll, dealer)
            if len(shares) >= threshold:
                holders = sorted(shares)[:threshold]
                chosen = [shares[holder] for holder in holders]
                with contextlib.suppress(CryptoError):  # a share altered on its way
                    secret = shamir.rebuild(chosen, shamir.weights(holders))
                    if self._is_secret(kind, roll, dealer, secret):
                        found[dealer] = secret
        return found

    def _is_secret(self, kind: keys.Kind, roll: bytes, dealer: int, secret: bytes) -> bool:
        header, entries = self._rolls[roll]
        if kind == "key":
            return AgreementKey(secret).public == entries[dealer].mask_public
        published = self._deals[roll, dealer].statement.seed_commitment
        return keys.seed_commitment(header, dealer, secret) == published

    def _shares(self, kind: keys.Kind, roll: bytes, dealer: int) -> dict[int, bytes]:
        """Shares of one dealer's secret: from unmasking, and from boxes to colluders."""
        shares: dict[int, bytes] = {}
        for unmask in self._unmasks:
            delivery, survivors = self._lists.get(unmask.lists, (b"", frozenset()))
            if delivery not in self._deliveries or self._deliveries[delivery][0] != roll:
                continue
            dealers = [s.index for s in self._deliveries[delivery][1].statements]
            if ("seed" if dealer in survivors else "key") == kind and dealer in dealers:
                shares[unmask.index] = unmask.shares[dealers.index(dealer)]
        deal = self._deals.get((roll, dealer))
        for parcel in deal.parcels if deal else ():
            if (self._rolls[roll][0], parcel.holder) in self._colluders:
                opened = self._open_box(parcel, roll)
                if opened:
                    shares[parcel.holder] = opened[0 if kind == "seed" else 1]
        return shares

    def _open_box(self, parcel: Parcel, roll: bytes) -> tuple[bytes, bytes] | None:
        header, entries = self._rolls[roll]
        own = AgreementKey(self._colluders[header, parcel.holder][1])
        dealer, holder = parcel.dealer, parcel.holder
        try:
            key = keys.box_key(own, entries[dealer].share_public, header, roll, dealer, holder)
            associated = keys.box_associated(header, roll, dealer, holder)
            shares = unseal(key, keys.ZERO_NONCE, parcel.box, associated)
        except CryptoError:
            return None
        return shares[: shamir.SHARE_BYTES], shares[shamir.SHARE_BYTES :]
