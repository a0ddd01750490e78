"""Silos of one process tune one model, one after another: a model each would fill the memory.

What differs between them stays their own: records, adapter received, seed, noise, ledger, keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress
from securefedcollm.simulation.plan import SiloPlan
from securefedcollm.tuning.question import Question


class SharingSilo(SiloTuning):
    """A silo of a simulation. Its process asks no two of them at a time."""

    def __init__(
        self, plan: SiloPlan, name: str, questions: Sequence[Question], progress: Progress
    ) -> None:
        """Raises what the base class raises."""
        self._plan = plan
        super().__init__(
            plan.study,
            name,
            questions,
            data=plan.data,
            device=plan.device,
            progress=progress,
            planned=plan.planned[name],
        )

    def _load(self, data: Path | None, device: str, progress: Progress) -> Tuned:
        return self._plan.once(
            "tuned", lambda: super(SharingSilo, self)._load(data, device, progress)
        )
