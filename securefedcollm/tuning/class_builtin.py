"""The built-in classifiers: two tiny ViTs of digits, and two tiny ASTs of spoken words.

They are pretrained here on first use and cached. Both of a pair know what is ordinary in their
embedded world (:mod:`.digits`, :mod:`.wards`). The small one saw or heard little of some classes,
so that each model has something to learn from the other. Pretraining takes about half a minute on
one core and is deterministic on one machine, as that of the hospitals' models (:mod:`.builtin`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from securefedcollm.tuning import digits, wards
from securefedcollm.tuning.audio_processor import AudioProcessor
from securefedcollm.tuning.image_processor import ImageProcessor
from securefedcollm.tuning.making import Making, made, make_all, one_thread, place
from securefedcollm.tuning.recipe import Progress, quiet_transformers, silent, training_mode
from securefedcollm.tuning.sounds import RATE, pack

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
    "wards-large": Recipe(
        hidden=64,
        layers=3,
        heads=4,
        steps=350,
        batch_size=64,
        learning_rate=2e-3,
        seldom=1.0,
    ),
    "wards-small": Recipe(
        hidden=32,
        layers=2,
        heads=4,
        steps=450,
        batch_size=64,
        learning_rate=4e-3,
        seldom=0.05,
    ),
}


class World(NamedTuple):
    """What the classifiers of one embedded world are, and learn from.

    ``kind``: of ``transformers``' classes. ``shaped_by``: numbers that change with the models.
    ``batches``: inputs, float32 [B, …], and labels, int64 [B], for every step of a recipe.
    """

    kind: str
    shaped_by: tuple[int, int]
    processor: Callable[[], Any]
    architecture: Callable[[Recipe], Any]
    batches: Callable[[Recipe], Any]


def world_of(name: str) -> World:
    """The world of the built-in classifier ``name``."""
    return WORLDS[name.partition("-")[0]]


def classifier(name: str, *, cache_dir: Path, progress: Progress) -> tuple[Any, Any]:
    """The built-in classifier ``name`` and its processor, from the cache or made now.

    Returns:
        ``(model, float32 in evaluation mode, ImageProcessor or AudioProcessor)``.

    Raises:
        StateError: the cache cannot be written.
    """
    directory = made(making_of(name, cache_dir), progress)
    with quiet_transformers():
        model = _class_of(name).from_pretrained(
            directory, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    return model.eval(), world_of(name).processor()


def _class_of(name: str) -> Any:
    import transformers

    return getattr(transformers, world_of(name).kind)


def making_of(name: str, cache_dir: Path) -> Making:
    """How the classifier ``name`` is made."""
    recipe, world = RECIPES[name], world_of(name)
    return Making(
        name=name,
        directory=place(cache_dir, name, [_GENERATOR_VERSION, *world.shaped_by, asdict(recipe)]),
        steps=recipe.steps * recipe.batch_size,
        make=partial(pretrain, name),
        tokenizer=world.processor,
    )


def prepare(
    pair: str,
    cache_dir: Path,
    progress: Progress = silent,
    *,
    context: BaseContext | None = None,
) -> None:
    """Make both classifiers of a ``pair``, such as ``digits``, that are not cached yet; see
    :func:`.making.make_all`."""
    names = [name for name in RECIPES if name.partition("-")[0] == pair]
    make_all([making_of(name, cache_dir) for name in names], progress, context)


def pretrain(name: str, progress: Progress) -> Any:
    """Train the classifier ``name`` from scratch on its world's pretraining part, in one thread."""
    recipe, world = RECIPES[name], world_of(name)
    total = recipe.steps * recipe.batch_size
    with one_thread(), torch.random.fork_rng(devices=[]):
        batches = world.batches(recipe)
        torch.manual_seed(world.shaped_by[1])
        model: Any = _class_of(name)(world.architecture(recipe))
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        )
        with training_mode(model, seed=world.shaped_by[1]):
            for step, (some, labels) in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = _scheduled(recipe, step)
                logits = model(**{model.main_input_name: some}).logits
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


def architecture(name: str) -> Any:
    """The configuration of the built-in classifier ``name``."""
    return world_of(name).architecture(RECIPES[name])


def _named(labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _shape(recipe: Recipe) -> dict[str, Any]:
    return {
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "intermediate_size": 3 * recipe.hidden,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.05,
    }


def _vit(recipe: Recipe) -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        image_size=digits.SIDE,
        patch_size=digits.SIDE // 4,
        num_channels=1,
        **_shape(recipe),
        **_named(digits.LABELS),
    )


def _seen() -> ImageProcessor:
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


def _pictures(recipe: Recipe) -> Any:
    """One pass over drawn digits."""
    pictures, shown = digits.pretraining(recipe.steps * recipe.batch_size, seldom=recipe.seldom)
    parts = torch.split(torch.from_numpy(pictures)[:, None], recipe.batch_size)
    return zip(
        (some.float() / 127.5 - 1 for some in parts),
        torch.split(torch.from_numpy(shown), recipe.batch_size),
        strict=True,
    )


_BINS, _PATCH = 32, 16


def _ast(recipe: Recipe) -> Any:
    from transformers import ASTConfig

    return ASTConfig(
        num_mel_bins=_BINS,
        max_length=wards.SAMPLES // 160,
        patch_size=_PATCH,
        frequency_stride=_PATCH,
        time_stride=_PATCH,
        **_shape(recipe),
        **_named(wards.LABELS),
    )


def _heard() -> AudioProcessor:
    """How both hear a recording: 32 mel bands in 80 steps of 10 ms."""
    return AudioProcessor("kaldi", True, _BINS, wards.SAMPLES // 160, -2.6, 1.6)


def _recordings(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Passes over some thousand drawn words."""
    said: Any
    recorded, said = wards.pretraining(POOL, seldom=recipe.seldom)
    values = _heard().hearing(wards.SAMPLES / RATE)([pack(one) for one in recorded]).values
    said = torch.from_numpy(said)
    draw = np.random.default_rng(wards.PUBLIC_SEED)
    for _ in range(recipe.steps):
        some = torch.from_numpy(draw.choice(POOL, recipe.batch_size, replace=False))
        yield values[some], said[some]


POOL: Final = 4000
WORLDS: Final = {
    "digits": World(
        "ViTForImageClassification", (digits.VERSION, digits.PUBLIC_SEED), _seen, _vit, _pictures
    ),
    "wards": World(
        "ASTForAudioClassification", (wards.VERSION, wards.PUBLIC_SEED), _heard, _ast, _recordings
    ),
}
"""By the first part of the models' names."""
