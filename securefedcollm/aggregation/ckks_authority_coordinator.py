"""The server's side of one attempt at one round of CKKS aggregation under an authority's key.

It relays, adds first polynomials, and fuses the sum with the authority's partial decryption. The
safety of silos rests on the authority and not on this (:mod:`~.ckks_authority`); what is guarded
here is the result, against malicious silos and the network: whoever breaks a rule is named.

The key is not the silos': a silo that is lost at any step is simply not in the sum, as long as a
quorum has uploaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np
from msgspec import structs

from securefedcollm.aggregation import ckks_authority_messages as am
from securefedcollm.aggregation import ckks_messages as m
from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.aggregation.header import Authority, Roster, RoundHeader, check_roster
from securefedcollm.aggregation.keys import lists_digest
from securefedcollm.aggregation.messages import Ask, Signable, Signed, decode
from securefedcollm.aggregation.roles import RoundResult, Sealing, Transcript, Word
from securefedcollm.aggregation.steps import AUTHORITY_TRANSITIONS, Step
from securefedcollm.errors import (
    CryptoError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import sha256, verify


class CkksAuthorityCoordinatorRound:
    """Makes the requests, takes the replies, opens the sum. Driven like ``CoordinatorRound``.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum, or the authority has a silo's name.
    """

    def __init__(self, *, header: RoundHeader, roster: Roster, authority: Authority) -> None:
        check_roster(header, roster)
        if authority.name in roster:
            raise LocalProtocolError(
                f"{authority.name} is a silo and the authority",
                hint="one role for each participant",
            )
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._ring = m.ring_of(header)
        self._size = ckks_ring.polynomial_bytes(self._ring)
        self._shape = m.shape_of(header)
        self._roster = roster
        self._authority = authority
        self._step = Step.ADVERTISE
        self._excluded: dict[str, str] = {}
        self._asked: tuple[str, ...] = (authority.name,)
        self._replied: set[str] = set()
        self._keys: am.AuthorityKeys
        self._key_id = b""
        self._sealed: dict[int, m.Sealed] = {}
        self._transcript = b""
        self._consents: dict[int, am.Consent] = {}
        self._parts: dict[int, am.CipherPart] = {}
        self._sum = np.zeros((0, DEGREE), dtype=np.uint64)
        self._statement: am.Statement
        self._word: Word | None = None
        self._opened: RoundResult | None = None
        self._result: RoundResult | None = None

    @property
    def step(self) -> Step:
        """The step whose replies are being collected."""
        return self._step

    @property
    def transcript(self) -> Transcript:
        """What the silos have consented to so far; final once the authority is asked to decrypt."""
        final = self._step in {Step.UNMASK, Step.NOTE, Step.DONE}
        survivors = tuple(self._consents) if final else ()
        dropouts = tuple(self._dropouts()) if final else ()
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, survivors, dropouts) if final else b"",
            survivors=tuple(map(self._roster.name, survivors)),
            dropouts=tuple(map(self._roster.name, dropouts)),
            agreements=self._signatures() if final else {},
            sealing=self._sealing() if final else None,
            word=self._word,
        )

    @property
    def excluded(self) -> dict[str, str]:
        """Name -> reason for everybody who has stopped taking part so far."""
        return dict(self._excluded)

    @property
    def result(self) -> RoundResult:
        """The sum, once :meth:`advance` has returned False.

        Raises:
            LocalProtocolError: not yet, or the attempt failed.
        """
        if self._result is None:
            raise LocalProtocolError(
                f"there is no result at step {self._step.value}",
                hint="call advance() until it returns False",
            )
        return self._result

    def __repr__(self) -> str:
        return f"CkksAuthorityCoordinatorRound(step={self._step.value}, excluded={self._excluded})"

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

    def receive(self, silo: str, frame: bytes) -> None:
        """Take the reply of ``silo``, or of the authority, in this step.

        One that is out, was not asked or has replied already changes nothing.

        Raises:
            RemoteProtocolError: the reply does not fit; that party is out (see ``excluded``).
        """
        if silo != self._authority.name:
            self._roster.index(silo)
        self._check_running()
        if silo not in self._waiting():
            raise RemoteProtocolError(
                f"sent a second or a late frame in step {self._step.value}",
                peer=silo,
                hint="ignored; nothing to do",
            )
        try:
            self._take(silo, frame)
        except RemoteProtocolError as error:
            self._excluded.setdefault(silo, error.message)
            raise
        self._replied.add(silo)

    def _take(self, silo: str, frame: bytes) -> None:
        shape = self._shape

        def limit(polynomials: int) -> int:
            return m.frame_limit(self._parameters, self._ring, polynomials)

        match self._step:
            case Step.ADVERTISE:
                most = limit(shape.keys * len(self._roster))
                self._on_keys(decode(am.AuthorityKeys, frame, silo, most))
            case Step.ENCRYPT:
                sealed = decode(m.Sealed, frame, silo)
                self._check_silo(silo, sealed)
                if sealed.key != self._key_id:
                    self._blame(silo, "encrypted under another key")
                self._sealed[sealed.index] = sealed
            case Step.UPLOAD:
                most = limit(shape.chunks + shape.groups)
                self._on_delivery(silo, decode(am.CipherDelivery, frame, silo, most))
            case Step.UNMASK:
                self._on_opened(decode(am.Opened, frame, silo, limit(shape.chunks)))
            case _:
                noted = decode(am.Noted, frame, silo)
                self._check_silo(silo, noted)
                if noted.statement != am.statement_digest(self._statement):
                    self._blame(silo, "noted another statement")

    def lost(self, silo: str, reason: str) -> None:
        """Take note that ``silo``, or the authority, will not reply: it is out."""
        if silo != self._authority.name:
            self._roster.index(silo)
        self._excluded.setdefault(silo, reason)

    def advance(self) -> bool:
        """Close this step; whoever has not replied is out. True while there is a next step.

        Raises:
            ProtocolError: too few silos are left, the authority is lost, or the opened sum is out
                of bounds.
            LocalProtocolError: the attempt is over already.
        """
        self._check_running()
        for name in self._waiting():
            self._excluded[name] = f"no reply in step {self._step.value}"
        try:
            self._close()
        except BaseException:
            self._step = Step.FAILED
            self._parts.clear()
            self._sum = np.zeros((0, DEGREE), dtype=np.uint64)
            raise
        self._step = AUTHORITY_TRANSITIONS[self._step].following
        self._replied.clear()
        return self._step is not Step.DONE

    def _close(self) -> None:
        names = self._roster.names
        match self._step:
            case Step.ADVERTISE:
                self._check_authority()
                self._asked = names
            case Step.ENCRYPT:
                self._sealed = {i: self._sealed[i] for i in self._enough(self._sealed)}
                self._asked = tuple(map(self._roster.name, self._sealed))
                self._transcript = m.transcript(self._key_id, tuple(self._sealed.values()))
                self._sum = np.zeros((self._shape.chunks, DEGREE), dtype=np.uint64)
            case Step.UPLOAD:
                # The sums are made: whoever is in them stays, whatever becomes of it.
                order = self._enough(self._consents)
                self._consents = {i: self._consents[i] for i in order}
                self._parts = {i: self._parts[i] for i in order}
                self._asked = (self._authority.name,)
            case Step.UNMASK:
                self._check_authority()
                self._open()
                self._parts.clear()
                self._asked = tuple(map(self._roster.name, self._consents))
            case _:
                assert self._opened is not None
                self._result = structs.replace(self._opened, excluded=dict(self._excluded))

    def _waiting(self) -> tuple[str, ...]:
        return tuple(
            name for name in self._asked if name not in self._replied and name not in self._excluded
        )

    def _check_running(self) -> None:
        if self._step not in AUTHORITY_TRANSITIONS:
            raise LocalProtocolError(
                f"this attempt is over ({self._step.value})",
                hint="start a new CkksAuthorityCoordinatorRound",
            )

    def _check_authority(self) -> None:
        name = self._authority.name
        if name in self._excluded:
            raise ProtocolError(
                f"the authority {name} is lost in step {self._step.value}: {self._excluded[name]}",
                hint="bring it back and start another attempt"
                + (" with the same silos" if self._step is Step.UNMASK else ""),
            )

    def _enough(self, replied: Iterable[int]) -> list[int]:
        """The silos that have replied, in order, if they are a quorum."""
        staying = sorted(replied)
        if len(staying) < self._parameters.quorum:
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self._excluded.items()))
            raise ProtocolError(
                f"only {len(staying)} silos completed step {self._step.value}; "
                f"{self._parameters.quorum} are needed ({reasons})",
                hint="nothing was opened; bring the lost silos back and start another attempt",
            )
        return staying

    def _dropouts(self) -> list[int]:
        return [index for index in self._sealed if index not in self._consents]

    def _sealing(self) -> Sealing:
        statement = self._keys.statement
        return Sealing(
            key=self._key_id,
            roots={self._roster.name(i): (s.root, s.signature) for i, s in self._sealed.items()},
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
        try:
            for part in keys.parts:
                ckks_ring.unpack(part, self._ring, self._shape.keys)
        except CryptoError as error:
            self._blame(name, f"sent malformed polynomials: {error}")
        self._keys = keys
        self._key_id = am.key_id(self._authority.key, statement.signed(), statement.signature)

    def _on_delivery(self, silo: str, delivery: am.CipherDelivery) -> None:
        consent = delivery.consent
        self._check_silo(silo, consent)
        if consent.transcript != self._transcript:
            self._blame(silo, "consents to other ciphertexts")
        # Adversary: a silo or the network that replaces a ciphertext after the commitments were
        # shown; a flipped bit, which SEAL would decrypt to garbage without an error.
        digest = sha256(delivery.first)
        seconds = m.polynomial_digests(delivery.second, self._size)
        root = m.cipher_root(self._key_id, consent.index, digest, seconds)
        if root != self._sealed[consent.index].root:
            self._blame(silo, "uploaded another ciphertext than it committed to")
        # Adversary: a silo that committed to no polynomials, to spoil the sum for the others.
        try:
            ckks_ring.unpack(delivery.second, self._ring, self._shape.groups)
            ckks_ring.accumulate(self._sum, delivery.first, self._ring)
        except CryptoError as error:
            self._blame(silo, f"sent malformed polynomials: {error}")
        self._parts[consent.index] = am.CipherPart(digest, delivery.second)
        self._consents[consent.index] = consent

    def _on_opened(self, opened: am.Opened) -> None:
        statement, name = opened.statement, self._authority.name
        self._check_office(statement.header, statement, statement.signature)
        if (statement.transcript, statement.survivors) != (self._transcript, tuple(self._consents)):
            self._blame(name, "decrypted another sum")
        if sha256(opened.share) != statement.share:
            self._blame(name, "signed another share than it sent")
        try:
            ckks_ring.accumulate(self._sum, opened.share, self._ring)
        except CryptoError as error:
            self._blame(name, f"sent malformed polynomials: {error}")
        self._statement = statement

    def _open(self) -> None:
        with Seal(self._ring) as seal:
            coefficients = seal.coefficients(self._sum)
        survivors = tuple(map(self._roster.name, self._consents))
        total = ckks_ring.decode(coefficients, self._ring, self._parameters.values, len(survivors))
        statement = self._statement
        self._word = Word(survivors, statement.share, statement.signature)
        self._opened = RoundResult(
            sum=total,
            survivors=survivors,
            dropouts=tuple(map(self._roster.name, self._dropouts())),
            excluded={},
            header_digest=self._header_digest,
            transcript=self._transcript,
            agreements=self._signatures(),
            word=self._word,
        )
        self._sum = np.zeros((0, DEGREE), dtype=np.uint64)

    # Checks used by several steps ---------------------------------------------------------------

    def _check_silo(self, silo: str, message: Signed) -> None:
        # Adversary: a silo or the network that speaks for another silo, or replays a frame of
        # another round, run, study or attempt.
        index = self._roster.index(silo)
        if message.index != index or message.header != self._header_digest:
            self._blame(silo, "sent a frame of another silo, round, study or global model")
        self._verify(silo, self._roster.key(index), message, message.signature)

    def _check_office(self, header: bytes, message: Signable, signature: bytes) -> None:
        if header != self._header_digest:
            self._blame(self._authority.name, "sent a frame of another round or study")
        self._verify(self._authority.name, self._authority.key, message, signature)

    def _verify(self, name: str, key: bytes, message: Signable, signature: bytes) -> None:
        try:
            verify(key, message.CONTEXT, message.signed(), signature)
        except CryptoError:
            self._blame(name, "sent a frame with a bad signature")

    def _blame(self, name: str, what: str) -> NoReturn:
        self._excluded.setdefault(name, what)
        raise RemoteProtocolError(
            what, peer=name, hint="its operator should compare study, model and version"
        ) from None
