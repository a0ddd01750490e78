"""The server's work between two sums, before it distils: the outer step, and central steps.

:class:`OuterStep` needs no torch. :class:`CentralSteps` imports it when it runs.

Adversary: none. Both work on opened means and public rows, so they are post-processing: no ε.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.federation.workload import Progress, Vector
from securefedcollm.study import Study
from securefedcollm.tuning.outer import Outer, OuterPlan

if TYPE_CHECKING:
    from securefedcollm.federation.tuned import Tuned
    from securefedcollm.tuning.question import Question

_MEMORY: Final = "outer/"
"""Prefix of the names of the outer optimiser's memory, among all that a server keeps."""


class OuterStep:
    """How an opened mean changes the global adapter: by the study's optimiser, or as it is."""

    def __init__(self, study: Study, *, plain: bool = False) -> None:
        """``plain``: leave the study's optimiser out, for a baseline."""
        given = study.server.outer if study.server and not plain else None
        self._most = study.adapter.max_abs
        self._outer = None
        self.norms: dict[str, float] = {}
        """L2 norms of the last mean and of the step that it became; empty without an optimiser."""
        if given is not None:
            self._outer = Outer(
                OuterPlan(
                    optimizer=given.optimizer,
                    learning_rate=given.learning_rate,
                    momentum=given.momentum,
                    beta2=given.beta2,
                    tau=given.tau,
                )
            )

    def take(self, part: str, point: Vector, mean: Vector) -> Vector:
        """The values after the mean update of ``point``; all three are float32 [d].

        Args:
            part: names which values of the adapter they are, the same in every round.

        Raises:
            TrainingError: the step leads to values that every silo would refuse.
        """
        if self._outer is None:
            return point + mean
        step = self._outer.step(part, mean)
        end: Vector = point + step
        self.norms = {
            "mean_norm": float(np.linalg.norm(mean)),
            "step_norm": float(np.linalg.norm(step)),
        }
        if not bool((np.abs(end) <= self._most).all()):  # a value that is no number is no less
            raise TrainingError(
                f"the outer step of norm {self.norms['step_norm']:.3g} leads to values above "
                f"adapter.max_abs ({self._most:g}), which silos refuse",
                hint="lower server.outer.learning_rate or server.outer.momentum",
            )
        return end

    def state(self) -> dict[str, Vector]:
        """Its memory, by names of its own."""
        found = self._outer.state() if self._outer else {}
        return {f"{_MEMORY}{name}": value for name, value in found.items()}

    def restore(self, state: Mapping[str, Vector]) -> dict[str, Vector]:
        """Continue from what :meth:`state` gave; returns the rest of ``state``.

        Raises:
            ValueError: it is another optimiser's.
        """
        own = {k.removeprefix(_MEMORY): v for k, v in state.items() if k.startswith(_MEMORY)}
        if self._outer is not None:
            self._outer.restore(own)
        return {name: value for name, value in state.items() if not name.startswith(_MEMORY)}


class CentralSteps:
    """The server's tuning of the global adapter on public rows (arXiv 2305.11414, algorithm 2)."""

    def __init__(self, study: Study, tuned: Tuned, public: Sequence[Question]) -> None:
        """
        Args:
            public: those with answers are tuned on.

        Raises:
            ConfigError: there are none.
        """
        assert study.server is not None
        assert study.server.central is not None
        answered = [question for question in public if question.answer is not None]
        if not answered:
            raise ConfigError(
                "no public row has its answer, so there is nothing to tune on",
                where="server.central",
                hint="give the server labelled rows (`--public`, task.data.public_labelled), or "
                "remove it",
            )
        self._study, self._plan, self._tuned = study, study.server.central, tuned
        self._rows = tuned.encode(answered, public=True)

    def run(self, round_: int, progress: Progress) -> dict[str, float]:
        """All steps of a round; returns the first and the last one's mean loss, in nats.

        Raises:
            TrainingError: the steps diverged.
        """
        from securefedcollm.federation.recipes import central_plan, training_seed
        from securefedcollm.tuning.local import train_public

        try:
            first, last = train_public(
                self._tuned.model,
                self._tuned.broadcast_layout(),
                self._rows,
                central_plan(self._study, self._plan, self._tuned.scoring, round_),
                seed=training_seed(self._study, "central", round_),
                progress=progress,
            )
        except TrainingError as error:
            raise TrainingError(
                f"server.central, round {round_ + 1}: {error.message}",
                hint="lower server.central.learning_rate",
            ) from None
        return {"first_loss": first, "last_loss": last}
