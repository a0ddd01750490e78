"""No record touches another's gradient, to the bit; padded batches, the control, let it.

Adversary: a server that sends an adapter which amplifies the last bits of floating-point sums until
they are the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from securefedcollm_audits.coupling import hostile_adapters
from transformers import LlamaConfig, LlamaForCausalLM

from securefedcollm.tuning.adapters import attach, layout_of, load_vector, select, to_vector
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.local import records_of
from securefedcollm.tuning.per_record import (
    per_record_gradients,
    question_losses,
    watched,
    without_broken,
)
from securefedcollm.tuning.questions import EncodedQuestions, Question, Scoring, encode
from securefedcollm.tuning.recipe import evaluation_mode

LAYERS, TOP, ADAPTERS, OTHERS = 4, 2, 16, 40
SCORED = Scoring("length", 0.5)


class Letters:
    """One token a letter; nothing of a tokenizer but what ``encode`` calls."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % 60 for letter in text] for text in texts]}


def text(draw: np.random.Generator, least: int, most: int) -> str:
    letters = draw.integers(97, 123, draw.integers(least, most + 1))
    return "".join(chr(letter) for letter in letters)


def questions(kind: str) -> tuple[list[Question], Question]:
    """(others, the one that may be there): mixed lengths and numbers of choices, or copies."""
    draw = np.random.default_rng(5)
    others = [
        Question(
            text(draw, 2, 30),
            tuple(text(draw, 1, 4) for _ in range(draw.integers(2, 5))),
            0,
            subject=f"patient {i // 3}",
        )
        for i in range(OTHERS)
    ]
    if kind == "copies":
        others = [Question("a", ("b", "c"), 1, subject=question.subject) for question in others]
    return others, Question(text(draw, 90, 90), ("some", "two", "x", "y", "z"), 2, subject="new")


def network(dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        base = LlamaForCausalLM(config).to(dtype).eval()
    return attach(base, method="lora", rank=4, top_layers=TOP, seed=1)


def tensors(model: Any, asked: list[Question], prefix: bool, private: bool) -> EncodedQuestions:
    data = encode(asked, Letters(), max_tokens=128)
    return with_prefix(model, data, LAYERS - TOP, 64 if private else None) if prefix else data


def hostile(model: Any) -> list[np.ndarray]:
    layout = layout_of(model, "lora")
    draw = np.random.default_rng(11)
    return list(hostile_adapters(to_vector(model, layout), layout, ADAPTERS, None, draw))


def padded(model: Any, data: EncodedQuestions, loss: Any) -> np.ndarray:
    """Clipped gradients, [n, d], from one batch as long as its longest record."""
    parameters = select(model, layout_of(model, "lora"))
    with evaluation_mode(model), watched(model) as calls:
        whole = data.select(torch.arange(len(data)))
        found = per_record_gradients(question_losses(model, whole, loss, SCORED), parameters, calls)
    return clipped([g.flatten(1).double().numpy() for g in found])


def clipped(blocks: list[np.ndarray]) -> np.ndarray:
    blocks, norms = without_broken(blocks)
    return np.concatenate(blocks, 1) * np.minimum(1.0, 1.0 / np.maximum(norms, 1e-300))[:, None]


def isolated(model: Any, data: EncodedQuestions, loss: Any) -> list[bytes]:
    """Bits of every record's gradient by the product's own path."""
    records = records_of(
        model, layout_of(model, "lora"), data, loss=loss, scoring=SCORED, micro_batch=64
    )
    found: dict[int, bytes] = {}
    with evaluation_mode(model):
        for rows, gradients in records.of_records(np.arange(len(data))):
            for at, row in enumerate(rows.tolist()):
                found[row] = b"".join(g[at].numpy().tobytes() for g in gradients)
    return [found[row] for row in range(len(data))]


@pytest.mark.parametrize("loss", ["choices", "answer"])
@pytest.mark.parametrize("kind", ["mixed", "copies"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hostile_adapter_finds_no_record_in_the_others_bits(
    dtype: torch.dtype, prefix: bool, kind: str, loss: Any
) -> None:
    model = network(dtype)
    layout = layout_of(model, "lora")
    others, added = questions(kind)
    order = np.random.default_rng(2).permutation(OTHERS).tolist()
    sets = {
        "without": others,
        "with": [*others, added],
        "first": [added, *others],
        "reordered": [others[i] for i in order],
        "few": others[:7],
    }
    data = {name: tensors(model, asked, prefix, private=True) for name, asked in sets.items()}
    together, apart = (
        tensors(model, asked, prefix, private=False) for asked in ([*others, added], others)
    )
    moved = 0.0
    for adapter in hostile(model):
        load_vector(model, layout, adapter)
        change = padded(model, together, loss)[:OTHERS] - padded(model, apart, loss)
        moved = max(moved, float(np.linalg.norm(change.sum(0))))
        found = {name: isolated(model, encoded, loss) for name, encoded in data.items()}
        assert found["with"][:OTHERS] == found["without"]
        assert found["first"][1:] == found["without"]
        assert found["reordered"] == [found["without"][i] for i in order]
        assert found["few"] == found["without"][:7]
        assert found["first"][0] == found["with"][-1]
    assert moved > 0.1  # clip norms, in the control
