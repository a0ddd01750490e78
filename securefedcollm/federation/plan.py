"""Values that both sides derive from the study, each on its own, and never from each other."""

from __future__ import annotations

from securefedcollm.aggregation import CKKS_SUITES, SUITE, RingParameters, Roster, RoundHeader
from securefedcollm.privacy.quantise import Quantiser
from securefedcollm.study import Study, digest


def silo_names(study: Study) -> list[str]:
    """The silos' names: the roster's, or ``silo-1`` … for a simulation."""
    listed = sorted(p.name for p in study.roster if p.role == "silo")
    width = len(str(study.silos.count))
    return listed or [f"silo-{i + 1:0{width}d}" for i in range(study.silos.count)]


def round_header(
    study: Study,
    *,
    roster: Roster,
    run_id: bytes,
    round_: int,
    attempt: int,
    model: bytes,
    values: int,
) -> RoundHeader:
    """The header that every message of this aggregation is bound to."""
    field, plan = study.field, study.aggregation
    return RoundHeader(
        study_digest=digest(study),
        run_id=run_id,
        round=round_,
        attempt=attempt,
        model_digest=model,
        parameters=RingParameters(
            values=values,
            bound=field.bound,
            field_bits=field.bits,
            silos=study.silos.count,
            min_silos=study.minimum,
            threshold=study.threshold,
            colluders=study.silos.colluders,
        ),
        roster_root=roster.root,
        suite=CKKS_SUITES[plan.ckks] if plan.scheme == "ckks" else SUITE,
    )


def quantiser(study: Study, values: int) -> Quantiser:
    """Float update [values] → integers within the study's field, and back."""
    return Quantiser(values=values, clip_norm=study.aggregation.clip_norm, bound=study.field.bound)
