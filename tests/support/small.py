"""A study whose small model has room for canaries: made on the spot, trained in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

from securefedcollm.study import Study, study_from_tree
from tests.support.models import llama, word_level

WORDS = tuple(f"w{i}" for i in range(120))


def small_study(directory: Path, **changes: object) -> Study:
    """Its model and question files are in ``directory``."""
    if not (directory / "train.jsonl").exists():
        _make(directory)
    tree = {
        "study": "small",
        "seed": 3,
        "rounds": 2,
        "task": {
            "data": {
                "train": "train.jsonl",
                "test": "test.jsonl",
                "public": 8,
                "public_labelled": 8,
                "per_silo": 240,
            }
        },
        "models": {"llm": {"source": "path:slm"}, "slm": {"source": "path:slm"}},
        "adapter": {"rank": 4},
        "silos": {"count": 3},
        "local": {"steps": 8, "batch_size": 60, "learning_rate": 0.01},
        "privacy": {"epsilon": 0.5, "delta": 1e-5},
        "aggregation": {"clip_norm": 4.0},
    }
    return study_from_tree(tree | changes)


def _make(directory: Path) -> None:
    words = ["<pad>", "<unk>", *WORDS]
    tokenizer = word_level(words, pad_token="<pad>")
    model = llama(
        len(words),
        seed=1,
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model.save_pretrained(directory / "slm")
    tokenizer.save_pretrained(directory / "slm")
    draw = random.Random(5)
    for name, count in (("train", 740), ("test", 8)):
        lines = [
            {
                "question": "w0 " + " ".join(draw.choices(WORDS[1:], k=5)),
                "choices": draw.sample(WORDS[1:], 4),
                "answer": draw.randrange(4),
            }
            for _ in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
