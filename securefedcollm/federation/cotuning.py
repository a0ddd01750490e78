"""The real workloads: tuning and distillation of language models, as the round loops want them.

The silo's is here, the server's in :mod:`securefedcollm.federation.servertuning`. Both are built
from a study and data in the process that runs them. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.errors import ConfigError, DataError, LocalProtocolError
from securefedcollm.federation.feasible import local_event, local_rate, refuse_joint_units
from securefedcollm.federation.messages import adapter_bytes
from securefedcollm.federation.plan import counting
from securefedcollm.federation.recipes import (
    loss_plan,
    steps_of,
    train_plan,
    training_seed,
)
from securefedcollm.federation.servertuning import ServerTuning as ServerTuning
from securefedcollm.federation.tuned import Tuned, accuracies, once
from securefedcollm.federation.workload import Gradient, Progress, Vector, silent, usable_threads
from securefedcollm.primitives import sha256
from securefedcollm.privacy.aside import SparingNoise, owned, set_aside
from securefedcollm.privacy.counting import too_many
from securefedcollm.privacy.events import Event, PoissonGaussian
from securefedcollm.privacy.identities import Content
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study
from securefedcollm.study.config import Distillation
from securefedcollm.tuning.adapters import AdapterLayout, load_vector, to_vector
from securefedcollm.tuning.content import folded
from securefedcollm.tuning.evaluate import Evaluation
from securefedcollm.tuning.head import device_of
from securefedcollm.tuning.heldout import right_shares
from securefedcollm.tuning.independence import refuse_coupling
from securefedcollm.tuning.local import (
    check_records,
    members_of,
    records_of,
    sampled_gradients,
    train_dp,
    train_plain,
)
from securefedcollm.tuning.plans import Protection
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import dataset_fingerprint, record_content


class Holdings:
    """A silo's questions as its ledger and the parts of a study see them: without a model."""

    def __init__(self, study: Study, questions: Sequence[Question], *, alone: bool = False) -> None:
        """
        Args:
            alone: as :class:`SiloTuning`.

        Raises:
            DataError: the unit is the subject, and a question has none.
        """
        self._subjects = _subjects(study, questions)
        self._study = study
        self._questions = tuple(questions)
        self._aside: npt.NDArray[np.bool_] | None = None  # units
        self._whole = alone  # a silo that takes part in no sum tunes on all of its records
        self._units = count_units(study, questions)
        self.records = len(questions)
        plain = dataset_fingerprint([replace(q, subject=None) for q in questions])
        self.dataset = dataset_fingerprint(questions) if self._subjects else plain
        self.also: Sequence[str] = [plain] if self._subjects else []

    @property
    def questions(self) -> tuple[Question, ...]:
        return self._questions

    def contents(self) -> Iterator[Content]:
        return contents_of(self._questions)

    @property
    def _members(self) -> list[npt.NDArray[np.int64]] | None:
        return members_of(len(self._questions), self._subjects)

    def set_aside(self, key: bytes) -> None:
        plan, study = self._study.validation, self._study
        assert plan is not None
        names = [
            content.words if content.owner is None or not self._subjects else content.owner.encode()
            for content in self.contents()
        ]
        self._aside = set_aside(key, owned(names, self._members), plan.share)
        held, units, room = int(self._aside.sum()), len(self._aside), counting(study).most
        if not 0 < held < units:
            raise ConfigError(
                f"of {units} records or subjects a share of {plan.share:g} sets {held} aside",
                where="validation.share",
                hint="choose a share that leaves some for tuning and some to ask",
            )
        if held > room:
            raise too_many(held, room)

    def aside(self) -> npt.NDArray[np.bool_]:
        """Which records are set aside, bool [records]."""
        found, members = self._units_aside(), self._members
        if members is None:
            return found
        rows = np.zeros(len(self._questions), dtype=np.bool_)
        for unit in np.flatnonzero(found):
            rows[members[unit]] = True
        return rows

    def _units_aside(self) -> npt.NDArray[np.bool_]:
        """Which units are; none where the study sets none aside."""
        if self._aside is not None:
            return self._aside
        if self._study.validation is not None and not self._whole:  # our own mistake
            raise LocalProtocolError("the study sets records aside, and none was")
        return np.zeros(self._units, dtype=np.bool_)


class SiloTuning(Holdings):
    """Implements :class:`securefedcollm.federation.workload.SiloWorkload` with a real SLM."""

    def __init__(
        self,
        study: Study,
        name: str,
        questions: Sequence[Question],
        *,
        data: Path | None = None,
        device: str = "cpu",
        progress: Progress = silent,
        planned: PoissonGaussian | None = None,
        alone: bool = False,
    ) -> None:
        """
        Args:
            planned: :func:`planned_event` of these questions, where it is already known: a
                simulation's processes need not all work it out.
            alone: the silo takes part in no sum and keeps the study's ε by its own noise, also
                where the study has the silos noise their sum together.

        Raises:
            ConfigError: the silo has fewer units than the expected batch, or more than all silos
                should have together, or no noise reaches the study's ε.
            DataError: the unit is the subject, and a question has none.
        """
        super().__init__(study, questions, alone=alone)
        self._name = name
        self._tuned = self._load(data, device, progress)
        self._loss = loss_plan(study.local, self._tuned.scoring)
        if by_unit(study):
            refuse_coupling(self._tuned.model, "models.slm", study.task.max_tokens)
            check_records(self._tuned.model, self._loss)
        self._data = self._tuned.encode(questions, private=by_unit(study))
        self.base_digest = self._tuned.base_digest
        self._event: PoissonGaussian | None = None
        if study.privacy and (study.privacy.noise == "local" or (alone and study.joint)):
            self._event = planned or planned_event(study, questions)
            if self._event.q != sampling_rate(study, questions):
                raise ValueError("the planned event is one of other records")
        elif study.joint:
            refuse_joint_units(study, self._units)
        if by_unit(study):
            self._prove_independence()

    def _load(self, data: Path | None, device: str, progress: Progress) -> Tuned:
        """The model with a fresh adapter. Every use of it begins by loading an adapter."""
        model = self._study.models.slm
        return Tuned.load(self._study, model, data=data, device=device, progress=progress)

    def _prove_independence(self) -> None:
        """Finish the test of independence before anybody asks for anything.

        Adversary: the server, which times the first answer. The test takes time for every shape
        that occurs, so a record of a length of its own would show there, without any noise.
        """
        layouts = [self._tuned.update_layout(round_) for round_ in (0, 1)]
        for layout in {layout.digest: layout for layout in layouts}.values():
            records_of(self._tuned.model, layout, self._data, self._loss)

    def right_shares(self, adapter: Vector) -> npt.NDArray[np.float64]:
        load_vector(self._tuned.model, self._tuned.broadcast_layout(), adapter)
        rows = np.flatnonzero(self.aside())
        found = np.zeros(len(self._questions))
        found[rows] = right_shares(self._tuned.model, self._data, rows, self._tuned.scoring)
        members, units = self._members, np.flatnonzero(self._units_aside())
        if members is None:
            return found[units]
        return np.array([found[members[unit]].mean() for unit in units])

    def layout(self, round_: int) -> bytes:
        return self._tuned.layout_digest(round_)

    def size(self, round_: int) -> int:
        return self._tuned.broadcast_layout().size

    def update_size(self, round_: int) -> int:
        return self._tuned.update_layout(round_).size

    def events(self) -> tuple[Event, ...]:
        return () if self._event is None else (self._event,)

    def fit(self, adapter: Vector, round_: int, progress: Progress) -> Vector:
        load_vector(self._tuned.model, self._tuned.broadcast_layout(), adapter)
        layout = self._tuned.update_layout(round_)
        if self._event is None or self._study.privacy is None:
            return self._fit_plain(layout, adapter, round_, progress)
        result = train_dp(
            self._tuned.model,
            layout,
            self._data,
            train_plan(
                self._study,
                self._loss,
                round_,
                steps=self._study.local.steps,
                batch_size=round(self._event.q * self._units),
            ),
            Protection(
                noise_multiplier=self._event.noise_multiplier,
                clip_norm=self._study.privacy.clip_norm,
            ),
            noise=self._noise(),
            subjects=self._subjects,
            progress=progress,
        )
        if result.events != (self._event,):  # our own mistake: nothing may leave
            raise LocalProtocolError("the training was not the one that was charged")
        return result.delta

    def _fit_plain(
        self, layout: AdapterLayout, adapter: Vector, round_: int, progress: Progress
    ) -> Vector:
        """Without noise the result follows from start and seed: :func:`once` may have it."""
        local, model = self._study.local, self._tuned.model
        data, aside = self._data, self.aside()
        if aside.any():
            data = data.select(torch.from_numpy(np.flatnonzero(~aside)))
        plan = train_plan(
            self._study,
            self._loss,
            round_,
            steps=local.steps or steps_of(local, len(data)),
            batch_size=local.batch_size,
        )

        def tune() -> tuple[Vector, Vector]:
            delta = train_plain(
                model,
                layout,
                data,
                plan,
                seed=training_seed(self._study, self._name, round_),
                max_grad_norm=local.max_grad_norm,
                progress=progress,
            ).delta
            return delta, to_vector(model, layout)

        # All of the study except the server's phase, which no silo knows of.
        silos_part = msgspec.structs.replace(
            self._study, server=None, distillation=Distillation()
        ).digest
        place = (self.base_digest, str(device_of(model)))
        start = (
            silos_part,
            place,
            self._name,
            self._questions,
            aside.tobytes(),
            round_,
            sha256(adapter_bytes(adapter)),
        )
        delta, end = once(("fit", *start), tune)
        load_vector(model, layout, end)
        return delta

    def gradients(self, adapter: Vector, round_: int, q: float) -> Iterator[Gradient]:
        load_vector(self._tuned.model, self._tuned.broadcast_layout(), adapter)
        return sampled_gradients(
            self._tuned.model,
            self._tuned.update_layout(round_),
            self._data,
            self._loss,
            q=q,
            noise=self._noise(),
            subjects=self._subjects,
        )

    def _noise(self) -> NoiseSource:
        aside = self._units_aside()
        return SparingNoise(aside) if aside.any() else NoiseSource()

    def save(self, adapter: Vector, directory: Path, beside: Mapping[str, bytes]) -> None:
        load_vector(self._tuned.model, self._tuned.broadcast_layout(), adapter)
        self._tuned.save(directory, beside)

    def adapter(self) -> Vector:
        """The adapter as it is now: for a silo that tunes alone, without any exchange."""
        return to_vector(self._tuned.model, self._tuned.broadcast_layout())

    def answers(self, test: Sequence[Question]) -> Evaluation:
        """This silo's own model's answers to every test question."""
        return self._tuned.answers(self._tuned.encode(test))

    def evaluate(self, test: Sequence[Question]) -> dict[str, float]:
        """Accuracy of this silo's own model by group."""
        return accuracies(self._tuned, self._tuned.encode(test))


def by_unit(study: Study) -> bool:
    """Whether records or subjects are protected one by one, by clipping each one's gradient."""
    return study.privacy is not None and study.privacy.unit != "silo"


def _subjects(study: Study, questions: Sequence[Question]) -> list[str] | None:
    """Whose record each question is, if that is the unit."""
    if study.subject is None:
        return None
    subjects = [question.subject for question in questions]
    if None in subjects:
        raise DataError(
            f"{subjects.count(None)} of {len(subjects)} questions have no {study.subject}",
            where="privacy.subject",
            hint="every record needs its subject, or privacy.subject another column",
        )
    # As the ledger does: two spellings of one name are one person, who pays once.
    return [folded(str(subject)) for subject in subjects]


def contents_of(questions: Sequence[Question]) -> Iterator[Content]:
    """The contents by which the privacy ledger knows the questions."""
    return (
        Content(record_content(q), None if q.subject is None else folded(q.subject), q.row)
        for q in questions
    )


def sampling_rate(study: Study, questions: Sequence[Question]) -> float:
    """Rate at which a silo with these questions takes each record, or subject, into a batch.

    Raises:
        ConfigError: fewer units than the expected batch.
        DataError: the unit is the subject, and a question has none.
    """
    return local_rate(study, count_units(study, questions))


def count_units(study: Study, questions: Sequence[Question]) -> int:
    """How many privacy units a silo has: its subjects, if they are the unit, or its records.

    Raises:
        DataError: the unit is the subject, and a question has none.
    """
    subjects = _subjects(study, questions)
    return len(set(subjects)) if subjects else len(questions)


def planned_event(study: Study, questions: Sequence[Question]) -> PoissonGaussian:
    """What one round of a silo's own DP-SGD releases, with the least noise that keeps the claim.

    Raises:
        ConfigError: fewer units than the expected batch, or no noise reaches the study's ε.
        DataError: the unit is the subject, and a question has none.
    """
    return local_event(study, count_units(study, questions))


def set_threads(count: int | None) -> int:
    """How many threads torch may use in this process; None: :func:`.workload.usable_threads`."""
    torch.set_num_threads(max(1, usable_threads() if count is None else count))
    return torch.get_num_threads()
