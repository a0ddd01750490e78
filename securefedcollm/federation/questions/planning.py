"""What questions to records cost before anybody asks: noise on votes, and the lead it drowns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final

import msgspec
import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.federation.questions.polls import answers_of, claim_of, vote_setting
from securefedcollm.privacy.votes import MOST_CHOICES, Votes, calibrate_votes, mistaken
from securefedcollm.study import Study

_LEADS: Final = (1, 5, 20, 50, 100)
_WRONG: Final = (0.05, 0.01)


class AnswerPlan(msgspec.Struct, frozen=True):
    """What ``questions`` questions that all retrieve one record cost, and what votes survive it.

    ``noise_multiplier``: z, noise over the sensitivity, against the asker and the colluders.
    ``vote``: the sensitivity in votes, 1, or √2 for a silo's whole answer. ``sigma``: standard
    deviation of the noise on each choice's votes if all ``silos`` answer. ``lead_95``, ``lead_99``:
    the lead of one choice over another that noise reverses once in 20 times, or in 100.
    ``reversed``: lead in votes → the probability that noise reverses it.
    """

    questions: int
    epsilon: float
    delta: float
    reader: str
    silos: int
    noise_multiplier: float
    vote: float
    sigma: float
    lead_95: float
    lead_99: float
    reversed: dict[int, float]


def answer_plans(
    study: Study, questions: Sequence[int] = (), epsilon: Sequence[float] = ()
) -> list[AnswerPlan]:
    """A plan for every ε and number of questions; default: those of the study.

    Raises:
        ConfigError: the study asks no records, a number is not positive, or no noise reaches ε.
    """
    plan, (own, delta) = answers_of(study), claim_of(study)
    numbers = questions or [plan.questions]
    if min(numbers) < 1:
        raise ConfigError("at least one question", where="--questions", hint="e.g. 100")
    return [_plan(study, number, e, delta) for e in (epsilon or [own]) for number in numbers]


def _plan(study: Study, questions: int, epsilon: float, delta: float) -> AnswerPlan:
    setting = vote_setting(study)
    z = calibrate_votes(epsilon, delta, questions, setting)
    made = Votes(setting, z, MOST_CHOICES)
    sigma = made.read(np.zeros(MOST_CHOICES, dtype=np.int64), study.silos.count).sigma
    lead_95, lead_99 = (math.sqrt(2.0) * sigma * NormalDist().inv_cdf(1.0 - p) for p in _WRONG)
    return AnswerPlan(
        questions=questions,
        epsilon=epsilon,
        delta=delta,
        reader=answers_of(study).reader,
        silos=study.silos.count,
        noise_multiplier=z,
        vote=made.sensitivity / made.levels,
        sigma=sigma,
        lead_95=lead_95,
        lead_99=lead_99,
        reversed={lead: mistaken(lead, sigma) for lead in _LEADS},
    )
