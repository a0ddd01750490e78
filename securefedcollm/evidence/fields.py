"""What the entries of an evidence log are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from securefedcollm.aggregation.header import MAX_COHORT

Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
Short = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}(?!\n)$")]
Signature = Annotated[str, Meta(pattern=r"^[0-9a-f]{128}(?!\n)$")]
Who = Annotated[str, Meta(min_length=1, max_length=64)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Positive = Annotated[float, Meta(gt=0)]
Whole = Annotated[int, Meta(gt=-(2**53), lt=2**53)]
Names = Annotated[list[Who], Meta(max_length=MAX_COHORT)]


class Content(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", kw_only=True
):
    """Base of every kind of entry."""


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A participant as this log's keeper knew it: name, role, Ed25519 key."""

    name: Who
    role: Annotated[str, Meta(pattern=r"^(server|silo|authority)(?!\n)$")]
    key: Hex


class Slip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frame of a question without its polynomials: what its author signed, and the signature.

    It holds digests, a random number and a seed, and nothing of the question."""

    signed: Annotated[str, Meta(pattern=r"^([0-9a-f]{128}|[0-9a-f]{224})(?!\n)$")]
    signature: Signature
