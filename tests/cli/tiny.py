"""A study that runs in seconds: two tiny random models and question files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

COLOURS = ("red", "blue", "green", "grey")
THINGS = tuple(f"thing{i}" for i in range(12))


def make_inputs(directory: Path, more: tuple[str, ...] = (), chat: str | None = None) -> Path:
    """Models and data in ``directory``; returns the study's file.

    ``more``: further words that the tokenizer knows; ``chat``: its chat template.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "Question:", "Answer:", "colour", "of", *COLOURS, *THINGS, *more]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = chat
    for seed, (name, width) in enumerate((("llm", 32), ("slm", 16))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    write_questions(directory / "train.jsonl", 160, 0)
    write_questions(directory / "test.jsonl", 24, 1)
    study = {
        "study": "tiny",
        "rounds": 2,
        "seed": 3,
        "task": {
            "data": {
                "train": "train.jsonl",
                "test": "test.jsonl",
                "public": 32,
                "public_labelled": 8,
                "per_silo": 32,
            }
        },
        "models": {"llm": {"source": "path:llm"}, "slm": {"source": "path:slm"}},
        "adapter": {"rank": 2},
        "silos": {"count": 4},
        "local": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        "privacy": {"epsilon": 8, "delta": 1e-5},
        "distillation": {"steps": 2, "batch_labelled": 4, "batch_unlabelled": 8},
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def write_questions(path: Path, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lines = []
    for i in range(count):
        thing = THINGS[i % len(THINGS)]
        second, third = THINGS[(7 * i + seed) % 12], THINGS[i // 12 % 12]
        order = torch.randperm(4, generator=draw).tolist()
        lines.append(
            {
                "question": f"colour of {thing} {second} {third}",
                "choices": [COLOURS[o] for o in order],
                "answer": order.index(i % len(THINGS) % 4),
                "patient": i // 4,
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
