"""Values that both sides derive from the study, each on its own, and never from each other."""

from __future__ import annotations

from collections.abc import Callable

from securefedcollm.aggregation import CKKS_SUITES, SUITE, RingParameters, Roster, RoundHeader
from securefedcollm.privacy.quantise import Quantiser
from securefedcollm.privacy.silo_unit import Setting, SiloUnit, calibrate_silo
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


def silo_unit(study: Study, update_size: Callable[[int], int], round_: int) -> SiloUnit | None:
    """The mechanism of ``round_`` in a study whose privacy unit is the silo.

    Args:
        update_size: length of the update of a round; they alternate between two at most, and one
            noise multiplier serves all rounds.

    Returns:
        None for a study of another unit, whose updates :func:`quantiser` takes as they are.

    Raises:
        ConfigError: the study's field has no room for the noise.
    """
    privacy = study.privacy
    if privacy is None or privacy.unit != "silo":
        return None
    largest = max(update_size(r) for r in range(min(2, study.rounds)))
    setting = Setting(largest, study.field.bound, study.quorum, study.silos.colluders)
    noise = calibrate_silo(privacy.epsilon, privacy.delta, study.rounds, setting)
    return SiloUnit(setting._replace(values=update_size(round_)), noise, privacy.clip_norm)
