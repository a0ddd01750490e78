"""The base model of :mod:`benchmarks.english`: a small Llama, trained on public text alone.

One thread and a fixed seed: the same weights on the same processor, nearly the same on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812

SEED: Final = 2026
VOCABULARY: Final = 2048
HIDDEN: Final = 128
LAYERS: Final = 2
TOKENS: Final = 64
"""Longest piece of a text in a step."""
BATCH: Final = 32
LEARNING_RATE: Final = 3e-3
WARMUP: Final = 50
PAD, END = "<pad>", "<end>"


def make(texts: Sequence[str], directory: Path, epochs: int) -> list[float]:
    """Write model and tokenizer into ``directory``; returns each epoch's mean loss."""
    torch.set_num_threads(1)
    tokenizer = tokenizer_of(texts)
    pieces = [
        ids[start : start + TOKENS + 1]
        for ids in tokenizer(list(texts))["input_ids"]
        for start in range(0, len(ids) - 4, TOKENS)
    ]
    torch.manual_seed(SEED)
    model = _untrained(tokenizer)
    losses = _train(model, pieces, tokenizer.pad_token_id, epochs)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return losses


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Byte-level BPE of these texts, which can spell any other as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)


def _untrained(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _train(model: Any, pieces: list[list[int]], pad: int, epochs: int) -> list[float]:
    steps = epochs * (len(pieces) // BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    draw = torch.Generator().manual_seed(SEED)
    step, means = 0, []
    for _ in range(epochs):
        order = torch.randperm(len(pieces), generator=draw).tolist()
        total = torch.zeros(())
        for start in range(0, len(pieces) - BATCH + 1, BATCH):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(step / WARMUP, 1 - 0.9 * step / steps)
            ids = _padded([pieces[i] for i in order[start : start + BATCH]], pad)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.mT, ids[:, 1:], ignore_index=pad)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        means.append(float(total) * epochs / steps)
    return means


def _padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
