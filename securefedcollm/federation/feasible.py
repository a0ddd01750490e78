"""What a study's privacy needs before a run can begin: enough records, and noise that keeps ε.

A run asks this of its records; ``study check`` asks the same of their number, before anyone trains.
Nothing here reads data or a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import counting, joint_step, silo_unit
from securefedcollm.federation.questions.polls import votes_of
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate, refuse_unpayable, unpayable
from securefedcollm.privacy.counting import too_many
from securefedcollm.privacy.events import Event, PoissonGaussian, repeat, times
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.study import Study

_calibrated = lru_cache(calibrate)  # silos of equal size in one process need it once


def local_rate(study: Study, units: int) -> float:
    """The rate at which a silo of ``units`` records (or subjects) takes each into a batch.

    Raises:
        ConfigError: fewer units than the expected batch.
    """
    batch = study.local.batch_size
    if study.local.sampling_rate is not None:  # joint DP-SGD: a silo by itself takes its own part
        batch = max(1, round(study.local.sampling_rate * units))
    if batch > units:
        raise ConfigError(
            f"an expected batch of {batch} needs as many {unit_name(study)}s, there are {units}",
            where="local.batch_size",
            hint=f"at most {units}; a tenth of it amplifies privacy well",
        )
    return batch / units


def local_event(study: Study, units: int) -> PoissonGaussian:
    """What one round of a silo's own DP-SGD releases, with the least noise that keeps the claim.

    Raises:
        ConfigError: fewer units than the expected batch, or no noise reaches the study's ε.
    """
    privacy, local = study.privacy, study.local
    if privacy is None:
        raise ValueError("a study without privacy plans no event")
    rate = local_rate(study, units)
    noise = _calibrated(privacy.epsilon, privacy.delta, rate, local.steps * study.rounds)
    return PoissonGaussian(q=rate, noise_multiplier=noise, steps=local.steps)


def refuse_joint_units(study: Study, units: int) -> None:
    """Refuse a silo with more units than all silos of a joint study should have together.

    Raises:
        ConfigError: names the rate.
    """
    assert study.local.sampling_rate is not None  # study.checks
    everybody = round(study.local.batch_size / study.local.sampling_rate)
    if units > everybody:
        raise ConfigError(
            f"this silo has {units} units, but batch_size / sampling_rate implies only "
            f"{everybody} across all silos",
            where="local.sampling_rate",
            hint=f"lower it to batch_size over all silos' units, or use {everybody} of them",
        )


def unit_name(study: Study) -> str:
    """``record`` or ``subject``: what a silo's own batch counts."""
    return "record" if study.subject is None else "subject"


def planned(study: Study, units: Sequence[int], values: int | None) -> Event | None:
    """Refuse what a run would refuse before its first round, and say what tuning will release.

    Args:
        units: records (or subjects) of each silo that is known; empty if none is.
        values: length of an update; None if it is not known. Then the plan is for the shortest,
            which is refused only if every other one is.

    Returns:
        all sums of tuning at worst, of the silo with the most noise. None: there is no noise to
        plan, or it follows from what is not known.

    Raises:
        ConfigError: a batch larger than a silo, a silo larger than all together, no noise that
            reaches the study's ε, or no room for it in the field.
    """
    privacy, asks = study.privacy, study.retrieval
    if asks is not None and asks.mode == "answers":
        votes_of(study, MOST_CHOICES)
    if study.validation is not None:
        counts = counting(study)
        for release in counts.events():
            _refuse_overspent(study, release, study.rounds)
        asked = round(study.validation.share * max(units, default=0))
        if asked > counts.most:
            raise too_many(asked, counts.most)
    if privacy is None:
        return None
    if privacy.unit == "silo":
        unit = silo_unit(study, lambda round_: values or 1, 0)
        assert unit is not None
        whole = _refuse_overspent(study, unit.event())
        return whole if values else None
    if study.joint:
        for count in units:
            refuse_joint_units(study, count)
        step = joint_step(study, values or 1)
        assert step is not None
        whole = _refuse_overspent(study, step.event())
        return whole if values else None
    slack = PoissonGaussian(1.0, 1.0, study.local.steps * study.rounds).slack
    refuse_unpayable(privacy.epsilon, TIGHT_SHARE * privacy.delta, slack)
    if not units:
        return None
    # The smallest silo takes the largest part of its records into a batch, under the most noise.
    return _refuse_overspent(study, local_event(study, min(units)))


def _refuse_overspent(study: Study, event: Event, sums: int | None = None) -> Event:
    """Refuse what no ledger would admit: ``event`` in every sum of the study, nothing before it.

    ``sums``: how many there are; by default those of tuning. Returns all of them as one.
    """
    privacy = study.privacy
    assert privacy is not None
    whole = repeat(event, times(event) * (sums or study.rounds * study.tuning_sums))
    spent = filter_within(
        (whole,), privacy.delta, privacy.epsilon, Terms(repeat(event, 1), privacy.epsilon)
    )
    if spent > privacy.epsilon:
        raise unpayable(privacy.epsilon, privacy.delta, whole.slack)
    return whole
