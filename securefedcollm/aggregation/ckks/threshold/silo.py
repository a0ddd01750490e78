"""A silo's side of one attempt at one round of threshold CKKS aggregation.

Nobody holds the keys: every member has a fresh secret in each, and it takes every member's partial
decryption to open anything. The adversary is the server together with up to c silos that do what
they like; it relays and may invent every frame, show different silos different things, and crash
and restart this process. A CKKS ciphertext does not reveal its content, and nobody can see whether
it, or a key part, is well formed. So two things protect this silo's vector: *which* ciphertexts its
share opens, and that each secret is used for one owner's ciphertext only:

1. Key parts are committed to before any is shown (K0, K1), so no member can choose its part as a
   function of the others' and know a joint secret.
2. Ciphertexts are committed to before any is shown (K2, K3), so none depends on another.
3. This silo gets the committed second polynomials themselves (K4), and multiplies and adds them
   itself (K5). So no aggregate can differ from the sum.
4. Every silo encrypts under keys of its own. A colluder that uploads a constant for a c1 reads, in
   the opened sum, the secrets that it is multiplied with: those of its own keys.
5. Members are in c + 1 committees, each with joint keys and encryption randomness u of its own. A
   colluder that gives a constant for its part of this silo's key reads u in the opened sum: that
   of its own committee. In one committee there is no colluder.
6. Each share carries flooding noise, which hides what a decryption reveals about the key (Li and
   Micciancio, eprint 2020/1533), and leaves once. The same sum is opened in a few attempts at
   most, so that the average over them tells little more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.answering import AnsweringSilo
from securefedcollm.aggregation.checks import accuse, check_announced, check_own, refuse
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import openings, polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.secrets import CkksSecrets, KeyShares
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.messages import UNSIGNED, Ask, Signed, decode, lists_digest
from securefedcollm.aggregation.roles import SERVER, Journal, Transcript
from securefedcollm.aggregation.steps import SILO_STEPS, Step
from securefedcollm.primitives import RandomSource, SigningKey, sha256


@dataclass(repr=False)
class _Secrets:
    """What must not outlive the attempt: the vector, this silo's shares of the keys, and what takes
    so much memory that it had better not."""

    own: CkksSecrets
    shares: KeyShares
    parts: tuple[bytes, ...] = ()
    """This silo's parts of everybody's keys, until they have left."""
    seconds: dict[int, Residues] = field(default_factory=dict)
    """Silo's index -> its second polynomials for this silo's committee."""

    def close(self) -> None:
        try:
            self.own.close()
        finally:
            self.shares.close()


class CkksSiloRound(AnsweringSilo[_Secrets]):
    """Answers the server's six requests, in order, once each. Not thread-safe.

    The arguments are those of :class:`~.masking.silo.SiloRound`.

    Raises:
        LocalProtocolError: header, roster, identity and vector do not belong together.
        ConfigError: no ring holds the sum.
    """

    def __init__(
        self,
        *,
        header: RoundHeader,
        roster: Roster,
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
            steps=SILO_STEPS["ckks"],
        )
        polynomials.check_length(vector, header.parameters.values)
        self._ring = m.ring_of(header)
        self._shape = m.shape_of(header)
        common = polynomials.hash_to_ring(self._header_digest, self._ring)
        self._hold(
            _Secrets(
                CkksSecrets(self._ring, self._shape, vector, common, random),
                KeyShares(self._ring, self._shape, common, len(roster), random),
            )
        )
        # Public transcript, filled step by step.
        self._digests: tuple[bytes, ...]
        self._commitments: dict[int, m.KeyCommitment]
        self._commitments_digest: bytes
        self._members: tuple[int, ...]
        self._key_id: bytes
        self._own: Signed
        self._sealed: dict[int, m.Sealed]
        self._transcript = b""

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far. The key needs all shares: nobody may drop out."""
        agreed = self._step in {Step.UNMASK, Step.DONE}
        members = self._members if agreed else ()
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, members, ()) if agreed else b"",
            survivors=tuple(map(self._roster.name, members)),
        )

    def _answer(self, frame: bytes, secrets: _Secrets) -> bytes:
        limit, silos, shape = self._limit, self._parameters.silos, self._shape
        match self._step:
            case Step.ADVERTISE:
                return self._on_ask(decode(Ask, frame, SERVER), secrets)
            case Step.SHARE:
                return self._on_commitments(decode(m.KeyCommitments, frame, SERVER), secrets)
            case Step.ENCRYPT:
                most = limit(silos * shape.keys)
                return self._on_parts(decode(m.KeyParts, frame, SERVER, most), secrets.own)
            case Step.UPLOAD:
                return self._on_sealed(decode(m.SealedRoll, frame, SERVER), secrets.own)
            case Step.AGREE:
                most = limit(silos * shape.groups)
                return self._on_pieces(decode(m.Pieces, frame, SERVER, most), secrets)
            case _:
                return self._on_verdicts(decode(m.Verdicts, frame, SERVER), secrets)

    def _limit(self, count: int) -> int:
        return m.frame_limit(self._parameters, self._ring, count)

    # K0, K1: the joint key --------------------------------------------------------------------

    def _on_ask(self, ask: Ask, secrets: _Secrets) -> bytes:
        check_announced(self._header, ask.header)
        secrets.parts = secrets.shares.key_parts()
        self._digests = tuple(sha256(part) for part in secrets.parts)
        commitment = m.key_commitment(self._header_digest, self._index, self._digests)
        # Adversary: a server that restarts this process for second keys in the same attempt.
        return self._answer_once(
            b"keys:",
            m.KeyCommitment(self._header_digest, self._index, UNSIGNED, commitment),
        )

    def _on_commitments(self, message: m.KeyCommitments, secrets: _Secrets) -> bytes:
        entries = message.entries
        everyone = range(1, len(self._roster) + 1)
        self._check_members([entry.index for entry in entries], everyone)
        self._check_signatures(entries, "key commitment")
        self._commitments = {entry.index: entry for entry in entries}
        check_own(self._own, self._commitments[self._index])
        self._commitments_digest = m.commitments_digest(self._header_digest, entries)
        parts, secrets.parts = secrets.parts, ()
        # Adversary: a server that has these key parts shown among two sets of commitments.
        return self._answer_once(
            b"deal:",
            m.KeyPart(
                self._header_digest,
                self._index,
                UNSIGNED,
                self._commitments_digest,
                self._digests,
                parts,
            ),
        )

    # K2, K3: the ciphertext, first its digest, then itself --------------------------------------

    def _on_parts(self, message: m.KeyParts, secrets: CkksSecrets) -> bytes:
        entries = message.entries
        self._check_members([entry.index for entry in entries], self._commitments)
        self._check_signatures(entries, "key part")
        self._members = tuple(entry.index for entry in entries)
        count = self._shape.committees
        joint = np.zeros((count, self._shape.keys, DEGREE), dtype=np.uint64)
        for entry in entries:
            # Adversary: a member that chose its part after it saw the others', to know the joint
            # secret; a relay that showed it other commitments, or another silo's part.
            found = m.key_commitment(self._header_digest, entry.index, entry.digests)
            if (
                entry.commitments != self._commitments_digest
                or found != self._commitments[entry.index].commitment
                or len(entry.digests) != len(self._roster)
                or tuple(map(sha256, entry.parts)) != (entry.digests[self._index - 1],)
            ):
                self._accuse(entry.index, "key part is not the one it committed to")
            own = joint[m.committee(entry.index, self._members, count)]
            openings.accumulate(own, entry.parts[0], self._ring, self._roster.name(entry.index))
        check_own(self._own, next(entry for entry in entries if entry.index == self._index))
        self._key_id = m.key_id(self._commitments_digest, entries)
        self._record_vector()
        upload = secrets.encrypt(joint)
        seconds = m.polynomial_digests(upload.second, self._size)
        root = m.cipher_root(self._key_id, self._index, sha256(upload.first), seconds)
        return self._answer_once(
            b"seal:", m.Sealed(self._header_digest, self._index, UNSIGNED, self._key_id, root)
        )

    def _on_sealed(self, message: m.SealedRoll, secrets: CkksSecrets) -> bytes:
        entries = message.entries
        self._check_exactly([entry.index for entry in entries])
        self._check_signatures(entries, "ciphertext commitment")
        for entry in entries:
            # Adversary: a server that showed a member another joint key, e.g. its own.
            if entry.key != self._key_id:
                self._accuse(entry.index, "ciphertext is under another key than this silo's")
        self._sealed = {entry.index: entry for entry in entries}
        check_own(self._own, self._sealed[self._index])
        self._transcript = m.transcript(self._key_id, entries)
        # Adversary: a server that shows this ciphertext's commitment among two sets of others, and
        # fills the second set after it has seen the ciphertext.
        self._record(b"upload:" + self._header.attempt_scope, self._transcript)
        return secrets.take_upload().encode()

    # K4: what is there to open ------------------------------------------------------------------

    def _on_pieces(self, message: m.Pieces, secrets: _Secrets) -> bytes:
        if len(message.lists) != len(self._members):
            refuse("did not relay one piece list for each member", "start a new attempt")
        committee = m.committee(self._index, self._members, self._shape.committees)
        mine = m.of_committee(committee, self._shape)
        for index, pieces in zip(self._members, message.lists, strict=True):
            root = m.cipher_root(self._key_id, index, pieces.first, pieces.seconds)
            digests = [pieces.seconds[at : at + 32] for at in range(0, len(pieces.seconds), 32)]
            found = m.polynomial_digests(pieces.pieces, self._size)
            # Adversary: a server that swaps, drops, repeats or alters a part of a ciphertext: it
            # would have this silo multiply another polynomial with the secrets of an honest key.
            if (
                root != self._sealed[index].root
                or len(pieces.seconds) != 32 * self._shape.seconds
                or found != b"".join(digests[k] for k in mine)
            ):
                self._accuse(index, "ciphertext is not the one it committed to")
            secrets.seconds[index] = openings.read(
                pieces.pieces, self._ring, self._shape.groups, self._roster.name(index)
            )
        # Adversary: a restart, to have two different lists agreed to.
        return self._answer_once(
            b"agree:", m.Verdict(self._header_digest, self._index, UNSIGNED, self._transcript)
        )

    # K5: one opening ----------------------------------------------------------------------------

    def _on_verdicts(self, message: m.Verdicts, secrets: _Secrets) -> bytes:
        self._check_exactly([verdict.index for verdict in message.verdicts])
        self._check_signatures(message.verdicts, "verdict")
        for verdict in message.verdicts:
            # Adversary: a server that showed members different ciphertexts or commitments.
            if verdict.transcript != self._transcript:
                self._accuse(verdict.index, "verdict is on other ciphertexts than this silo's")
        check_own(self._own, next(v for v in message.verdicts if v.index == self._index))
        names = [self._roster.name(index) for index in self._members]
        openings.record_opening(self._journal, self._header, names, self._step)
        share = secrets.shares.decrypt(secrets.seconds)
        # Adversary: a clone of this process that answers again, so that the average of the answers
        # has less flooding noise. The noise is in what is recorded: only one of them leaves.
        return self._answer_once(
            b"partial:",
            m.Partial(self._header_digest, self._index, UNSIGNED, self._transcript, share),
        )

    # Checks used by several steps ---------------------------------------------------------------

    @property
    def _size(self) -> int:
        return polynomials.polynomial_bytes(self._ring)

    def _check_exactly(self, members: Sequence[int]) -> None:
        if tuple(members) != self._members:
            refuse(
                "sent a list that is not of the silos that share the key",
                "a silo was lost: start a new attempt under a fresh key",
            )

    def _accuse(self, index: int, what: str) -> NoReturn:
        accuse(self._roster.name(index), what)

    def _answer_once(self, key: bytes, message: Signed) -> bytes:
        """Say it, and expect to be shown it again."""
        self._own = self._say(key, message)
        return self._own.encode()
