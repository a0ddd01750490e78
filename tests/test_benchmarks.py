"""Benchmarks still play what they measure. No figure of theirs is asserted."""

from __future__ import annotations

from pathlib import Path

from benchmarks import engine, joint, vectors
from securefedcollm.study import load_study


def test_steps_of_joint_training_with_nothing_to_train() -> None:
    study = load_study("quickstart-joint", {"rounds": 1, "local.steps": 2})
    assert set(joint.overhead(study, 20)) == {"silo_ms", "silo_wall_ms", "protocol_ms"}


def test_rounds_in_processes_with_nothing_to_train(tmp_path: Path) -> None:
    found = engine.embedded(1000, tmp_path)
    assert found["bytes_up_per_silo"] > 1000


def test_a_round_of_a_long_vector_in_processes_of_its_own(tmp_path: Path) -> None:
    found = vectors.measure(100_000, 3, tmp_path)
    assert found["upload_mb"] > 0.26
    assert found["silo_peak_mb"] > 0.4  # the vector itself, at the least
