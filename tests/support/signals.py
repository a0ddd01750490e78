"""What tests of classifiers of pictures and of recordings share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from securefedcollm_audits.privacy.coupling import PaddedRecords

import securefedcollm as sfc
from securefedcollm.study import Study, study_from_tree
from securefedcollm.tuning.adapters import layout_of, select
from securefedcollm.tuning.local import records_of
from securefedcollm.tuning.passes import Widths
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions

LABELS: Final = ("cat", "dog", "newt")
NAMED: Final = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {n: i for i, n in enumerate(LABELS)},
}
LOSS: Final = LossPlan(kind="answer", scoring=PLAIN, micro_batch=16)

TUNING: Final = {
    "steps": 2,
    "batch_size": 24,
    "sampling_rate": 0.2,
    "learning_rate": 0.01,
    "micro_batch": 16,
}
"""The silos' part of :func:`tiny_signal_study`."""


def tiny_signal_study(task: Mapping[str, Any], world: str, /, **changes: Any) -> Study:
    """A built-in ``world`` on the models ``slm`` and ``llm`` of a directory, with joint noise."""
    tree = {
        "study": "tiny",
        "seed": 3,
        "rounds": 1,
        "task": {**task, "data": {"builtin": world, "per_silo": 40, "max_test": 20}},
        "models": {"llm": {"source": "path:llm"}, "slm": {"source": "path:slm"}},
        "adapter": {"rank": 2},
        "silos": {"count": 3},
        "local": TUNING,
        "privacy": {"epsilon": 8, "delta": 1e-5, "noise": "distributed"},
        "aggregation": {"value_bits": 20, "clip_norm": 1.0},
        "distillation": {"steps": 2, "batch_labelled": 4, "batch_unlabelled": 8},
    }
    return study_from_tree(tree | changes)


def run_without_noise(tiny_study: Callable[..., Study], directory: Path) -> Any:
    """A run of ``tiny_study`` in ``directory / "run"``, which is quick. Quick starts have noise."""
    local = {"steps": 2, "batch_size": 8, "learning_rate": 0.01}
    study = tiny_study(directory, privacy=None, local=local)
    return sfc.simulate(study, out=directory / "run", data=directory, workers=0)


def gradients_and_control(
    model: Any, data: EncodedQuestions, control: type[EncodedQuestions]
) -> tuple[np.ndarray, np.ndarray]:
    """Each record's, by the product and from the same records as ``control``: [n, d]."""
    layout = layout_of(model, "ffa-lora")
    coupled = PaddedRecords(
        model,
        select(model, layout),
        control(**vars(data)),
        loss="answer",
        scoring=PLAIN,
        widths=Widths(1, 16),
    )
    found = []
    for records in (records_of(model, layout, data, LOSS), coupled):
        out = np.zeros((len(data), layout.size))
        for rows, gradients in records.of_records(np.arange(len(data))):
            out[rows] = torch.cat([gradient.flatten(1) for gradient in gradients], 1).numpy()
        found.append(out)
    return found[0], found[1]
