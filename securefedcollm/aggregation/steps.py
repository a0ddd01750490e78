"""The steps of a round and the tables of transitions that both sides follow.

The state diagram in ``docs/protocol.md`` is generated from :data:`TRANSITIONS`.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, NamedTuple

SchemeName = Literal["masking", "masking-graph", "ckks", "ckks-authority"]
"""The protocols that a sum can be made with."""


class Step(Enum):
    """Where a round stands; a silo's and the coordinator's agree unless one of them failed."""

    ADVERTISE = "advertise"
    DRAW = "draw"
    SHARE = "share"
    ENCRYPT = "encrypt"
    UPLOAD = "upload"
    AGREE = "agree"
    CHALLENGE = "challenge"
    UNMASK = "unmask"
    NOTE = "note"
    DONE = "done"
    FAILED = "failed"


class Transition(NamedTuple):
    """The server's request in a step, a silo's reply, and the step that follows.

    Anything else leads to :attr:`Step.FAILED`, for good: a silo goes there at the first frame that
    does not fit, the coordinator when too few silos are left.
    """

    request: str
    reply: str
    following: Step


TRANSITIONS: Final[dict[Step, Transition]] = {
    Step.ADVERTISE: Transition("Ask", "Advertise", Step.SHARE),
    Step.SHARE: Transition("Roll", "Deal", Step.UPLOAD),
    Step.UPLOAD: Transition("Delivery", "Upload", Step.AGREE),
    Step.AGREE: Transition("Survey", "Agreement", Step.UNMASK),
    Step.UNMASK: Transition("Opening", "Unmask", Step.DONE),
}
"""Masking, R0 to R4. ``DONE`` and ``FAILED`` have no way out."""

GRAPH_TRANSITIONS: Final[dict[Step, Transition]] = {
    Step.ADVERTISE: Transition("Ask", "Advertise", Step.DRAW),
    Step.DRAW: Transition("Members", "Draw", Step.SHARE),
    Step.SHARE: Transition("Neighbours", "Letters", Step.UPLOAD),
    Step.UPLOAD: Transition("Post", "Upload", Step.AGREE),
    Step.AGREE: Transition("Survivors", "Agreement", Step.CHALLENGE),
    Step.CHALLENGE: Transition("Tally", "Challenge", Step.UNMASK),
    Step.UNMASK: Transition("Proof", "Shares", Step.DONE),
}
"""Masking on a graph, G0 to G6."""

CKKS_TRANSITIONS: Final[dict[Step, Transition]] = {
    Step.ADVERTISE: Transition("Ask", "KeyCommitment", Step.SHARE),
    Step.SHARE: Transition("KeyCommitments", "KeyPart", Step.ENCRYPT),
    Step.ENCRYPT: Transition("KeyParts", "Sealed", Step.UPLOAD),
    Step.UPLOAD: Transition("SealedRoll", "CipherUpload", Step.AGREE),
    Step.AGREE: Transition("Pieces", "Verdict", Step.UNMASK),
    Step.UNMASK: Transition("Verdicts", "Partial", Step.DONE),
}
"""CKKS, K0 to K5."""

AUTHORITY_TRANSITIONS: Final[dict[Step, Transition]] = {
    Step.ADVERTISE: Transition("Ask", "AuthorityKeys", Step.ENCRYPT),
    Step.ENCRYPT: Transition("KeyOffer", "Sealed", Step.UPLOAD),
    Step.UPLOAD: Transition("SealedRoll", "CipherDelivery", Step.UNMASK),
    Step.UNMASK: Transition("OpenRequest", "Opened", Step.NOTE),
    Step.NOTE: Transition("Notice", "Noted", Step.DONE),
}
"""CKKS under an authority's key, A0 to A4: the authority answers the first and the fourth request,
the silos the others."""

STEPS: Final[dict[SchemeName, tuple[Step, ...]]] = {
    "masking": tuple(TRANSITIONS),
    "masking-graph": tuple(GRAPH_TRANSITIONS),
    "ckks": tuple(CKKS_TRANSITIONS),
    "ckks-authority": tuple(AUTHORITY_TRANSITIONS),
}
"""The exchanges of a round, in order."""

KEYHOLDER_STEPS: Final = (Step.ADVERTISE, Step.UNMASK)
"""Of the exchanges under an authority's key, those that the authority answers."""

SILO_STEPS: Final[dict[SchemeName, tuple[Step, ...]]] = STEPS | {
    "ckks-authority": tuple(s for s in AUTHORITY_TRANSITIONS if s not in KEYHOLDER_STEPS)
}
"""The exchanges that a silo answers, in order."""
