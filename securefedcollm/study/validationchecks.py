"""What a private validation needs of the rest of a study. Every refusal names the key and the
fix."""

from __future__ import annotations

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Study


def check_validation(study: Study) -> None:
    """Refuse a validation that the study has no place for, and a choice by one that it has not.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    plan, privacy, keep = study.validation, study.privacy, study.keep
    if keep is not None and keep.metric == "private":
        _check_choice(study)
    if plan is None:
        return
    if study.task.kind == "own":
        raise ConfigError(
            "the silos train with their own code, which answers no questions",
            where="validation",
            hint="remove it, or choose a kind of task that this project trains",
        )
    # A silo as the unit has one vector: what is set aside and what is tuned on would be the same
    # unit, and pay for both sums.
    if privacy is not None and privacy.unit == "silo":
        raise ConfigError(
            "with unit: silo all records of a silo are one unit, and none can be set aside",
            where="validation",
            hint="remove it, or choose privacy.unit: record or subject",
        )
    if privacy is None and plan.noise_multiplier is not None:
        raise ConfigError(
            "a study without differential privacy has no noise",
            where="validation.noise_multiplier",
            hint="remove it, or give the study a privacy section",
        )


def _check_choice(study: Study) -> None:
    assert study.keep is not None
    if study.validation is None:
        raise ConfigError(
            "no record is set aside to choose a round by",
            where="keep.metric",
            hint="give validation, or choose metric: loss or accuracy, on public questions",
        )
    if study.keep.best != "slm":
        raise ConfigError(
            "silos answer with the small model, and do not have the large one",
            where="keep.best",
            hint="choose slm, or metric: loss or accuracy",
        )
