"""One record among copies of another, at an adapter that a hostile server chose, to the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from securefedcollm_audits.privacy.coupling import (
    Bench,
    Case,
    PaddedRecords,
    audit,
    hostile_adapters,
)
from securefedcollm_audits.privacy.lower_bounds import audit_scores
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.plan import joint_step
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning import local
from securefedcollm.tuning.adapters import load_vector, select, to_vector
from securefedcollm.tuning.per_record import Records
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from tests.support.small import small_study

RELEASES, OTHERS = 400, 39
LONG = Question("w0 " + " ".join(f"w{i}" for i in range(1, 50)), ("w3", "w4", "w5", "w6"), 1)
COPIES = [Question("w0 w7", ("w1", "w2", "w3", "w4"), 0)] * OTHERS
NOBODY = Question("w0 w9", ("w1",), 0)
"""A question with one choice: its gradient is exactly zero, so it is the zeroed-out record."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("small")


def study_of(directory: Any, **changes: Any) -> Any:
    settings = {
        "rounds": 1,
        "local": {
            "steps": 1,
            "batch_size": OTHERS + 1,  # all of them: what is sampled would only blur the control
            "learning_rate": 1.0,
            "optimizer": "sgd",
            "loss": "choices",
            "micro_batch": 32,
        },
        "privacy": {"epsilon": 1, "delta": 1e-5},
    }
    return small_study(directory, **(settings | changes))


def visible(adapter: np.ndarray) -> np.ndarray:
    """Where an update can be read off: added to a huge value it would be rounded away."""
    return np.abs(adapter) < 1.0


def worst_adapter(study: Any, directory: Any) -> Any:
    tuned = Tuned.load(study, study.models.slm, data=directory)
    layout = tuned.broadcast_layout()
    bench = Bench(tuned, 1.0)
    found = []
    draw = np.random.default_rng(4)
    for adapter in hostile_adapters(to_vector(tuned.model, layout), layout, 60, None, draw):
        change = bench.moved(adapter, Case("copies", COPIES, [LONG]))
        found.append((float(np.linalg.norm(change[visible(adapter)])), len(found), adapter))
    moved, _, adapter = max(found)
    assert moved > 8  # clip norms: what padding would do to the others
    return adapter


Release = Callable[[bool], np.ndarray]


def proven(release: Release, direction: np.ndarray, count: int, delta: float) -> float:
    """Lower bound on ε (Clopper–Pearson, 95 %) from ``count`` releases with and without."""
    scores = [
        np.array([release(present) @ direction for _ in range(count)]) for present in (True, False)
    ]
    return float(audit_scores(*scores, delta).epsilon)


def difference(silos: dict[bool, SiloTuning], adapter: Any, records: Any) -> np.ndarray:
    """What the added record does to the sum of clipped gradients: the attacker's direction."""
    sums = []
    for silo in silos.values():
        tuned = silo._tuned
        load_vector(tuned.model, tuned.broadcast_layout(), adapter)  # a training moved it
        parameters = select(tuned.model, tuned.update_layout(0))
        path = records(tuned.model, parameters, silo._data)
        total = local.GridSum(tuned.update_layout(0).size, 1.0, 1.0, OTHERS + 1)
        local.sum_clipped(total, path, np.arange(OTHERS + 1))
        sums.append(total.integers.astype(np.float64))
    apart = sums[0] - sums[1]
    apart *= visible(adapter)
    return apart / max(np.linalg.norm(apart), 1.0)  # zero: a gradient that is not finite


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["local", "joint"])
def test_hundreds_of_releases_at_a_hostile_adapter_prove_no_more_than_is_claimed(
    directory: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adversary: a server that knows all records but one and chose the adapter. The control is the
    same training with padded batches: there it proves several times the claim."""
    changes = {}
    if mode == "joint":
        changes["privacy"] = {"epsilon": 1, "delta": 1e-5, "noise": "distributed"}
        changes["local"] = {
            "steps": 1,
            "batch_size": 3 * (OTHERS + 1),
            "sampling_rate": 1.0,
            "learning_rate": 1.0,
            "loss": "choices",
            "micro_batch": 32,
        }
    study = study_of(directory, **changes)
    adapter = worst_adapter(study, directory)
    silos = {
        present: SiloTuning(study, "silo-1", [*COPIES, LONG if present else NOBODY], data=directory)
        for present in (True, False)
    }
    values = silos[True].update_size(0)
    step = joint_step(study, values)
    quiet = [] if step is None else [step] * (study.quorum - study.silos.colluders - 1)

    def release(present: bool) -> np.ndarray:
        silo = silos[present]
        if step is None:
            return -silo.fit(adapter, 0, silent).astype(np.float64)
        total = step.protect(silo.gradients(adapter, 0, step.sampling_rate), NoiseSource())
        for other in quiet:  # honest silos without a record in this step: their noise counts
            total += other.protect([], NoiseSource())
        return total.astype(np.float64)

    release(True)  # loads the adapter, and tests the passes

    def real(model: Any, parameters: Any, data: Any) -> Records:
        return local.records_of(
            model,
            silos[True]._tuned.update_layout(0),
            data,
            LossPlan(kind="choices", scoring=silos[True]._tuned.scoring, micro_batch=32),
        )

    def padded(model: Any, parameters: Any, data: Any) -> Records:
        ready = real(model, parameters, data)
        return PaddedRecords(
            model,
            parameters,
            data,
            loss="choices",
            scoring=silos[True]._tuned.scoring,
            widths=ready._widths,
        )

    for silo in silos.values():
        release(silo is silos[True])
    found = proven(release, difference(silos, adapter, real), RELEASES, 1e-5)
    assert found < 1.0
    monkeypatch.setattr(local, "Records", PaddedRecords)
    attacked = proven(release, difference(silos, adapter, padded), RELEASES, 1e-5)
    assert attacked > 2.0, attacked


def test_the_audit_finds_nothing_and_its_control_does(directory: Any) -> None:
    study = study_of(directory)
    finding = audit(study, data=directory, records=40, adapters=20, seed=3)
    assert finding.held
    assert finding.figures["moved, mixed records"] == 0
    assert finding.figures["moved, copies of one record"] == 0
    assert finding.figures["control, any adapter"] > 0.5
    assert finding.entry().audit == "coupling"


@pytest.mark.soak
def test_all_weights_couple_nothing_and_their_control_does(directory: Any) -> None:
    small = {"slm": {"source": "path:slm"}}
    study = study_of(directory, adapter={"method": "full"}, models=small)
    finding = audit(study, data=directory, records=20, adapters=8, seed=3)
    assert finding.held
    assert finding.figures["moved, mixed records"] == 0
    assert finding.figures["moved, copies of one record"] == 0
    assert finding.figures["control, any adapter"] > 0.5


@pytest.mark.parametrize(("method", "least"), [("prompt", 1e-9), ("prefix", 0.05)])
def test_virtual_tokens_couple_nothing_and_their_control_does(
    directory: Any, method: str, least: float
) -> None:
    """Every layer normalises a prompt before it uses it: a short lever. A prefix is a long one."""
    study = study_of(directory, adapter={"method": method, "virtual_tokens": 4})
    finding = audit(study, data=directory, records=30, adapters=20, seed=3)
    assert finding.held
    assert finding.figures["moved, mixed records"] == 0
    assert finding.figures["moved, copies of one record"] == 0
    assert finding.figures["control, any adapter"] > least


@pytest.mark.parametrize("method", ["ffa-lora", "prefix"])
def test_the_audit_refutes_a_build_that_pads(
    directory: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Records", PaddedRecords)
    study = study_of(directory, adapter={"method": method})
    finding = audit(study, data=directory, records=40, adapters=20, seed=3)
    assert not finding.held
    assert "a record moves the others' sum by" in finding.sentence


def test_the_command_prints_the_control_and_what_was_moved(directory: Any) -> None:
    import yaml

    study = study_of(directory)
    (directory / "study.yaml").write_text(yaml.safe_dump(study.tree))
    arguments = ["audit", "coupling", str(directory / "study.yaml"), "--data", str(directory)]
    result = CliRunner().invoke(app, [*arguments, "--adapters", "12", "--records", "30", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"]["moved, mixed records"] == 0


def test_tokens_without_an_embedding_are_refused_before_any_is_sampled(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Adversary: a server that sees the silo fail in the very step that samples the record."""
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("fewer")
    study = study_of(directory)
    model = LlamaForCausalLM.from_pretrained(directory / "slm")
    model.resize_token_embeddings(40)
    model.save_pretrained(directory / "slm")
    SiloTuning(study, "silo-1", COPIES * 2, data=directory)
    with pytest.raises(ConfigError, match="the model has embeddings for 40"):
        SiloTuning(study, "silo-1", [*COPIES * 2, LONG], data=directory)


def test_a_study_without_such_units_is_refused(directory: Any) -> None:
    study = study_of(
        directory,
        privacy={
            "epsilon": 8,
            "delta": 1e-5,
            "unit": "silo",
            "noise": "distributed",
            "clip_norm": 4.0,
        },
    )
    with pytest.raises(ConfigError, match="protects no single records"):
        audit(study, data=directory)
