"""Tiny models of many families, and questions whose choices share a row if the family can."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from securefedcollm.tuning.packing import ANY_LENGTH
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, encode
from tests.support.models import WORDS

WINDOW = 16
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {
    **SIZES,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GEMMA3 = Gemma3TextConfig(
    **HEADS, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
)
MPT = MptConfig(vocab_size=40, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)
FAMILIES: dict[str, tuple[Any, int]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**HEADS)), ANY_LENGTH),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(**SIZES, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16)
        ),
        ANY_LENGTH,
    ),
    "gemma3": (lambda: Gemma3ForCausalLM(GEMMA3), WINDOW),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**HEADS, sliding_window=WINDOW)), WINDOW),
    "mpt": (lambda: MptForCausalLM(MPT), 0),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**SIZES, n_head=2)), 0),
    "falcon": (
        lambda: FalconForCausalLM(FalconConfig(**SIZES, num_attention_heads=2, alibi=True)),
        0,
    ),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)), 0),
    "lfm2": (
        lambda: Lfm2ForCausalLM(Lfm2Config(**HEADS, layer_types=["conv", "full_attention"])),
        0,
    ),
}


def made(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name][0]().eval()


class Numbers:
    """w7 is token 9: no vocabulary, no files."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str], **unused: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + int(word[1:]) for word in text.split()] for text in texts]}


def questions(longest: int = 6) -> list[Question]:
    """Choices of one to four words; prompts of up to ``longest`` words."""
    draw = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(least, most + 1)))

    lengths = (2, longest, 4, longest)
    return [Question(words(n, n), tuple(words(1, 4) for _ in range(3)), 1) for n in lengths]


def encoded(longest: int = 6) -> EncodedQuestions:
    return encode(questions(longest), Numbers(), 256)
