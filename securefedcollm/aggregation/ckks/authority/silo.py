"""A silo's side of one attempt at one round of CKKS aggregation under an authority's key.

The adversary is the server together with up to c silos; the authority does not collude with it (the
two together could open this silo's ciphertext). The silo checks that the key is the authority's and
of this very round, commits to its ciphertext before any is shown, and lets it leave for one list of
commitments. The authority decides which sum is opened (:mod:`~.ckks.authority.keyholder`). Its
signed statement comes back here, so that this silo knows how many noise shares are in the sum.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.answering import AnsweringSilo
from securefedcollm.aggregation.checks import (
    accuse,
    check_announced,
    check_header,
    check_list,
    check_own,
    check_signature,
)
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.secrets import CkksSecrets
from securefedcollm.aggregation.header import Authority, Roster, RoundHeader
from securefedcollm.aggregation.messages import UNSIGNED, decode, lists_digest
from securefedcollm.aggregation.roles import SERVER, Journal, Transcript, Word
from securefedcollm.aggregation.steps import SILO_STEPS, Step
from securefedcollm.errors import CryptoError, LocalProtocolError
from securefedcollm.primitives import RandomSource, SigningKey, sha256


class CkksAuthoritySiloRound(AnsweringSilo[CkksSecrets]):
    """Answers the server's three requests, in order, once each. Not thread-safe.

    The arguments are those of :class:`~.ckks.threshold.silo.CkksSiloRound`, and

    Args:
        authority: the key holder, from the silo's own study.

    Raises:
        LocalProtocolError: header, roster, identity and vector do not belong together.
        ConfigError: no ring holds the sum.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        authority: Authority,
        name: str,
        signing_key: SigningKey,
        vector: npt.NDArray[np.int64],
        vector_id: bytes,
        journal: Journal,
        random: RandomSource = os.urandom,
    ) -> None:
        super().__init__(
            header=header,
            roster=roster,
            name=name,
            signing_key=signing_key,
            vector_id=vector_id,
            journal=journal,
            steps=SILO_STEPS["ckks-authority"],
        )
        # Adversary: a study whose key holder is one of the parties that it guards against.
        if authority.key in roster.keys:
            raise LocalProtocolError(
                "the authority has the key of a silo", hint="one key for each participant"
            )
        polynomials.check_length(vector, header.parameters.values)
        self._ring = m.ring_of(header)
        self._shape = m.shape_of(header)
        self._authority = authority
        common = polynomials.hash_to_ring(self._header_digest, self._ring)
        self._hold(CkksSecrets(self._ring, self._shape, vector, common, random))
        # Public transcript, filled step by step.
        self._key_id: bytes
        self._own: m.Sealed
        self._sealed: tuple[int, ...]
        self._transcript = b""
        self._word: Word | None = None

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far."""
        if self._word is None:
            return Transcript(header=self._header_digest, delivery=self._transcript)
        survivors = [self._roster.index(name) for name in self._word.survivors]
        dropouts = [index for index in self._sealed if index not in survivors]
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, survivors, dropouts),
            survivors=self._word.survivors,
            dropouts=tuple(map(self._roster.name, dropouts)),
            word=self._word,
        )

    def _answer(self, frame: bytes, secrets: CkksSecrets) -> bytes:
        match self._step:
            case Step.ENCRYPT:
                limit = m.frame_limit(self._parameters, self._ring, self._shape.keys)
                return self._on_key(decode(am.KeyOffer, frame, SERVER, limit), secrets)
            case Step.UPLOAD:
                return self._on_sealed(decode(m.SealedRoll, frame, SERVER), secrets)
            case _:
                return self._on_notice(decode(am.Notice, frame, SERVER))

    def _on_key(self, offer: am.KeyOffer, secrets: CkksSecrets) -> bytes:
        check_announced(self._header, offer.header)
        # Adversary: a server that puts its own key in the place of the authority's, or an old one.
        keys, what = offer.statement, f"{self._authority.name}'s key"
        check_header(keys.header, self._header_digest, what)
        check_signature(keys, keys.signature, self._authority.key, what)
        # Adversary: a server that hands out another silo's keys. A colluder can have the secret of
        # its own keys read out of the sum.
        if (
            len(keys.keys) != len(self._roster)
            or len(set(keys.keys)) != len(self._roster)
            or keys.keys[self._index - 1] != sha256(offer.part)
        ):
            accuse(self._authority.name, "key is not the one made for this silo")
        try:
            own = polynomials.unpack(offer.part, self._ring, self._shape.keys)
        except CryptoError as error:
            accuse(self._authority.name, f"key is malformed ({error})")
        self._key_id = am.key_id(self._authority.key, keys.signed(), keys.signature)
        self._record_vector()
        upload = secrets.encrypt(own[np.newaxis])
        size = polynomials.polynomial_bytes(self._ring)
        seconds = m.polynomial_digests(upload.second, size)
        root = m.cipher_root(self._key_id, self._index, sha256(upload.first), seconds)
        self._own = self._say(
            b"seal:", m.Sealed(self._header_digest, self._index, UNSIGNED, self._key_id, root)
        )
        return self._own.encode()

    def _on_sealed(self, message: m.SealedRoll, secrets: CkksSecrets) -> bytes:
        entries = message.entries
        self._sealed = tuple(entry.index for entry in entries)
        everyone = range(1, len(self._roster) + 1)
        self._check_members(self._sealed, everyone)
        self._check_signatures(entries, "ciphertext commitment")
        check_own(self._own, entries[self._sealed.index(self._index)], "a commitment")
        for entry in entries:
            # Adversary: a server that showed a silo another key, e.g. its own.
            if entry.key != self._key_id:
                accuse(self._roster.name(entry.index), "ciphertext is under another key")
        self._transcript = m.transcript(self._key_id, entries)
        consent = self._say(
            b"upload:",  # one list an attempt: see below
            am.Consent(self._header_digest, self._index, UNSIGNED, self._transcript),
        )
        # Adversary: a server that shows this ciphertext's commitment among two sets of others, and
        # fills the second set after it has seen the ciphertext. The authority opens sums only of
        # silos that consent to the same list, and this silo consents to one.
        upload = secrets.take_upload()
        return am.CipherDelivery(consent, upload.first, upload.second).encode()

    def _on_notice(self, notice: am.Notice) -> bytes:
        statement, what = notice.statement, f"{self._authority.name}'s statement"
        # Adversary: a server that makes up how many silos are in the sum, to have this silo settle
        # its budget as if there were more noise in it.
        check_header(statement.header, self._header_digest, what)
        check_signature(statement, statement.signature, self._authority.key, what)
        check_list(statement.survivors, self._sealed, self._parameters.quorum)
        if statement.transcript != self._transcript or self._index not in statement.survivors:
            accuse(self._authority.name, "statement is not about a sum with this silo's ciphertext")
        names = tuple(map(self._roster.name, statement.survivors))
        noted = self._say(
            b"noted:",
            am.Noted(self._header_digest, self._index, UNSIGNED, am.statement_digest(statement)),
        )
        self._word = Word(names, statement.share, statement.signature)
        return noted.encode()
