"""What a silo does alike on the complete graph and on a random one: keys, shares, masks, upload.

The adversary is the server together with up to c silos (:mod:`~.masking.silo`,
:mod:`~.graph.silo`). The two sides differ in who a silo's *peers* are, and in how it comes to know
that one list of survivors holds for all.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from securefedcollm.aggregation.answering import AnsweringSilo
from securefedcollm.aggregation.checks import check_announced, refuse
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.messages import Advertise, Agreement, Refusal
from securefedcollm.aggregation.masking.parcels import DealerFaultError, Parcels, refuse_key
from securefedcollm.aggregation.masking.upload import Upload, UploadBuffer, words_digest
from securefedcollm.aggregation.messages import UNSIGNED, Ask, sign
from securefedcollm.aggregation.roles import Journal, Transcript
from securefedcollm.aggregation.steps import SILO_STEPS, SchemeName
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import (
    AgreementKey,
    RandomSource,
    SigningKey,
    well_spelled,
)

Keys = Mapping[int, Advertise]
"""Index -> the public keys that this silo has checked."""


@dataclass(repr=False)
class MaskSecrets:
    """The secrets that must not outlive the attempt."""

    buffer: UploadBuffer
    mask_secret: bytes
    share_secret: bytes
    seed: bytes
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Dealer -> (seed share, mask-key share) that this silo holds."""

    def forget(self) -> None:
        """Drop what is not needed once the vector has left: from then on it gives only shares."""
        self.mask_secret = self.share_secret = self.seed = b""

    def close(self) -> None:
        self.forget()
        self.held.clear()
        self.buffer.words[:] = 0  # the vector, until it is masked and has left


M = TypeVar("M", bound=MaskSecrets)


class MaskedSilo(AnsweringSilo[M]):
    """Base of both sides; :class:`~.masking.silo.SiloRound` has the arguments."""

    SCHEME: ClassVar[SchemeName]

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        name: str,
        signing_key: SigningKey,
        vector: packing.Bounded,
        vector_id: bytes,
        journal: Journal,
        random: RandomSource = os.urandom,
        threads: int = 1,
    ) -> None:
        super().__init__(
            header=header,
            roster=roster,
            name=name,
            signing_key=signing_key,
            vector_id=vector_id,
            journal=journal,
            steps=SILO_STEPS[self.SCHEME],
        )
        self._check_suite()
        self._random = random
        self._threads = threads
        buffer = UploadBuffer(header.parameters)
        packing.pack(vector, header.parameters, buffer.words, threads)
        self._hold(self._fresh(buffer))
        # Public transcript, filled step by step.
        self._own_keys: Advertise
        self._roll_digest = b""
        self._dealers: tuple[int, ...] = ()
        self._delivery_digest = b""
        self._lists: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        """Survivors and dropouts."""
        self._lists_digest = b""

    @abstractmethod
    def _check_suite(self) -> None:
        """Raises: LocalProtocolError where the header is not for this side."""

    @abstractmethod
    def _fresh(self, buffer: UploadBuffer) -> M:
        """The attempt's secrets, drawn now."""

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far."""
        survivors, dropouts = self._lists
        return Transcript(
            header=self._header_digest,
            delivery=self._delivery_digest,
            lists=self._lists_digest,
            survivors=tuple(map(self._roster.name, survivors)),
            dropouts=tuple(map(self._roster.name, dropouts)),
        )

    def handle(self, frame: bytes) -> bytes:
        """As :meth:`.AnsweringSide.handle`.

        A :class:`~.masking.messages.Refusal` in place of an upload is an answer too: it names a
        dealer, and this side has then failed.
        """
        try:
            return super().handle(frame)
        except DealerFaultError as fault:
            return sign(
                Refusal(
                    header=self._header_digest,
                    index=self._index,
                    signature=UNSIGNED,
                    delivery=self._delivery_digest,
                    accused=fault.dealer,
                ),
                self._signing_key,
            ).encode()

    # Keys and shares ----------------------------------------------------------------------------

    def _on_ask(self, ask: Ask, secrets: M) -> bytes:
        check_announced(self._header, ask.header)
        # Adversary: a server that crashes this process and has it begin again, to get two sets of
        # keys signed for one attempt and show them to different silos.
        self._own_keys = self._say(
            b"keys:",
            Advertise(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                mask_public=AgreementKey(secrets.mask_secret).public,
                share_public=AgreementKey(secrets.share_secret).public,
            ),
        )
        return self._own_keys.encode()

    def _check_keys(self, entries: Iterable[Advertise]) -> None:
        """Adversary: a silo that repeats another's key without knowing its secret."""
        everyone = list(entries)
        publics = {key for entry in everyone for key in (entry.mask_public, entry.share_public)}
        if len(publics) != 2 * len(everyone) or not all(map(well_spelled, publics)):
            refuse(
                "relayed keys in which one key appears twice or in a second spelling",
                "report the server and the silos that have them",
            )

    def _shared(
        self, secrets: M, holders: Sequence[int], threshold: int
    ) -> list[tuple[bytes, bytes]]:
        """For each holder its share of the seed, and of the mask secret."""
        seed_shares = shamir.deal(secrets.seed, threshold, holders, self._random)
        key_shares = shamir.deal(secrets.mask_secret, threshold, holders, self._random)
        return list(zip(seed_shares, key_shares, strict=True))

    def _parcels(self, secrets: M, peers: Keys) -> Parcels:
        return Parcels(
            header=self._header_digest,
            roster=self._roster,
            roll=peers,
            roll_digest=self._roll_digest,
            index=self._index,
            secret=secrets.share_secret,
        )

    # Upload -------------------------------------------------------------------------------------

    def _upload(self, secrets: M, peers: Keys) -> bytes:
        """The vector, masked with these peers; they mask theirs with this silo."""
        # Adversary: a server that restores this process, to have one vector masked twice, among
        # different peers.
        self._record(b"upload:" + self._header.attempt_scope, self._delivery_digest)
        words = secrets.buffer.words
        add, subtract = self._mask_keys(secrets, peers)
        masks.apply(words, add=add, subtract=subtract, threads=self._threads)
        upload = sign(
            Upload(
                header=self._header_digest,
                index=self._index,
                signature=UNSIGNED,
                delivery=self._delivery_digest,
                words=words_digest(words, self._threads),
            ),
            self._signing_key,
        )
        del words
        frame = secrets.buffer.finish(upload)
        secrets.forget()
        return frame

    def _mask_keys(self, secrets: M, peers: Keys) -> tuple[list[bytes], list[bytes]]:
        header, delivery = self._header_digest, self._delivery_digest
        mask_key = AgreementKey(secrets.mask_secret)
        add = [keys.self_mask_key(secrets.seed, header, delivery, self._index)]
        subtract: list[bytes] = []
        for peer, entry in sorted(peers.items()):
            try:
                key = keys.pair_mask_key(
                    mask_key, entry.mask_public, header, delivery, self._index, peer
                )
            except CryptoError as error:
                refuse_key(self._roster.name(peer), error)
            (add if self._index < peer else subtract).append(key)
        return add, subtract

    # Survivors ----------------------------------------------------------------------------------

    def _agreement(self) -> bytes:
        """This silo's signature over the lists that it has written down."""
        agreement = Agreement(
            header=self._header_digest,
            index=self._index,
            signature=UNSIGNED,
            lists=self._lists_digest,
        )
        return sign(agreement, self._signing_key).encode()

    def _opened(self, secrets: M, dealers: Sequence[int]) -> tuple[bytes, ...]:
        """Of each dealer one share: a survivor's of its seed, a dropout's of its mask secret."""
        survivors = {*self._lists[0]}
        return tuple(secrets.held[dealer][0 if dealer in survivors else 1] for dealer in dealers)
