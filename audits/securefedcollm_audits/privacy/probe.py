"""Canaries through DP-SGD inside a silo: a probe model whose records have orthogonal gradients.

The trainer is the product's own :func:`securefedcollm.tuning.local.train_dp`; only the model is
made for the purpose. Record i consists of one token, which the model maps to row i of its trainable
matrix and nothing else; so the record's gradient lies in that row, along one known direction, and
rows without a record hold noise alone. The gradient is far longer than C.

Imports torch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedConfig

from securefedcollm.federation.plan import quantiser
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study
from securefedcollm.tuning import local
from securefedcollm.tuning.adapters import AdapterLayout, load_vector
from securefedcollm.tuning.plans import LossPlan, Protection, TrainPlan
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm_audits.privacy.canaries import (
    LENGTH,
    CanaryScores,
    NoiseOf,
    Path,
    masked_sum,
    seats_of,
)
from securefedcollm_audits.protocol.cohort import Vector

_NAME = "base_model.0.lora_B.weight"
_VICTIM = "silo-001"
_WIDTH = 2  # of a row: one number for each of two possible answers


class Probe(nn.Module):
    """A "language model" of one token: logits = sharpness · B[:, token]."""

    def __init__(self, rows: int, sharpness: float) -> None:
        super().__init__()
        self.base_model = _Base(rows)
        self.sharpness = sharpness
        self.dtype = torch.float32
        self.config = PreTrainedConfig(num_hidden_layers=1)

    def get_output_embeddings(self) -> Any:
        return lambda hidden: self.sharpness * hidden


class _Base(nn.ModuleList):
    """One "decoder layer", whose matrix is what an adapter would be."""

    def __init__(self, rows: int) -> None:
        matrix = nn.Linear(rows, _WIDTH, bias=False)
        nn.init.zeros_(matrix.weight)
        super().__init__([nn.ModuleDict({"lora_B": matrix})])
        self._rows, self._matrix = rows, [matrix]  # in a list: registered once

    def forward(self, input_ids: Tensor, **unused: Any) -> Any:
        hot = F.one_hot(input_ids, self._rows).float()
        return SimpleNamespace(last_hidden_state=self._matrix[0](hot))


def local_path(
    study: Study,
    event: PoissonGaussian,
    units: int,
    *,
    length: float = LENGTH,
    masked: bool = True,
) -> Path:
    """DP-SGD steps of one silo with ``units`` records, then quantised, masked, summed, decoded.

    Readings are of all steps together: in one without a canary the noise is √steps as large.

    Args:
        event: the noise, the rate and the steps that are played.
        length: of a gradient in clip norms. Where there are several steps, it must be so short that
            no step makes the answer sure; then each has a gradient longer than C.
        masked: play the protocol's round; else the silo's own integers are taken, which are what is
            left of the sum without the other silos' (:func:`.canaries._opened`).
    """
    assert study.privacy is not None
    clip_norm, z, rows = study.privacy.clip_norm, event.noise_multiplier, 2 * units
    batch = max(1, round(event.q * units))
    values = rows * _WIDTH
    layout = AdapterLayout((_NAME,), ((_WIDTH, rows),))
    data = _records(units)
    # The step must not be cut off by the clip of the whole update, which is for its field only.
    expected = clip_norm * math.sqrt(event.steps * (values * z**2 + event.q * units))
    rate = batch * study.aggregation.clip_norm / (2.0 * expected)
    plan = TrainPlan(
        steps=event.steps,
        batch_size=batch,
        learning_rate=rate,
        optimizer="sgd",
        loss=LossPlan(micro_batch=study.local.micro_batch),
    )
    encoder = quantiser(study, values)
    model = Probe(rows, length * clip_norm * math.sqrt(2.0))

    def once(noise: NoiseOf) -> CanaryScores:
        load_vector(model, layout, np.zeros(values, dtype=np.float32))
        delta = local.train_dp(
            model,
            layout,
            data,
            plan,
            Protection(noise_multiplier=z, clip_norm=clip_norm),
            noise=noise(_VICTIM),
        ).delta
        total = encoder.encode(delta).integers
        if masked:
            total = _through_a_round(study, total)
        against, towards = encoder.decode(total, 1).astype(np.float64).reshape(_WIDTH, rows)
        # Every record's answer is the second: SGD moves its row along (−1, 1)/√2.
        seen = (towards - against) / math.sqrt(2.0) * batch / (rate * clip_norm)
        return CanaryScores(seen[:units], seen[units:])

    played = PoissonGaussian(q=batch / units, noise_multiplier=z, steps=event.steps)
    steps = "one DP-SGD step" if event.steps == 1 else f"{event.steps} DP-SGD steps"
    return Path(played, once, f"{steps} inside a silo, a unit being a record")


def _through_a_round(study: Study, integers: Vector) -> Vector:
    """One silo's integers as a server that knows all others' has them from the opened sum."""
    cohort = seats_of(study).cohort(len(integers), study.field.bound)
    cohort.vectors[_VICTIM] = integers
    return masked_sum(cohort, cohort.names) - cohort.plain_sum(cohort.names[1:])


def _records(units: int) -> EncodedQuestions:
    """Record i: the token i, and the second of two answers of one token each."""
    ones = torch.ones(units, 1, dtype=torch.int64)
    choices = torch.arange(_WIDTH).repeat(units, 1)
    return EncodedQuestions(
        tokens=torch.arange(units)[:, None],
        segments=torch.zeros(units, 1, dtype=torch.int8),
        positions=0 * ones,
        prompt_tokens=ones[:, 0],
        targets=choices,
        target_slots=0 * choices,
        target_choices=choices,
        choice_mask=torch.ones(units, _WIDTH, dtype=torch.bool),
        choice_lengths=torch.ones(units, _WIDTH),
        answers=ones[:, 0],
        groups=("",) * units,
    )
