"""A silo's side of one attempt at one round of threshold CKKS aggregation.

Nobody holds the key: it is the sum of one fresh secret per member and attempt, and it takes every
member's partial decryption to open anything. The adversary is the server together with up to c
silos; it relays and may invent every frame, show different silos different things, and crash and
restart this process. A CKKS ciphertext does not say what it is a ciphertext of, so what protects
this silo's vector is *which* ciphertext its share opens, and that is checked before it answers:

1. Key parts are committed to before any is shown (K0, K1), so no member can choose its part as a
   function of the others' and know the joint secret.
2. Ciphertexts are committed to before any is shown (K2, K3), so no member can choose its own as a
   function of the others' (say, minus all of them but one) and leave one vector in the sum.
3. Every chunk of the aggregate is added up again from the committed ciphertexts by c + 1 members,
   of which one at least is honest (K4), and no silo decrypts a chunk that they do not all vouch for
   (K5). A random linear check with parts that each silo reports for itself would not do: one
   colluder can report whatever makes the check come out.
4. Each share carries flooding noise that drowns what a decryption tells about the key (Li and
   Micciancio, eprint 2020/1533), and leaves once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import ckks_messages as m
from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks_checks import (
    accumulate,
    accuse,
    check_list,
    check_signatures,
    record_once,
    refuse,
    split,
)
from securefedcollm.aggregation.ckks_ring import Residues
from securefedcollm.aggregation.ckks_secrets import CkksSecrets
from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.keys import lists_digest
from securefedcollm.aggregation.messages import UNSIGNED, Ask, Signed, decode, sign
from securefedcollm.aggregation.scheme import Journal, Transcript
from securefedcollm.aggregation.silo import SERVER
from securefedcollm.aggregation.steps import CKKS_TRANSITIONS, Step
from securefedcollm.errors import CryptoError, LocalProtocolError
from securefedcollm.primitives import KEY_BYTES, RandomSource, SigningKey, sha256
from securefedcollm.study.ring import DEGREE


class CkksSiloRound:
    """Answers the server's six requests, in order, once each. Not thread-safe.

    The arguments are those of :class:`~.silo.SiloRound`; ``random`` feeds the flooding noise only,
    since SEAL draws keys and encryption noise from the system by itself.

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
        self._index = roster.index(name)
        if roster.key(self._index) != signing_key.public or len(vector_id) != KEY_BYTES:
            raise LocalProtocolError(
                f"this identity is not {name}'s on the roster, or the vector id is not 32 bytes",
                hint="run with the identity that signed the study",
            )
        if vector.shape != (header.parameters.values,):
            raise LocalProtocolError(
                f"a vector of shape {vector.shape}, not ({header.parameters.values},)",
                hint="quantise to the study's bound and length first",
            )
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
        self._common = ckks_ring.hash_to_ring(self._header_digest, self._ring)
        self._secrets: CkksSecrets | None = CkksSecrets(
            self._ring, self._shape, vector, self._common, random
        )
        # Public transcript, filled step by step.
        self._part: bytes
        self._commitments: dict[int, m.KeyCommitment]
        self._commitments_digest: bytes
        self._members: tuple[int, ...]
        self._key_id: bytes
        self._own: Signed
        self._sealed: dict[int, m.Sealed]
        self._transcript = b""

    @property
    def step(self) -> Step:
        """The step whose request this silo will answer next."""
        return self._step

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far. The key needs all its shares: nobody drops out."""
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
        secrets = self._secrets
        if secrets is None:
            refuse(
                f"sent a frame although this silo's round is over ({self._step.value})",
                "start a new attempt or the next round",
            )
        try:
            reply = self._answer(frame, secrets)
        except BaseException:
            self._finish(Step.FAILED)
            raise
        self._step = CKKS_TRANSITIONS[self._step].following
        if self._step is Step.DONE:
            self._finish(Step.DONE)
        return reply

    def _answer(self, frame: bytes, secrets: CkksSecrets) -> bytes:
        limit, silos, shape = self._limit, self._parameters.silos, self._shape
        match self._step:
            case Step.ADVERTISE:
                return self._on_ask(decode(Ask, frame, SERVER), secrets)
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
                return self._on_aggregate(
                    decode(m.Aggregate, frame, SERVER, limit(shape.groups)), secrets
                )

    def _limit(self, polynomials: int) -> int:
        return m.frame_limit(self._parameters, self._ring, polynomials)

    def _finish(self, step: Step) -> None:
        self._step = step
        if self._secrets is not None:
            self._secrets.close()
        self._secrets = None

    # K0, K1: the joint key --------------------------------------------------------------------

    def _on_ask(self, ask: Ask, secrets: CkksSecrets) -> bytes:
        # Adversary: a server that runs another study, model, round or parameter set. Only the
        # silo's own header is ever used; this comparison is for a message that names the field.
        if ask.header != self._header:
            fields = ", ".join(self._header.differences(ask.header))
            refuse(
                f"announced a round that differs from this silo's in: {fields}",
                "compare the signed study and the global model that both sides hold",
            )
        self._part = secrets.key_parts()
        commitment = m.key_commitment(self._header_digest, self._index, self._part)
        # Adversary: a server that restarts this process for a second key in the same attempt.
        return self._say(
            b"keys:",
            m.KeyCommitment(self._header_digest, self._index, UNSIGNED, commitment),
        )

    def _on_commitments(self, message: m.KeyCommitments) -> bytes:
        entries = message.entries
        everyone = tuple(range(1, len(self._roster) + 1))
        self._check_members([entry.index for entry in entries], everyone)
        self._check_all_signed(entries, "key commitment")
        self._commitments = {entry.index: entry for entry in entries}
        self._check_own(self._commitments[self._index])
        self._commitments_digest = m.commitments_digest(self._header_digest, entries)
        # Adversary: a server that has this key part shown among two sets of commitments.
        return self._say(
            b"deal:",
            m.KeyPart(
                self._header_digest, self._index, UNSIGNED, self._commitments_digest, self._part
            ),
        )

    # K2, K3: the ciphertext, first its digest, then itself --------------------------------------

    def _on_parts(self, message: m.KeyParts, secrets: CkksSecrets) -> bytes:
        entries = message.entries
        self._check_members([entry.index for entry in entries], tuple(self._commitments))
        self._check_all_signed(entries, "key part")
        joint = np.zeros((self._shape.keys, DEGREE), dtype=np.uint64)
        for entry in entries:
            # Adversary: a member that chose its part after it saw the others', to know the joint
            # secret; a relay that showed it other commitments.
            found = m.key_commitment(self._header_digest, entry.index, entry.part)
            if (
                entry.commitments != self._commitments_digest
                or found != self._commitments[entry.index].commitment
            ):
                self._accuse(entry.index, "key part is not the one it committed to")
            self._accumulate(joint, entry.part, entry.index)
        self._check_own(next(entry for entry in entries if entry.index == self._index))
        self._members = tuple(entry.index for entry in entries)
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
        self._check_own(self._sealed[self._index])
        self._transcript = m.transcript(self._key_id, entries)
        # Adversary: a server that shows this ciphertext's commitment among two sets of others, and
        # fills the second set after it has seen the ciphertext.
        self._record(b"upload:" + self._header.attempt_scope, self._transcript)
        return secrets.take_upload().encode()

    # K4: is the aggregate the sum? --------------------------------------------------------------

    def _on_pieces(self, message: m.Pieces) -> bytes:
        if len(message.lists) != len(self._members):
            refuse("did not relay one piece list for each member", "start a new attempt")
        mine = m.assigned(
            self._index, self._members, self._parameters.colluders, self._shape.groups
        )
        total = np.zeros((len(mine), DEGREE), dtype=np.uint64)
        for index, pieces in zip(self._members, message.lists, strict=True):
            digests = split(pieces.seconds)
            root = m.cipher_root(self._key_id, index, pieces.first, pieces.seconds)
            expected = b"".join(digests[k] for k in mine if k < len(digests))
            # Adversary: a server that swaps, drops, repeats or alters a chunk of a ciphertext.
            if (
                root != self._sealed[index].root
                or len(pieces.seconds) != 32 * self._shape.groups
                or m.polynomial_digests(pieces.pieces, self._size) != expected
            ):
                self._accuse(index, "ciphertext is not the one it committed to")
            self._accumulate(total, pieces.pieces, index)
        sums = m.polynomial_digests(ckks_ring.pack(total, self._ring), self._size)
        # Adversary: a restart, to have two different sums vouched for.
        return self._say(
            b"agree:",
            m.Verdict(self._header_digest, self._index, UNSIGNED, self._transcript, sums),
        )

    # K5: one opening ----------------------------------------------------------------------------

    def _on_aggregate(self, message: m.Aggregate, secrets: CkksSecrets) -> bytes:
        self._check_exactly([verdict.index for verdict in message.verdicts])
        self._check_all_signed(message.verdicts, "verdict")
        for verdict in message.verdicts:
            # Adversary: a server that showed members different ciphertexts or commitments.
            if verdict.transcript != self._transcript:
                self._accuse(verdict.index, "verdict is on other ciphertexts than this silo's")
        self._check_own(next(v for v in message.verdicts if v.index == self._index))
        self._check_sums(message)
        # Adversary: a server that opens this attempt and then another one over other members; the
        # difference would bare the silos in which they differ. One set of members per round.
        names = [self._roster.name(index).encode() for index in self._members]
        self._record(b"open:" + self._header.round_scope, sha256(*(sha256(name) for name in names)))
        try:
            share = secrets.decrypt(message.second)
        except CryptoError as error:
            refuse(f"sent an aggregate that is malformed ({error})", "report the server")
        # Adversary: a clone of this process that answers again, so that the average of the answers
        # has less flooding noise. The noise is in what is recorded: only one of them leaves.
        return self._say(
            b"partial:",
            m.Partial(self._header_digest, self._index, UNSIGNED, self._transcript, share),
        )

    def _check_sums(self, message: m.Aggregate) -> None:
        """Each chunk of the aggregate is what all its verifiers say the sum is.

        Adversary: a server that asks to decrypt one silo's ciphertext, or any other than the sum of
        the committed ones; up to c verifiers that vouch for it.
        """
        vouched: dict[tuple[int, int], bytes] = {}
        for verdict in message.verdicts:
            chunks = m.assigned(
                verdict.index, self._members, self._parameters.colluders, self._shape.groups
            )
            if len(verdict.sums) != 32 * len(chunks):
                self._accuse(verdict.index, "verdict does not cover its chunks")
            for k, digest in zip(chunks, split(verdict.sums), strict=True):
                vouched[k, verdict.index] = digest
        found = split(m.polynomial_digests(message.second, self._size))
        if len(found) != self._shape.groups:
            refuse("sent an aggregate of another length", "report the server")
        for k, digest in enumerate(found):
            for index in m.verifiers(k, self._members, self._parameters.colluders):
                if vouched[k, index] != digest:
                    refuse(
                        f"asks to decrypt what {self._roster.name(index)} does not vouch for: "
                        f"group {k} is not the sum of the committed ciphertexts",
                        "report the server, and that silo if the others vouch for it",
                    )

    # Checks used by several steps ---------------------------------------------------------------

    @property
    def _size(self) -> int:
        return ckks_ring.polynomial_bytes(self._ring)

    def _check_members(self, members: Sequence[int], allowed: tuple[int, ...]) -> None:
        check_list(members, allowed, self._parameters.quorum)
        if self._index not in members:
            refuse("left this silo out of the list", "start a new attempt")

    def _check_exactly(self, members: Sequence[int]) -> None:
        if tuple(members) != self._members:
            refuse(
                "sent a list that is not of the silos that share the key",
                "a silo was lost: start a new attempt under a fresh key",
            )

    def _check_own(self, entry: Signed) -> None:
        # Adversary: a relay that swaps in what this silo signed elsewhere.
        if entry != self._own:
            refuse("relayed a frame that this silo did not send", "start a new attempt")

    def _check_all_signed(self, entries: Sequence[Signed], what: str) -> None:
        check_signatures(entries, what, self._header_digest, self._roster)

    def _accumulate(self, total: Residues, data: bytes, index: int) -> None:
        accumulate(total, data, self._ring, self._roster.name(index))

    def _accuse(self, index: int, what: str) -> NoReturn:
        accuse(self._roster.name(index), what)

    def _say(self, key: bytes, message: Signed) -> bytes:
        """Sign, write down what is about to be said in this attempt, and say it."""
        signed = sign(message, self._signing_key)
        self._record(key + self._header.attempt_scope, sha256(signed.signed()))
        self._own = signed
        return signed.encode()

    def _record(self, key: bytes, value: bytes) -> None:
        record_once(self._journal, key, value, self._step)
