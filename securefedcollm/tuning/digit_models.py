"""The built-in classifiers of digits: two tiny ViTs, pretrained here on first use and cached.

Both see ordinary digits of the embedded world (:mod:`.digits`). The small one saw little of four of
the ten, so that each model has something to learn from the other. Pretraining takes about half a
minute on one core and is deterministic on one machine, as that of the hospitals' models
(:mod:`.builtin`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812

from securefedcollm.tuning import digits
from securefedcollm.tuning.image_processor import ImageProcessor
from securefedcollm.tuning.making import Making, made, make_all, one_thread, place
from securefedcollm.tuning.recipe import Progress, quiet_transformers, silent, training_mode

_GENERATOR_VERSION: Final = 1


@dataclass(frozen=True)
class Recipe:
    """Architecture and pretraining of one built-in classifier."""

    hidden: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    learning_rate: float
    seldom: float
    weight_decay: float = 0.05
    warmup_steps: int = 30


RECIPES: Final[dict[str, Recipe]] = {
    "digits-large": Recipe(
        hidden=64,
        layers=3,
        heads=4,
        steps=500,
        batch_size=128,
        learning_rate=2e-3,
        seldom=1.0,
    ),
    "digits-small": Recipe(
        hidden=32,
        layers=2,
        heads=4,
        steps=800,
        batch_size=64,
        learning_rate=4e-3,
        seldom=0.05,
    ),
}


def digit_model(name: str, *, cache_dir: Path, progress: Progress) -> tuple[Any, ImageProcessor]:
    """The built-in classifier ``name`` and its processor, from the cache or made now.

    Returns:
        ``(ViTForImageClassification float32 in evaluation mode, ImageProcessor)``.

    Raises:
        StateError: the cache cannot be written.
    """
    from transformers import ViTForImageClassification

    directory = made(making_of(name, cache_dir), progress)
    with quiet_transformers():
        model = ViTForImageClassification.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    return model.eval(), make_processor()


def making_of(name: str, cache_dir: Path) -> Making:
    """How the classifier ``name`` is made."""
    recipe = RECIPES[name]
    shaped_by = [_GENERATOR_VERSION, digits.VERSION, digits.PUBLIC_SEED, asdict(recipe)]
    return Making(
        name=name,
        directory=place(cache_dir, name, shaped_by),
        steps=recipe.steps * recipe.batch_size,
        make=partial(pretrain, name),
        tokenizer=make_processor,
    )


def prepare(
    cache_dir: Path, progress: Progress = silent, *, context: BaseContext | None = None
) -> None:
    """Make both classifiers that are not cached yet; see :func:`.making.make_all`."""
    make_all([making_of(name, cache_dir) for name in RECIPES], progress, context)


def make_processor() -> ImageProcessor:
    """How both see a picture: 16 × 16 shades of grey, from −1 to 1."""
    return ImageProcessor(
        height=digits.SIDE,
        width=digits.SIDE,
        channels=1,
        resize=(digits.SIDE, digits.SIDE),
        resample=2,
        factor=1 / 255,
        mean=(0.5,),
        std=(0.5,),
    )


def pretrain(name: str, progress: Progress) -> Any:
    """Train the classifier ``name`` from scratch: one pass over the public pictures, one thread."""
    from transformers import ViTForImageClassification

    recipe = RECIPES[name]
    pictures, shown = digits.pretraining(recipe.steps * recipe.batch_size, seldom=recipe.seldom)
    batches = zip(
        torch.split(torch.from_numpy(pictures)[:, None], recipe.batch_size),
        torch.split(torch.from_numpy(shown), recipe.batch_size),
        strict=True,
    )
    seed, total = digits.PUBLIC_SEED, len(shown)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = ViTForImageClassification(architecture(recipe))
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        )
        with training_mode(model, seed=seed):
            for step, (some, labels) in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = _scheduled(recipe, step)
                logits = model(pixel_values=some.float() / 127.5 - 1).logits
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(logits, labels))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                progress((step + 1) * recipe.batch_size, total, f"pretraining {name}")
    return model.eval()


def _scheduled(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to 2 %."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * warmup * (0.02 + 0.98 * cosine)


def architecture(recipe: Recipe) -> Any:
    """The ``ViTConfig`` of a classifier made by ``recipe``."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=3 * recipe.hidden,
        image_size=digits.SIDE,
        patch_size=digits.SIDE // 4,
        num_channels=1,
        id2label=dict(enumerate(digits.LABELS)),
        label2id={label: i for i, label in enumerate(digits.LABELS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
