"""Toy models and tokenizers, made on the spot.

``llama`` and ``word_level`` are enough for most tests; ``Toy`` is both with questions to answer, as
the tests of the recipes want them. ``byte_level`` and ``sentence_piece`` cut the same text
differently, for a teacher and a student that share no tokens. Models of other families stay in the
tests that are about them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, encode

WORDS = [f"w{i}" for i in range(20)]
"""The toy's vocabulary, after ``<s>`` and ``<unk>``."""


def llama(vocabulary: int, *, seed: int = 0, **shape: Any) -> Any:
    """A random Llama in evaluation mode; the same ``seed`` and ``shape`` give the same weights.

    Args:
        vocabulary: number of tokens.
        shape: more of its configuration; else two layers of 16 values with two heads.
    """
    usual = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=vocabulary, **(usual | shape))
        return LlamaForCausalLM(config).eval()


def word_level(words: Sequence[str], unknown: str = "<unk>", **special: str) -> Any:
    """A tokenizer that cuts at white space; the n-th of ``words`` is token n.

    Args:
        unknown: which of them stands for all others.
        special: as ``bos_token="<s>"``.
    """
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, **special)


@dataclass(frozen=True)
class Toy:
    """What the tests of the recipes train."""

    model: Callable[..., Any]
    questions: Callable[..., list[Question]]
    encoded: Callable[..., EncodedQuestions]


def make_model(*, hidden: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama over the toy's vocabulary."""
    return llama(
        len(WORDS) + 2,
        seed=seed,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    ).to(dtype)


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


def make_toy() -> Toy:
    """Models, and questions about nothing for them."""
    tokenizer = word_level(["<s>", "<unk>", *WORDS])

    def encoded(count: int, *, labelled: bool = True, seed: int = 0) -> EncodedQuestions:
        return encode(make_questions(count, labelled=labelled, seed=seed), tokenizer, 32)

    return Toy(make_model, make_questions, encoded)


CORPUS = [
    "the newspaper said naïve things about the über-cool café today",
    "a paper about new things said the café is cool today",
    "things said today about the new naïve paper",
]


def byte_level() -> Any:
    """As GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end)


def sentence_piece() -> Any:
    """As Llama 2's: spaces are ▁, what is unknown falls back to bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS[1:], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
