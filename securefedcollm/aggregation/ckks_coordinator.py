"""The server's side of one attempt at one round of threshold CKKS aggregation.

It relays, adds first polynomials (no key and no library needed for that), and fuses the members'
partial decryptions. The silos' safety does not rest on it (:mod:`~.ckks_silo`). What it guards is
the result, against malicious silos and the network: every frame is signed and bound to the round,
every ciphertext to the commitment before it, and whoever breaks a rule is named.

The key is n-of-n: a silo that is lost once the key is made (after K1) takes the attempt with it.
The attempt is abandoned with :class:`~.roles.AbandonedError`, which names the lost silos; the
others repeat under a fresh key.
"""

from __future__ import annotations

from typing import NoReturn, TypeVar

import numpy as np
from msgspec import structs

from securefedcollm.aggregation import ckks_messages as m
from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks_ring import Residues
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.aggregation.header import Roster, RoundHeader, check_roster
from securefedcollm.aggregation.keys import lists_digest
from securefedcollm.aggregation.messages import Ask, Message, Signed, decode
from securefedcollm.aggregation.roles import AbandonedError, RoundResult, Sealing, Transcript
from securefedcollm.aggregation.steps import CKKS_TRANSITIONS, Step
from securefedcollm.errors import (
    CryptoError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import sha256, verify

T = TypeVar("T")


class CkksCoordinatorRound:
    """Makes the requests, takes the replies, opens the sum. Driven like ``CoordinatorRound``.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum.
    """

    def __init__(self, *, header: RoundHeader, roster: Roster) -> None:
        check_roster(header, roster)
        self._header = header
        self._header_digest = header.digest
        self._parameters = header.parameters
        self._ring = m.ring_of(header)
        self._size = ckks_ring.polynomial_bytes(self._ring)
        self._shape = m.shape_of(header)
        self._roster = roster
        self._step = Step.ADVERTISE
        self._excluded: dict[str, str] = {}
        self._asked: tuple[int, ...] = tuple(range(1, len(roster) + 1))
        self._replied: set[int] = set()
        self._commitments: dict[int, m.KeyCommitment] = {}
        self._commitments_digest = b""
        self._parts: dict[int, m.KeyPart] = {}
        self._key_id = b""
        self._sealed: dict[int, m.Sealed] = {}
        self._transcript = b""
        self._firsts: dict[int, bytes] = {}  # digests
        self._seconds: dict[int, bytes] = {}  # packed polynomials, relayed to all members
        self._second_digests: dict[int, bytes] = {}
        self._sum = _zeros(0)  # of first polynomials, then of shares too
        self._verdicts: dict[int, m.Verdict] = {}
        self._result: RoundResult | None = None

    @property
    def step(self) -> Step:
        """The step whose replies are being collected."""
        return self._step

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far; an agreement is the signature of a verdict."""
        agreed = self._step in {Step.UNMASK, Step.DONE}
        members = tuple(self._parts) if agreed else ()
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, members, ()) if agreed else b"",
            survivors=tuple(map(self._roster.name, members)),
            agreements=self._signatures() if agreed else {},
            sealing=self._sealing() if agreed else None,
        )

    @property
    def excluded(self) -> dict[str, str]:
        """Name -> reason for every silo that has stopped taking part so far."""
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
        return f"CkksCoordinatorRound(step={self._step.value}, excluded={self._excluded})"

    def requests(self) -> dict[str, bytes]:
        """One frame for every silo that takes part in this step and has not replied yet."""
        if self._step not in CKKS_TRANSITIONS:
            self._over()
        waiting = self._waiting()
        if self._step in {Step.ENCRYPT, Step.AGREE}:
            make = self._key_parts if self._step is Step.ENCRYPT else self._pieces
            return {self._roster.name(index): make(index).encode() for index in waiting}
        frame = self._request().encode()
        return {self._roster.name(index): frame for index in waiting}

    def _request(self) -> Message:
        match self._step:
            case Step.ADVERTISE:
                return Ask(self._header)
            case Step.SHARE:
                return m.KeyCommitments(tuple(self._commitments.values()))
            case Step.UPLOAD:
                return m.SealedRoll(tuple(self._sealed.values()))
            case _:
                return m.Verdicts(tuple(self._verdicts.values()))

    def _key_parts(self, owner: int) -> m.KeyParts:
        """For one silo: every member's parts of its keys."""
        return m.KeyParts(
            tuple(
                structs.replace(part, parts=(part.parts[owner - 1],))
                for part in self._parts.values()
            )
        )

    def _pieces(self, member: int) -> m.Pieces:
        """For one member: all digests of every ciphertext, and what its committee multiplies."""
        committee = m.committee(member, tuple(self._parts), self._shape.committees)
        mine = m.of_committee(committee, self._shape)
        return m.Pieces(
            tuple(
                m.PieceList(
                    self._firsts[index],
                    self._second_digests[index],
                    b"".join(second[k * self._size : (k + 1) * self._size] for k in mine),
                )
                for index, second in self._seconds.items()
            )
        )

    def receive(self, silo: str, frame: bytes) -> None:
        """Take the reply of ``silo`` in this step.

        A silo that is out, was not asked or has replied already changes nothing.

        Raises:
            RemoteProtocolError: the reply does not fit; the silo is out (see ``excluded``).
        """
        index = self._roster.index(silo)
        if self._step not in CKKS_TRANSITIONS:
            self._over()
        if index not in self._waiting():
            raise RemoteProtocolError(
                f"sent a second or a late frame in step {self._step.value}",
                peer=silo,
                hint="ignored; nothing to do",
            )
        try:
            self._take(index, silo, frame)
        except RemoteProtocolError as error:
            self._excluded.setdefault(silo, error.message)
            raise
        self._replied.add(index)

    def _take(self, index: int, silo: str, frame: bytes) -> None:
        shape = self._shape
        all_keys = shape.keys * len(self._roster)

        def limit(polynomials: int) -> int:
            return m.frame_limit(self._parameters, self._ring, polynomials)

        match self._step:
            case Step.ADVERTISE:
                commitment = decode(m.KeyCommitment, frame, silo)
                self._check_signed(index, commitment)
                self._commitments[index] = commitment
            case Step.SHARE:
                self._on_part(index, decode(m.KeyPart, frame, silo, limit(all_keys)))
            case Step.ENCRYPT:
                sealed = decode(m.Sealed, frame, silo)
                self._check_signed(index, sealed)
                if sealed.key != self._key_id:
                    self._blame(index, "encrypted under another key")
                self._sealed[index] = sealed
            case Step.UPLOAD:
                most = limit(shape.chunks + shape.seconds)
                self._on_upload(index, decode(m.CipherUpload, frame, silo, most))
            case Step.AGREE:
                self._on_verdict(index, decode(m.Verdict, frame, silo))
            case _:
                self._on_partial(index, decode(m.Partial, frame, silo, limit(shape.chunks)))

    def lost(self, silo: str, reason: str) -> None:
        """Take note that ``silo`` will not reply: it is out."""
        self._roster.index(silo)
        self._excluded.setdefault(silo, reason)

    def advance(self) -> bool:
        """Close this step; whoever has not replied is out. True while there is a next step.

        Raises:
            AbandonedError: a silo whose share the key needs is lost.
            ProtocolError: too few silos are left, or the opened sum is out of bounds.
            LocalProtocolError: the attempt is over already.
        """
        if self._step not in CKKS_TRANSITIONS:
            self._over()
        for index in self._waiting():
            self._excluded[self._roster.name(index)] = f"no reply in step {self._step.value}"
        try:
            self._close()
        except BaseException:
            self._step = Step.FAILED
            self._forget()
            raise
        self._step = CKKS_TRANSITIONS[self._step].following
        self._replied.clear()
        return self._step is not Step.DONE

    def _close(self) -> None:
        match self._step:
            case Step.ADVERTISE:
                self._commitments = self._staying(self._commitments)
                entries = tuple(self._commitments.values())
                self._commitments_digest = m.commitments_digest(self._header_digest, entries)
            case Step.SHARE:
                self._parts = self._staying(self._parts)
                self._key_id = m.key_id(self._commitments_digest, tuple(self._parts.values()))
            case Step.ENCRYPT:
                self._sealed = self._everyone(self._sealed)
                self._transcript = m.transcript(self._key_id, tuple(self._sealed.values()))
                for part in self._parts.values():  # used, and the larger part of the memory
                    self._parts[part.index] = structs.replace(part, parts=())
                self._sum = _zeros(self._shape.chunks)
            case Step.UPLOAD:
                self._seconds = self._everyone(self._seconds)
            case Step.AGREE:
                self._verdicts = self._everyone(self._verdicts)
                self._seconds.clear()
            case _:
                self._everyone(dict.fromkeys(self._replied, b""))
                self._open()

    def _forget(self) -> None:
        self._seconds.clear()
        self._sum = _zeros(0)

    def _waiting(self) -> tuple[int, ...]:
        return tuple(
            index
            for index in self._asked
            if index not in self._replied and self._roster.name(index) not in self._excluded
        )

    def _over(self) -> NoReturn:
        raise LocalProtocolError(
            f"this attempt is over ({self._step.value})", hint="start a new CkksCoordinatorRound"
        )

    def _reasons(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in sorted(self._excluded.items()))

    def _staying(self, replied: dict[int, T]) -> dict[int, T]:
        """Replies of silos that are still in, by index, if they are a quorum. The key is not made
        yet: the round goes on without the others."""
        staying = {
            index: replied[index]
            for index in sorted(replied)
            if self._roster.name(index) not in self._excluded
        }
        if len(staying) < self._parameters.quorum:
            raise ProtocolError(
                f"only {len(staying)} silos completed step {self._step.value}; "
                f"{self._parameters.quorum} are needed ({self._reasons()})",
                hint="nothing was opened; bring the lost silos back and start another attempt",
            )
        self._asked = tuple(staying)
        return staying

    def _everyone(self, replied: dict[int, T]) -> dict[int, T]:
        """Replies of all who share the key, by index."""
        lost = {
            name: self._excluded[name]
            for name in map(self._roster.name, self._parts)
            if name in self._excluded
        }
        if lost:
            raise AbandonedError(
                f"{', '.join(sorted(lost))} lost in step {self._step.value} although the key needs "
                f"all its shares ({self._reasons()})",
                lost=lost,
                hint="nothing was opened; "
                + (
                    "try again with exactly these silos, or go on with the next round"
                    if self._step is Step.UNMASK
                    else "the others repeat under a fresh key"
                ),
            )
        return {index: replied[index] for index in self._parts}

    # What silos send ----------------------------------------------------------------------------

    def _on_part(self, index: int, part: m.KeyPart) -> None:
        self._check_signed(index, part)
        # Adversary: a silo that makes its key parts up after it saw the others'.
        found = m.key_commitment(self._header_digest, index, part.digests)
        if (
            part.commitments != self._commitments_digest
            or found != self._commitments[index].commitment
            or len(part.parts) != len(self._roster)
            or tuple(map(sha256, part.parts)) != part.digests
        ):
            self._blame(index, "revealed another key part than it committed to")
        for one in part.parts:
            self._check_polynomials(index, one, self._shape.keys)
        self._parts[index] = part

    def _on_upload(self, index: int, upload: m.CipherUpload) -> None:
        # Adversary: a silo or the network that replaces a ciphertext after the commitments were
        # shown; a flipped bit, which SEAL would decrypt to garbage without an error.
        digest = sha256(upload.first)
        seconds = m.polynomial_digests(upload.second, self._size)
        if m.cipher_root(self._key_id, index, digest, seconds) != self._sealed[index].root:
            self._blame(index, "uploaded another ciphertext than it committed to")
        self._accumulate(index, upload.first)
        self._check_polynomials(index, upload.second, self._shape.seconds)
        self._firsts[index], self._second_digests[index] = digest, seconds
        self._seconds[index] = upload.second

    def _on_verdict(self, index: int, verdict: m.Verdict) -> None:
        self._check_signed(index, verdict)
        if verdict.transcript != self._transcript:
            self._blame(index, "judged other ciphertexts")
        self._verdicts[index] = verdict

    def _on_partial(self, index: int, partial: m.Partial) -> None:
        self._check_signed(index, partial)
        if partial.transcript != self._transcript:
            self._blame(index, "decrypted another aggregate")
        self._accumulate(index, partial.share)

    def _open(self) -> None:
        members = tuple(self._parts)
        with Seal(self._ring) as seal:
            coefficients = seal.coefficients(self._sum)
        total = ckks_ring.decode(coefficients, self._ring, self._parameters.values, len(members))
        self._result = RoundResult(
            sum=total,
            survivors=tuple(self._roster.name(index) for index in members),
            dropouts=(),
            excluded=dict(self._excluded),
            header_digest=self._header_digest,
            transcript=self._transcript,
            agreements=self._signatures(),
        )
        self._forget()

    def _sealing(self) -> Sealing:
        return Sealing(
            key=self._key_id,
            roots={self._roster.name(i): (s.root, s.signature) for i, s in self._sealed.items()},
        )

    def _signatures(self) -> dict[str, bytes]:
        return {self._roster.name(i): verdict.signature for i, verdict in self._verdicts.items()}

    # Checks used by several steps ---------------------------------------------------------------

    # Adversary: an empty or short vector, which SEAL's loader would take for a valid one. The total
    # is spoilt then, and no longer needed: without this silo the attempt is abandoned.

    def _accumulate(self, index: int, data: bytes) -> None:
        try:
            ckks_ring.accumulate(self._sum, data, self._ring)
        except CryptoError as error:
            self._blame(index, f"sent malformed polynomials: {error}")

    def _check_polynomials(self, index: int, data: bytes, count: int) -> None:
        try:
            ckks_ring.unpack(data, self._ring, count)
        except CryptoError as error:
            self._blame(index, f"sent malformed polynomials: {error}")

    def _check_signed(self, index: int, message: Signed) -> None:
        # Adversary: a silo or the network that speaks for another silo, or replays a frame of
        # another round, run, study or attempt.
        if message.index != index or message.header != self._header_digest:
            self._blame(index, "sent a frame of another silo, round, study or global model")
        try:
            verify(self._roster.key(index), message.CONTEXT, message.signed(), message.signature)
        except CryptoError:
            self._blame(index, "sent a frame with a bad signature")

    def _blame(self, index: int, what: str) -> NoReturn:
        name = self._roster.name(index)
        self._excluded.setdefault(name, what)
        raise RemoteProtocolError(
            what, peer=name, hint="the silo's operator should compare study, model and version"
        ) from None


def _zeros(rows: int) -> Residues:
    return np.zeros((rows, DEGREE), dtype=np.uint64)
