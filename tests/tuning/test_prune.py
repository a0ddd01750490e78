"""Leaving layers out of a model, and healing what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError, DataError, TrainingError
from securefedcollm.tuning.identity import weights_digest
from securefedcollm.tuning.layers import decoder_layers, passed_over
from securefedcollm.tuning.prune import (
    block_influence,
    choose_layers,
    heal,
    perplexity,
    pruned,
    token_windows,
)
from tests.support.models import llama

VOCABULARY = 40


def small_llama(layers: int = 4, tied: bool = True) -> Any:
    return llama(
        VOCABULARY,
        num_hidden_layers=layers,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


def gpt2() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, initializer_range=0.2
        )
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [small_llama, lambda: small_llama(tied=False), gpt2])
def test_a_pruned_model_is_the_model_without_those_layers(make: Any, windows: torch.Tensor) -> None:
    model = make()
    before = weights_digest(model)
    small = pruned(model, [0, 2, 3])
    assert small.config.num_hidden_layers == len(decoder_layers(small)) == 3
    layers = decoder_layers(model)
    kept = [layers[i] for i in (0, 2, 3)]
    with torch.no_grad():
        got = small(windows, use_cache=False).logits
        del layers[1]
        model.config.num_hidden_layers = 3
        assert list(layers) == kept
        torch.testing.assert_close(got, model(windows, use_cache=False).logits)
    # Copies: training the small one must not touch the large one.
    model = make()
    small = pruned(model, [0, 2, 3])
    with torch.no_grad():
        for weight in small.parameters():
            weight.add_(1.0)
    assert weights_digest(model) == before


def test_the_least_influential_layer_goes(windows: torch.Tensor) -> None:
    model = small_llama()
    idle = decoder_layers(model)[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.mul_(1e-3)
        idle.mlp.down_proj.weight.mul_(1e-3)
    influence = block_influence(model, windows)
    assert len(influence) == 4
    assert influence[2] == pytest.approx(0, abs=1e-4)
    assert choose_layers(model, windows, 3) == [0, 1, 3]
    assert choose_layers(model, windows, 1) == [max(range(4), key=influence.__getitem__)]
    with passed_over(model, 2, 3):
        assert block_influence(model, windows)[2] == pytest.approx(0, abs=1e-6)
    for keep in (0, 4, 9):
        with pytest.raises(ConfigError, match="cannot be kept"):
            choose_layers(model, windows, keep)


def test_perplexity_is_that_of_the_library(windows: torch.Tensor) -> None:
    model = small_llama()
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert perplexity(model, windows, batch_size=5) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_healing_brings_the_copy_back_to_its_teacher(windows: torch.Tensor) -> None:
    teacher = small_llama()
    student = pruned(teacher, [0, 1, 3])
    frozen = student.get_input_embeddings().weight.detach().clone()
    before = weights_digest(teacher)
    losses = heal(student, teacher, windows, steps=40, batch_size=6, learning_rate=5e-3, seed=2)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(student.get_input_embeddings().weight, frozen)
    assert weights_digest(teacher) == before

    again = pruned(teacher, [0, 1, 3])
    heal(again, teacher, windows, steps=40, batch_size=6, learning_rate=5e-3, seed=2)
    assert weights_digest(again) == weights_digest(student)


def test_the_chunked_loss_is_the_whole_loss(windows: torch.Tensor) -> None:
    from securefedcollm.tuning.prune import _kd_backward

    teacher, student = small_llama(), pruned(small_llama(), [0, 3])
    student.requires_grad_(False)
    decoder_layers(student).requires_grad_(True)
    reported = _kd_backward(student, teacher, windows)
    got = [p.grad.clone() for p in decoder_layers(student).parameters()]
    student.zero_grad()
    guess = F.log_softmax(student(windows).logits.double(), -1)
    with torch.no_grad():
        wanted = F.log_softmax(teacher(windows).logits.double(), -1)
    loss = (wanted.exp() * (wanted - guess)).sum() / windows.numel()
    loss.backward()
    assert reported == pytest.approx(loss.item(), rel=1e-5)
    for have, parameter in zip(got, decoder_layers(student).parameters(), strict=True):
        torch.testing.assert_close(have, parameter.grad, rtol=1e-4, atol=1e-6)


def test_healing_that_diverges_says_so(windows: torch.Tensor) -> None:
    teacher = small_llama()
    broken = pruned(teacher, [0])
    with torch.no_grad():
        decoder_layers(broken)[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        heal(broken, teacher, windows, steps=2)


class Words:
    eos_token_id = 39

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def test_windows_hold_the_texts_in_order() -> None:
    windows = token_windows(["a bb ccc", "dddd e ff g"], Words(), 3)
    assert windows.tolist() == [[1, 2, 3], [39, 4, 1], [2, 1, 39]]
    assert token_windows(["a bb ccc", "d"], Words(), 5).tolist() == [[1, 2, 3, 39, 1]]
    with pytest.raises(DataError, match="do not fill one window"):
        token_windows(["a"], Words(), 5)
