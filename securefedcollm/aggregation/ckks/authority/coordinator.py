"""The server's side of one attempt at one round of CKKS aggregation under an authority's key.

It relays, adds first polynomials, and fuses the sum with the authority's partial decryption. The
safety of silos rests on the authority (:mod:`~.ckks.authority.keyholder`), not on this module. It
guards the result, against malicious silos and the network. A participant that breaks a rule is
named.

The key is not the silos': a silo that is lost at any step is simply not in the sum, as long as a
quorum has uploaded.
"""

from __future__ import annotations

from msgspec import structs

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.round import CkksAttendedRound
from securefedcollm.aggregation.header import Authority, Roster, RoundHeader
from securefedcollm.aggregation.messages import Ask, Signable, decode, lists_digest
from securefedcollm.aggregation.roles import RoundResult, Sealing, Transcript, Word
from securefedcollm.aggregation.steps import AUTHORITY_TRANSITIONS, Step
from securefedcollm.errors import LocalProtocolError, ProtocolError
from securefedcollm.primitives import sha256


class CkksAuthorityCoordinatorRound(CkksAttendedRound):
    """Makes the requests, takes the replies, opens the sum.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum, or the authority has a silo's name.
    """

    def __init__(self, *, header: RoundHeader, roster: Roster, authority: Authority) -> None:
        super().__init__(header, roster, AUTHORITY_TRANSITIONS, others=(authority.name,))
        if authority.name in roster:
            raise LocalProtocolError(
                f"{authority.name} is a silo and the authority",
                hint="one role for each participant",
            )
        self._authority = authority
        self._asked = (authority.name,)
        self._keys: am.AuthorityKeys
        self._consents: dict[int, am.Consent] = {}
        self._parts: dict[int, am.CipherPart] = {}
        self._statement: am.Statement
        self._word: Word | None = None
        self._opened: RoundResult | None = None

    @property
    def transcript(self) -> Transcript:
        """The silos' consents so far; final once the authority is asked to decrypt."""
        final = self._step in {Step.UNMASK, Step.NOTE, Step.DONE}
        survivors = tuple(self._consents) if final else ()
        dropouts = tuple(self._dropouts()) if final else ()
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, survivors, dropouts) if final else b"",
            survivors=self._names(survivors),
            dropouts=self._names(dropouts),
            agreements=self._signatures() if final else {},
            sealing=self._sealing() if final else None,
            word=self._word,
        )

    def requests(self) -> dict[str, bytes]:
        """One frame for everybody who takes part in this step and has not replied yet."""
        self._check_running()
        waiting = self._waiting()
        if self._step is Step.ENCRYPT:
            return {name: self._offer(name).encode() for name in waiting}
        return dict.fromkeys(waiting, self._request() if waiting else b"")

    def _offer(self, silo: str) -> am.KeyOffer:
        part = self._keys.parts[self._roster.index(silo) - 1]
        return am.KeyOffer(self._header, self._keys.statement, part)

    def _request(self) -> bytes:
        match self._step:
            case Step.ADVERTISE:
                return Ask(self._header).encode()
            case Step.UPLOAD:
                return m.SealedRoll(tuple(self._sealed.values())).encode()
            case Step.UNMASK:
                return am.OpenRequest(
                    tuple(self._sealed.values()),
                    tuple(self._consents.values()),
                    tuple(self._parts.values()),
                ).encode()
            case _:
                return am.Notice(self._statement).encode()

    def _take(self, name: str, frame: bytes | memoryview) -> None:
        shape, limit = self._shape, self._limit
        match self._step:
            case Step.ADVERTISE:
                most = limit(shape.keys * len(self._roster))
                self._on_keys(decode(am.AuthorityKeys, frame, name, most))
            case Step.ENCRYPT:
                self._on_sealed(name, frame)
            case Step.UPLOAD:
                most = limit(shape.chunks + shape.groups)
                self._on_delivery(name, decode(am.CipherDelivery, frame, name, most))
            case Step.UNMASK:
                self._on_opened(decode(am.Opened, frame, name, limit(shape.chunks)))
            case _:
                noted = decode(am.Noted, frame, name)
                self._check_signed(name, noted)
                if noted.statement != am.statement_digest(self._statement):
                    self._blame(name, "noted another statement")

    def _close(self) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._check_authority()
                self._asked = self._roster.names
            case Step.ENCRYPT:
                self._sealed = self._quorum(self._sealed)
                self._commit()
            case Step.UPLOAD:
                # The sums are made: whoever is in them stays, whatever becomes of it.
                order = sorted(self._consents)
                self._enough(len(order), self._parameters.quorum)
                self._consents = {i: self._consents[i] for i in order}
                self._parts = {i: self._parts[i] for i in order}
                self._asked = (self._authority.name,)
            case Step.UNMASK:
                self._check_authority()
                self._open()
                self._forget()
                self._ask(self._consents)
            case _:
                assert self._opened is not None
                self._result = structs.replace(self._opened, excluded=dict(self._excluded))

    def _forget(self) -> None:
        super()._forget()
        self._parts.clear()

    def _check_authority(self) -> None:
        name = self._authority.name
        if name in self._excluded:
            raise ProtocolError(
                f"the authority {name} is lost in step {self._step.value}: {self._excluded[name]}",
                hint="bring it back and start another attempt"
                + (" with the same silos" if self._step is Step.UNMASK else ""),
            )

    def _dropouts(self) -> list[int]:
        return [index for index in self._sealed if index not in self._consents]

    def _sealing(self) -> Sealing:
        statement = self._keys.statement
        return Sealing(
            key=self._key_id,
            roots=self._roots(),
            offer=(am.keys_digest(statement.keys), statement.signature),
        )

    def _signatures(self) -> dict[str, bytes]:
        return {self._roster.name(i): consent.signature for i, consent in self._consents.items()}

    # What silos and the authority send ------------------------------------------------------------

    def _on_keys(self, keys: am.AuthorityKeys) -> None:
        statement, name = keys.statement, self._authority.name
        self._check_office(statement.header, statement, statement.signature)
        if (
            len(keys.parts) != len(self._roster)
            or tuple(sha256(part) for part in keys.parts) != statement.keys
        ):
            self._blame(name, "signed other keys than it sent")
        for part in keys.parts:
            self._check_polynomials(name, part, self._shape.keys)
        self._keys = keys
        self._key_id = am.key_id(self._authority.key, statement.signed(), statement.signature)

    def _on_delivery(self, name: str, delivery: am.CipherDelivery) -> None:
        consent = delivery.consent
        index = self._check_signed(name, consent)
        if consent.transcript != self._transcript:
            self._blame(name, "consents to other ciphertexts")
        digest, _ = self._add_ciphertext(index, delivery.first, delivery.second, self._shape.groups)
        self._parts[index] = am.CipherPart(digest, delivery.second)
        self._consents[index] = consent

    def _on_opened(self, opened: am.Opened) -> None:
        statement, name = opened.statement, self._authority.name
        self._check_office(statement.header, statement, statement.signature)
        if (statement.transcript, statement.survivors) != (self._transcript, tuple(self._consents)):
            self._blame(name, "decrypted another sum")
        if sha256(opened.share) != statement.share:
            self._blame(name, "signed another share than it sent")
        self._accumulate(name, opened.share)
        self._statement = statement

    def _open(self) -> None:
        survivors = self._names(self._consents)
        total = self._decoded(len(survivors))
        statement = self._statement
        self._word = Word(survivors, statement.share, statement.signature)
        self._opened = RoundResult(
            sum=total,
            survivors=survivors,
            dropouts=self._names(self._dropouts()),
            excluded={},
            header_digest=self._header_digest,
            transcript=self._transcript,
            agreements=self._signatures(),
            word=self._word,
        )

    def _check_office(self, header: bytes, message: Signable, signature: bytes) -> None:
        # Adversary: the network speaks for the authority, or replays what it said before.
        if header != self._header_digest:
            self._blame(self._authority.name, "sent a frame of another round or study")
        self._verify(self._authority.name, self._authority.key, message, signature)
