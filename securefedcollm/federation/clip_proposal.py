"""A proposal for ``aggregation.clip_norm``: the norm of one update made from public rows.

A silo's own update would tell about its records, so nobody may choose a clip norm by it. Here the
small model is tuned once, as a silo does in a round, on rows that are public anyway: the study's
public questions or a file of public rows. Made-up answers do where theirs are not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import SiloTuning, by_unit
from securefedcollm.federation.dealing import deal, noisy_answers, read_public
from securefedcollm.federation.feasible import local_event
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study
from securefedcollm.tuning.question import Question

_ROOM: Final = 1.5
"""Silos' updates differ, and their records are not the public ones."""


class Proposal(NamedTuple):
    """What an update made from public rows says about the clip norm."""

    clip_norm: float
    """The proposed one."""
    norm: float
    """L2 norm of the update, the larger one where rounds alternate."""
    rows: int
    made_up: bool
    """Whether answers were made up."""

    def kept(self, clip_norm: float) -> float:
        """The part of such an update that a clip norm keeps, in (0, 1]."""
        return min(1.0, clip_norm / self.norm)


def propose_clip(
    study: Study,
    *,
    units: int | None,
    public: Path | None = None,
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Proposal:
    """Tune once on public rows and propose a clip norm that leaves such an update whole.

    Args:
        units: records (or subjects) of a silo: its noise follows from them.
        public: a file of public rows; None: those of the study.

    Raises:
        ConfigError: the study clips gradients and no updates, has no public rows, or its silos'
            records are not known.
    """
    if study.joint:
        raise ConfigError(
            "joint DP-SGD sums gradients, which privacy.clip_norm bounds; no update is clipped",
            where="aggregation.clip_norm",
            hint="leave --propose-clip out",
        )
    if by_unit(study) and units is None:
        raise ConfigError(
            "a silo's noise is a part of its update, and follows from how many records it has",
            where="--propose-clip",
            hint="give --records N",
        )
    questions, made_up = _with_answers(study, _public_rows(study, public, data))
    norm = _update_norm(study, questions, units or 0, data, device, progress)
    # Distributed noise grows with the clip norm, so there is no room to spare for it.
    silo = study.privacy is not None and study.privacy.unit == "silo"
    return Proposal(_rounded_up(norm if silo else _ROOM * norm), norm, len(questions), made_up)


def _public_rows(study: Study, public: Path | None, data: Path | None) -> Sequence[Question]:
    if public is not None:
        return read_public(study, public)
    spec = study.task.data
    found: Sequence[Question] = ()
    if spec.builtin or (spec.train is not None and spec.public):
        found = deal(study, data).public
    if not found:
        raise ConfigError(
            "the study has no public rows to tune on",
            where="--public",
            hint="give a file of rows that are public: --public FILE",
        )
    return found


def _with_answers(study: Study, questions: Sequence[Question]) -> tuple[tuple[Question, ...], bool]:
    """Those with answers if they fill a batch, else all, with made-up answers where none is."""
    answered = tuple(question for question in questions if question.answer is not None)
    open_ones = tuple(q for q in questions if q.answer is None and len(q.choices) > 1)
    if len(answered) >= study.local.batch_size or not open_ones:
        if not answered:
            raise ConfigError(
                "none of the public rows has an answer to tune on",
                where="--public",
                hint="give a file with answers: --public FILE",
            )
        return answered, False
    return answered + noisy_answers(open_ones, study.seed), True


def _update_norm(
    study: Study,
    questions: Sequence[Question],
    units: int,
    data: Path | None,
    device: str,
    progress: Progress,
) -> float:
    """Norm of a round's update. A smaller batch gets less noise, so a step has as much of it."""
    batch = min(study.local.batch_size, len(questions))
    planned, privacy = None, study.privacy
    if privacy is not None and by_unit(study):
        event = local_event(study, units)
        planned = PoissonGaussian(
            q=batch / len(questions),
            noise_multiplier=event.noise_multiplier * batch / study.local.batch_size,
            steps=event.steps,
        )
        privacy = msgspec.structs.replace(privacy, unit="record", subject=None)
    shaped = msgspec.structs.replace(
        study,
        privacy=privacy,
        validation=None,
        local=msgspec.structs.replace(study.local, batch_size=batch),
    )
    silo = SiloTuning(
        shaped,
        "public",
        [replace(question, subject=None) for question in questions],
        data=data,
        device=device,
        planned=planned,
    )
    adapter = silo.adapter()
    rounds = range(min(2 if study.adapter.method == "rolora" else 1, study.rounds))
    return max(float(np.linalg.norm(silo.fit(adapter, r, progress))) for r in rounds)


def _rounded_up(value: float) -> float:
    """Two significant digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")
