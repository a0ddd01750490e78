"""Frozen weights in eight or four bits: the numbers, one record at a time, and what is refused.

Most of it needs bitsandbytes, whose part for processors is enough.
"""

from __future__ import annotations

import builtins
import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, full_layout, load_vector, save_adapter, select
from securefedcollm.tuning.independence import proved
from securefedcollm.tuning.kernels import _Nobodys
from securefedcollm.tuning.local import records_of
from securefedcollm.tuning.models import load_model, save_model
from securefedcollm.tuning.passes import Shape, Widths
from securefedcollm.tuning.per_record import Records
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.quantised import (
    QuantisedLinear,
    check_quantization,
    quantise,
    quiet_bitsandbytes,
    round_weights,
    weights_bytes,
)
from securefedcollm.tuning.recipe import evaluation_mode
from tests.support.models import Toy, llama, word_level

KEY = "models.slm.quantization"
CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]

needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def model_of(dtype: torch.dtype = torch.float32, kind: Any = "none") -> Any:
    base = llama(22, hidden_size=64, intermediate_size=128, initializer_range=0.2).to(dtype)
    quantise(base, kind, KEY)
    return base


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if bitsandbytes were not installed."""
    usual = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
        return usual(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_error_says_how_to_install_it(kind: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^models\.slm\.quantization: {kind} needs") as caught:
        check_quantization(kind, KEY, CPU)
    assert "pip install 'securefedcollm[gpu]'" in caught.value.hint


@pytest.mark.usefixtures("missing")
def test_weights_that_are_not_rounded_need_no_package() -> None:
    check_quantization("none", KEY, CPU)
    base = model_of()
    round_weights(base, "none", KEY)
    assert not any(isinstance(module, QuantisedLinear) for module in base.modules())


@pytest.mark.parametrize(("kind", "share"), [("none", 1.0), ("int8", 0.25), ("nf4", 0.13)])
def test_an_estimate_knows_what_the_weights_take(kind: Any, share: float) -> None:
    """On the meta device, where no weight exists."""
    with torch.device("meta"):
        base = llama(22, hidden_size=512, intermediate_size=1024)
    whole, embeddings = weights_bytes(base, "none", 4), 2 * 22 * 512 * 4
    found = weights_bytes(base, kind, 4) - embeddings
    assert found == pytest.approx(share * (whole - embeddings), rel=0.02)


def test_a_family_without_linear_layers_is_refused() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    for change in (quantise, round_weights):
        with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layers"):
            change(base, "nf4", KEY)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.15)])
def test_linear_layers_are_rounded_and_the_rest_is_not(
    kind: Any, most: float, dtype: torch.dtype
) -> None:
    check_quantization(kind, KEY, CPU)
    plain, base = model_of(dtype), model_of(dtype, kind)
    for name, module in plain.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        other = base.get_submodule(name)
        if name == "lm_head":
            assert torch.equal(other.weight, module.weight)
            continue
        assert isinstance(other, QuantisedLinear)
        assert other.weight.dtype == dtype
        assert other.weight.shape == module.weight.shape
        error = (other.weight - module.weight).norm() / module.weight.norm()
        assert 0 < error < most
    width = 4 if dtype == torch.float32 else 2
    taken = sum(v.numel() * v.element_size() for v in (*base.parameters(), *base.buffers()))
    rotary = sum(v.numel() * v.element_size() for v in plain.buffers())
    # The tables of nf4 are 1,092 bytes a layer, which shows on a toy alone.
    tables = 14 * 1092 if kind == "nf4" else 0
    assert taken - rotary - tables == pytest.approx(weights_bytes(plain, kind, width), rel=0.02)


@needed
def test_the_numbers_are_those_of_the_package_itself() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layer = nn.Linear(128, 96)
    packed, state = quantize_4bit(
        layer.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(QuantisedLinear(layer, "nf4").weight, dequantize_4bit(packed, state))


@needed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_as_an_ordinary_one_with_its_weight(kind: Any, bias: bool) -> None:
    layer = nn.Linear(64, 48, bias)
    quantised = QuantisedLinear(layer, kind)
    with torch.no_grad():
        layer.weight.copy_(quantised.weight)
    given = torch.randn(3, 5, 64, requires_grad=True)
    slope = torch.randn(3, 5, 48)
    found, wanted = (
        (result.detach(), *torch.autograd.grad(result, [given], slope))
        for result in (quantised(given), layer(given))
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert not quantised.weight.requires_grad


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_weight_is_kept_for_the_backward_pass(kind: Any) -> None:
    base = model_of(kind=kind)
    kept: list[int] = []
    sizes = {64 * 64, 64 * 128}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.numel()) or value, lambda value: value
    ):
        embedded = torch.randn(1, 3, 64, requires_grad=True)
        base(inputs_embeds=embedded, use_cache=False)
    assert kept
    assert not sizes & set(kept)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_for_a_merge_gives_the_same_function(kind: Any) -> None:
    quantised, rounded = model_of(kind=kind), model_of()
    round_weights(rounded, kind, KEY)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(quantised(tokens).logits, rounded(tokens).logits)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_rounds_the_weights_that_were_tuned_on(kind: Any) -> None:
    """Files of float32 under a study in bfloat16. The control: another type, other weights."""
    base = model_of()
    tuned, right, wrong = copy.deepcopy(base).bfloat16(), copy.deepcopy(base), copy.deepcopy(base)
    quantise(tuned, kind, KEY)
    round_weights(right, kind, KEY, "bfloat16")
    round_weights(wrong, kind, KEY)
    layers = [name for name, m in tuned.named_modules() if isinstance(m, QuantisedLinear)]
    assert layers

    def same(merged: Any) -> bool:
        pairs = [(tuned.get_submodule(n), merged.get_submodule(n)) for n in layers]
        return all(torch.equal(mine.weight.float(), its.weight) for mine, its in pairs)

    assert same(right)
    assert not same(wrong)


def adapted(kind: Any, **options: Any) -> Any:
    model = attach(model_of(kind=kind), **({"method": "lora", "rank": 4, "seed": 1} | options))
    layout = full_layout(model)
    load_vector(model, layout, np.random.default_rng(1).normal(scale=0.05, size=layout.size))
    return model


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_stays_in_float32_and_only_it_is_trained(kind: Any) -> None:
    base = model_of(torch.bfloat16, kind)
    model = attach(base, method="lora", rank=4)
    trained = select(model, full_layout(model))
    assert len(trained) == 2 * 14
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if ".lora_" in name
    }


def gradients(model: Any, data: Any) -> list[bytes]:
    plan = LossPlan(kind="choices", micro_batch=16)
    records = records_of(model, full_layout(model), data, plan)
    found: dict[int, bytes] = {}
    with evaluation_mode(model):
        for rows, values in records.of_records(np.arange(len(data))):
            for at, row in enumerate(rows.tolist()):
                found[row] = b"".join(v[at].numpy().tobytes() for v in values)
    return [found[row] for row in range(len(data))]


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_a_records_gradient_is_its_own_to_the_bit(toy: Toy, kind: Any) -> None:
    """Through the product's own test of independence, and beside other records."""
    model, data = adapted(kind), toy.encoded(24)
    alone = gradients(model, data)
    assert len(set(alone)) > 20
    fewer = data.select(torch.arange(5, 24, 2))
    assert gradients(model, fewer) == alone[5::2]
    rounded = model_of()
    round_weights(rounded, kind, KEY)
    like = attach(rounded, method="lora", rank=4, seed=1)
    load_vector(like, full_layout(like), np.random.default_rng(1).normal(scale=0.05, size=SIZE))
    for mine, theirs in zip(alone, gradients(like, data), strict=True):
        a, b = (np.frombuffer(values, np.float32) for values in (mine, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


SIZE = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
"""Values of a LoRA adapter of rank 4 on all linear layers."""


def company(model: Any, shape: Shape) -> bool:
    """Whether the product's own test lets records of ``shape`` share a pass."""
    layout = full_layout(model)
    parameters = select(model, layout)

    def compute(rows: Any, widths: Widths) -> list[bytes]:
        records = Records(
            model, parameters, rows, loss="choices", scoring=LossPlan().scoring, widths=widths
        )
        found: dict[int, bytes] = {}
        for members, values in records.of_records(np.arange(len(rows))):
            for at, row in enumerate(members.tolist()):
                found[row] = b"".join(v[at].numpy().tobytes() for v in values)
        return [found[row] for row in range(len(rows))]

    widths = Widths(tokens=8 * shape.length, most=8)
    with evaluation_mode(model):
        tested = proved(model, [shape], widths, compute, "a test")
    return tested.alone is not None and shape not in tested.alone


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_records_of_a_quantised_model_may_share_a_pass(kind: Any) -> None:
    assert company(adapted(kind), Shape(8, 2))


def test_memory_that_a_weight_gave_back_is_a_records() -> None:
    """What is made of weights alone is nobody's row, but only as long as it is there."""
    memory, nobodys = np.ones((8, 64), np.float32), _Nobodys()
    made = torch.from_numpy(memory)
    nobodys.take([made])
    assert made[2:] in nobodys  # the control: a part of it
    del made
    assert torch.from_numpy(memory) not in nobodys  # a record's tensor, in the same place


def with_outliers(scale: float) -> Any:
    """A model whose linear layers are the package's own for LLM.int8(), with an adapter.

    They look for columns with a large input among all rows of a pass, and compute those in other
    numbers. ``scale`` is that of the norms before them: at 1 there are such columns.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    base = model_of()
    for name, module in list(base.named_modules()):
        if "norm" in name:
            nn.init.constant_(module.weight, scale)
        if type(module) is nn.Linear and name != "lm_head":
            size = (module.in_features, module.out_features, False)
            layer = Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
            layer.weight = Int8Params(module.weight.data, requires_grad=False).to("cpu")
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, layer)
    base.is_loaded_in_8bit = True
    return attach(base, method="lora", rank=4, seed=1)


@needed
def test_outliers_of_a_whole_pass_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """The control. A later token changes an earlier one, and a record another one."""
    with quiet_bitsandbytes():
        with pytest.raises(ConfigError, match="sees the tokens that follow"):
            company(with_outliers(1.0), Shape(8, 2))
        assert not company(with_outliers(0.3), Shape(8, 2))
    assert "change each other's last bits" in caplog.text


@needed
def test_a_model_that_brings_its_own_bits_is_refused(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_model(model_of(), word_level(["a", "<unk>"]), tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with quiet_bitsandbytes():
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=config
        )
        save_model(packed, word_level(["a", "<unk>"]), tmp_path / "packed")
        with pytest.raises(ConfigError, match="quantised by bitsandbytes already"):
            load_model(f"path:{tmp_path / 'packed'}")


@needed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.1), ("nf4", 1e-4)], ids=["int8", "nf4"])
def test_others_load_base_and_adapter_with_transformers_alone(
    tmp_path: Any, kind: Any, most: float
) -> None:
    """As the model card says. LLM.int8() rounds the inputs too, so its results are near ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_model(model_of(), word_level(["a", "<unk>"]), tmp_path / "base")
    ours = adapted(kind)
    save_adapter(ours, tmp_path / "adapter")
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
        }
    with quiet_bitsandbytes(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype="float32",
            quantization_config=BitsAndBytesConfig(**settings),
        )
        theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
        if kind == "nf4":  # in evaluation some processors round its scales to bfloat16
            theirs.train()
        tokens = torch.arange(12)[None]
        found, wanted = (m(input_ids=tokens).logits.float() for m in (ours, theirs))
    assert (found - wanted).norm() / wanted.norm() < most


@needed
def test_a_weight_beyond_half_precision_is_refused_in_eight_bits() -> None:
    base = model_of()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match="above 65,504"):
        quantise(base, "int8", KEY)
