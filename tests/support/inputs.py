"""A study that runs in seconds: two tiny random models and question files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from tests.support.models import llama, word_level

COLOURS = ("red", "blue", "green", "grey")
THINGS = tuple(f"thing{i}" for i in range(12))


def make_inputs(directory: Path, more: tuple[str, ...] = (), chat: str | None = None) -> Path:
    """Models and data in ``directory``; returns the study's file.

    ``more``: further words that the tokenizer knows; ``chat``: its chat template.
    """
    words = ["<pad>", "<unk>", "Question:", "Answer:", "colour", "of", *COLOURS, *THINGS, *more]
    tokenizer = word_level(words, pad_token="<pad>")
    tokenizer.chat_template = chat
    for seed, (name, width) in enumerate((("llm", 32), ("slm", 16))):
        model = llama(
            len(words),
            seed=seed,
            hidden_size=width,
            intermediate_size=2 * width,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        model.save_pretrained(directory / name)
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


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def tuned(inputs, out, adapter=None, models=None, **task):
    """A run without privacy that learns something, so that accuracy is no accident."""
    tree = yaml.safe_load((inputs / "tiny.yaml").read_text())
    tree["adapter"] = adapter or tree["adapter"]
    if task.get("kind") == "classification":
        data = {"train": "train-labels.jsonl", "test": "test-labels.jsonl"}
        tree["task"]["data"] |= data
    for ours, theirs in task.get("columns", {}).items():
        for file in (tree["task"]["data"]["train"], tree["task"]["data"]["test"]):
            text = (inputs / file).read_text().replace(f'"{ours}":', f'"{theirs}":')
            (inputs / f"own-{file}").write_text(text)
        tree["task"]["data"] |= {name: f"own-{tree['task']['data'][name]}" for name in
                                 ("train", "test")}  # fmt: skip
    tree["task"] |= task
    for name, keys in (models or {}).items():
        tree["models"][name] |= keys
    tree |= {"privacy": None, "rounds": 1}
    tree["local"] = {"steps": 30, "batch_size": 16, "learning_rate": 0.05}
    tree["distillation"]["steps"] = 20
    (inputs / "study.yaml").write_text(yaml.safe_dump(tree))
    words = ["simulate", inputs / "study.yaml", "--data", inputs, "--out", out]
    invoke(*words, "--workers", "0", "--no-baselines", "--json")
    return inputs / tree["task"]["data"]["test"]
