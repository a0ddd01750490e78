"""One-run audit: a single training of a silo, with hundreds of canaries in its records.

Some of a silo's records become *canaries*: words drawn at random, with an answer drawn at random,
so that each pulls the adapter hard and its own way. A fair coin decides for each whether it is in
the data. Then the silo tunes as in the study, all rounds, by its own code. The attacker is the
server: it knows the base model, the adapter that it sent in every round, the update that came back,
and all canaries; it explains each update by the canaries' gradients (ridge regression), and scores
a canary by its coefficient.

Adversary of the claim under test: everybody who sees a silo's updates (``noise: local``). Imports
torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, Vector, silent
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Event
from securefedcollm.study import Study
from securefedcollm.tuning.adapters import load_vector, select
from securefedcollm.tuning.media import medium_of
from securefedcollm.tuning.per_record import per_record_gradients, question_losses, watched
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm_audits.privacy.finding import Finding, above_claim, power_of
from securefedcollm_audits.privacy.lower_bounds import Scores
from securefedcollm_audits.privacy.one_run_bounds import (
    Curve,
    Tally,
    curve_of,
    epsilon_lower_bound,
    gaussian_lower_bound,
    p_value,
    refutes_curve,
    tallies,
)

CANARIES: Final = 500
_PART: Final = 0.975
"""Confidence of each of two tests, so that both together are right with 95 %."""
_DELTAS: Final = (0.3, 0.1, 1e-2, 1e-3, 1e-4)
_MICRO_BATCH: Final = 64
_FACTORS: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
_TRIES: Final = 3


class Played(NamedTuple):
    """One training run: float64 [m] scores, bool [m] coins, and what was charged for it."""

    scores: Scores
    present: npt.NDArray[np.bool_]
    events: tuple[Event, ...]


def audit(
    study: Study,
    *,
    data: Path | None = None,
    canaries: int = CANARIES,
    seed: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Tune one silo of the study with canaries, and guess which were in.

    Args:
        data: directory of the study's files.
        canaries: how many; at most half of the silo's records.
        seed: of canaries and coins, to repeat them; noise is fresh in any case.

    Raises:
        ConfigError: the study's noise is not added inside a silo, or the silo has few records.
    """
    refuse_distributed(study, "one-run")
    played = train(study, data, canaries, seed, progress)
    return judge(study, "one-run", played, f"{study.rounds} rounds of one silo's own tuning")


def refuse_distributed(study: Study, audit_name: str) -> None:
    """
    Raises:
        ConfigError: single updates are never seen, so this attacker does not exist.
    """
    if study.privacy is not None and study.privacy.noise == "distributed":
        raise ConfigError(
            "in this study nobody sees one silo's updates: they are noised as a sum",
            where="privacy.noise",
            hint=f"`audit mechanism` attacks the sum; `audit {audit_name}` is for noise: local",
        )


def train(
    study: Study, data: Path | None, canaries: int, seed: int | None, progress: Progress
) -> Played:
    """The one run."""
    name = silo_names(study)[0]
    records = list(deal(study, data).silos[name])
    draw = random.Random(seed)  # noqa: S311 - chooses canaries; noise and keys are the product's
    draw.shuffle(records)
    count = fitting(canaries, len(records))
    made = random_questions(records, count, draw)
    present = np.array([draw.random() < 0.5 for _ in made])
    inside = [question for question, there in zip(made, present, strict=True) if there]
    inside = records[count:] + inside
    silo = SiloTuning(study, name, inside, data=data, progress=progress, alone=True)
    attacker = Tuned.load(study, study.models.slm, data=data)
    known = attacker.encode(made)
    adapter, scores = silo.adapter(), np.zeros(count)
    for round_ in range(study.rounds):
        update = silo.fit(adapter, round_, progress)
        gradients = _gradients(attacker, adapter, round_, known)
        scores -= _coefficients(gradients, update.astype(np.float64))
        adapter = silo.adapter()
    return Played(scores, present, tuple(silo.events()) * study.rounds)


def fitting(canaries: int, records: int) -> int:
    """As many canaries as asked for and as the records allow.

    Raises:
        ConfigError: too few records for any.
    """
    most = records // 2
    if min(canaries, most) < 10:
        raise ConfigError(
            f"{min(canaries, most)} canaries prove nothing",
            where="--canaries",
            hint=f"at least 10, and twice as many records; the silo has {records}",
        )
    return min(canaries, most)


def random_questions(
    records: Sequence[Question], count: int, draw: random.Random
) -> list[Question]:
    """``count`` questions shaped like the first records, of words drawn from all of them; or, where
    they are about pictures or recordings, about noise, with labels drawn as well."""
    if records[0].signal:
        return [_noise(question, number, draw) for number, question in enumerate(records[:count])]
    words = sorted(
        {word for q in records for text in (q.prompt, *q.choices) for word in text.split()}
    )

    def text(like: str) -> str:
        return " ".join(draw.choices(words, k=max(1, len(like.split()))))

    return [
        replace(
            question,
            prompt=text(question.prompt),
            choices=tuple(text(choice) for choice in question.choices),
            answer=draw.randrange(len(question.choices)),
            subject=alone(question, number),
        )
        for number, question in enumerate(records[:count])
    ]


def _noise(like: Question, number: int, draw: random.Random) -> Question:
    medium = medium_of(like.signal)
    return medium.question_of(
        medium.noise_like(like.signal, draw.randrange(2**63)),
        like.choices,
        draw.randrange(len(like.choices)),
        group=like.group,
        subject=alone(like, number),
    )


def alone(question: Question, number: int) -> str | None:
    """A canary is a unit by itself: where subjects are the units, it has one of its own."""
    return None if question.subject is None else f"canary {number}"


def _gradients(
    tuned: Tuned, adapter: Vector, round_: int, data: EncodedQuestions
) -> npt.NDArray[np.float64]:
    """Each question's gradient at ``adapter``, of length 1 each: float64 [m, d]."""
    load_vector(tuned.model, tuned.broadcast_layout(), adapter)
    study, found = tuned.study, []
    parameters = select(tuned.model, tuned.update_layout(round_))
    with watched(tuned.model) as calls:
        for rows in torch.split(torch.arange(len(data)), _MICRO_BATCH):
            batch = data.select(rows)
            losses = question_losses(tuned.model, batch, study.local.loss, tuned.scoring)
            parts = per_record_gradients(losses, parameters, calls)
            flat = torch.cat([p.reshape(len(rows), -1) for p in parts], dim=1)
            found.append(F.normalize(flat.double(), dim=1).numpy())
    return np.concatenate(found)


def _coefficients(gradients: npt.NDArray[np.float64], update: npt.NDArray[np.float64]) -> Scores:
    """``update`` as a sum of the gradients, by ridge regression; scaled to unit size."""
    products = gradients @ gradients.T + np.eye(len(gradients))
    found: Scores = np.asarray(np.linalg.solve(products, gradients @ update), dtype=np.float64)
    return np.divide(found, max(float(found.std()), 1e-30))


def judge(study: Study, name: str, played: Played, what: str) -> Finding:
    """Both tests of the claim, and the lower bounds."""
    found = tallies(played.scores, played.present)
    delta = study.privacy.delta if study.privacy else 1e-5
    bound = epsilon_lower_bound(found, delta, _PART)
    curved = gaussian_lower_bound(found, delta, _PART)
    claimed = claim(played.events, delta).epsilon if played.events else None
    faults, power, factor = above_claim(bound.epsilon, claimed), "", 0.0
    if claimed is not None:
        promised = curve_of((claim(played.events, d).epsilon, d) for d in (*_DELTAS, delta))
        if not faults and _too_rare(found, promised):
            faults.append("so many right guesses are too rare under the accountant's curve")

        def refuted(at: Played) -> bool:
            some = tallies(at.scores, at.present)
            return _above(some, claimed, delta) or _too_rare(some, promised)

        factor = _noticed(played, refuted)
        power = power_of(factor, "would at best")
    every = found[-1]
    return Finding(
        audit=name,
        study=study,
        setting=f"{what}, {len(played.scores)} canaries, {int(played.present.sum())} of them in",
        claimed=claimed,
        bound=bound.epsilon,
        delta=delta,
        faults=faults,
        figures={
            "canaries": float(len(played.scores)),
            "auc": auc(played.scores, played.present),
            "guesses": float(bound.tally.guesses),
            "right guesses": float(bound.tally.right),
            "right of all": every.right / every.guesses,
            "bound if the curve is Gaussian": curved.epsilon,
            "confidence": 0.95,
        }
        | ({"notices noise below": factor} if power else {}),
        power=power,
    )


def _above(found: Sequence[Tally], claimed: float, delta: float) -> bool:
    """Whether some tally refutes (``claimed``, ``delta``)."""
    error = (1.0 - _PART) / len(found)
    return any(p_value(tally, claimed, delta) <= error for tally in found)


def _too_rare(found: Sequence[Tally], promised: Curve) -> bool:
    error = (1.0 - _PART) / len(found)
    return any(refutes_curve(tally, promised, error) for tally in found)


def _noticed(played: Played, refuted: Callable[[Played], bool]) -> float:
    """The noise, over that charged, below which this attack would refute the claim; 0 if nowhere.

    Scores in and out are taken for normal and as far apart as the AUC says, and their spread for
    noise that shrinks with the mechanism's. Some of it is of other kinds and stays. So the true
    figure is this one or less.
    """
    apart = math.sqrt(2.0) * NormalDist().inv_cdf(
        min(max(auc(played.scores, played.present), 0.5), 1.0 - 1e-9)
    )
    draw = np.random.default_rng(len(played.scores))  # nothing private is hidden by it

    def mostly(factor: float) -> bool:
        wins = 0
        for _ in range(_TRIES):
            present = draw.random(len(played.scores)) < 0.5
            scores = draw.normal(size=len(present)) + present * apart / factor
            wins += refuted(Played(scores, present, played.events))
        return 2 * wins > _TRIES

    return next((factor for factor in _FACTORS if mostly(factor)), 0.0)


def auc(scores: Scores, present: npt.NDArray[np.bool_]) -> float:
    """Probability that a canary that is in scores above one that is not (ties count half)."""
    inside, outside = scores[present], np.sort(scores[~present])
    if not len(inside) or not len(outside):
        return 0.5
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2.0 * len(outside)))
