"""The kinds of value that a study's keys have, and how a key carries its meaning.

A key's meaning is written next to its field (:func:`says`) and nowhere else: ``study keys``,
``study new``, ``study schema --json`` and ``docs/keys.md`` are all made from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}(?!\n)$")]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
Schedule = Literal["constant", "linear", "cosine"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mapping in the YAML file. Unknown keys are refused."""


def says(meaning: str, needed: str = "") -> Meta:
    """What a key means, in a sentence or two of plain English.

    Args:
        needed: when a key must be given although it has a default.
    """
    return Meta(description=meaning, extra={"needed": needed} if needed else None)
