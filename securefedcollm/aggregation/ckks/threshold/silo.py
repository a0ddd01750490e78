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
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.checks import (
    accuse,
    check_announced,
    check_identity,
    check_list,
    check_own,
    check_signatures,
    record_once,
    refuse,
    refuse_late,
)
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import openings, polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.secrets import CkksSecrets, KeyShares
from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.messages import UNSIGNED, Ask, Signed, decode, lists_digest, sign
from securefedcollm.aggregation.roles import SERVER, Journal, Transcript
from securefedcollm.aggregation.steps import CKKS_TRANSITIONS, Step
from securefedcollm.primitives import RandomSource, SigningKey, sha256


class CkksSiloRound:
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
        check_roster(header, roster)
        self._index = check_identity(roster, name, signing_key, vector_id)
        polynomials.check_length(vector, header.parameters.values)
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._ring = m.ring_of(header)
        self._shape = m.shape_of(header)
        self._roster = roster
        self._signing_key = signing_key
        self._vector_id = vector_id
        self._journal = journal
        self._step = Step.ADVERTISE
        common = polynomials.hash_to_ring(self._header_digest, self._ring)
        self._secrets: CkksSecrets | None = CkksSecrets(
            self._ring, self._shape, vector, common, random
        )
        self._shares: KeyShares | None = KeyShares(
            self._ring, self._shape, common, len(roster), random
        )
        # Public transcript, filled step by step.
        self._parts: tuple[bytes, ...]
        self._digests: tuple[bytes, ...]
        self._commitments: dict[int, m.KeyCommitment]
        self._commitments_digest: bytes
        self._members: tuple[int, ...]
        self._key_id: bytes
        self._own: Signed
        self._sealed: dict[int, m.Sealed]
        self._seconds: dict[int, Residues] = {}
        self._transcript = b""

    @property
    def step(self) -> Step:
        """The step whose request this silo will answer next."""
        return self._step

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

    def __repr__(self) -> str:
        return f"CkksSiloRound(silo={self._roster.name(self._index)!r}, step={self._step.value})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CkksSiloRound holds secrets: it is neither copied nor pickled")

    def handle(self, frame: bytes) -> bytes:
        """Answer the server's next request.

        Raises:
            RemoteProtocolError: the request must not be answered; the round is over for this silo.
            Exception: whatever the journal raises; the round is over for this silo.
        """
        secrets, shares = self._secrets, self._shares
        if secrets is None or shares is None:
            refuse_late(self._step)
        try:
            reply = self._answer(frame, secrets, shares)
        except BaseException:
            self._finish(Step.FAILED)
            raise
        self._step = CKKS_TRANSITIONS[self._step].following
        if self._step is Step.DONE:
            self._finish(Step.DONE)
        return reply

    def _answer(self, frame: bytes, secrets: CkksSecrets, shares: KeyShares) -> bytes:
        limit, silos, shape = self._limit, self._parameters.silos, self._shape
        match self._step:
            case Step.ADVERTISE:
                return self._on_ask(decode(Ask, frame, SERVER), shares)
            case Step.SHARE:
                return self._on_commitments(decode(m.KeyCommitments, frame, SERVER))
            case Step.ENCRYPT:
                return self._on_parts(
                    decode(m.KeyParts, frame, SERVER, limit(silos * shape.keys)), secrets
                )
            case Step.UPLOAD:
                return self._on_sealed(decode(m.SealedRoll, frame, SERVER), secrets)
            case Step.AGREE:
                most = limit(silos * shape.groups)
                return self._on_pieces(decode(m.Pieces, frame, SERVER, most))
            case _:
                return self._on_verdicts(decode(m.Verdicts, frame, SERVER), shares)

    def _limit(self, count: int) -> int:
        return m.frame_limit(self._parameters, self._ring, count)

    def _finish(self, step: Step) -> None:
        self._step = step
        for kept in (self._secrets, self._shares):
            if kept is not None:
                kept.close()
        self._secrets = self._shares = None
        self._seconds.clear()
        self._parts = ()

    # K0, K1: the joint key --------------------------------------------------------------------

    def _on_ask(self, ask: Ask, shares: KeyShares) -> bytes:
        check_announced(self._header, ask.header)
        self._parts = shares.key_parts()
        self._digests = tuple(sha256(part) for part in self._parts)
        commitment = m.key_commitment(self._header_digest, self._index, self._digests)
        # Adversary: a server that restarts this process for second keys in the same attempt.
        return self._say(
            b"keys:",
            m.KeyCommitment(self._header_digest, self._index, UNSIGNED, commitment),
        )

    def _on_commitments(self, message: m.KeyCommitments) -> bytes:
        entries = message.entries
        everyone = range(1, len(self._roster) + 1)
        self._check_members([entry.index for entry in entries], everyone)
        self._check_all_signed(entries, "key commitment")
        self._commitments = {entry.index: entry for entry in entries}
        check_own(self._own, self._commitments[self._index])
        self._commitments_digest = m.commitments_digest(self._header_digest, entries)
        parts, self._parts = self._parts, ()
        # Adversary: a server that has these key parts shown among two sets of commitments.
        return self._say(
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
        self._check_all_signed(entries, "key part")
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
        # Adversary: a server that gets two vectors of this silo into two sums over the same
        # members; their difference would be this silo's alone.
        self._record(b"vector:" + self._header.round_scope, self._vector_id)
        upload = secrets.encrypt(joint)
        seconds = m.polynomial_digests(upload.second, self._size)
        root = m.cipher_root(self._key_id, self._index, sha256(upload.first), seconds)
        return self._say(
            b"seal:", m.Sealed(self._header_digest, self._index, UNSIGNED, self._key_id, root)
        )

    def _on_sealed(self, message: m.SealedRoll, secrets: CkksSecrets) -> bytes:
        entries = message.entries
        self._check_exactly([entry.index for entry in entries])
        self._check_all_signed(entries, "ciphertext commitment")
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

    def _on_pieces(self, message: m.Pieces) -> bytes:
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
            self._seconds[index] = openings.read(
                pieces.pieces, self._ring, self._shape.groups, self._roster.name(index)
            )
        # Adversary: a restart, to have two different lists agreed to.
        return self._say(
            b"agree:", m.Verdict(self._header_digest, self._index, UNSIGNED, self._transcript)
        )

    # K5: one opening ----------------------------------------------------------------------------

    def _on_verdicts(self, message: m.Verdicts, shares: KeyShares) -> bytes:
        self._check_exactly([verdict.index for verdict in message.verdicts])
        self._check_all_signed(message.verdicts, "verdict")
        for verdict in message.verdicts:
            # Adversary: a server that showed members different ciphertexts or commitments.
            if verdict.transcript != self._transcript:
                self._accuse(verdict.index, "verdict is on other ciphertexts than this silo's")
        check_own(self._own, next(v for v in message.verdicts if v.index == self._index))
        names = [self._roster.name(index) for index in self._members]
        openings.record_opening(self._journal, self._header, names, self._step)
        share = shares.decrypt(self._seconds)
        # Adversary: a clone of this process that answers again, so that the average of the answers
        # has less flooding noise. The noise is in what is recorded: only one of them leaves.
        return self._say(
            b"partial:",
            m.Partial(self._header_digest, self._index, UNSIGNED, self._transcript, share),
        )

    # Checks used by several steps ---------------------------------------------------------------

    @property
    def _size(self) -> int:
        return polynomials.polynomial_bytes(self._ring)

    def _check_members(self, members: Sequence[int], allowed: Iterable[int]) -> None:
        check_list(members, allowed, self._parameters.quorum, own=self._index)

    def _check_exactly(self, members: Sequence[int]) -> None:
        if tuple(members) != self._members:
            refuse(
                "sent a list that is not of the silos that share the key",
                "a silo was lost: start a new attempt under a fresh key",
            )

    def _check_all_signed(self, entries: Sequence[Signed], what: str) -> None:
        check_signatures(entries, what, self._header_digest, self._roster)

    def _accuse(self, index: int, what: str) -> NoReturn:
        accuse(self._roster.name(index), what)

    def _say(self, key: bytes, message: Signed) -> bytes:
        """Sign the coming answer of this attempt, record it in the journal, and return it."""
        signed = sign(message, self._signing_key)
        self._record(key + self._header.attempt_scope, sha256(signed.signed()))
        self._own = signed
        return signed.encode()

    def _record(self, key: bytes, value: bytes) -> None:
        record_once(self._journal, key, value, self._step)
