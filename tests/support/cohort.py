"""A CKKS cohort in memory, and a script that lets a test stand between server and silos."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import Cohort, MemoryJournal

from securefedcollm.aggregation import CKKS_TRANSITIONS
from securefedcollm.aggregation.ckks import messages as ckks_messages
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import CKKS_SUITES
from securefedcollm.aggregation.ckks.threshold.coordinator import CkksCoordinatorRound
from securefedcollm.aggregation.ckks.threshold.silo import CkksSiloRound
from securefedcollm.aggregation.messages import sign
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import ProtocolError, RemoteProtocolError
from securefedcollm.primitives import RandomSource, sha256

Hook = Callable[[Step, str, bytes], bytes | None]
"""Sees each frame on its way, and may alter or (None) drop it."""

STEPS = tuple(CKKS_TRANSITIONS)
REPLIES = {
    Step.ADVERTISE: ckks_messages.KeyCommitment,
    Step.SHARE: ckks_messages.KeyPart,
    Step.ENCRYPT: ckks_messages.Sealed,
    Step.UPLOAD: ckks_messages.CipherUpload,
    Step.AGREE: ckks_messages.Verdict,
    Step.UNMASK: ckks_messages.Partial,
}
REQUESTS = {
    Step.SHARE: ckks_messages.KeyCommitments,
    Step.ENCRYPT: ckks_messages.KeyParts,
    Step.UPLOAD: ckks_messages.SealedRoll,
    Step.AGREE: ckks_messages.Pieces,
    Step.UNMASK: ckks_messages.Verdicts,
}


def cohort(silos: int = 4, *, values: int = 5000, kind="precise", **options) -> Cohort:
    """Five thousand values: two chunks, the second one mostly padding."""
    made = Cohort(silos=silos, values=values, **options)
    made.header = msgspec.structs.replace(made.header, suite=CKKS_SUITES[kind])
    return made


def silo(
    made: Cohort, name: str, header=None, vector=None, random: RandomSource = os.urandom
) -> CkksSiloRound:
    """One silo at the start of an attempt."""
    vector = made.vectors[name] if vector is None else vector
    return CkksSiloRound(
        header=header or made.header,
        roster=made.roster,
        name=name,
        signing_key=made.keys[name],
        vector=vector,
        vector_id=sha256(vector.tobytes()),
        journal=made.journals[name],
        random=random,
    )


class FullJournal(MemoryJournal):
    """A journal that cannot be written any more once it is ``full``."""

    full = False

    def record(self, key: bytes, value: bytes) -> bytes:
        if self.full:
            raise OSError("no space left")
        return super().record(key, value)


class Round:
    """One attempt under the honest coordinator, with a hook in either direction."""

    def __init__(self, made: Cohort, *, header=None, silos=None) -> None:
        self.cohort = made
        header = header or made.header
        self.silos = silos or {name: silo(made, name, header) for name in made.names}
        self.coordinator = CkksCoordinatorRound(header=header, roster=made.roster)
        self.refused: dict[str, str] = {}
        self.shares: list[str] = []  # who decrypted anything
        self.received: dict[tuple[Step, str], bytes] = {}

    def play(self, request: Hook | None = None, reply: Hook | None = None):
        """To the end, or ProtocolError."""
        while self.exchange(request, reply):
            pass
        return self.coordinator.result

    def exchange(self, request: Hook | None = None, reply: Hook | None = None) -> bool:
        step = self.coordinator.step
        for name, sent in self.coordinator.requests().items():
            frame = request(step, name, sent) if request else sent
            if frame is None:
                self.coordinator.lost(name, "request lost")
                continue
            try:
                answer = self.silos[name].handle(frame)
            except RemoteProtocolError as error:
                self.refused[name] = error.message
                self.coordinator.lost(name, error.message)
                continue
            self.received[step, name] = answer
            if step is Step.UNMASK:
                self.shares.append(name)
            answer = reply(step, name, answer) if reply else answer
            if answer is None:
                self.coordinator.lost(name, "reply lost")
                continue
            try:
                self.coordinator.receive(name, answer)
            except RemoteProtocolError:
                continue  # it is named in coordinator.excluded
        return self.coordinator.advance()

    def until(self, step: Step) -> Round:
        while self.coordinator.step is not step:
            self.exchange()
        return self


def at(step: Step, who, change) -> Hook:
    """A hook that applies ``change`` to the frames of ``who`` (a name, or None: all) at a step."""

    def hook(now: Step, name: str, frame: bytes) -> bytes | None:
        return change(frame) if now is step and who in (None, name) else frame

    return hook


def fails(played: Round, **hooks: Hook) -> str:
    """Play to the end, which must not be a sum; returns why."""
    with pytest.raises(ProtocolError) as caught:
        played.play(**hooks)
    assert played.coordinator.step is Step.FAILED
    return caught.value.message


def attempt(made: Cohort, number: int = 1):
    """The header of another attempt at the same round."""
    return msgspec.structs.replace(made.header, attempt=number)


def sign_as(made: Cohort, name: str, message, **changes):
    """What a colluder signs: ``message`` with other content."""
    return sign(msgspec.structs.replace(message, **changes), made.keys[name])


def edit(kind, change, key=None):
    """Decode, change some fields, sign again if a key is given, encode."""

    def apply(frame: bytes) -> bytes:
        message = msgspec.msgpack.decode(frame, type=kind)
        message = msgspec.structs.replace(message, **change(message))
        return (sign(message, key) if key else message).encode()

    return apply


def flipped(data: bytes, at_byte: int = 100, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[at_byte] ^= 1 << bit
    return bytes(changed)


def opened(made: Cohort, ciphertext, shares) -> np.ndarray:
    """What an attacker decodes from a ciphertext's c0 and any shares: int64 coefficients / Δ."""
    from securefedcollm.aggregation.ckks.seal import Seal

    ring = ckks_messages.ring_of(made.header)
    rows = ckks_messages.shape_of(made.header).chunks
    total = polynomials.unpack(ciphertext, ring, rows)
    for share in shares:
        total = polynomials.add(total, polynomials.unpack(share, ring, rows), ring)
    with Seal(ring) as seal:
        coefficients = polynomials.centred(seal.coefficients(total), ring)
    return coefficients.reshape(-1)[: made.header.parameters.values] / 2.0**ring.scale_bits


def dropped(frame: bytes) -> None:
    """A change for :func:`at`: the frame is lost."""
