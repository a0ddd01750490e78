"""Soft prompts and prefixes: what PEFT makes of them, in packed rows, saved, averaged, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import (
    PROMPT,
    full_layout,
    layout_of,
    load_adapter,
    load_vector,
    merged,
    quiet_peft,
    save_adapter,
    to_vector,
)
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.head import check_positions
from securefedcollm.tuning.independence import made_up_adapter
from securefedcollm.tuning.local import check_records, train_dp, train_plain
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.prompts import attach_prompt, check_virtual
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import choice_scores, encode
from securefedcollm.tuning.recipe import inference_mode
from tests.support.packed import WINDOW, Numbers, encoded, made, questions
from tests.support.plans import distil_plan, protection, train_plan

TOKENS = 3
METHODS = ["prompt", "prefix"]
FAMILIES = [
    ("llama", "prompt"),
    ("llama", "prefix"),
    ("opt", "prompt"),
    ("opt", "prefix"),
    ("gemma3", "prompt"),
    ("gemma3", "prefix"),
    ("mistral", "prompt"),
    ("mistral", "prefix"),
    ("bloom", "prompt"),  # a row each
    ("falcon", "prompt"),
    ("mamba", "prompt"),
    ("lfm2", "prompt"),
]


def behind(model: Any, asked: list[Question]) -> torch.Tensor:
    """Scores by PEFT's own forward pass: no packing, no padding, nothing of ours."""
    read = Numbers()
    rows = []
    for question in asked:
        scores = []
        for choice in question.choices:
            prompt, rest = read([question.prompt, choice])["input_ids"]
            tokens = torch.tensor([prompt + rest])
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
            log_p = logits[-tokens.shape[1] :].float().log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(log_p.gather(1, torch.tensor(rest)[:, None]).sum())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


@pytest.mark.parametrize("longest", [6, 2 * WINDOW])
@pytest.mark.parametrize(("name", "method"), FAMILIES)
def test_packed_choices_score_as_pefts_own_pass_for_each(
    name: str, method: Any, longest: int
) -> None:
    base = made(name)
    with inference_mode(base):
        plain = choice_scores(base, encoded(longest))
    model = attach_prompt(base, method=method, tokens=TOKENS, seed=1)
    check_virtual(model, "path:slm")
    with inference_mode(model), made_up_adapter(model, 0.5):
        found = choice_scores(model, encoded(longest))
        torch.testing.assert_close(found, behind(model, questions(longest)), atol=1e-4, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(choice_scores(model, encoded(longest)), plain)
    assert (found - plain).abs().max() > 1e-4  # beyond a window of all layers nothing is seen


@pytest.mark.parametrize("method", METHODS)
def test_texts_and_single_choices_see_the_virtual_tokens(method: Any) -> None:
    """They go another way through the output layer, and without a mask of their own."""
    model = attach_prompt(made("llama"), method=method, tokens=TOKENS)
    asked = [Question("w1 w2", ("w3 w4 w5",), 0), Question("w9", ("w3",), 0)]
    data = encode(asked, Numbers(), 64)
    assert data.generative
    with inference_mode(model), made_up_adapter(model, 0.5):
        torch.testing.assert_close(choice_scores(model, data), behind(model, asked))


@pytest.mark.parametrize("method", METHODS)
def test_all_participants_start_alike_and_the_global_generator_is_left_alone(method: Any) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = attach_prompt(made("llama"), method=method, tokens=TOKENS, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two = attach_prompt(made("llama"), method=method, tokens=TOKENS, seed=7)
    other = attach_prompt(made("llama"), method=method, tokens=TOKENS, seed=8)
    layout = full_layout(one)
    assert layout.names == (PROMPT,)
    assert layout.shapes == ((TOKENS, 16 if method == "prompt" else 2 * 2 * 16),)
    assert layout == layout_of(one, method)
    assert np.array_equal(to_vector(one, layout), to_vector(two, layout))
    assert not np.array_equal(to_vector(one, layout), to_vector(other, layout))
    assert [n for n, p in one.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_fresh_virtual_tokens_are_what_they_have_always_been(method: Any) -> None:
    """Small, and pinned: participants of different versions must start alike."""
    model = attach_prompt(made("llama"), method=method, tokens=TOKENS, seed=7)
    values = to_vector(model, full_layout(model))
    assert 0.015 < np.abs(values).max() <= 0.02
    expected = [0.014056773, 0.009016531, 0.014052584, -0.00780869]
    assert values[:4].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_mean_of_prompts_is_the_prompt_of_the_mean() -> None:
    """What a secure sum averages is what the model embeds: no product of means."""
    model = attach_prompt(made("llama"), method="prompt", tokens=TOKENS)
    layout = full_layout(model)
    vectors = [np.random.default_rng(i).normal(size=layout.size) for i in range(4)]
    seen = []
    for vector in (*vectors, np.mean(vectors, axis=0)):
        load_vector(model, layout, vector)
        seen.append(model.get_prompt(1)[0].detach())
    torch.testing.assert_close(torch.stack(seen[:-1]).mean(0), seen[-1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_saved_virtual_tokens_load_through_peft_to_the_digit(
    method: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = attach_prompt(made("llama").to(dtype), method=method, tokens=TOKENS)
    layout = full_layout(model)
    values = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    load_vector(model, layout, values)
    save_adapter(model, tmp_path / "slm")
    assert [*load_file(tmp_path / "slm" / "adapter_model.safetensors")] == [PROMPT]
    config = json.loads((tmp_path / "slm" / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == TOKENS
    with inference_mode(model):
        wanted = choice_scores(model, encoded())
    for loaded in (
        PeftModel.from_pretrained(made("llama").to(dtype), str(tmp_path / "slm")),
        load_adapter(made("llama").to(dtype), tmp_path / "slm"),
    ):
        check_virtual(loaded, "--adapter")
        assert np.array_equal(to_vector(loaded, layout), values)
        with inference_mode(loaded):
            assert torch.equal(choice_scores(loaded, encoded()), wanted)
            if dtype == torch.float32:
                torch.testing.assert_close(behind(loaded, questions()), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_generation_continues_behind_the_virtual_tokens(method: Any) -> None:
    """Step by step it is the most probable token of a plain forward pass, and not the base's."""
    model = attach_prompt(made("llama"), method=method, tokens=TOKENS)
    tokens = torch.tensor([[3, 9, 20, 7]])
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    with inference_mode(model), made_up_adapter(model, 0.5), quiet_peft():
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        found = model.generate(**given, **options)
        plain = model.get_base_model().generate(**given, **options)
        for _ in range(6):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == tokens.tolist()
    assert found.tolist() != plain.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_of_another_model_are_refused(method: Any, tmp_path: Path) -> None:
    save_adapter(attach_prompt(made("llama"), method=method, tokens=TOKENS), tmp_path / "slm")
    wider = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}  # heads as wide, but more
    deeper = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}
    for sizes in (wider, deeper) if method == "prefix" else (wider,):
        other = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
        with pytest.raises(ConfigError, match="made for another base model"):
            load_adapter(other, tmp_path / "slm")
    file = tmp_path / "slm" / "adapter_model.safetensors"
    save_file({"other": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match="made for another base model"):
        load_adapter(made("llama"), tmp_path / "slm")


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_can_hold_virtual_tokens(method: Any, tmp_path: Path) -> None:
    save_adapter(attach_prompt(made("llama"), method=method, tokens=TOKENS), tmp_path / "slm")
    with pytest.raises(ConfigError, match="virtual tokens stand before every input, and no weight"):
        merged(made("llama"), tmp_path / "slm")


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_take_positions_of_a_model_with_a_table(method: Any) -> None:
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = attach_prompt(GPT2LMHeadModel(config).eval(), method=method, tokens=TOKENS)
    check_positions(model, 29, "path:slm")
    named = r"task.max_tokens: 30 tokens, the model path:slm has positions for 29 beside its 3 vi"
    with pytest.raises(ConfigError, match=named):
        check_positions(model, 30, "path:slm")
    last = encode([Question(" ".join(["w1"] * 29), ("w2", "w3"), 0)], Numbers(), 64)
    with inference_mode(model):
        assert torch.isfinite(choice_scores(model, last)).all()
        with pytest.raises(IndexError):  # the control: there is no position for one more
            choice_scores(model, encode([Question("w1 " * 30, ("w2", "w3"), 0)], Numbers(), 64))


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("mamba", "prefix", "virtual tokens do not fit the model: "),
        ("lfm2", "prefix", "Lfm2ForCausalLM cannot be tuned by virtual tokens: "),
    ],
)
def test_a_family_that_cannot_be_given_a_prefix_is_refused_by_name(
    name: str, method: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_virtual(attach_prompt(made(name), method=method, tokens=TOKENS), "path:slm")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_does_not_heed_virtual_tokens_is_refused(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be tuned for nothing, and its figures would be the base model's."""
    model = attach_prompt(made("llama"), method=method, tokens=TOKENS)
    inner = model.get_base_model().model
    plain = inner.forward

    def deaf(**given: Any) -> Any:
        mask = given.get("attention_mask")
        behind = mask[..., TOKENS:] if given.get("past_key_values") is not None else mask
        given["past_key_values"] = None
        if given.get("inputs_embeds") is None:
            return plain(**given | {"attention_mask": behind})
        given["inputs_embeds"] = given["inputs_embeds"][:, TOKENS:]
        given["attention_mask"] = (
            mask[:, TOKENS:] if mask.ndim == 2 else mask[:, :, TOKENS:, TOKENS:]
        )
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"][:, TOKENS:]
        found = plain(**given)
        found.last_hidden_state = F.pad(found.last_hidden_state, (0, 0, TOKENS, 0))
        return found

    monkeypatch.setattr(inner, "forward", deaf)
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM .* by virtual tokens: they change noth"
    ):
        check_virtual(model, "path:slm")


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_prompts_are_tuned_privately_and_distilled(name: str) -> None:
    data = encoded()
    models = [attach_prompt(made(name), method="prompt", tokens=n) for n in (2, TOKENS)]
    layouts = [full_layout(model) for model in models]
    plan = train_plan(steps=2, batch_size=2, learning_rate=0.01)
    check_records(models[1], LossPlan())
    assert train_plain(models[1], layouts[1], data, plan, seed=1).delta.any()
    noise = NoiseSource()
    assert train_dp(models[1], layouts[1], data, plan, protection(), noise=noise).delta.any()
    before = [to_vector(model, layout) for model, layout in zip(models, layouts, strict=True)]
    for over in ("choices", "answer"):
        learnt = distil_plan(
            steps=2,
            batch_labelled=2,
            batch_unlabelled=0,
            learning_rate_llm=0.01,
            learning_rate_slm=0.01,
            over=over,
        )
        distil(tuple(models), tuple(layouts), (data, data), learnt, seed=1)  # type: ignore[arg-type]
        for model, layout, old in zip(models, layouts, before, strict=True):
            assert not np.array_equal(to_vector(model, layout), old)
