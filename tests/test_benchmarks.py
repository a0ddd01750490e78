"""Benchmarks still play what they measure. No figure of theirs is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine, forgetting, joint, vectors
from securefedcollm.study import load_study


def test_steps_of_joint_training_with_nothing_to_train() -> None:
    study = load_study("quickstart-joint", {"rounds": 1, "local.steps": 2})
    assert set(joint.overhead(study, 20)) == {"silo_ms", "silo_wall_ms", "protocol_ms"}


def test_rounds_in_processes_with_nothing_to_train(tmp_path: Path) -> None:
    found = engine.embedded(1000, tmp_path)
    assert found["bytes_up_per_silo"] > 1000


def test_what_is_forgotten_is_what_a_task_had_less_what_is_left() -> None:
    scores = [
        {"slm": {"general": 0.9, "private 1": a, "private 2": b, "private 3": c}}
        for a, b, c in ((0.2, 0.2, 0.2), (0.7, 0.2, 0.3), (0.5, 0.8, 0.3), (0.4, 0.6, 0.9))
    ]
    matrix, found = forgetting.figures(scores, "slm")
    assert matrix.shape == (4, 3)
    assert found == pytest.approx(
        {"at the end": 1.9 / 3, "general": 0.9, "learnt": 0.8, "forgotten": 0.25}
    )
    runs = {"naive": [scores, scores], forgetting.AT_ONCE: [scores[-1:], scores[-1:]]}
    lines = forgetting.show(runs, "slm").splitlines()
    assert "| naive | 80.0 (80.0 to 80.0) | 63.3 (63.3 to 63.3) | 25.0 (25.0 to 25.0) |" in lines[2]
    assert lines[-1] == "| all at once, at the end | 40.0 | 60.0 | 90.0 |"


def test_a_round_of_a_long_vector_in_processes_of_its_own(tmp_path: Path) -> None:
    found = vectors.measure(100_000, 3, tmp_path)
    assert found["upload_mb"] > 0.26
    assert found["silo_peak_mb"] > 0.4  # the vector itself, at the least
