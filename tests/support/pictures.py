"""Tiny random classifiers of pictures, and studies that tune them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from securefedcollm.study import Study
from securefedcollm.tuning.image_processor import ImageProcessor
from securefedcollm.tuning.pictures import pack, question_of
from securefedcollm.tuning.question import Question
from tests.support.signals import LABELS, NAMED, tiny_signal_study

SIDE: Final = 8
SHAPE: Final = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def clip_config(**more: Any) -> Any:
    sight = CLIPVisionConfig(**SHAPE, projection_dim=8)
    words = CLIPTextConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    return CLIPConfig(
        text_config=words.to_dict(), vision_config=sight.to_dict(), projection_dim=8, **more
    )


FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "ViT": lambda: ViTForImageClassification(ViTConfig(**SHAPE, **NAMED)),
    "DeiT": lambda: DeiTForImageClassification(DeiTConfig(**SHAPE, **NAMED)),
    "CLIP": lambda: CLIPForImageClassification(clip_config(**NAMED)),
}
HEADLESS: Final[dict[str, Callable[[], Any]]] = {
    "ViT": lambda: ViTModel(ViTConfig(**SHAPE)),
    "CLIP": lambda: CLIPModel(clip_config()),
}


def saved(directory: Path, make: Callable[[], Any], seed: int = 0) -> Path:
    """A random model of that kind, as a directory that ``path:`` reads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    model.save_pretrained(directory)
    processor().save_pretrained(directory)
    return directory


def processor(**changes: Any) -> ImageProcessor:
    """Pictures of :data:`SIDE` pixels, resized if need be."""
    usual: dict[str, Any] = {
        "height": SIDE,
        "width": SIDE,
        "channels": 3,
        "resize": (SIDE, SIDE),
        "resample": 2,
        "factor": 1 / 255,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.25, 0.2),
    }
    return ImageProcessor(**(usual | changes))


def noise(count: int, seed: int = 0, labels: tuple[str, ...] = LABELS) -> list[Question]:
    """Pictures of noise with labels in turn."""
    draw = np.random.default_rng(seed)
    return [
        question_of(
            pack(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)), labels, i % len(labels)
        )
        for i in range(count)
    ]


def tiny_study(directory: Path, **changes: Any) -> Study:
    """The built-in digits on two tiny random ViTs in ``directory``, with joint noise."""
    if not (directory / "slm").exists():
        grey = {"num_channels": 1, "image_size": 16, "patch_size": 8}
        for name, width in (("slm", 16), ("llm", 24)):
            shape = {**SHAPE, **grey, "hidden_size": width}
            saved(
                directory / name, lambda shape=shape: ViTForImageClassification(ViTConfig(**shape))
            )
            processor(
                height=16, width=16, resize=None, channels=1, mean=(0.5,), std=(0.5,)
            ).save_pretrained(directory / name)
    task = {"kind": "image_classification", "labels": [*"0123456789"]}
    return tiny_signal_study(task, "digits", **changes)
