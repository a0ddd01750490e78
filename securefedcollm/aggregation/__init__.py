"""The sans-IO core: protected vectors go in, one opened sum comes out.

``aggregation`` sums integers within a declared bound and does not know what they mean. It has no
sockets, files, clock or global randomness; the federation carries its frames and keeps its journal.
"""

from securefedcollm.aggregation.ckks.parameters import AUTHORITY_SUITES, CKKS_SUITES
from securefedcollm.aggregation.header import (
    SUITE,
    Authority,
    RingParameters,
    Roster,
    RoundHeader,
    attempt_scope,
    names_digest,
    round_scope,
)
from securefedcollm.aggregation.roles import (
    AbandonedError,
    AuthoritySide,
    CoordinatorSide,
    Journal,
    RoundResult,
    Sealing,
    SiloSide,
    Transcript,
    Word,
)
from securefedcollm.aggregation.scheme import authority_side, coordinator_side, silo_side
from securefedcollm.aggregation.steps import (
    AUTHORITY_TRANSITIONS,
    CKKS_TRANSITIONS,
    STEPS,
    TRANSITIONS,
    SchemeName,
    Step,
)

__all__ = [
    "AUTHORITY_SUITES",
    "AUTHORITY_TRANSITIONS",
    "CKKS_SUITES",
    "CKKS_TRANSITIONS",
    "STEPS",
    "SUITE",
    "TRANSITIONS",
    "AbandonedError",
    "Authority",
    "AuthoritySide",
    "CoordinatorSide",
    "Journal",
    "RingParameters",
    "Roster",
    "RoundHeader",
    "RoundResult",
    "SchemeName",
    "Sealing",
    "SiloSide",
    "Step",
    "Transcript",
    "Word",
    "attempt_scope",
    "authority_side",
    "coordinator_side",
    "names_digest",
    "round_scope",
    "silo_side",
]
