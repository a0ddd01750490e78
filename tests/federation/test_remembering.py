"""Rows of one comparison share what they would compute again; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.federation import cotuning
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.tuned import once, remembering
from securefedcollm.federation.workload import silent, usable_threads
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def test_the_result_not_asked_for_longest_is_made_again():
    made = []

    def make(key):
        return once(key, lambda: made.append(key) or key)

    make("a"), make("a")
    assert made == ["a", "a"]  # outside, nothing is kept
    with remembering(2):
        for key in "abacab":
            assert make(key) == key
    assert "".join(made[2:]) == "abcb"
    make("a")
    assert made[-1] == "a"


def test_a_round_is_tuned_once_a_start_and_leaves_the_same_model(inputs, monkeypatch):
    study = load_study(inputs / "tiny.yaml", ["privacy=none", "adapter.method=lora"])
    questions = deal(study, inputs).silos

    def silo(plan, name="silo-1"):
        return SiloTuning(plan, name, questions[name], data=inputs)

    tuned = []

    def counted(*args, **kwargs):
        tuned.append(kwargs["seed"])
        return train_plain(*args, **kwargs)

    train_plain = cotuning.train_plain
    monkeypatch.setattr(cotuning, "train_plain", counted)

    fresh = silo(study)
    start = fresh.adapter()
    wanted = fresh.fit(start, 0, silent)
    tuned.clear()
    with remembering(20):
        first, again = silo(study), silo(load_study(inputs / "tiny.yaml", [
            "privacy=none", "adapter.method=lora", "distillation.loss=none"
        ]))  # fmt: skip
        for workload in (first, again):
            assert np.array_equal(workload.fit(start, 0, silent), wanted)
            assert np.array_equal(workload.adapter(), fresh.adapter())
        assert len(tuned) == 1
        # Another start, round, silo or recipe is another result.
        others = [
            again.fit(start + np.float32(0.01), 0, silent),
            again.fit(start, 1, silent),
            silo(study, "silo-2").fit(start, 0, silent),
            silo(load_study(inputs / "tiny.yaml", [
                "privacy=none", "adapter.method=lora", "local.learning_rate=0.02"
            ])).fit(start, 0, silent),
        ]  # fmt: skip
        assert len(tuned) == 5
        assert not any(np.array_equal(other, wanted) for other in others)
        # Models made from one base do not meet.
        assert np.array_equal(first.adapter(), fresh.adapter())


def test_what_privacy_noises_is_never_taken_from_memory(inputs):
    study = load_study(inputs / "tiny.yaml", ["privacy.epsilon=8"])
    questions = deal(study, inputs).silos["silo-1"]
    with remembering(20):
        workload = SiloTuning(study, "silo-1", questions, data=inputs)
        start = workload.adapter()
        assert not np.array_equal(workload.fit(start, 0, silent), workload.fit(start, 0, silent))


@pytest.mark.parametrize(
    ("asked", "cores", "threads"), [("1", 4, 1), ("9", 4, 4), ("", 4, 4), (" 2,1", 4, 2)]
)
def test_omp_num_threads_limits_what_we_take(asked, cores, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert usable_threads() == threads
