"""All weights: their gradients record by record, what travels, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.noise import GridSum
from securefedcollm.tuning.adapters import (
    full_layout,
    layout_of,
    load_adapter,
    load_vector,
    merged,
    save_adapter,
    to_vector,
)
from securefedcollm.tuning.local import members_of, records_of, sum_clipped
from securefedcollm.tuning.per_record import WholeRecords, question_losses
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, choice_scores, encode
from securefedcollm.tuning.recipe import evaluation_mode, inference_mode
from securefedcollm.tuning.whole import WholeModel, tokenizer_files
from tests.support.models import WORDS, llama, make_questions, word_level

VOCABULARY = ["<s>", "<unk>", *WORDS]
SHAPE: dict[str, Any] = {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}


def base_of(kind: str = "llama", *, tied: bool = True) -> Any:
    if kind == "llama":
        return llama(len(VOCABULARY), tie_word_embeddings=tied, **SHAPE)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=len(VOCABULARY), tie_word_embeddings=tied, **sizes, **SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def data_of(count: int = 6) -> EncodedQuestions:
    return encode(make_questions(count), word_level(VOCABULARY), 32)


def records(model: WholeModel, data: EncodedQuestions, loss: Any, **options: Any) -> WholeRecords:
    made = records_of(model, full_layout(model), data, LossPlan(kind=loss), **options)
    assert isinstance(made, WholeRecords)
    return made


def gradients(model: WholeModel, data: EncodedQuestions, loss: Any) -> dict[str, np.ndarray]:
    """Of every record, by the weight's name: [n, …]."""
    found: dict[int, list[torch.Tensor]] = {}
    with evaluation_mode(model):
        for rows, some in records(model, data, loss).of_records(np.arange(len(data))):
            assert len(rows) == 1  # never more of them in memory
            found[int(rows[0])] = [gradient[0] for gradient in some]
    return {
        name: np.stack([found[row][i].numpy() for row in range(len(data))])
        for i, name in enumerate(full_layout(model).names)
    }


def of_opacus(causal: Any, asked: list[Question]) -> dict[str, np.ndarray]:
    """In the library's own forward pass, all records in one batch, padded on the right."""
    read = word_level(VOCABULARY)
    prompts = [read(question.prompt)["input_ids"] for question in asked]
    answers = [read(question.choices[0])["input_ids"] for question in asked]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(asked), longest, dtype=torch.int64)
    labels = torch.full((len(asked), longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    hooked = GradSampleModule(causal.train(), loss_reduction="sum", strict=False)
    logits = hooked(input_ids=tokens, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ).backward()
    found = {name: p.grad_sample.numpy().copy() for name, p in causal.named_parameters()}
    hooked.remove_hooks()
    return found


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus, on numbers of tokens
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_every_kind_of_layer_are_those_of_opacus(tied: bool) -> None:
    """Opacus knows no tied weights: there the gradient is the sum of both layers'."""
    asked = [Question(q.prompt, (q.choices[0],), 0) for q in make_questions(6)]
    base, apart = base_of(tied=tied), base_of(tied=False)
    ours = gradients(WholeModel(base), encode(asked, word_level(VOCABULARY), 32), "answer")
    apart.load_state_dict(base.state_dict())
    theirs = of_opacus(apart, asked)
    if tied:
        theirs["model.embed_tokens.weight"] += theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        np.testing.assert_allclose(found, theirs[name], atol=2e-5, rtol=1e-4, err_msg=name)
        assert np.abs(found).max() > 1e-3, name


@pytest.mark.parametrize("loss", ["answer", "choices"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_lead_to_the_change_that_a_loss_makes(kind: str, loss: Any) -> None:
    """Central differences in float64, along a random direction of all weights: no rule of ours."""
    data, base = data_of(3), base_of(kind)
    model = WholeModel(base)
    found = gradients(model, data, loss)
    draw = np.random.default_rng(0)
    direction = {name: draw.normal(size=values.shape[1:]) for name, values in found.items()}
    causal, step = model.get_base_model().double(), 1e-3

    def losses(at: float) -> np.ndarray:
        with torch.no_grad():
            for name, weight in causal.named_parameters():
                weight.copy_(model.base(name) + at * torch.from_numpy(direction[name]))
            return question_losses(causal, data, loss, PLAIN).double().numpy()

    slope = (losses(step) - losses(-step)) / (2 * step)
    ours = sum((found[name] * direction[name]).reshape(len(data), -1).sum(1) for name in found)
    np.testing.assert_allclose(ours, slope, rtol=0.02, atol=0.02)
    assert np.abs(slope).max() > 0.5


def test_a_unit_is_the_sum_of_its_records_and_clipped_as_one() -> None:
    data, model = data_of(), WholeModel(base_of())
    flat = np.concatenate(
        [g.reshape(len(data), -1) for g in gradients(model, data, "answer").values()], axis=1
    ).astype(np.float64)
    members = members_of(len(data), ["a", "b", "a", "c", "b", "a"])
    made = records(model, data, "answer", members=members)
    with evaluation_mode(model):
        sizes = [len(blocks[0]) for blocks in made.of_units(np.arange(3))]
        total = GridSum(flat.shape[1], 0.5, 0.5, 3)
        sum_clipped(total, made, np.arange(3))
    assert sizes == [1, 1, 1]  # one in memory at a time
    units = np.stack([flat[rows].sum(0) for rows in ([0, 2, 5], [1, 4], [3])])
    units *= np.minimum(1, 0.5 / np.linalg.norm(units, axis=1))[:, None]
    np.testing.assert_allclose(total.integers * 0.5 / 2.0**46, units.sum(0), atol=1e-9)


def test_what_travels_is_the_difference_and_a_tied_weight_is_there_once() -> None:
    base = base_of()
    model = WholeModel(base)
    layout = layout_of(model, "full")
    assert layout == full_layout(model)
    assert list(layout.names) == sorted(layout.names)
    assert "lm_head.weight" not in layout.names
    assert layout.size == sum(p.numel() for p in base.parameters())
    assert not to_vector(model, layout).any()
    change = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    load_vector(model, layout, change)
    np.testing.assert_allclose(to_vector(model, layout), change, atol=1e-6)
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())
    causal = model.get_base_model()
    assert causal.lm_head.weight is causal.model.embed_tokens.weight


def test_a_difference_that_was_taken_is_taken_up_bit_for_bit() -> None:
    """Server and silos add the same vector to the same base: they must have the same weights, and
    say the same of them, also where the sum was rounded."""
    base = torch.nn.Linear(500, 1000, bias=False)
    draw = np.random.default_rng(0)

    def wild(shape: Any) -> np.ndarray:
        return (draw.normal(size=shape) * 10.0 ** draw.integers(-9, 3, shape)).astype(np.float32)

    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(wild((1000, 500))))
    server, silo = WholeModel(base), WholeModel(base)
    layout = full_layout(server)
    load_vector(server, layout, wild(layout.size))
    sent = to_vector(server, layout)
    load_vector(silo, layout, sent)
    assert np.array_equal(to_vector(silo, layout), sent)


def test_the_base_is_there_while_it_is_asked_for() -> None:
    data, base = data_of(), base_of()
    model = WholeModel(base)
    layout = full_layout(model)
    load_vector(model, layout, np.full(layout.size, 0.1))
    with inference_mode(model):
        tuned = choice_scores(model, data)
        with model.disable_adapter():
            plain = choice_scores(model, data)
        assert torch.equal(plain, choice_scores(base, data))
        assert torch.equal(tuned, choice_scores(model, data))
    assert not torch.allclose(tuned, plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_released_model_is_one_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    data, base = data_of(), base_of(kind)
    model = WholeModel(base)
    layout = full_layout(model)
    load_vector(model, layout, np.random.default_rng(1).normal(scale=0.1, size=layout.size))
    save_adapter(model, tmp_path / "slm", tokenizer_files(word_level(VOCABULARY)))
    with inference_mode(model):
        ours = choice_scores(model, data)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slm")
    for again in (plain, load_adapter(base_of(kind), tmp_path / "slm")):
        with inference_mode(again):
            assert torch.equal(choice_scores(again, data), ours)
    assert merged(base, tmp_path / "slm") is base
    with pytest.raises(ConfigError, match="was tuned from another base model"):
        load_adapter(llama(len(VOCABULARY), hidden_size=32), tmp_path / "slm")


def test_weights_of_few_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="small steps of a whole model would be rounded away"):
        WholeModel(base_of().bfloat16())
