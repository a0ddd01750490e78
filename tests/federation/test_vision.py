"""Pictures through the whole product: a study is run, verified, used, and refused where it must."""

from __future__ import annotations

import json
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
from transformers import AutoModelForImageClassification, ViTForImageClassification
from typer.testing import CliRunner

import securefedcollm as sfc
from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.sizes import update_values
from securefedcollm.federation.tuned import Tuned, adapted
from securefedcollm.study import load_study
from securefedcollm.tuning import class_builtin, digits
from securefedcollm.tuning.adapters import layout_of, quiet_peft
from securefedcollm.tuning.identity import weights_digest
from tests.support.pictures import tiny_study
from tests.support.signals import TUNING, run_without_noise

VISION = Path(__file__).parents[2] / "configs" / "vision.yaml"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def run(directory: Path) -> Any:
    return run_without_noise(tiny_study, directory)


def test_a_run_ends_in_evidence_that_verifies(run: Any, directory: Path) -> None:
    assert sfc.verify(run.bundle()).holds
    rows = {(row.model, row.method) for row in run.table}
    assert {("slm", "FedCoLLM"), ("llm", "FedCoLLM"), ("slm", "zero-shot")} <= rows


def test_an_adapter_is_used_without_this_program(run: Any, directory: Path) -> None:
    """As its README says: the head that it was tuned with lies beside it."""
    adapter = directory / "run" / "adapters" / "slm"
    model = AutoModelForImageClassification.from_pretrained(directory / "slm")
    head = load_file(adapter / "head.safetensors")
    classes, width = head["classifier.weight"].shape
    assert (classes, width) == (10, 16)
    model.classifier = nn.Linear(width, classes)
    model.load_state_dict(head, strict=False)
    with quiet_peft():
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    study = tiny_study(directory)
    tuned = Tuned.load(study, study.models.slm, data=directory)
    tuned.load_adapter(adapter)
    test = tuned.encode(deal(study, None).test)
    assert test.signal is not None
    with torch.no_grad():
        theirs = model(pixel_values=test.signal.inputs(torch.float32)).logits
    assert np.allclose(tuned.answers(test).scores, theirs.log_softmax(-1).numpy(), atol=1e-4)
    told = (adapter / "README.md").read_text()
    assert "head.safetensors" in told
    assert "AutoTokenizer" not in told


def test_a_run_is_measured_again_from_its_files(run: Any, directory: Path) -> None:
    words = ["model", "evaluate", "--run", str(directory / "run"), "--data", str(directory)]
    result = CliRunner().invoke(app, [*words, "--role", "slm", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = [row for row in run.table if (row.model, row.method) == ("slm", "FedCoLLM")]
    assert found["general"]["accuracy"] == pytest.approx(row.accuracy["general"])
    assert len(found["all"]["confusion"]) == 10
    result = CliRunner().invoke(app, [*words, "--role", "slm", "--base", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = [row for row in run.table if (row.model, row.method) == ("slm", "zero-shot")]
    assert json.loads(result.stdout)["general"]["accuracy"] == row.accuracy["general"]


def test_a_classifiers_adapter_is_merged_by_its_run(run: Any, directory: Path) -> None:
    adapter = directory / "run" / "adapters" / "slm"
    words = ["model", "merge", "--out", str(directory / "merged"), "--data", str(directory)]
    result = CliRunner().invoke(app, [*words, "--model", "path:slm", "--adapter", str(adapter)])
    assert result.exit_code != 0
    assert not (directory / "merged").exists()
    assert "classifier of pictures" in str(result.exception or result.output)
    words += ["--run", str(directory / "run"), "--role", "slm"]
    assert CliRunner().invoke(app, words).exit_code == 0  # the control


@pytest.mark.parametrize("views", [None, {"views": 3, "shift": 0.2, "noise": 0.1}])
def test_no_picture_moves_what_the_others_contribute(
    views: dict[str, Any] | None, directory: Path
) -> None:
    """The control has no fixed passes: the last one is as large as there are pictures left."""
    local = {**TUNING, "augmentation": views}
    study = tiny_study(directory, local=local)
    found = audit(study, data=directory, records=3, adapters=8, seed=1)
    assert not found.faults
    assert found.figures["control, any adapter"] > 1e-8
    assert found.figures["moved, mixed records"] == 0


@pytest.mark.parametrize("method", ["ffa-lora", "lora"])
def test_the_planned_size_of_an_update_is_the_real_one(method: Any) -> None:
    study = load_study(VISION, [f"adapter.method={method}"])
    base = ViTForImageClassification(class_builtin.architecture("digits-small"))
    tuned = adapted(base, study, study.models.slm)
    assert update_values(study, None) == layout_of(tuned, method).size


REFUSED: dict[str, tuple[list[str], str]] = {
    "labels": (['task.labels=["a", "b"]'], "task.labels"),
    "no labels": (["task.labels=[]"], "task.labels"),
    "score": (["task.score=length"], "task.score"),
    "letters": (["models.slm.ask=letters"], "models.slm.ask"),
    "virtual tokens": (["adapter={method: prompt}"], "adapter.method"),
    "rounded": (["models.llm.quantization=int8"], "models.llm.quantization"),
    "tokens": (["distillation.over=all"], "distillation.over"),
    "dirichlet": (["task.data.partition=dirichlet"], "task.data.partition"),
    "another world": (["task.data={builtin: hospitals}"], "task.kind"),
    "words": (["task.kind=classification"], "task.kind"),
    "template": (['task.template="Text: {}"'], "task.template"),
    "sites": (["silos.count=900"], "silos.count"),
    "equal views": (["local.augmentation={views: 2}"], "local.augmentation"),
    "patient": (["privacy.unit=subject", "privacy.subject=patient"], "privacy.subject"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pictures_have_no_use_for_is_refused(case: str) -> None:
    changes, where = REFUSED[case]
    load_study(VISION)  # the control
    with pytest.raises(ConfigError) as refused:
        load_study(VISION, changes)
    assert refused.value.where == where


def test_words_have_no_views() -> None:
    with pytest.raises(ConfigError, match="words have no views") as refused:
        load_study(VISION.with_name("quickstart.yaml"), ["local.augmentation={shift: 0.1}"])
    assert refused.value.where == "local.augmentation"


def test_a_model_of_words_is_refused(directory: Path) -> None:
    study = tiny_study(
        directory, models={"slm": {"source": "builtin:hospital-slm"}}, distillation={}
    )
    with pytest.raises(SecureFedCoLLMError, match="reads text, and no pictures"):
        SiloTuning(study, "silo-1", deal(study, None).silos["silo-1"], data=directory)


def test_a_subject_may_have_several_pictures(directory: Path) -> None:
    """Noise of the silo's own, and the digit of the file as the unit."""
    study = tiny_study(
        directory,
        privacy={"epsilon": 8, "delta": 1e-3, "unit": "subject", "subject": "digit"},
        local={"steps": 2, "batch_size": 4, "learning_rate": 0.1, "micro_batch": 16},
        aggregation={"clip_norm": 4.0},
    )
    records = deal(study, None).silos["silo-2"]
    silo = SiloTuning(study, "silo-2", records, data=directory)
    assert len({q.subject for q in records}) < len(records) == 40
    delta = silo.fit(silo.adapter(), 0, lambda *_: None)
    assert np.isfinite(delta).all()
    assert delta.any()
    assert silo.events()


def test_the_worlds_parts_share_no_digit_and_no_site_anothers_scanner() -> None:
    world = digits.Digits(5, 4)
    silos = [world.records(i, 200) for i in range(4)]
    public, tests = world.public(), world.tests()
    owners = [{q.subject for q in part} for part in (*silos, public, tests)]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert [world.subjects(i, 200) for i in range(4)] == [len(part) for part in owners[:4]]
    assert {q.answer for q in public if q.group == "private"} == {None}
    assert all(q.answer is not None for q in (*tests, *silos[0]))
    assert digits.Digits(5, 4).records(1, 200) == silos[1]
    assert digits.Digits(6, 4).records(1, 200) != silos[1]
    assert len({q.prompt for part in silos for q in part}) > 790
    shown = {fault(np.full((1, 16, 16), 9, dtype=np.uint8)).tobytes() for fault in digits.FAULTS}
    assert len(shown) == len(digits.FAULTS) - 1  # a mirror does nothing to an even page


def test_pretraining_is_deterministic_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(class_builtin.RECIPES["digits-small"], layers=1, steps=100, batch_size=32)
    monkeypatch.setitem(class_builtin.RECIPES, "digits-small", tiny)
    first, again = (class_builtin.pretrain("digits-small", lambda *_: None) for _ in range(2))
    assert weights_digest(first) == weights_digest(again)
    pictures, shown = digits.pretraining(300, seldom=1.0)
    with torch.no_grad():
        inputs = torch.from_numpy(pictures)[:, None].float() / 127.5 - 1
        right = first(pixel_values=inputs).logits.argmax(1) == torch.from_numpy(shown)
    assert right.float().mean() > 0.2  # a guess is right once in ten


@pytest.mark.soak
def test_the_quick_start_teaches_both_models(tmp_path: Path) -> None:
    """The whole of ``configs/vision.yaml``, the models' pretraining included."""
    words = ["simulate", str(VISION), "--out", str(tmp_path / "run"), "--no-baselines"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert sfc.verify(tmp_path / "run" / "evidence.zip").holds
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    private = {(r["model"], r["method"]): r["accuracy"]["private"] for r in table}
    assert private["slm", "FedCoLLM"] > private["slm", "zero-shot"] + 0.1
    assert private["llm", "FedCoLLM"] > private["llm", "zero-shot"] + 0.05
