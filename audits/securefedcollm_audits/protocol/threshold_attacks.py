"""Attacks on threshold CKKS rounds by a server and a colluding silo that runs other code.

Nobody can see from a ciphertext or a key part that it is malformed. Below Δ, the opened sum gives
away the secrets that the colluder's polynomial is multiplied with. The question is whose secrets
these are.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import CKKS_SUITES, DEGREE
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.secrets import CkksSecrets, KeyShares
from securefedcollm.aggregation.ckks.threshold.coordinator import CkksCoordinatorRound
from securefedcollm.aggregation.ckks.threshold.silo import CkksSiloRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.primitives import sha256
from securefedcollm_audits.protocol import malformed
from securefedcollm_audits.protocol.cohort import Cohort, Vector, altered
from securefedcollm_audits.protocol.outcome import Outcome

VICTIM, COLLUDER = "silo-001", "silo-004"
_BOUND = 2**9 - 1
"""Values are up to 1, of this bound; a vector that is not opened looks 1,000 times as large."""


class _Round:
    """A round of four silos; ``prepare`` is the colluder's change to its parts."""

    def __init__(self, prepare: Callable[[_Round, CkksSecrets, KeyShares], None]) -> None:
        self.made = Cohort(silos=4, values=4 * DEGREE, bound=_BOUND)
        self.made.header = altered(self.made.header, suite=CKKS_SUITES["precise"])
        rng = np.random.default_rng(1)
        for vector in self.made.vectors.values():
            vector[:] = rng.integers(-1, 2, len(vector))
        self.ring, self.shape = m.ring_of(self.made.header), m.shape_of(self.made.header)
        self.bits = self.ring.scale_bits - 3
        sides = {name: self._silo(name) for name in self.made.names}
        secrets = sides[COLLUDER]._secrets
        assert secrets is not None
        prepare(self, secrets.own, secrets.shares)
        self.parts: dict[str, m.KeyPart] = {}
        self.uploads: dict[str, m.CipherUpload] = {}
        self.opened = np.zeros((self.shape.chunks, DEGREE), dtype=np.uint64)
        server = CkksCoordinatorRound(header=self.made.header, roster=self.made.roster)
        more = True
        while more:
            step = server.step
            for name, frame in server.requests().items():
                reply = sides[name].handle(frame)
                self._keep(step, name, reply)
                server.receive(name, reply)
            more = server.advance()

    def _silo(self, name: str) -> CkksSiloRound:
        made = self.made
        return CkksSiloRound(
            header=made.header,
            roster=made.roster,
            name=name,
            signing_key=made.keys[name],
            vector=made.vectors[name],
            vector_id=sha256(made.vectors[name].tobytes()),
            journal=made.journals[name],
        )

    def _keep(self, step: Step, name: str, frame: bytes) -> None:
        """The server's view, and the sum before it is rounded."""
        match step:
            case Step.SHARE:
                self.parts[name] = msgspec.msgpack.decode(frame, type=m.KeyPart)
            case Step.UPLOAD:
                self.uploads[name] = msgspec.msgpack.decode(frame, type=m.CipherUpload)
                polynomials.accumulate(self.opened, self.uploads[name].first, self.ring)
            case Step.UNMASK:
                share = msgspec.msgpack.decode(frame, type=m.Partial).share
                polynomials.accumulate(self.opened, share, self.ring)
            case _:
                pass

    def judge(self, attack: str, found: Vector, opened: Vector, defence: str) -> Outcome:
        """``found``: the values read out of the sum; ``opened``: the victim's vector by them."""
        vector = self.made.vectors[VICTIM]
        learnt = []
        if not 0 < np.abs(found).max() <= len(self.made.names):
            learnt.append("nothing: the attack itself went wrong")
        if np.abs(opened - vector).mean() < 1000 * np.abs(vector).mean():
            learnt.append(f"the vector of {VICTIM}")
        return Outcome(attack, tuple(learnt), defence, not learnt)


def threshold_malformed_ciphertext() -> Outcome:
    """Have a colluder upload a constant for its c1, read the joint secret that it is multiplied
    with out of the opened sum, and try it on the victim's ciphertext."""

    def prepare(played: _Round, secrets: CkksSecrets, shares: KeyShares) -> None:
        forged = malformed.upload(played.ring, played.shape, played.bits)

        def encrypt(joint: Residues) -> m.CipherUpload:
            secrets._upload = forged
            return forged

        secrets.encrypt = encrypt  # type: ignore[method-assign]

    played = _Round(prepare)
    ring, shape = played.ring, played.shape
    found = malformed.read_secrets(ring, shape, played.opened, played.bits)
    upload = played.uploads[VICTIM]
    opened = malformed.open_with(ring, shape, found, upload.first, upload.second)
    defence = "the secret that is read is of the colluder's own keys, and opens nobody else's"
    return played.judge("a constant for a ciphertext", found, opened, defence)


def threshold_malformed_key() -> Outcome:
    """Have a colluder give a constant for its part of the victim's keys, read the randomness u of
    the victim's ciphertext out of the opened sum, and take the keys times u off its c0."""
    victim = 0

    def prepare(played: _Round, secrets: CkksSecrets, shares: KeyShares) -> None:
        make, decrypt = shares.key_parts, shares.decrypt
        constant = np.full((played.shape.keys, DEGREE), 1 << played.bits, dtype=np.uint64)

        def key_parts() -> tuple[bytes, ...]:
            parts = list(make())
            parts[victim] = polynomials.pack(constant, played.ring)
            return tuple(parts)

        shares.key_parts = key_parts  # type: ignore[method-assign]
        shares.decrypt = lambda seconds: decrypt(  # type: ignore[method-assign]
            {index: second for index, second in seconds.items() if index != victim + 1}
        )

    played = _Round(prepare)
    ring, shape, members = played.ring, played.shape, (1, 2, 3, 4)
    low = malformed.read(ring, played.opened, played.bits).reshape(-1, shape.keys, DEGREE)
    found = np.rint(low.mean(axis=1)).astype(np.int64)  # u of every group
    mine = m.committee(members[-1], members, shape.committees)
    keys = np.zeros((shape.keys, DEGREE), dtype=np.uint64)
    for index, part in zip(members, played.parts.values(), strict=True):
        if m.committee(index, members, shape.committees) == mine:
            polynomials.accumulate(keys, part.parts[victim], ring)
    terms = [[(keys[at % shape.keys], -found[at // shape.keys])] for at in range(shape.chunks)]
    first = polynomials.unpack(played.uploads[VICTIM].first, ring, shape.chunks)
    opened = malformed.decode(ring, first, terms)
    defence = "the randomness that is read is of the colluder's committee; the others' hides the c0"
    return played.judge("a constant for a key part", found, opened, defence)


CASES = (threshold_malformed_ciphertext, threshold_malformed_key)
