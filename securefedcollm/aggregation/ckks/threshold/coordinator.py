"""The server's side of one attempt at one round of threshold CKKS aggregation.

It relays, adds first polynomials (no key and no library needed for that), and fuses the members'
partial decryptions. The silos' safety does not rest on it (:mod:`~.ckks.threshold.silo`). It guards
the result, against malicious silos and the network: every frame is signed and bound to the round,
every ciphertext to the commitment before it, and a silo that breaks a rule is named.

The key is n-of-n: a silo that is lost once the key is made (after K1) takes the attempt with it.
The attempt is abandoned with :class:`~.roles.AbandonedError`, which names the lost silos; the
others repeat under a fresh key.
"""

from __future__ import annotations

from typing import TypeVar

from msgspec import structs

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks.round import CkksAttendedRound
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.messages import Ask, Message, decode, lists_digest
from securefedcollm.aggregation.roles import AbandonedError, RoundResult, Sealing, Transcript
from securefedcollm.aggregation.steps import CKKS_TRANSITIONS, Step
from securefedcollm.primitives import sha256

T = TypeVar("T")


class CkksCoordinatorRound(CkksAttendedRound):
    """Makes the requests, takes the replies, opens the sum.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum.
    """

    def __init__(self, *, header: RoundHeader, roster: Roster) -> None:
        super().__init__(header, roster, CKKS_TRANSITIONS)
        self._commitments: dict[int, m.KeyCommitment] = {}
        self._commitments_digest = b""
        self._parts: dict[int, m.KeyPart] = {}
        self._firsts: dict[int, bytes] = {}  # digests
        self._seconds: dict[int, bytes] = {}  # packed polynomials, relayed to all members
        self._second_digests: dict[int, bytes] = {}
        self._verdicts: dict[int, m.Verdict] = {}

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far; an agreement is the signature of a verdict."""
        agreed = self._step in {Step.UNMASK, Step.DONE}
        members = tuple(self._parts) if agreed else ()
        return Transcript(
            header=self._header_digest,
            delivery=self._transcript,
            lists=lists_digest(self._transcript, members, ()) if agreed else b"",
            survivors=self._names(members),
            agreements=self._signatures() if agreed else {},
            sealing=Sealing(self._key_id, self._roots()) if agreed else None,
        )

    def requests(self) -> dict[str, bytes]:
        """One frame for every silo that takes part in this step and has not replied yet."""
        self._check_running()
        waiting = self._waiting()
        if self._step in {Step.ENCRYPT, Step.AGREE}:
            make = self._key_parts if self._step is Step.ENCRYPT else self._pieces
            return {name: make(self._roster.index(name)).encode() for name in waiting}
        return dict.fromkeys(waiting, self._request().encode())

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

    def _take(self, name: str, frame: bytes | memoryview) -> None:
        shape, limit = self._shape, self._limit
        match self._step:
            case Step.ADVERTISE:
                commitment = decode(m.KeyCommitment, frame, name)
                index = self._check_signed(name, commitment)
                self._commitments[index] = commitment
            case Step.SHARE:
                most = limit(shape.keys * len(self._roster))
                self._on_part(name, decode(m.KeyPart, frame, name, most))
            case Step.ENCRYPT:
                self._on_sealed(name, frame)
            case Step.UPLOAD:
                most = limit(shape.chunks + shape.seconds)
                self._on_upload(name, decode(m.CipherUpload, frame, name, most))
            case Step.AGREE:
                self._on_verdict(name, decode(m.Verdict, frame, name))
            case _:
                self._on_partial(name, decode(m.Partial, frame, name, limit(shape.chunks)))

    def _close(self) -> None:
        match self._step:
            case Step.ADVERTISE:  # the key is not made yet: the round goes on without the others
                self._commitments = self._quorum(self._commitments)
                entries = tuple(self._commitments.values())
                self._commitments_digest = m.commitments_digest(self._header_digest, entries)
            case Step.SHARE:
                self._parts = self._quorum(self._parts)
                self._key_id = m.key_id(self._commitments_digest, tuple(self._parts.values()))
            case Step.ENCRYPT:
                self._sealed = self._everyone(self._sealed)
                self._commit()
                for part in self._parts.values():  # used, and the larger part of the memory
                    self._parts[part.index] = structs.replace(part, parts=())
            case Step.UPLOAD:
                self._seconds = self._everyone(self._seconds)
            case Step.AGREE:
                self._verdicts = self._everyone(self._verdicts)
                self._seconds.clear()
            case _:
                self._everyone(dict.fromkeys(self._parts, b""))
                self._open()

    def _forget(self) -> None:
        super()._forget()
        self._seconds.clear()

    def _everyone(self, replied: dict[int, T]) -> dict[int, T]:
        """Replies of all who share the key, by index."""
        lost = {
            name: self._excluded[name]
            for name in self._names(self._parts)
            if name in self._excluded
        }
        if lost:
            raise AbandonedError(
                f"{', '.join(sorted(lost))} lost in step {self._step.value} although the key needs "
                f"all its shares{self._reasons()}",
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

    def _on_part(self, name: str, part: m.KeyPart) -> None:
        index = self._check_signed(name, part)
        # Adversary: a silo that makes its key parts up after it saw the others'.
        found = m.key_commitment(self._header_digest, index, part.digests)
        if (
            part.commitments != self._commitments_digest
            or found != self._commitments[index].commitment
            or len(part.parts) != len(self._roster)
            or tuple(map(sha256, part.parts)) != part.digests
        ):
            self._blame(name, "revealed another key part than it committed to")
        for one in part.parts:
            self._check_polynomials(name, one, self._shape.keys)
        self._parts[index] = part

    def _on_upload(self, name: str, upload: m.CipherUpload) -> None:
        index = self._roster.index(name)
        digest, digests = self._add_ciphertext(
            index, upload.first, upload.second, self._shape.seconds
        )
        self._firsts[index], self._second_digests[index] = digest, digests
        self._seconds[index] = upload.second

    def _on_verdict(self, name: str, verdict: m.Verdict) -> None:
        index = self._check_signed(name, verdict)
        if verdict.transcript != self._transcript:
            self._blame(name, "judged other ciphertexts")
        self._verdicts[index] = verdict

    def _on_partial(self, name: str, partial: m.Partial) -> None:
        self._check_signed(name, partial)
        if partial.transcript != self._transcript:
            self._blame(name, "decrypted another aggregate")
        self._accumulate(name, partial.share)

    def _open(self) -> None:
        self._result = RoundResult(
            sum=self._decoded(len(self._parts)),
            survivors=self._names(self._parts),
            dropouts=(),
            excluded=dict(self._excluded),
            header_digest=self._header_digest,
            transcript=self._transcript,
            agreements=self._signatures(),
        )
        self._forget()

    def _signatures(self) -> dict[str, bytes]:
        return {self._roster.name(i): verdict.signature for i, verdict in self._verdicts.items()}
