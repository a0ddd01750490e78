"""How much can the small model learn from the public prompts, and from whom?

    python -m benchmarks.student STUDY FILES --data DIR --states DIR --set KEY=VALUE …

STUDY names both models and how they are asked. FILES is what ``python -m benchmarks.questions``
wrote. The small model, with a fresh adapter each time, learns the public prompts from

``gold``: their right answers. No teacher can do better on these prompts in this many steps;
``soft``: the untuned large model's distribution over the choices, in the answers' place;
``hard``: its first choice;
``pooled``: what ``entropy-pooled`` makes of the large model and of the small one as it begins.

With ``--start ADAPTER`` the small model begins with that adapter, such as the one that an
experiment's row ``fedavg`` left in ``adapters/slm``.

Accuracy and the right answer's log-probability are those of the development split after every
epoch. No silo, no noise and no test question takes part. ``teacher`` has the scores of
the large model by itself, of the small one as it begins and of their pool on the public prompts,
and, with ``--develop-teacher``, those of the large one on the development split.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks._machine import machine
from securefedcollm.federation.dealing import read_records
from securefedcollm.federation.tuned import Tuned
from securefedcollm.study import Study, load_study
from securefedcollm.tuning.adapters import load_vector, select, to_vector
from securefedcollm.tuning.choice_distil import divergence, entropy_pooled, predict
from securefedcollm.tuning.kept_states import keeping_states
from securefedcollm.tuning.questions import (
    EncodedQuestions,
    choice_scores,
    shuffled_batches,
    sorted_by_length,
)
from securefedcollm.tuning.recipe import make_optimizer, training_mode


def learn(
    tuned: Tuned,
    prompts: EncodedQuestions,
    target: Tensor,
    development: EncodedQuestions,
    plan: argparse.Namespace,
) -> list[dict[str, float]]:
    """Teach ``target`` ([N, C]) to a fresh adapter; the development scores after each epoch."""
    found: list[dict[str, float]] = []
    rate, size = plan.learning_rate, plan.batch_size
    optimizer = make_optimizer("adam", select(tuned.model, tuned.broadcast_layout()), rate)
    batches = shuffled_batches(len(prompts), size, torch.Generator().manual_seed(plan.seed))
    steps = len(prompts) // size
    for epoch in range(plan.epochs):
        total, began = 0.0, time.perf_counter()
        with training_mode(tuned.model, seed=plan.seed + epoch):
            for _ in range(steps):
                batch = next(batches)
                for part in torch.split(sorted_by_length(prompts, batch), plan.micro_batch):
                    scores = choice_scores(tuned.model, prompts.select(part), tuned.scoring)
                    loss = divergence(target[part], scores, 1.0, "forward") / len(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.item() / steps
                optimizer.step()
                optimizer.zero_grad()
        score = tuned.answers(development).score()
        found.append(
            {
                "epoch": epoch + 1,
                "loss": total,
                "accuracy": score.accuracy,
                "gold_log_prob": score.gold_log_prob,
                "seconds": time.perf_counter() - began,
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr)
    return found


def teacher(study: Study, files: Path, plan: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The untuned large model's distributions over the prompts' choices, [N, C], and its scores."""
    assert study.models.llm is not None
    llm = Tuned.load(study, study.models.llm, data=plan.data)
    found: dict[str, Any] = {}
    names = ["public-answered"] + (["development"] if plan.develop_teacher else [])
    said = torch.empty(0)
    for name in reversed(names):  # the public prompts last: they are what it returns
        records = read_records(study, files / f"{name}.jsonl", private=False)
        encoded = llm.encode(records, public=True)
        said = predict(llm.model, encoded, scoring=llm.scoring)
        found[name] = scores_of(said, encoded.answers)
    return said, found


def scores_of(said: Tensor, answers: Tensor) -> dict[str, float]:
    """Accuracy, gold log-probability and mean entropy of predictions [N, C], in nats."""
    gold = said.gather(1, answers[:, None])[:, 0].log()
    return {
        "accuracy": (said.argmax(1) == answers).float().mean().item(),
        "gold_log_prob": gold.mean().item(),
        "entropy": torch.special.entr(said).sum(-1).mean().item(),
    }


def run(plan: argparse.Namespace) -> dict[str, Any]:
    """Every row, as plain values."""
    study = load_study(plan.study, plan.set)
    rows: dict[str, Any] = {}
    said, scores = torch.empty(0), {}
    if {"soft", "hard", "pooled"} & set(plan.rows):
        said, scores = teacher(study, plan.files, plan)
        print(json.dumps(scores), file=sys.stderr)
    slm = Tuned.load(study, study.models.slm, data=plan.data)
    if plan.start is not None:
        slm.load_adapter(plan.start)
    layout = slm.broadcast_layout()
    start = to_vector(slm.model, layout)
    prompts, development = (
        slm.encode(read_records(study, plan.files / f"{name}.jsonl", private=False))
        for name in ("public-answered", "development")
    )
    score = slm.answers(development).score()
    rows["start"] = {"accuracy": score.accuracy, "gold_log_prob": score.gold_log_prob}
    print(json.dumps(rows["start"]), file=sys.stderr)
    answers = prompts.answers
    choices = prompts.choice_mask.shape[1]
    targets = {"gold": F.one_hot(answers, choices).float()}
    if len(said):
        targets |= {"soft": said, "hard": F.one_hot(said.argmax(1), choices).float()}
        own = predict(slm.model, prompts, scoring=slm.scoring)
        targets["pooled"] = entropy_pooled(said, own, study.distillation.sharpness)
        scores |= {"start": scores_of(own, answers)}
        scores |= {"pooled": scores_of(targets["pooled"], answers)}
        print(json.dumps(scores), file=sys.stderr)
    for row in plan.rows:
        print(row, file=sys.stderr)
        load_vector(slm.model, layout, start)
        rows[row] = learn(slm, prompts, targets[row], development, plan)
    return {
        "machine": machine(),
        "study": study.tree,
        "learning_rate": plan.learning_rate,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "teacher": scores,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows as JSON; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--states", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", nargs="+", default=["gold", "soft", "hard"])
    parser.add_argument("--start", type=Path, metavar="ADAPTER")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--develop-teacher", action="store_true")
    plan = parser.parse_args(arguments)
    with keeping_states(plan.states, 40 * 10**9):
        print(json.dumps(run(plan), indent=2))


if __name__ == "__main__":
    main()
