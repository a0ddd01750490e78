"""A CKKS cohort in memory whose key an authority holds; the attacker plays the server.

Silos and authority are the library's own; the server is its honest coordinator with a hook in
either direction, or whatever an attack makes of it.
"""

from __future__ import annotations

import msgspec

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.authority.coordinator import CkksAuthorityCoordinatorRound
from securefedcollm.aggregation.ckks.authority.keyholder import CkksAuthorityRound
from securefedcollm.aggregation.ckks.authority.silo import CkksAuthoritySiloRound
from securefedcollm.aggregation.ckks.parameters import AUTHORITY_SUITES, CkksSet
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm.aggregation.header import Authority, RoundHeader
from securefedcollm.aggregation.messages import Message, decode
from securefedcollm.aggregation.roles import RoundResult
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm_audits.protocol.cohort import Cohort, Hook, MemoryJournal, Vector, recorded

NAME = "auditor"
KEY = SigningKey.generate(recorded("authority identity"))
AUTHORITY = Authority(NAME, KEY.public)


def cohort(
    silos: int = 4, *, values: int = 5000, kind: CkksSet = "precise", bound: int = 1000
) -> Cohort:
    """Five thousand values: two chunks, the second one mostly padding."""
    made = Cohort(silos=silos, values=values, bound=bound)
    made.header = msgspec.structs.replace(made.header, suite=AUTHORITY_SUITES[kind])
    made.journals[NAME] = MemoryJournal()
    return made


def silo(
    made: Cohort, name: str, header: RoundHeader | None = None, vector: Vector | None = None
) -> CkksAuthoritySiloRound:
    """One silo at the start of an attempt."""
    vector = made.vectors[name] if vector is None else vector
    return CkksAuthoritySiloRound(
        header=header or made.header,
        roster=made.roster,
        authority=AUTHORITY,
        name=name,
        signing_key=made.keys[name],
        vector=vector,
        vector_id=sha256(vector.tobytes()),
        journal=made.journals[name],
    )


def authority(made: Cohort, header: RoundHeader | None = None) -> CkksAuthorityRound:
    """The authority at the start of an attempt."""
    return CkksAuthorityRound(
        header=header or made.header,
        roster=made.roster,
        signing_key=KEY,
        journal=made.journals[NAME],
    )


class Round:
    """One attempt under the honest coordinator, with a hook in either direction."""

    def __init__(self, made: Cohort, *, header: RoundHeader | None = None) -> None:
        self.cohort = made
        self.header = header = header or made.header
        self.sides: dict[str, CkksAuthoritySiloRound | CkksAuthorityRound] = {
            name: silo(made, name, header) for name in made.names
        }
        self.sides[NAME] = authority(made, header)
        self.coordinator = CkksAuthorityCoordinatorRound(
            header=header, roster=made.roster, authority=AUTHORITY
        )
        self.refused: dict[str, str] = {}
        self.received: dict[tuple[Step, str], bytes] = {}
        self.sent: dict[tuple[Step, str], bytes] = {}

    def play(self, request: Hook | None = None, reply: Hook | None = None) -> RoundResult:
        """Play to the end, or raise ProtocolError."""
        while self.exchange(request, reply):
            pass
        return self.coordinator.result

    def exchange(self, request: Hook | None = None, reply: Hook | None = None) -> bool:
        step = self.coordinator.step
        for name, made in self.coordinator.requests().items():
            frame = request(step, name, made) if request else made
            if frame is None:
                self.coordinator.lost(name, "request lost")
                continue
            self.sent[step, name] = frame
            try:
                answer = self.sides[name].handle(frame)
            except RemoteProtocolError as error:
                self.refused[name] = error.message
                self.coordinator.lost(name, error.message)
                continue
            self.received[step, name] = answer
            changed = reply(step, name, answer) if reply else answer
            if changed is None:
                self.coordinator.lost(name, "reply lost")
                continue
            try:
                self.coordinator.receive(name, changed)
            except RemoteProtocolError:
                continue  # it is named in coordinator.excluded
        return self.coordinator.advance()

    def until(self, step: Step) -> Round:
        """Play up to the beginning of ``step``."""
        while self.coordinator.step is not step:
            self.exchange()
        return self

    def request(self) -> am.OpenRequest:
        """An honest server's request to the authority, after the upload."""
        (frame,) = self.until(Step.UNMASK).coordinator.requests().values()
        return decode(am.OpenRequest, frame, "server", len(frame))

    def say(self, name: str, message: Message) -> bytes | None:
        """Send ``name`` a frame; None if it refuses, which ``refused`` keeps."""
        try:
            answer = self.sides[name].handle(message.encode())
        except RemoteProtocolError as error:
            self.refused[name] = error.message
            return None
        self.received[self.coordinator.step, name] = answer
        return answer

    @property
    def deliveries(self) -> dict[str, am.CipherDelivery]:
        """The server's data of each silo after the upload."""
        return {
            name: msgspec.msgpack.decode(frame, type=am.CipherDelivery)
            for (step, name), frame in self.received.items()
            if step is Step.UPLOAD
        }

    @property
    def opened(self) -> am.Opened | None:
        """The authority's answer, if there is one."""
        frame = self.received.get((Step.UNMASK, NAME))
        return None if frame is None else msgspec.msgpack.decode(frame, type=am.Opened)


def decrypt(made: Cohort, first: bytes, share: bytes) -> Vector:
    """The vector from the first polynomials of a ciphertext and a partial decryption."""
    ring, rows = m.ring_of(made.header), m.shape_of(made.header).chunks
    total = polynomials.unpack(first, ring, rows)
    polynomials.accumulate(total, share, ring)
    with Seal(ring) as seal:
        signed = polynomials.centred(seal.coefficients(total), ring)
    rounded = (signed + (1 << (ring.scale_bits - 1))) >> ring.scale_bits
    return rounded.reshape(-1)[: made.values]


def leaks(made: Cohort, *rounds: Round) -> list[str]:
    """The server's knowledge beyond one sum of one set of silos, from all frames that passed."""
    found = []
    shares = [opened for played in rounds if (opened := played.opened)]
    sets = {opened.statement.survivors for opened in shares}
    if len(sets) > 1:
        found.append(f"sums of {len(sets)} sets of silos")
    if any(len(members) < made.header.parameters.quorum for members in sets):
        found.append("a sum of fewer silos than a quorum")
    for opened in shares:
        for played in rounds:
            for name, delivery in played.deliveries.items():
                vector = decrypt(made, delivery.first, opened.share)
                if (vector == made.vectors[name]).mean() > 0.5:
                    found.append(f"the vector of {name}")
    return found
