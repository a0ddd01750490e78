"""The functions that pick each role's side of a scheme.

The two CKKS schemes need tenseal, so a scheme is imported only when a caller asks for a side of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from securefedcollm.aggregation.header import Authority, Roster, RoundHeader
from securefedcollm.aggregation.masking.packing import Bounded
from securefedcollm.aggregation.roles import AuthoritySide, CoordinatorSide, Journal, SiloSide
from securefedcollm.aggregation.steps import SchemeName
from securefedcollm.errors import LocalProtocolError
from securefedcollm.primitives import RandomSource, SigningKey

if TYPE_CHECKING:
    from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
    from securefedcollm.aggregation.masking.silo import SiloRound


def silo_side(
    scheme: SchemeName,
    *,
    header: RoundHeader,
    roster: Roster,
    name: str,
    signing_key: SigningKey,
    vector: Bounded,
    vector_id: bytes,
    journal: Journal,
    random: RandomSource = os.urandom,
    threads: int = 1,
    authority: Authority | None = None,
) -> SiloSide:
    """The silo's side of ``scheme``; the arguments are those of :class:`~.masking.silo.SiloRound`.

    ``authority``: who holds the key, for ``ckks-authority``.
    """
    match scheme:
        case "masking" | "masking-graph":
            return _masked(scheme)(
                header=header,
                roster=roster,
                name=name,
                signing_key=signing_key,
                vector=vector,
                vector_id=vector_id,
                journal=journal,
                random=random,
                threads=threads,
            )
        case "ckks":
            from securefedcollm.aggregation.ckks.threshold.silo import CkksSiloRound

            return CkksSiloRound(
                header=header,
                roster=roster,
                name=name,
                signing_key=signing_key,
                vector=vector.astype(np.int64, copy=False),
                vector_id=vector_id,
                journal=journal,
                random=random,
            )
        case "ckks-authority":
            from securefedcollm.aggregation.ckks.authority.silo import CkksAuthoritySiloRound

            return CkksAuthoritySiloRound(
                header=header,
                roster=roster,
                authority=_named(authority),
                name=name,
                signing_key=signing_key,
                vector=vector.astype(np.int64, copy=False),
                vector_id=vector_id,
                journal=journal,
                random=random,
            )


def coordinator_side(
    scheme: SchemeName,
    *,
    header: RoundHeader,
    roster: Roster,
    threads: int = 1,
    authority: Authority | None = None,
    narrow: bool = False,
) -> CoordinatorSide:
    """The server's side of ``scheme``; the arguments are those of ``CoordinatorRound``."""
    match scheme:
        case "masking":
            from securefedcollm.aggregation.masking.coordinator import CoordinatorRound

            return CoordinatorRound(header=header, roster=roster, threads=threads, narrow=narrow)
        case "masking-graph":
            from securefedcollm.aggregation.masking.graph.coordinator import GraphCoordinatorRound

            return GraphCoordinatorRound(
                header=header, roster=roster, threads=threads, narrow=narrow
            )
        case "ckks":
            from securefedcollm.aggregation.ckks.threshold.coordinator import CkksCoordinatorRound

            return CkksCoordinatorRound(header=header, roster=roster)
        case "ckks-authority":
            from securefedcollm.aggregation.ckks.authority.coordinator import (
                CkksAuthorityCoordinatorRound,
            )

            return CkksAuthorityCoordinatorRound(
                header=header, roster=roster, authority=_named(authority)
            )


def authority_side(
    *,
    header: RoundHeader,
    roster: Roster,
    signing_key: SigningKey,
    journal: Journal,
    random: RandomSource = os.urandom,
) -> AuthoritySide:
    """The key holder's side of ``ckks-authority``."""
    from securefedcollm.aggregation.ckks.authority.keyholder import CkksAuthorityRound

    return CkksAuthorityRound(
        header=header, roster=roster, signing_key=signing_key, journal=journal, random=random
    )


def _masked(scheme: SchemeName) -> type[SiloRound] | type[GraphSiloRound]:
    from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
    from securefedcollm.aggregation.masking.silo import SiloRound

    return SiloRound if scheme == "masking" else GraphSiloRound


def _named(authority: Authority | None) -> Authority:
    if authority is None:
        raise LocalProtocolError(
            "no authority is named, and its key is to be used",
            hint="take it from the study's roster",
        )
    return authority
