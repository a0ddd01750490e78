"""The authority's side of one attempt at one round of CKKS aggregation under its own keys.

The authority makes fresh keys for every attempt, and decrypts one sum. It is a separate party, such
as an auditor. It gets no first polynomial, so it can read neither a vector nor a sum. Together with
the server it could open single ciphertexts. This key model assumes that the two do not collude, and
for that reason the threshold model is the default.

The adversary is the server together with up to c silos. It relays and may invent every frame, and
crash and restart this process. A ciphertext does not reveal its content, so:

1. The authority never gets an aggregate. It gets the second polynomials of single ciphertexts,
   which must hash to the digests that their owners signed under this very key (A1), and adds them
   up itself. So it decrypts exactly the sum. It has to believe no linear check and no report.
2. Every silo in the sum has signed the list of all committed ciphertexts before its own one left
   (A2). So no ciphertext in the sum was chosen as a function of an honest one ("minus the others").
3. The sum has a quorum of silos, at least c + 2, of which two are honest.
4. Every silo encrypts under keys of its own. A colluder can upload anything instead of a
   ciphertext, say a constant for c1, and so read in the opened sum the secret that it is
   multiplied with. Nobody else's vector is encrypted under that secret.
5. One set of silos a round, whatever the attempt, in a few attempts at most; and in an attempt one
   answer, noise included.
"""

from __future__ import annotations

import os

from securefedcollm.aggregation.answering import AnsweringSide
from securefedcollm.aggregation.checks import accuse, check_announced, check_list, refuse
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import openings, polynomials
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.secrets import KeyShares
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.messages import UNSIGNED, Ask, decode, lists_digest
from securefedcollm.aggregation.roles import SERVER, Journal, Sealing, Transcript, Word
from securefedcollm.aggregation.steps import KEYHOLDER_STEPS, Step
from securefedcollm.primitives import RandomSource, SigningKey, sha256


class CkksAuthorityRound(AnsweringSide[KeyShares]):
    """Answers the server's two requests, in order, once each. Not thread-safe.

    Args:
        header: of this attempt, from the authority's own study. It knows nothing of model and
            vector length; every silo in the sum signed those of the header.
        roster: the silos.
        signing_key: the identity that the study names as its authority.
        journal: durable across restarts, and shared by all processes of this authority.
        random: of secrets, errors and flooding noise.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
        signing_key: SigningKey,
        journal: Journal,
        random: RandomSource = os.urandom,
    ) -> None:
        super().__init__(
            header=header,
            roster=roster,
            signing_key=signing_key,
            journal=journal,
            steps=KEYHOLDER_STEPS,
        )
        self._ring = m.ring_of(header)
        self._shape = m.shape_of(header)
        common = polynomials.hash_to_ring(self._header_digest, self._ring)
        self._hold(KeyShares(self._ring, self._shape, common, len(roster), random))
        self._key_id = b""
        self._offer: tuple[bytes, bytes]
        self._transcript = Transcript(header=self._header_digest)

    @property
    def key_id(self) -> bytes:
        """32 bytes that stand for this attempt's key; empty before there is one."""
        return self._key_id

    @property
    def transcript(self) -> Transcript:
        """What was opened, after an opening."""
        return self._transcript

    def _answer(self, frame: bytes, secrets: KeyShares) -> bytes:
        if self._step is Step.ADVERTISE:
            return self._on_ask(decode(Ask, frame, SERVER), secrets)
        silos, shape = self._parameters.silos, self._shape
        limit = m.frame_limit(self._parameters, self._ring, silos * shape.groups)
        return self._on_request(decode(am.OpenRequest, frame, SERVER, limit), secrets)

    def _on_ask(self, ask: Ask, secrets: KeyShares) -> bytes:
        check_announced(self._header, ask.header, whose="the authority's", held="the signed study")
        parts = secrets.key_parts()
        digests = tuple(sha256(part) for part in parts)
        # Adversary: a server that restarts this process for second keys in the same attempt.
        keys = self._say(b"keys:", am.KeyStatement(self._header_digest, UNSIGNED, digests))
        self._key_id = am.key_id(self._signing_key.public, keys.signed(), keys.signature)
        self._offer = am.keys_digest(digests), keys.signature
        return am.AuthorityKeys(keys, parts).encode()

    def _on_request(self, message: am.OpenRequest, secrets: KeyShares) -> bytes:
        transcript = self._check_sealed(message)
        survivors = self._check_consents(message, transcript)
        seconds = self._read(message)
        names = tuple(map(self._roster.name, survivors))
        openings.record_opening(self._journal, self._header, names, self._step)
        share = secrets.decrypt(seconds)
        # Adversary: a clone of this process that answers again, so that the average of the answers
        # has less flooding noise. The noise is in what is recorded: only one of them leaves.
        statement = self._say(
            b"partial:",
            am.Statement(self._header_digest, UNSIGNED, transcript, survivors, sha256(share)),
        )
        self._transcript = self._public(message, transcript, statement, names)
        return am.Opened(statement, share).encode()

    def _check_sealed(self, message: am.OpenRequest) -> bytes:
        """The list of committed ciphertexts, all of this round and under this key."""
        indices = [entry.index for entry in message.sealed]
        check_list(indices, range(1, len(self._roster) + 1), self._parameters.quorum)
        self._check_signatures(message.sealed, "ciphertext commitment")
        for entry in message.sealed:
            # Adversary: a server that gave a silo another key than this, its own for instance.
            if entry.key != self._key_id:
                accuse(self._roster.name(entry.index), "ciphertext is under another key")
        return m.transcript(self._key_id, message.sealed)

    def _check_consents(self, message: am.OpenRequest, transcript: bytes) -> tuple[int, ...]:
        """The silos in the sum: enough of them, and each has signed this very list.

        Adversary: a server that asks to open one silo's ciphertext, or a few; or one that showed
        some silos another list, and completed this one after it had seen their ciphertexts.
        """
        survivors = tuple(consent.index for consent in message.consents)
        sealed = [entry.index for entry in message.sealed]
        check_list(survivors, sealed, self._parameters.quorum)
        self._check_signatures(message.consents, "consent")
        for consent in message.consents:
            if consent.transcript != transcript:
                accuse(self._roster.name(consent.index), "consent is to other ciphertexts")
        return survivors

    def _read(self, message: am.OpenRequest) -> dict[int, Residues]:
        """The second polynomials of everybody in the sum, by index."""
        if len(message.parts) != len(message.consents):
            refuse("did not send one ciphertext for each consent", "report the server")
        size = polynomials.polynomial_bytes(self._ring)
        roots = {entry.index: entry.root for entry in message.sealed}
        found: dict[int, Residues] = {}
        for consent, part in zip(message.consents, message.parts, strict=True):
            name = self._roster.name(consent.index)
            seconds = m.polynomial_digests(part.second, size)
            # Adversary: a server that swaps, drops, repeats or alters a part of a ciphertext.
            root = m.cipher_root(self._key_id, consent.index, part.first, seconds)
            if root != roots[consent.index]:
                accuse(name, "ciphertext is not the one it committed to")
            found[consent.index] = openings.read(part.second, self._ring, self._shape.groups, name)
        return found

    def _public(
        self,
        message: am.OpenRequest,
        transcript: bytes,
        statement: am.Statement,
        names: tuple[str, ...],
    ) -> Transcript:
        sealed = [entry.index for entry in message.sealed]
        dropouts = [index for index in sealed if index not in statement.survivors]
        return Transcript(
            header=self._header_digest,
            delivery=transcript,
            lists=lists_digest(transcript, statement.survivors, dropouts),
            survivors=names,
            dropouts=tuple(map(self._roster.name, dropouts)),
            agreements={
                self._roster.name(consent.index): consent.signature for consent in message.consents
            },
            sealing=Sealing(
                key=self._key_id,
                roots={
                    self._roster.name(entry.index): (entry.root, entry.signature)
                    for entry in message.sealed
                },
                offer=self._offer,
            ),
            word=Word(names, statement.share, statement.signature),
        )
