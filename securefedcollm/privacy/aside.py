"""Which of a silo's units are set aside for validation, and samples without them.

A unit, a record or a subject, is set aside if an HMAC of its identity, under a key of this silo and
this study, falls below the share. So its part follows from the unit and the key alone: no other
record moves it, nobody outside can compute it, and the next study draws afresh. The key follows
from the key beside the silo's ledger, so it is the same after a kill, and for every run.

Two records with the same words have one identity, as in the ledger, and share a part.

Adversary: the author of studies, who has the parts drawn again until a record of interest lies
where it is wanted. A record pays for every study, whichever part it is in; and which part that is,
no one learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from securefedcollm.primitives import hmac_sha256, sha256
from securefedcollm.privacy.noise import NoiseSource

_UNIT: Final = b"securefedcollm/validation/unit/v1\0"
_PART: Final = b"securefedcollm/validation/part/v1\0"
_STUDY: Final = b"securefedcollm/validation/study/v1\0"

Bools = npt.NDArray[np.bool_]


def part_key(ledger_key: bytes, study: bytes) -> bytes:
    """The key of a study's parts, 32 bytes, from the 32 secret bytes beside the silo's ledger."""
    return hmac_sha256(ledger_key, _PART + study)


def validation_of(study: str) -> str:
    """By which the ledger knows the validations of a study (digest, hex): as a study of its own."""
    return sha256(_STUDY, study.encode()).hex()


def apart(one: str, other: str) -> bool:
    """Whether two studies of a ledger are a study and its validations, whose units are disjoint."""
    return validation_of(one) == other or validation_of(other) == one


def set_aside(key: bytes, identities: Iterable[bytes], share: float) -> Bools:
    """Which units are set aside: bool [n]; each with probability ``share``, by itself."""
    below = int(share * 2.0**64)
    drawn = [
        int.from_bytes(hmac_sha256(key, _UNIT + unit)[:8], "big") < below for unit in identities
    ]
    return np.array(drawn, dtype=np.bool_)


class SparingNoise(NoiseSource):
    """A source whose Poisson samples leave out the units that are set aside.

    Every unit is drawn as without validation, at the same rate of the same number, and those of the
    other part are dropped. So neither rate nor number says how many are set aside, and a unit that
    is tuned on is drawn with probability q as ever.

    Args:
        aside: bool [units].
    """

    __slots__ = ("_aside",)

    def __init__(self, aside: Bools, key: bytes | None = None) -> None:
        super().__init__(key)
        self._aside = aside

    def poisson_batch(self, n_records: int, q: float) -> npt.NDArray[np.int64]:
        drawn = super().poisson_batch(n_records, q)
        return drawn[~self._aside[drawn]]


def owned(records: Sequence[bytes], units: Sequence[npt.NDArray[np.int64]] | None) -> list[bytes]:
    """The identity of every unit: of its own record, or of its subject's first.

    Args:
        records: the identity of every record; where subjects are the units, its subject's.
        units: the records of every unit; None: each record is one.
    """
    return list(records) if units is None else [records[unit[0]] for unit in units]
