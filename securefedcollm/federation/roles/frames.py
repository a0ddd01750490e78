"""The largest frame that makes sense: a longer one is refused before it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.federation.messages import MAX_FRAME
from securefedcollm.federation.workload import ServerWorkload
from securefedcollm.study import Study

if TYPE_CHECKING:
    from securefedcollm.federation.cotuning import SiloTuning

SLACK: Final = 64 << 20
"""Bytes of a frame without the adapter: lists and shares of 128 silos, proofs."""

LARGEST_TO_AUTHORITY: Final = 1 << 31
"""Bytes of a request: half a ciphertext of every silo."""


def largest_frame(study: Study, workload: SiloTuning) -> int:
    """Bytes of the largest request that a silo of this study can get."""
    return _largest(study, workload.size(0))


def largest_reply(study: Study, workload: ServerWorkload) -> int:
    """Bytes of the largest reply that a silo of this study can give.

    Adversary: a silo that announces a longer one, and makes the server wait for it.
    """
    values = max(workload.update_size(round_) for round_ in range(study.rounds))
    return min(MAX_FRAME, _largest(study, values))


def _largest(study: Study, values: int) -> int:
    """An adapter takes 4 bytes a value. Under a threshold key a silo is sent every silo's part of
    its keys, and then every silo's second polynomials; it sends as many for all committees."""
    ring = study.ring
    polynomials = 0
    if ring is not None:
        shape = ring.shape(values, study.silos.colluders)
        polynomials = study.silos.count * max(shape.keys, shape.groups)
    return SLACK + 32 * values + 8 * DEGREE * polynomials
