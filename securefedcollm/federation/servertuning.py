"""The server's real workload: its models, the opened means, and its phase between two sums.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.recipes import distil_plan, pace_of, training_seed
from securefedcollm.federation.serverparts import CentralSteps, OuterStep
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, Vector, silent
from securefedcollm.study import Study
from securefedcollm.tuning.adapters import load_vector, to_vector
from securefedcollm.tuning.descent import Descent
from securefedcollm.tuning.distil import DistilStep, distil
from securefedcollm.tuning.evaluate import GroupScore
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm.tuning.vocabulary import vocabulary_of


class ServerTuning:
    """Implements :class:`securefedcollm.federation.workload.ServerWorkload` with real models."""

    def __init__(
        self,
        study: Study,
        *,
        public: Sequence[Question],
        test: Sequence[Question] = (),
        distillation: bool = True,
        data: Path | None = None,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        """``distillation=False`` makes this plain FedAvg, without any part of the server's phase.

        The LLM is then not even loaded.

        Raises:
            ConfigError: there are too few public questions for the study.
        """
        self._study = study
        place: dict[str, Any] = {"data": data, "device": device, "progress": progress}
        shown: dict[str, Any] = {"public": True, "progress": progress}
        self._slm = Tuned.load(study, study.models.slm, **place)
        self._tests = {"slm": self._slm.encode(test, **shown)} if test else {}
        self._llm: Tuned | None = None
        self._kept: dict[str, EncodedQuestions] = {}
        kept: Sequence[Question] = ()
        if study.keep is not None and study.keep.metric != "private" and distillation:
            public, kept = _validation(study, public)
            self._kept["slm"] = self._slm.encode(kept, **shown)
        self.base_digest = self._slm.base_digest
        self._descent = Descent(
            study.local.optimizer,
            study.local.learning_rate,
            pace_of(study, study.local, study.local.steps, 0),
        )
        self._outer = OuterStep(study, plain=not distillation)
        self._central: CentralSteps | None = None
        self._losses: dict[str, float] = {}
        if distillation and study.server is not None and study.server.central is not None:
            self._central = CentralSteps(study, self._slm, public)
        if distillation and study.models.llm is not None:
            self._llm = Tuned.load(study, study.models.llm, **place)
            self._tests |= {"llm": self._llm.encode(test, **shown)} if test else {}
            if kept:
                self._kept["llm"] = self._llm.encode(kept, **shown)
            over_tokens = study.distillation.over != "choices"
            self._vocabularies = (
                (vocabulary_of(self._llm.tokenizer), vocabulary_of(self._slm.tokenizer))
                if over_tokens
                else None
            )
            apart = (
                self._vocabularies is not None and self._vocabularies[0] != self._vocabularies[1]
            )
            self._llm_public = self._llm.encode(public, cuts=apart, **shown)
            self._slm_public = self._slm.encode(public, cuts=apart, **shown)

    def layout(self, round_: int) -> bytes:
        return self._slm.layout_digest(round_)

    def update_size(self, round_: int) -> int:
        return self._slm.update_layout(round_).size

    def adapter(self) -> Vector:
        return to_vector(self._slm.model, self._slm.broadcast_layout())

    def absorb(self, mean: Vector, round_: int) -> None:
        layout = self._slm.update_layout(round_)
        point = to_vector(self._slm.model, layout)
        load_vector(self._slm.model, layout, self._outer.take(layout.digest, point, mean))

    def descend(self, gradient: Vector, round_: int) -> None:
        layout = self._slm.update_layout(round_)
        point = to_vector(self._slm.model, layout)
        load_vector(self._slm.model, layout, self._descent.step(point, gradient))

    def descent(self) -> dict[str, Vector]:
        return {"adapter": self.adapter(), **self._descent.state(), **self._outer.state()}

    def restore_descent(self, state: Mapping[str, Vector]) -> None:
        load_vector(self._slm.model, self._slm.broadcast_layout(), state["adapter"])
        others = self._outer.restore(state)
        self._descent.restore({k: v for k, v in others.items() if k != "adapter"})

    def distil(self, round_: int, progress: Progress) -> dict[str, float]:
        if self._central is not None:
            self._losses = self._central.run(round_, progress)
        if self._llm is None:
            return {}
        steps: list[DistilStep] = []
        distil(
            (self._llm.model, self._slm.model),
            (self._llm.broadcast_layout(), self._slm.broadcast_layout()),
            (self._llm_public, self._slm_public),
            distil_plan(self._study, (self._llm.scoring, self._slm.scoring), round_),
            seed=training_seed(self._study, "server", round_),
            vocabularies=self._vocabularies,
            on_step=steps.append,
            progress=progress,
        )
        found: dict[str, float] = {}
        for name in ("llm", "slm"):
            every = (getattr(step, f"loss_{name}") for step in steps)
            losses = [loss for loss in every if loss is not None]
            found |= {f"first_loss_{name}": losses[0], f"last_loss_{name}": losses[-1]}
        return found

    def measure(self) -> dict[str, dict[str, float]]:
        scores = self._scores()
        found = {"evaluation": {key: score.accuracy for key, score in scores.items()}}
        perplexity = {k: s.perplexity for k, s in scores.items() if s.perplexity is not None}
        found |= {"perplexity": perplexity} if perplexity else {}
        found |= {"outer": self._outer.norms} if self._outer.norms else {}
        found |= {"central": self._losses} if self._losses else {}
        return found | ({"validation": self._validate()} if self._kept else {})

    def _validate(self) -> dict[str, float]:
        """Scores on the public questions that nothing was distilled from."""
        found: dict[str, float] = {}
        for name, tuned in self._models():
            score = tuned.answers(self._kept[name]).score()
            loss = max(0.0, -score.gold_log_prob)  # a rounded 0 is no gain
            found |= {f"{name}/loss": loss, f"{name}/accuracy": score.accuracy}
        return found

    def evaluate(self) -> dict[str, float]:
        """Only the accuracies."""
        return self.measure()["evaluation"]

    def _scores(self) -> dict[str, GroupScore]:
        tests = [(name, tuned, self._tests.get(name)) for name, tuned in self._models()]
        return {
            f"{name}/{group}": score
            for name, tuned, test in tests
            if test is not None
            for group, score in tuned.answers(test).by_group().items()
        }

    def save(self, directory: Path) -> None:
        for name, tuned in self._models():
            tuned.save(directory / name)

    def load(self, directory: Path) -> None:
        for name, tuned in self._models():
            tuned.load_adapter(directory / name)

    def _models(self) -> list[tuple[str, Tuned]]:
        models = [("slm", self._slm)]
        return models if self._llm is None else [*models, ("llm", self._llm)]


def _validation(
    study: Study, public: Sequence[Question]
) -> tuple[Sequence[Question], Sequence[Question]]:
    """The public questions to distil from, and ``keep.rows`` answered ones that are set aside.

    Raises:
        ConfigError: there are not enough of either.
    """
    assert study.keep is not None
    answered = [i for i, question in enumerate(public) if question.answer is not None]
    if len(answered) < study.keep.rows:
        raise ConfigError(
            f"{study.keep.rows} of {len(answered)} public questions with answers",
            where="keep.rows",
            hint="lower it, or give the server more (`--public`, task.data.public_labelled)",
        )
    draw = torch.Generator().manual_seed(training_seed(study, "keep", 0))
    order = torch.randperm(len(answered), generator=draw).tolist()
    taken = {answered[i] for i in order[: study.keep.rows]}
    rest = [question for i, question in enumerate(public) if i not in taken]
    if not rest and study.models.llm is not None:
        raise ConfigError(
            "all public questions are set aside for measuring, and none is left to distil from",
            where="keep.rows",
            hint="lower it, or give the server more (`--public`)",
        )
    return rest, [public[i] for i in sorted(taken)]
