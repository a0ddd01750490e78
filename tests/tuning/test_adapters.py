"""Adapters: what is shared, what is trained, what a secure sum may add up."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.tuning.adapters import (
    AdapterLayout,
    attach,
    full_layout,
    layout_of,
    load_adapter,
    load_vector,
    save_adapter,
    select,
    to_vector,
)
from securefedcollm.tuning.questions import choice_scores

FIRST_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def filled(model: Any, layout: AdapterLayout, seed: int) -> np.ndarray:
    """Give the adapter random values and return them."""
    values = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    load_vector(model, layout, values)
    return values


def products(model: Any) -> list[torch.Tensor]:
    """The weight change B·A·α/r of every adapted layer, float64."""
    return [
        m.get_delta_weight("default").detach().double()
        for m in model.modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    ]


def test_a_fresh_adapter_is_the_identity(toy: Any) -> None:
    data = toy.encoded(6)
    with torch.no_grad():
        plain = choice_scores(toy.model(), data)
        adapted = choice_scores(attach(toy.model(), seed=3), data)
    assert torch.equal(plain, adapted)


def test_ffa_shares_a_bit_for_bit_and_leaves_the_global_generator_alone(toy: Any) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = attach(toy.model(), seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two = attach(toy.model(), seed=7)
    other = attach(toy.model(), seed=8)
    layout = full_layout(one)
    assert np.array_equal(to_vector(one, layout), to_vector(two, layout))
    assert not np.array_equal(to_vector(one, layout), to_vector(other, layout))


def test_a_is_what_it_has_always_been(toy: Any) -> None:
    """Participants of different versions must derive the same A, so its values are pinned."""
    a = dict(attach(toy.model(), seed=7).named_parameters())[
        FIRST_A.replace("lora_A", "lora_A.default")
    ]
    assert a.shape == (8, 32)
    assert float(a.abs().max()) <= 1 / np.sqrt(32)
    expected = [0.08466376, -0.11415488, 0.17013898, -0.07615807]
    assert a[0, :4].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_mean_of_ffa_vectors_is_the_mean_of_the_updates(toy: Any) -> None:
    """The reason for the default: exact under a sum, for plain LoRA it is not."""
    for method, exact in (("ffa-lora", True), ("lora", False)):
        silos = [attach(toy.model(), method=method, seed=7) for _ in range(3)]
        layout = layout_of(silos[0], method)
        vectors = [filled(model, layout, seed) for seed, model in enumerate(silos)]
        wanted = [torch.stack(p).mean(0) for p in zip(*map(products, silos), strict=True)]
        server = attach(toy.model(), method=method, seed=7)
        load_vector(server, layout, np.mean(np.array(vectors, dtype=np.float64), axis=0))
        gap = max(
            float((a - b).norm() / b.norm()) for a, b in zip(products(server), wanted, strict=True)
        )
        assert (gap < 1e-6) if exact else (gap > 0.1)


def test_rolora_alternates(toy: Any) -> None:
    model = attach(toy.model(), method="rolora", seed=0)
    even, odd = layout_of(model, "rolora", 0), layout_of(model, "rolora", 1)
    assert all(".lora_B." in name for name in even.names)
    assert all(".lora_A." in name for name in odd.names)
    assert even == layout_of(model, "rolora", 2)
    assert even.digest != odd.digest
    both = layout_of(model, "lora")
    assert both.size == even.size + odd.size == full_layout(model).size


def test_only_the_layout_is_trainable(toy: Any) -> None:
    model = attach(toy.model(), seed=0)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_B." in name for name in trainable)
    select(model, layout_of(model, "rolora", 1))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name for name in trainable)


def test_vectors_round_trip(toy: Any) -> None:
    model = attach(toy.model(), seed=0)
    layout = layout_of(model, "ffa-lora")
    values = filled(model, layout, 1)
    assert np.array_equal(to_vector(model, layout), values)
    values[:] = 0  # the model keeps its own copy
    assert to_vector(model, layout).any()


def test_another_shape_is_refused_and_both_are_named(toy: Any) -> None:
    small, large = attach(toy.model(), seed=0), attach(toy.model(hidden=32), seed=0)
    layout = layout_of(small, "ffa-lora")
    with pytest.raises(ConfigError, match=r"shape \(16, 8\) in the layout and \(32, 8\) in this"):
        to_vector(large, layout)
    with pytest.raises(ConfigError, match=rf"shape \(5,\), the layout needs \({layout.size},\)"):
        load_vector(small, layout, np.zeros(5, dtype=np.float32))
    with pytest.raises(ConfigError, match="no place in this model"):
        to_vector(toy.model(), layout)
    assert layout.digest != layout_of(large, "ffa-lora").digest


def test_targets_and_top_layers(toy: Any) -> None:
    names = layout_of(
        attach(toy.model(), targets=["q_proj", "v_proj"], top_layers=1), "ffa-lora"
    ).names
    assert len(names) == 2
    assert all(".layers.1.self_attn." in name for name in names)
    every = layout_of(attach(toy.model(), targets="all-linear", top_layers=1), "ffa-lora").names
    both = layout_of(attach(toy.model(), targets="all-linear"), "ffa-lora").names
    assert len(every) == 7
    assert set(every) == {name for name in both if ".layers.1." in name}
    for targets, says in {
        ("q_proj", "v_porj"): "v_porj fits no module",  # PEFT would train q_proj alone
        ("q_proj", "embed_tokens"): "embed_tokens is Embedding",
        ("self_attn",): "self_attn is LlamaAttention",
    }.items():
        with pytest.raises(ConfigError, match=f"adapter.targets: {says}") as caught:
            attach(toy.model(), targets=targets)
        assert "down_proj, gate_proj, k_proj" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match=r"adapter.top_layers: 3 layers asked for, the model has"):
        attach(toy.model(), top_layers=3)


def test_adapters_stay_float32_on_a_bfloat16_base(toy: Any) -> None:
    model = attach(toy.model(dtype=torch.bfloat16), seed=0)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_a_saved_adapter_loads_through_peft(toy: Any, tmp_path: Path) -> None:
    model = attach(toy.model(), seed=0)
    filled(model, layout_of(model, "ffa-lora"), 1)
    save_adapter(model, tmp_path / "slm")
    filled(model, layout_of(model, "ffa-lora"), 2)
    save_adapter(model, tmp_path / "slm")  # replaces the first
    assert sorted(p.suffix for p in (tmp_path / "slm").iterdir()) == [
        ".json",
        ".md",
        ".safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["slm"]
    data = toy.encoded(6)
    for loaded in (
        PeftModel.from_pretrained(toy.model(), str(tmp_path / "slm")),
        load_adapter(toy.model(), tmp_path / "slm"),
    ):
        with torch.no_grad():
            assert torch.equal(choice_scores(loaded, data), choice_scores(model, data))


def test_saving_and_loading_fail_in_one_line(toy: Any, tmp_path: Path) -> None:
    model = attach(toy.model(), seed=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write the adapter"):
        save_adapter(model, tmp_path / "file" / "slm")
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors"):
        load_adapter(toy.model(), tmp_path)
    save_adapter(model, tmp_path / "slm")
    with pytest.raises(ConfigError, match="made for another base model"):
        load_adapter(toy.model(hidden=32), tmp_path / "slm")
    (tmp_path / "slm" / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"adapter_config.json cannot be read"):
        load_adapter(toy.model(), tmp_path / "slm")


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True),
    ],
)
def test_an_adapter_of_another_kind_is_refused(toy: Any, tmp_path: Path, config: Any) -> None:
    """Its virtual tokens were ignored before: the base model's figures, without a word."""
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(toy.model(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"of the kind .*, and only LoRA, prompts and prefixes"):
        load_adapter(toy.model(), tmp_path)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: name.replace("model.model.", "model."), "28 of its tensors fit no module"),
        (lambda name: name if "q_proj" not in name else None, "it lacks tensors for .*q_proj"),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused(
    toy: Any, tmp_path: Path, rename: Callable[[str], str | None], says: str
) -> None:
    """PEFT warns, and goes on with what fits: nothing, it may be."""
    save_adapter(attach(toy.model(), seed=0), tmp_path / "slm")
    file = tmp_path / "slm" / "adapter_model.safetensors"
    renamed = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, file)
    with warnings.catch_warnings(action="error"), pytest.raises(ConfigError, match=says) as caught:
        load_adapter(toy.model(), tmp_path / "slm")
    assert "\n" not in str(caught.value)


def test_attach_does_not_touch_the_base(toy: Any) -> None:
    base = toy.model()
    before = copy.deepcopy(base.state_dict())
    adapted = attach(base, seed=0)
    after = adapted.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
