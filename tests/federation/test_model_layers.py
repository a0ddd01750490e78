"""``models.*.top_layers``: each model has its own number of tuned layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import ServerTuning, SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.estimate import estimate
from securefedcollm.federation.sizes import update_values
from securefedcollm.study import Study, digest, load_study
from tests.support.inputs import make_inputs

LLM, SLM = "models.llm.top_layers=1", "models.slm.top_layers=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def study_of(inputs: Path, *changes: str) -> Study:
    return load_study(inputs / "tiny.yaml", ["privacy=none", *changes])


def test_the_key_goes_before_that_of_the_adapter(inputs: Path) -> None:
    every = study_of(inputs)
    assert "top_layers" not in every.tree["models"]["llm"]  # older studies keep their digest
    size = update_values(every, inputs)
    one = update_values(study_of(inputs, "adapter.top_layers=1"), inputs)
    assert size == 2 * one
    assert update_values(study_of(inputs, LLM), inputs) == size
    assert update_values(study_of(inputs, "adapter.top_layers=1", SLM), inputs) == size
    assert digest(study_of(inputs, SLM)) != digest(every)


def test_the_llm_learns_in_one_layer_and_the_slm_in_both(inputs: Path) -> None:
    study = study_of(inputs, "adapter.top_layers=1", SLM)
    dealt = deal(study, inputs)
    server = ServerTuning(study, public=dealt.public, data=inputs)
    silo = SiloTuning(study, "silo-1", dealt.silos["silo-1"], data=inputs)
    assert silo.layout(0) == server.layout(0)
    assert server.update_size(0) == update_values(study, inputs)
    told = estimate(study, inputs)
    assert told["slm"]["trained_values"] == server.update_size(0)
    server.distil(0, lambda done, total, text: None)
    tuned = {}
    for name, model in server._models():
        weights = model.model.named_parameters()
        tuned[name] = {
            key.split(".layers.")[1][0]
            for key, value in weights
            if "lora_B" in key and bool(torch.any(value != 0))
        }
    assert tuned == {"slm": {"0", "1"}, "llm": {"1"}}


@pytest.mark.parametrize(
    "changes",
    [
        ("adapter={method: prompt}", LLM),
        ("adapter={method: full}", "models.llm=none", "distillation={}", SLM),
    ],
)
def test_other_adapters_leave_no_layers_out(inputs: Path, changes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"top_layers: only a low-rank adapter") as caught:
        study_of(inputs, *changes)
    assert "ffa-lora" in caught.value.hint


def test_a_model_with_fewer_layers_is_named_with_the_key(inputs: Path) -> None:
    study = study_of(inputs, "models.slm.top_layers=3")
    with pytest.raises(ConfigError, match="3 layers asked for, the model has 2"):
        ServerTuning(study, public=deal(study, inputs).public, data=inputs)
