"""The chunked distillation loss against the plain one: memory, time, and the gradient.

    python -m benchmarks.distillation --json

Both get the same hidden states of a student and a teacher and both output layers (random, of the
sizes of SmolLM2-135M by default) and give cross-entropy plus KL with the gradient of the student's
hidden states. Plain: logits of all positions, ``log_softmax``, ``cross_entropy``, ``kl_div`` and
``backward``, as a training loop would write it. Memory is the peak of torch's own allocations above
what the inputs take, from its allocation records. Times are medians of process CPU time on one
thread. The two run in turn, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks._machine import machine
from securefedcollm.tuning.token_loss import CHUNK, Labels, Target, Teacher, chunked_loss

Step = Callable[[], Tensor]
"""Computes the loss and returns the gradient of the student's hidden states."""


def make_inputs(positions: int, vocabulary: int, width: int) -> dict[str, Tensor]:
    """Hidden states and output layers that give logits of a trained model's spread."""
    draw = torch.Generator().manual_seed(0)
    scale = 3.0 / width**0.5
    return {
        "student": torch.randn(positions, width, generator=draw),
        "student_head": torch.randn(vocabulary, width, generator=draw) * scale,
        "teacher": torch.randn(positions, width, generator=draw),
        "teacher_head": torch.randn(vocabulary, width, generator=draw) * scale,
        "gold": torch.randint(vocabulary, (positions,), generator=draw),
    }


def plain(given: dict[str, Tensor]) -> Tensor:
    """As a training loop would write it."""
    hidden = given["student"].clone().requires_grad_()
    logits = hidden @ given["student_head"].T
    with torch.no_grad():
        target = F.log_softmax(given["teacher"] @ given["teacher_head"].T, dim=-1)
    loss = F.cross_entropy(logits, given["gold"], reduction="mean")
    loss = loss + F.kl_div(
        F.log_softmax(logits, dim=-1), target, reduction="batchmean", log_target=True
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return hidden.grad


def chunked(given: dict[str, Tensor]) -> Tensor:
    """The project's loss."""
    hidden = given["student"].clone().requires_grad_()

    def says(where: slice) -> Target:
        return Target(F.log_softmax(given["teacher"][where] @ given["teacher_head"].T, dim=-1))

    loss = chunked_loss(
        hidden,
        lambda states: states @ given["student_head"].T,
        labels=Labels(gold=given["gold"], scale=1 / len(hidden)),
        teacher=Teacher(targets=says, scale=1 / len(hidden)),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return hidden.grad


def peak_mb(step: Step) -> float:
    """The most that torch held at once during ``step``, above what it held before, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most / 1e6


def in_turn(steps: list[Step], repeats: int) -> list[list[float]]:
    """CPU seconds of every step, taken in turn."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON (the only output there is)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(given.positions, given.vocabulary, given.width)
    steps: list[Step] = [lambda: plain(inputs), lambda: chunked(inputs)]
    expected, found = (step() for step in steps)
    peaks = [peak_mb(step) for step in steps]
    times = in_turn(steps, given.repeats)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    result = {
        "positions": given.positions,
        "vocabulary": given.vocabulary,
        "width": given.width,
        "chunk": CHUNK,
        "peak_mb": round(peaks[1], 1),
        "naive_peak_mb": round(peaks[0], 1),
        "peak_ratio": round(peaks[1] / peaks[0], 4),
        "cpu_s": round(statistics.median(times[1]), 4),
        "naive_cpu_s": round(statistics.median(times[0]), 4),
        "time_ratio": round(statistics.median(ratios), 4),
        "grad_rel_error": float((found - expected).norm() / expected.norm()),
        "machine": machine("torch"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
