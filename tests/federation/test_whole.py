"""All weights through the roles: sizes that are promised, rounds of every placement, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from securefedcollm_cli.main import app
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.cotuning import ServerTuning, SiloTuning, count_units
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.estimate import estimate
from securefedcollm.federation.sizes import update_values
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import Study, load_study
from securefedcollm.tuning.adapters import load_vector, to_vector
from tests.support.inputs import COLOURS, THINGS, make_inputs
from tests.support.rounds import Killed

FULL = ("adapter={method: full}", "models.llm=none", "distillation={}")
SERVER = (
    "server.outer={optimizer: nesterov, learning_rate: 0.7, momentum: 0.5}",
    "server.central={steps: 2, batch_size: 4, learning_rate: 0.001}",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def study_of(inputs: Path, *changes: str) -> Study:
    return load_study(inputs / "tiny.yaml", [*FULL, *changes])


def run(inputs: Path, out: Path, *changes: str, **options: Any) -> dict[str, Any]:
    plan = SimulationPlan(out=out, data=inputs, workers=0, baselines=(), **options)
    return Simulation(study_of(inputs, *changes), plan).run(silent, lambda text: None)


def test_the_sizes_that_are_promised_are_those_that_are_sent(inputs: Path) -> None:
    study = study_of(inputs)
    tuned = Tuned.load(study, study.models.slm, data=inputs)
    size = tuned.update_layout(0).size
    assert size == tuned.broadcast_layout().size == update_values(study, inputs)
    told = estimate(study, inputs)["slm"]
    assert told["update_values"] == told["broadcast_values"] == told["parameters"] == size
    assert tuned.layout_digest(0) == tuned.layout_digest(1)


@pytest.mark.parametrize(
    "privacy",
    [
        ("privacy=null",),
        ("privacy={epsilon: 8, delta: 1e-5}",),
        ("privacy={epsilon: 8, delta: 1e-5, unit: subject, subject: patient}",),
        ("privacy={epsilon: 8, delta: 1e-5, unit: silo, noise: distributed}",),
    ],
)
def test_a_round_of_every_placement(inputs: Path, privacy: tuple[str]) -> None:
    study = study_of(inputs, *privacy, "aggregation.clip_norm=1", *SERVER)
    dealt = deal(study, inputs)
    name, records = next(iter(dealt.silos.items()))
    spelt = [replace(q, subject=f" {q.subject}\u00a0") for q in records[::2]] + list(records[1::2])
    assert count_units(study, spelt) == count_units(study, records)  # one document, spelt twice
    silo = SiloTuning(study, name, records, data=inputs)
    server = ServerTuning(study, public=dealt.public, test=dealt.test, data=inputs)
    start = server.adapter()
    assert not start.any()
    update = silo.fit(start, 0, silent)
    assert update.shape == start.shape == (silo.update_size(0),)
    server.absorb(update, 0)
    after = server.adapter()
    server.distil(0, silent)
    assert not np.array_equal(server.adapter(), after)  # its central steps
    assert silo.fit(server.adapter(), 1, silent).any()


def test_a_joint_step_takes_gradients_of_all_weights(inputs: Path) -> None:
    joint = "privacy={epsilon: 8, delta: 1e-5, noise: distributed}"
    study = study_of(inputs, joint, "local.sampling_rate=0.0625", "aggregation.value_bits=20")
    dealt = deal(study, inputs)
    name, records = next(iter(dealt.silos.items()))
    silo = SiloTuning(study, name, records, data=inputs)
    server = ServerTuning(study, public=dealt.public, data=inputs)
    gradients = list(silo.gradients(server.adapter(), 0, 1.0))
    assert len(gradients) == len(records)
    assert all(found.shape == (silo.update_size(0),) and found.any() for found in gradients)
    server.descend(np.mean(gradients, 0).astype(np.float32), 0)
    taken = server.descent()
    assert taken["adapter"].any()
    again = ServerTuning(study, public=dealt.public, data=inputs)
    again.restore_descent(taken)
    assert np.array_equal(again.adapter(), server.adapter())


def test_a_saved_model_is_taken_up_again_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    study = study_of(inputs)
    one, two = (Tuned.load(study, study.models.slm, data=inputs) for _ in range(2))
    layout = one.broadcast_layout()
    load_vector(one.model, layout, np.random.default_rng(0).normal(size=layout.size))
    one.save(tmp_path / "slm")
    two.load_adapter(tmp_path / "slm")
    assert np.array_equal(to_vector(one.model, layout), to_vector(two.model, layout))
    assert json.loads((tmp_path / "slm" / "task.json").read_text())["study"] == "tiny"
    AutoTokenizer.from_pretrained(tmp_path / "slm")
    (tmp_path / "slm" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(StateError, match="the saved model cannot be taken up"):
        two.load_adapter(tmp_path / "slm")


def test_a_run_killed_between_sum_and_step_ends_as_the_one_that_was_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("privacy=null", *SERVER)
    run(inputs, tmp_path / "whole", *changes)
    real = ServerTuning.distil

    def killed(self: ServerTuning, round_: int, progress: Any) -> Any:
        if round_ == 1:
            raise Killed
        return real(self, round_, progress)

    monkeypatch.setattr(ServerTuning, "distil", killed)
    with pytest.raises(Killed):
        run(inputs, tmp_path / "cut", *changes)
    monkeypatch.setattr(ServerTuning, "distil", real)
    run(inputs, tmp_path / "cut", *changes, resume=True)
    first, second = (weights(tmp_path / name / "adapters" / "slm") for name in ("whole", "cut"))
    assert all(values.equal(second[name]) for name, values in first.items())


def test_the_model_that_a_silo_is_given_is_the_servers(inputs: Path, tmp_path: Path) -> None:
    study = study_of(inputs, "privacy=null")
    dealt = deal(study, inputs)
    name, records = next(iter(dealt.silos.items()))
    silo = SiloTuning(study, name, records, data=inputs)
    server = ServerTuning(study, public=dealt.public, data=inputs)
    server.absorb(silo.fit(server.adapter(), 0, silent), 0)
    server.save(tmp_path)
    silo.save(server.adapter(), tmp_path / "given", {"proof.json": b"{}"})
    first, second = weights(tmp_path / "slm"), weights(tmp_path / "given")
    assert all(values.equal(second[name]) for name, values in first.items())
    assert (tmp_path / "given" / "proof.json").exists()


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return found


@pytest.mark.soak
def test_documents_that_are_cut_into_rows_are_the_units(inputs: Path, tmp_path: Path) -> None:
    """Continued pre-training on text, by all weights, under ε for a whole document."""
    name_of = dict(zip(("train", "test"), COLOURS, strict=False))
    for name, documents, first in (("train", 48, 0), ("test", 6, 100)):
        rows = [
            {
                "text": f"colour of {THINGS[d % 12]} {THINGS[d // 12]} {THINGS[r]} {name_of[name]}",
                "document": first + d,
            }
            for d in range(documents)
            for r in range(1 + d % 4)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = "{train: train.jsonl, test: test.jsonl, public: 8, public_labelled: 8, per_silo: 24}"
    changes = (
        f"task={{kind: text, data: {files}}}",
        f"models.slm.source='path:{inputs / 'slm'}'",
        "privacy={epsilon: 8, delta: 1e-5, unit: subject, subject: document}",
        "local.batch_size=4",
        *SERVER,
    )
    study = study_of(inputs, *changes)
    dealt = deal(study, tmp_path)
    homes = {}
    for name, records in dealt.silos.items():
        documents = {question.subject for question in records}
        assert len(documents) < len(records)
        assert count_units(study, records) == len(documents)
        for document in documents:
            assert homes.setdefault(document, name) == name  # nobody else has a part of it
    name, records = next(iter(dealt.silos.items()))
    silo = SiloTuning(study, name, records, data=tmp_path)
    gradients = list(silo.gradients(np.zeros(silo.size(0), dtype=np.float32), 0, 1.0))
    assert len(gradients) == count_units(study, records)
    words = ["simulate", inputs / "tiny.yaml", "--data", tmp_path, "--out", tmp_path / "run"]
    words += [word for change in (*FULL, *changes) for word in ("--set", change)]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--workers", "0", "--json")])
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["evidence"]["holds"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("models.llm={source: 'path:llm'}",), "adapter.method: all weights of the large model"),
        (("models.slm.dtype=bfloat16",), "models.slm.dtype: small steps of a whole model"),
        (("adapter.rank=4",), "adapter.rank: an adapter of the method full has none"),
        (("adapter.virtual_tokens=4",), "adapter.virtual_tokens: an adapter of the method full"),
        (("adapter.top_layers=1",), "adapter.top_layers: an adapter of the method full has none"),
    ],
)
def test_what_all_weights_have_no_use_for_is_refused(
    inputs: Path, changes: tuple[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(inputs, *changes)
    assert str(caught.value).startswith(says)
