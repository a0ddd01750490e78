"""The cost of differential privacy in a silo's time, on the built-in SLM.

    python -m benchmarks.privacy_overhead --json

A step without privacy, the same step with its gradient taken record by record, and the whole step
of DP-SGD (Poisson sample, per-record gradients, clip, exact noise): same batch, same micro-batch,
one thread, in turn, so that other load on the machine affects all alike. ``isolation_ratio``
compares the DP-SGD step with one whose micro-batches are padded to their longest record: the price
of no record touching another's gradient. ``one_record_a_pass_ratio`` does the same where
every record goes by itself, output layer included. Times are medians of process CPU
time; ratios are medians over the repeats. Then it times one training round of one quickstart silo
with and without privacy, after encoding the records and loading the model. ``more_to_begin_s`` is
the time that privacy adds before: the test of independence, once per process, and the results of
the model's frozen part for each record by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from securefedcollm_audits.privacy.coupling import PaddedRecords
from torch import nn

from benchmarks._machine import machine
from securefedcollm.federation.cotuning import SiloTuning, planned_event
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study, load_study
from securefedcollm.tuning import local as local_module
from securefedcollm.tuning.adapters import to_vector
from securefedcollm.tuning.local import train_dp, train_plain
from securefedcollm.tuning.per_record import (
    per_record_gradients,
    question_losses,
    watched,
)
from securefedcollm.tuning.plans import LossPlan, Protection, TrainPlan
from securefedcollm.tuning.questions import EncodedQuestions, sorted_by_length
from securefedcollm.tuning.recipe import Progress, make_optimizer, training_mode

STEPS = 6
CLIP, NOISE = 1.0, 1.0

Run = Callable[[Progress], None]
"""Trains STEPS steps and calls back after each."""


def variants(study: Study, tuned: Tuned, batch: EncodedQuestions) -> dict[str, Run]:
    """The ways to train on all of ``batch`` in every step."""
    layout, local = tuned.update_layout(0), study.local

    def plan(micro_batch: int) -> TrainPlan:
        loss = LossPlan(kind=local.loss, scoring=tuned.scoring, micro_batch=micro_batch)
        return TrainPlan(steps=STEPS, batch_size=len(batch), learning_rate=1e-3, loss=loss)

    def plain(progress: Progress) -> None:
        train_plain(tuned.model, layout, batch, plan(local.micro_batch), seed=1, progress=progress)

    def private(progress: Progress, micro_batch: int = local.micro_batch) -> None:
        train_dp(
            tuned.model,
            layout,
            batch,
            plan(micro_batch),  # a sampling rate of 1: the batch of the others
            Protection(noise_multiplier=NOISE, clip_norm=CLIP),
            noise=NoiseSource(),
            progress=progress,
        )

    def per_record(progress: Progress) -> None:
        """The plain step, but with Σ of per-record gradients for its gradient."""
        parameters = [p for p in tuned.model.parameters() if p.requires_grad]
        descend = make_optimizer("adam", parameters, 1e-3)
        with training_mode(tuned.model, seed=1), watched(tuned.model) as calls:
            for step in range(STEPS):
                sums = [torch.zeros_like(p) for p in parameters]
                order = sorted_by_length(batch, torch.randperm(len(batch)))
                for rows in torch.split(order, local.micro_batch):
                    part = batch.select(rows)
                    losses = question_losses(tuned.model, part, local.loss, tuned.scoring)
                    found = per_record_gradients(losses / len(batch), parameters, calls)
                    for total, gradient in zip(sums, found, strict=True):
                        total += gradient.sum(0)
                for parameter, total in zip(parameters, sums, strict=True):
                    parameter.grad = total
                nn.utils.clip_grad_norm_(parameters, torch.inf)
                descend.step()
                progress(step + 1, STEPS, "")

    def padded(progress: Progress) -> None:
        """The step of DP-SGD in padded micro-batches: not private against a hostile adapter."""
        product, local_module.Records = local_module.Records, PaddedRecords  # type: ignore[misc]
        try:
            private(progress)
        finally:
            local_module.Records = product  # type: ignore[misc]

    def alone(progress: Progress) -> None:
        private(progress, micro_batch=1)

    return {
        "plain": plain,
        "per_record": per_record,
        "dp": private,  # before the padded one: the findings on independence are remembered
        "padded": padded,
        "alone": alone,
    }


def step_ms(run: Run) -> float:
    """Median CPU milliseconds of a step, without the first, which sets things up."""
    ends: list[float] = []
    run(lambda done, total, text: ends.append(time.process_time()))
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ends))


def silo_s(study: Study, data: Path | None) -> tuple[float, float]:
    """CPU seconds in which one silo of ``study`` gets ready, and trains one round."""
    name, records = next(iter(deal(study, data).silos.items()))
    start = time.process_time()
    silo = SiloTuning(study, name, records, data=data)
    ready = time.process_time()
    silo.fit(silo.adapter(), 0, silent)
    return ready - start, time.process_time() - ready


def rounds_of(study: Study, data: Path | None) -> dict[str, float]:
    """Getting ready and a round of one silo, with and without privacy."""
    if study.privacy is not None:  # calibration is done once a study, not once a round
        planned_event(study, next(iter(deal(study, data).silos.values())))
    bare = msgspec.structs.replace(study, privacy=None)
    silos = [(silo_s(bare, data), silo_s(study, data)) for _ in range(3)]
    rounds = [(plain[1], dp[1]) for plain, dp in silos]
    plain_round, dp_round = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "more_to_begin_s": round(statistics.median(dp[0] - plain[0] for plain, dp in silos), 2),
        "plain_round_s": round(plain_round, 2),
        "dp_round_s": round(dp_round, 2),
        "round_ratio": round(statistics.median(b / a for a, b in rounds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument(
        "--steps", action="store_true", help="only the steps: no round, and minutes less"
    )
    parser.add_argument("--data", type=Path, help="the directory of the study's files, if it has")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study(asked.config, [])

    tuned = Tuned.load(study, study.models.slm, data=asked.data)
    records = next(iter(deal(study, asked.data).silos.values()))
    runs = variants(study, tuned, tuned.encode(records[: study.local.batch_size]))
    alone_ms = step_ms(runs.pop("alone"))  # once: it takes long
    for run in runs.values():
        step_ms(run)  # the first use of everything
    times = [{name: step_ms(run) for name, run in runs.items()} for _ in range(asked.repeats)]

    def median(name: str) -> float:
        return round(statistics.median(row[name] for row in times), 2)

    def ratio(name: str, to: str = "plain") -> float:
        return round(statistics.median(row[name] / row[to] for row in times), 3)

    result = {
        "benchmark": "privacy_overhead",
        "study": study.study,
        "batch": study.local.batch_size,
        "micro_batch": study.local.micro_batch,
        "adapter_values": len(to_vector(tuned.model, tuned.update_layout(0))),
        "plain_step_ms": median("plain"),
        "per_record_step_ms": median("per_record"),
        "padded_dp_step_ms": median("padded"),
        "dp_step_ms": median("dp"),
        "per_sample_gradient_ratio": ratio("per_record"),
        "dp_step_ratio": ratio("dp"),
        "isolation_ratio": ratio("dp", to="padded"),
        "one_record_a_pass_ratio": round(alone_ms / median("padded"), 2),
        **({} if asked.steps else rounds_of(study, asked.data)),
        "threads": 1,
        "machine": machine("torch", "numpy", "peft", "transformers"),
    }
    if asked.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        print(f"{key:26} {value}")


if __name__ == "__main__":
    main()
