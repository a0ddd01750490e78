"""The sans-IO core: protected vectors go in, one opened sum comes out.

``aggregation`` sums integers within a declared bound and knows nothing of what they mean. It has no
sockets, files, clock or global randomness; the federation carries its frames and keeps its journal.
"""

from securefedcollm.aggregation.header import (
    CKKS_SUITES,
    SUITE,
    RingParameters,
    Roster,
    RoundHeader,
)
from securefedcollm.aggregation.scheme import (
    STEPS,
    AbandonedError,
    CoordinatorSide,
    Journal,
    RoundResult,
    SchemeName,
    SiloSide,
    Transcript,
    coordinator_side,
    silo_side,
)
from securefedcollm.aggregation.steps import CKKS_TRANSITIONS, TRANSITIONS, Step

__all__ = [
    "CKKS_SUITES",
    "CKKS_TRANSITIONS",
    "STEPS",
    "SUITE",
    "TRANSITIONS",
    "AbandonedError",
    "CoordinatorSide",
    "Journal",
    "RingParameters",
    "Roster",
    "RoundHeader",
    "RoundResult",
    "SchemeName",
    "SiloSide",
    "Step",
    "Transcript",
    "coordinator_side",
    "silo_side",
]
