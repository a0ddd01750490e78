"""A tiny Llama over eight words, and questions about nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, encode

WORDS = [f"w{i}" for i in range(20)]


@dataclass(frozen=True)
class Toy:
    """What the tests of the recipes train."""

    model: Callable[..., Any]
    questions: Callable[..., list[Question]]
    encoded: Callable[..., EncodedQuestions]


def make_model(*, hidden: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS) + 2,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=32,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    return model.to(dtype).eval()


def make_questions(count: int, *, labelled: bool = True, seed: int = 0) -> list[Question]:
    """Prompts of unequal length, two or three choices of one to three words."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    out = []
    for i in range(count):
        choices = tuple(text(1, 3) for _ in range(draw.randint(2, 3)))
        answer = draw.randrange(len(choices)) if labelled else None
        out.append(Question(text(2, 5), choices, answer, group="odd" if i % 2 else "even"))
    return out


@pytest.fixture(scope="session")
def toy() -> Toy:
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", *WORDS])}, "<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    def encoded(count: int, *, labelled: bool = True, seed: int = 0) -> EncodedQuestions:
        return encode(make_questions(count, labelled=labelled, seed=seed), tokenizer, 32)

    return Toy(make_model, make_questions, encoded)
