"""A cohort in memory whose key an authority holds, and a script between server and the others."""

from __future__ import annotations

import msgspec
from securefedcollm_audits.cohort import Cohort, MemoryJournal, recorded

from securefedcollm.aggregation import ckks_authority_messages as am
from securefedcollm.aggregation import ckks_messages as m
from securefedcollm.aggregation.ckks_authority import CkksAuthorityRound
from securefedcollm.aggregation.ckks_authority_coordinator import CkksAuthorityCoordinatorRound
from securefedcollm.aggregation.ckks_authority_silo import CkksAuthoritySiloRound
from securefedcollm.aggregation.header import AUTHORITY_SUITES, Authority
from securefedcollm.aggregation.messages import decode
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import SigningKey, sha256

from .ckks_cohort import Hook

NAME = "auditor"
KEY = SigningKey.generate(recorded("authority identity"))
AUTHORITY = Authority(NAME, KEY.public)


def cohort(silos: int = 4, *, values: int = 5000, kind="precise", **options) -> Cohort:
    made = Cohort(silos=silos, values=values, **options)
    made.header = msgspec.structs.replace(made.header, suite=AUTHORITY_SUITES[kind])
    made.journals[NAME] = MemoryJournal()
    return made


def silo(made: Cohort, name: str, header=None, vector=None) -> CkksAuthoritySiloRound:
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


def authority(made: Cohort, header=None, key=KEY) -> CkksAuthorityRound:
    return CkksAuthorityRound(
        header=header or made.header,
        roster=made.roster,
        signing_key=key,
        journal=made.journals[NAME],
    )


class Round:
    """One attempt under the honest coordinator, with a hook in either direction."""

    def __init__(self, made: Cohort, *, header=None) -> None:
        self.cohort = made
        header = header or made.header
        self.sides = {name: silo(made, name, header) for name in made.names}
        self.sides[NAME] = authority(made, header)
        self.coordinator = CkksAuthorityCoordinatorRound(
            header=header, roster=made.roster, authority=AUTHORITY
        )
        self.refused: dict[str, str] = {}
        self.received: dict[tuple[Step, str], bytes] = {}
        self.sent: dict[tuple[Step, str], bytes] = {}

    def play(self, request: Hook | None = None, reply: Hook | None = None):
        """To the end, or ProtocolError."""
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
        while self.coordinator.step is not step:
            self.exchange()
        return self

    def request(self) -> am.OpenRequest:
        """What the authority is about to be asked."""
        (frame,) = self.until(Step.UNMASK).coordinator.requests().values()
        return decode(am.OpenRequest, frame, "server", len(frame))


def deliveries(played: Round) -> dict[str, am.CipherDelivery]:
    """What the server holds of each silo after the upload."""
    return {
        name: msgspec.msgpack.decode(frame, type=am.CipherDelivery)
        for (step, name), frame in played.received.items()
        if step is Step.UPLOAD
    }


def sealed_of(played: Round) -> dict[str, m.Sealed]:
    return {
        name: msgspec.msgpack.decode(frame, type=m.Sealed)
        for (step, name), frame in played.received.items()
        if step is Step.ENCRYPT
    }
