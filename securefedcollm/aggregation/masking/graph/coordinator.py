"""The server's side of one attempt at one round of masking on a random graph.

As :mod:`~.masking.coordinator`: this code is the honest server, and the adversary here is up to c
malicious silos and attackers on the network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from securefedcollm.aggregation.attendance import AttendedRound
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.coordinator import probe
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Dealer,
    Draw,
    Letter,
    Letters,
    Members,
    Neighbours,
    Post,
    Proof,
    Shares,
    Shown,
    Survivors,
    Tally,
    Uploaded,
)
from securefedcollm.aggregation.masking.messages import BOX_BYTES, Advertise, Agreement, Refusal
from securefedcollm.aggregation.masking.upload import MAGIC, Upload, split
from securefedcollm.aggregation.messages import Ask, decode
from securefedcollm.aggregation.roles import RoundResult, Transcript
from securefedcollm.aggregation.steps import GRAPH_TRANSITIONS, Step
from securefedcollm.errors import CryptoError, ProtocolError
from securefedcollm.primitives import AgreementKey, equal, verify


class GraphCoordinatorRound(AttendedRound):
    """Makes the requests, takes the replies, opens the sum.

    Args:
        header: as there; its suite names k and t.
        narrow: give the sum as int32 where that holds it.

    Raises:
        LocalProtocolError: the header is for another roster or graph.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        threads: int = 1,
        narrow: bool = False,
    ) -> None:
        super().__init__(header, roster, GRAPH_TRANSITIONS)
        self._graph = choice.graph_of(header)
        self._threads = threads
        self._narrow = narrow
        self._advertisements: dict[int, Advertise] = {}
        self._publics: set[bytes] = set()
        self._members: tuple[int, ...] = ()
        self._roll_digest = b""
        self._draws: dict[int, bytes] = {}
        self._drawn: dict[int, tuple[int, ...]] = {}
        self._deals: dict[int, Letters] = {}
        self._letters: dict[int, dict[int, Letter]] = {}
        """Holder -> dealer -> letter, by ascending dealer."""
        self._delivery_digest = b""
        self._sum = np.zeros(0, dtype="<u8")
        self._uploads: dict[int, Upload] = {}
        self._survivors: tuple[int, ...] = ()
        self._dropouts: tuple[int, ...] = ()
        self._lists_digest = b""
        self._agreements: dict[int, Agreement] = {}
        self._tally = Tally(b"", bytes(32))
        self._tally_digest = b""
        self._paths: list[list[bytes]] = []
        self._challenges: dict[int, Challenge] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        """Responder -> dealer -> share."""

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far."""
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=self._names(self._survivors),
            dropouts=self._names(self._dropouts),
            agreements=self._signatures(),
        )

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
        return Neighbours(tuple(self._advertisements[j] for j in self._drawn[index])).encode()

    def _post(self, holder: int) -> bytes:
        letters = self._letters.get(holder, {})
        return Post(
            dealers=self._packed(tuple(self._deals)),
            senders=tuple(map(self._dealer, letters)),
            letters=tuple(letters.values()),
        ).encode()

    def _dealer(self, index: int) -> Dealer:
        entry = self._advertisements[index]
        return Dealer(index, entry.mask_public, entry.share_public)

    def _proof(self, index: int) -> bytes:
        signers = sorted(self._agreements)
        count = choice.samples(self._parameters, self._graph, len(signers))
        secret = self._challenges[index].secret
        places = choice.challenged(secret, self._tally_digest, len(signers), count)
        kept = (j for j in self._letters.get(index, {}) if j in self._uploads)
        return Proof(
            shown=tuple(
                Shown(self._agreements[signers[place]].signature, tuple(self._paths[place]))
                for place in places
            ),
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

    # G0, G1 -----------------------------------------------------------------------------------

    def _on_advertise(self, name: str, advertise: Advertise) -> None:
        index = self._check_signed(name, advertise)
        pair = {advertise.mask_public, advertise.share_public}
        # Adversary: a silo with a key of small order, or with another silo's key; its neighbours
        # would refuse, so it is taken off here.
        if len(pair) < 2 or pair & self._publics:
            self._blame(name, "advertised a key that is in use already")
        if not all(map(probe, pair)):
            self._blame(name, "advertised a public key that is misspelled or of small order")
        self._publics |= pair
        self._advertisements[index] = advertise

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
        expected = [(index, holder, BOX_BYTES) for holder in self._drawn[index]]
        parcels = [letter.parcel for letter in deal.letters]
        found = [(parcel.dealer, parcel.holder, len(parcel.box)) for parcel in parcels]
        if deal.roll != self._roll_digest or found != expected:
            self._blame(name, "sent a dealing that does not fit its draw")
        # Adversary: a silo whose letters do not verify: each neighbour would blame the relay.
        own = self._dealer(index)
        for letter in deal.letters:
            said = own.letter(self._header_digest, self._roll_digest, letter.parcel)
            try:
                verify(self._roster.key(index), Letter.CONTEXT, said, letter.signature)
            except CryptoError:
                self._blame(name, "sent a letter with a bad signature")
        self._deals[index] = deal

    def _close_share(self) -> None:
        self._deals = self._quorum(self._deals)
        self._check_kept(tuple(self._deals))
        for dealer, deal in self._deals.items():
            for letter in deal.letters:
                self._letters.setdefault(letter.parcel.holder, {})[dealer] = letter
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
                    hint="nothing was opened; bring the lost silos back and start another attempt",
                )

    # G3 ---------------------------------------------------------------------------------------

    def _on_upload(self, name: str, frame: bytes | memoryview) -> None:
        if frame[: len(MAGIC)] != MAGIC:
            self._on_refusal(name, decode(Refusal, frame, name))
            return
        upload, words = split(frame, self._parameters, name, self._threads)
        index = self._check_signed(name, upload)
        if upload.delivery != self._delivery_digest:
            self._blame(name, "masked its vector for another delivery")
        np.add(self._sum, words, out=self._sum)
        self._uploads[index] = upload

    def _on_refusal(self, name: str, refusal: Refusal) -> None:
        # Either may be lying: the accused dealt a bad share, or this silo invents it.
        self._check_signed(name, refusal)
        if refusal.delivery != self._delivery_digest or refusal.accused not in self._deals:
            self._blame(name, "refused another delivery")
        accused = self._roster.name(refusal.accused)
        self._excluded[name] = f"refused: {accused} dealt it a bad share"

    def _close_upload(self) -> None:
        self._survivors = tuple(sorted(self._uploads))
        self._dropouts = tuple(index for index in self._deals if index not in self._uploads)
        self._enough(len(self._survivors), self._parameters.quorum)
        self._check_kept(self._survivors)
        self._lists_digest = choice.survivors_digest(
            self._delivery_digest, self._packed(self._survivors)
        )
        self._ask(self._survivors)

    # G4, G5 -----------------------------------------------------------------------------------

    def _on_agreement(self, name: str, agreement: Agreement) -> None:
        index = self._check_signed(name, agreement)
        if agreement.lists != self._lists_digest:
            self._blame(name, "agreed to other lists")
        self._agreements[index] = agreement

    def _close_agree(self) -> None:
        self._enough(len(self._agreements), self._parameters.threshold)
        signers = tuple(sorted(self._agreements))
        root, self._paths = choice.proofs([self._agreements[i].signature for i in signers])
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
        for (dealer, letter), share in zip(held.items(), sent.shares, strict=True):
            # Adversary: a silo that sends an altered share, or another silo's.
            parcel = letter.parcel
            kind: keys.Kind = "seed" if dealer in self._uploads else "key"
            committed = (
                parcel.seed_share_commitment if kind == "seed" else parcel.key_share_commitment
            )
            found = keys.share_commitment(self._header_digest, dealer, index, kind, share)
            if not equal(found, committed):
                self._blame(name, f"sent a wrong share of {self._roster.name(dealer)}'s secret")
        self._shares[index] = dict(zip(held, sent.shares, strict=True))

    def _open(self) -> None:
        secrets = {dealer: self._rebuild(dealer) for dealer in self._deals}
        header, delivery = self._header_digest, self._delivery_digest
        add: list[bytes] = []
        subtract = [
            keys.self_mask_key(secrets[index], header, delivery, index) for index in self._survivors
        ]
        for dropout in self._dropouts:
            own = AgreementKey(secrets[dropout])
            # The survivors that masked with it: those that it drew, and those that drew it.
            near = {*self._drawn[dropout], *self._letters.get(dropout, {})} & {*self._uploads}
            for survivor in near:
                public = self._advertisements[survivor].mask_public
                key = keys.pair_mask_key(own, public, header, delivery, dropout, survivor)
                # The lower index added the mask: undo the survivor's half.
                (subtract if survivor < dropout else add).append(key)
        masks.apply(self._sum, add=add, subtract=subtract, threads=self._threads)
        count = len(self._survivors)
        total = packing.unpack(self._sum, self._parameters, count, narrow=self._narrow)
        self._result = RoundResult(
            sum=total,
            survivors=self._names(self._survivors),
            dropouts=self._names(self._dropouts),
            excluded=dict(self._excluded),
            header_digest=header,
            transcript=self._lists_digest,
            agreements=self._signatures(),
        )
        self._forget()

    def _signatures(self) -> dict[str, bytes]:
        return {
            self._roster.name(index): self._agreements[index].signature
            for index in sorted(self._agreements)
        }

    def _rebuild(self, dealer: int) -> bytes:
        """A survivor's seed or a dropout's mask secret, checked against what its owner published.

        Adversary: a dealer whose shares belong to another secret. Every share here matches the
        dealer's own commitment, so a wrong secret is the dealer's fault.
        """
        name = self._roster.name(dealer)
        responders = [i for i in self._drawn[dealer] if i in self._shares][: self._graph.shares]
        if len(responders) < self._graph.shares:
            raise ProtocolError(
                f"only {len(responders)} neighbours of {name} answered; "
                f"{self._graph.shares} are needed{self._reasons()}",
                hint="try again with exactly these survivors, or go on with the next round",
            )
        shares = [self._shares[i][dealer] for i in responders]
        try:
            secret = shamir.rebuild(shares, shamir.weights(responders))
        except CryptoError:
            self._blame(name, "dealt shares of no secret; the sum cannot be opened")
        if dealer in self._uploads:
            published = self._deals[dealer].seed_commitment
            found = keys.seed_commitment(self._header_digest, dealer, secret)
        else:
            published = self._advertisements[dealer].mask_public
            found = AgreementKey(secret).public
        if not equal(found, published):
            self._blame(name, "dealt shares of another secret; the sum cannot be opened")
        return secret


def _same(frame: bytes) -> Callable[[int], bytes]:
    return lambda index: frame
