"""A cached prefix of frozen layers changes the time, not the scores or the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import attach, layout_of
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.layers import decoder_layers, passed_over
from securefedcollm.tuning.local import train_dp, train_plain
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, choice_scores, encode
from tests.support.models import llama
from tests.support.plans import protection, train_plan

LAYERS, TOP = 5, 2


class Letters:
    """One token a letter; nothing of a tokenizer but what ``encode`` calls."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % 30 for letter in text] for text in texts]}


def adapted(seed: int = 0) -> Any:
    base = llama(
        32, seed=seed, intermediate_size=24, num_hidden_layers=LAYERS, num_key_value_heads=1
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    model = attach(base, method="lora", rank=2, targets=targets, top_layers=TOP, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture
def data() -> EncodedQuestions:
    questions = [
        Question("which one?", ("abc", "de", "fgh"), 1),
        Question("a longer prompt this is", ("x", "yz"), 0),
        Question("so?", ("no", "yes indeed", "it is"), 2),
    ]
    return encode(questions, Letters(), max_tokens=64)


def test_scores_and_gradients_are_those_of_the_whole_model(data: EncodedQuestions) -> None:
    model = adapted()
    cached = with_prefix(model, data, LAYERS - TOP)
    rows = torch.tensor([2, 0])
    results = []
    for questions in (data, cached):
        model.zero_grad()
        scores = choice_scores(model, questions.select(rows))
        scores[torch.isfinite(scores)].pow(2).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append((scores.detach(), torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0


def test_the_layers_below_are_not_run(data: EncodedQuestions) -> None:
    model = adapted()
    cached = with_prefix(model, data, LAYERS - TOP)
    layers = decoder_layers(model.get_base_model())
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        choice_scores(model, cached)
    assert ran == [3, 4]


def test_training_takes_the_same_steps(data: EncodedQuestions) -> None:
    deltas = []
    for use_cache in (False, True):
        model = adapted()
        layout = layout_of(model, "lora")
        questions = with_prefix(model, data, LAYERS - TOP) if use_cache else data
        plan = train_plan(steps=3, batch_size=2, learning_rate=1e-2)
        plain = train_plain(model, layout, questions, plan, seed=4).delta
        plan = train_plan(steps=2, batch_size=3, learning_rate=1e-2, optimizer="sgd")
        quiet, noise = protection(clip_norm=0.1, noise_multiplier=1e-3), NoiseSource()
        private = train_dp(model, layout, questions, plan, quiet, noise=noise).delta
        deltas.append(np.concatenate([plain, private]))
    np.testing.assert_allclose(deltas[0], deltas[1], atol=1e-4)
    assert np.abs(deltas[0]).max() > 1e-3


def test_models_that_add_positions_to_the_input_are_left_alone(data: EncodedQuestions) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2))
    assert with_prefix(model, data, 1) is data


def test_layers_come_back_after_a_failure() -> None:
    model = adapted().get_base_model()
    before = list(decoder_layers(model))
    with pytest.raises(ZeroDivisionError), passed_over(model, 0, 3):
        raise ZeroDivisionError
    assert list(decoder_layers(model)) == before


def test_scores_without_gradients_are_chunked_and_the_same(
    data: EncodedQuestions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from securefedcollm.tuning import questions as module

    model = adapted()
    whole = choice_scores(model, data).detach()
    for chunk in (1, 3, 256):
        monkeypatch.setattr(module, "HEAD_CHUNK", chunk)
        with torch.no_grad():
            torch.testing.assert_close(choice_scores(model, data), whole)
