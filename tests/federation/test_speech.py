"""Recordings through the whole product: a study is run, verified, used, refused where it must."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from securefedcollm_audits.privacy.coupling import audit
from securefedcollm_cli.main import app
from torch import nn
from transformers import ASTForAudioClassification, AutoModelForAudioClassification
from typer.testing import CliRunner

import securefedcollm as sfc
from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.estimate import estimate
from securefedcollm.federation.export import seconds_beside
from securefedcollm.federation.sizes import update_values
from securefedcollm.federation.tuned import Tuned, adapted
from securefedcollm.study import load_study
from securefedcollm.tuning import class_builtin, wards
from securefedcollm.tuning.adapters import layout_of, quiet_peft
from securefedcollm.tuning.data import write_questions
from securefedcollm.tuning.identity import weights_digest
from securefedcollm.tuning.sounds import pack
from tests.support.signals import run_without_noise
from tests.support.sounds import FAMILIES, saved, tiny_study

SPEECH = Path(__file__).parents[2] / "configs" / "speech.yaml"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def run(directory: Path) -> Any:
    return run_without_noise(tiny_study, directory)


def test_a_run_ends_in_evidence_that_verifies(run: Any) -> None:
    assert sfc.verify(run.bundle()).holds
    rows = {(row.model, row.method) for row in run.table}
    assert {("slm", "FedCoLLM"), ("llm", "FedCoLLM"), ("slm", "zero-shot")} <= rows


def test_an_adapter_is_used_without_this_program(run: Any, directory: Path) -> None:
    """As its README says: the head lies beside it, and a layer that the base lacks is left out."""
    adapter = directory / "run" / "adapters" / "slm"
    model, info = AutoModelForAudioClassification.from_pretrained(
        directory / "slm", output_loading_info=True
    )
    assert any(key.startswith("projector.") for key in info["missing_keys"])
    model.projector = nn.Identity()
    head = load_file(adapter / "head.safetensors")
    classes, width = head["classifier.weight"].shape
    assert (classes, width) == (8, 16)
    model.set_submodule("classifier", nn.Linear(width, classes))
    model.load_state_dict(head, strict=False)
    with quiet_peft():
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    study = tiny_study(directory)
    tuned = Tuned.load(study, study.models.slm, data=directory)
    tuned.load_adapter(adapter)
    test = tuned.encode(deal(study, None).test)
    assert test.signal is not None
    assert test.signal.values.shape[1] == 0.3 * 16_000
    with torch.no_grad():
        theirs = model(input_values=test.signal.inputs(torch.float32)).logits
    assert np.allclose(tuned.answers(test).scores, theirs.log_softmax(-1).numpy(), atol=1e-4)
    told = (adapter / "README.md").read_text()
    assert "AutoModelForAudioClassification" in told
    assert "model.projector = nn.Identity()" in told
    assert json.loads((adapter / "task.json").read_text())["max_seconds"] == 0.3


def test_a_run_is_measured_again_from_its_files(run: Any, directory: Path) -> None:
    words = ["model", "evaluate", "--run", str(directory / "run"), "--data", str(directory)]
    result = CliRunner().invoke(app, [*words, "--role", "slm", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = [row for row in run.table if (row.model, row.method) == ("slm", "FedCoLLM")]
    assert found["general"]["accuracy"] == pytest.approx(row.accuracy["general"])
    assert len(found["all"]["confusion"]) == 8


def measured(directory: Path, test: Path, *source: str) -> tuple[int, str]:
    words = ["model", "evaluate", "--test", str(test), "--data", str(directory), "--json"]
    result = CliRunner().invoke(app, [*words, *source])
    return result.exit_code, result.output


def test_an_adapter_hears_as_much_as_its_run_did(run: Any, directory: Path, tmp_path: Path) -> None:
    """Without the run: what lies beside the adapter says how long a recording counts."""
    questions = deal(tiny_study(directory), None).test
    write_questions(tmp_path / "test.jsonl", questions, "subject", "audio_classification")
    adapter = tmp_path / "adapter"
    shutil.copytree(directory / "run" / "adapters" / "slm", adapter)
    bare = ["--model", str(directory / "slm"), "--adapter", str(adapter)]
    bare += ["--task", "audio_classification"]
    for label in wards.LABELS:
        bare += ["--label", label]
    code, again = measured(
        directory, tmp_path / "test.jsonl", "--run", str(directory / "run"), "--role", "slm"
    )
    assert code == 0, again
    assert measured(directory, tmp_path / "test.jsonl", *bare) == (0, again)
    contract = json.loads((adapter / "task.json").read_text())
    (adapter / "task.json").write_text(json.dumps(contract | {"max_seconds": 2.0}))
    code, longer = measured(directory, tmp_path / "test.jsonl", *bare)  # the control
    assert code == 0
    assert longer != again


@pytest.mark.parametrize(
    "said",
    ["[]", "{", *(f'{{"max_seconds": {said}}}' for said in ('"long"', "0", "NaN", "9" * 400))],
)
def test_a_contract_that_says_no_length_is_refused(said: str, tmp_path: Path) -> None:
    assert seconds_beside(None) == seconds_beside(tmp_path) == 10.0
    (tmp_path / "task.json").write_text('{"max_seconds": 2}')
    assert seconds_beside(tmp_path) == 2.0  # the control
    (tmp_path / "task.json").write_text(said)
    with pytest.raises(ConfigError, match=r"max_seconds is no number|cannot be read") as refused:
        seconds_beside(tmp_path)
    assert refused.value.where == str(tmp_path / "task.json")


@pytest.mark.parametrize(
    "family",
    ["Wav2Vec2", *(pytest.param(f, marks=pytest.mark.soak) for f in ("HuBERT", "AST", "Whisper"))],
)
def test_no_recording_moves_what_the_others_contribute(family: str, directory: Path) -> None:
    """The control has no fixed passes: the last one is as large as there are recordings left."""
    if not (place := directory / family).exists():
        saved(place, family, FAMILIES[family])
    study = tiny_study(directory, models={"slm": {"source": f"path:{family}"}}, distillation={})
    found = audit(study, data=directory, records=3, adapters=8, seed=1)
    assert not found.faults
    assert found.figures["control, any adapter"] > 1e-8
    assert found.figures["moved, mixed records"] == 0


def test_the_planned_size_of_an_update_is_the_real_one() -> None:
    study = load_study(SPEECH)
    base = ASTForAudioClassification(class_builtin.architecture("wards-small"))
    tuned = adapted(base, study, study.models.slm)
    assert update_values(study, None) == layout_of(tuned, "ffa-lora").size


def test_memory_follows_the_length_of_recordings(directory: Path) -> None:
    short = tiny_study(directory)
    longer = tiny_study(directory, task={**TASK, "max_seconds": 3.0})
    found = [
        estimate(study, directory)["slm"]["activation_bytes_per_record"]
        for study in (short, longer)
    ]
    assert found[1] > 5 * found[0] > 0


TASK: dict[str, Any] = {
    "kind": "audio_classification",
    "labels": list(wards.LABELS),
    "data": {"builtin": "wards", "per_silo": 40, "max_test": 20},
}
REFUSED: dict[str, tuple[list[str], str]] = {
    "labels": (['task.labels=["a", "b"]'], "task.labels"),
    "score": (["task.score=length"], "task.score"),
    "letters": (["models.slm.ask=letters"], "models.slm.ask"),
    "virtual tokens": (["adapter={method: prompt}"], "adapter.method"),
    "rounded": (["models.llm.quantization=int8"], "models.llm.quantization"),
    "tokens": (["distillation.over=all"], "distillation.over"),
    "dirichlet": (["task.data.partition=dirichlet"], "task.data.partition"),
    "another world": (["task.data={builtin: digits}"], "task.kind"),
    "pictures": (["task.kind=image_classification", "task.max_seconds=10.0"], "task.kind"),
    "sites": (["silos.count=13"], "silos.count"),
    "mirrored": (["local.augmentation={flip: true}"], "local.augmentation.flip"),
    "patient": (["privacy.unit=subject", "privacy.subject=patient"], "privacy.subject"),
    "no time": (["task.max_seconds=0.01"], "task.max_seconds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_recordings_have_no_use_for_is_refused(case: str) -> None:
    changes, where = REFUSED[case]
    load_study(SPEECH)  # the control
    with pytest.raises(ConfigError) as refused:
        load_study(SPEECH, changes)
    assert refused.value.where == where


def test_seconds_are_refused_where_nothing_is_heard() -> None:
    vision = SPEECH.with_name("vision.yaml")
    with pytest.raises(ConfigError, match="has no recordings"):
        load_study(vision, ["task.max_seconds=0.8"])


def test_a_subject_may_have_several_recordings(directory: Path) -> None:
    """Noise of the silo's own, and the speaker as the unit."""
    study = tiny_study(
        directory,
        privacy={"epsilon": 8, "delta": 1e-3, "unit": "subject", "subject": "speaker"},
        local={"steps": 2, "batch_size": 2, "learning_rate": 0.1, "micro_batch": 16},
        aggregation={"clip_norm": 4.0},
    )
    records = deal(study, None).silos["silo-2"]
    silo = SiloTuning(study, "silo-2", records, data=directory)
    assert len({q.subject for q in records}) < len(records) == 40
    delta = silo.fit(silo.adapter(), 0, lambda *_: None)
    assert np.isfinite(delta).all()
    assert delta.any()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("silos", [1, 4, 12])
def test_the_worlds_parts_share_no_speaker(silos: int, mixed: bool) -> None:
    world = wards.Wards(5, silos, wards.Sizes(10, 30, 30))
    records = [world.records(i, 60, mixed=mixed) for i in range(silos)]
    public, tests = world.public(), world.tests()
    owners = [{q.subject for q in part} for part in (*records, public, tests)]
    assert sum(map(len, owners)) == len(set.union(*owners))
    if not mixed:
        assert [world.subjects(i, 60) for i in range(silos)] == [len(o) for o in owners[:silos]]
    assert {q.answer for q in public if q.group == "private"} == {None}
    assert all(q.answer is not None for q in (*tests, *records[0]))


def test_a_study_draws_its_own_records_the_same_every_time() -> None:
    first = wards.Wards(5, 4).records(1, 20)
    assert wards.Wards(5, 4).records(1, 20) == first
    assert wards.Wards(6, 4).records(1, 20) != first
    assert len({q.prompt for q in first}) == 20


def test_pretraining_is_deterministic_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(class_builtin.RECIPES["wards-small"], layers=1, steps=60, batch_size=32)
    monkeypatch.setitem(class_builtin.RECIPES, "wards-small", tiny)
    monkeypatch.setattr(class_builtin, "POOL", 300)
    first, again = (class_builtin.pretrain("wards-small", lambda *_: None) for _ in range(2))
    assert weights_digest(first) == weights_digest(again)
    recorded, said = wards.pretraining(100, seldom=1.0)
    processor = class_builtin.world_of("wards-small").processor().hearing(0.8)
    with torch.no_grad():
        inputs = processor([pack(samples) for samples in recorded]).values
        right = first(input_values=inputs).logits.argmax(1) == torch.from_numpy(said)
    assert right.float().mean() > 0.25  # a guess is right once in eight


@pytest.mark.soak
def test_the_quick_start_teaches_both_models(tmp_path: Path) -> None:
    """The whole of ``configs/speech.yaml``, the models' pretraining included."""
    words = ["simulate", str(SPEECH), "--out", str(tmp_path / "run"), "--no-baselines"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert sfc.verify(tmp_path / "run" / "evidence.zip").holds
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    private = {(r["model"], r["method"]): r["accuracy"]["private"] for r in table}
    assert private["slm", "FedCoLLM"] > private["slm", "zero-shot"] + 0.1
    assert private["llm", "FedCoLLM"] > private["llm", "zero-shot"] + 0.05
