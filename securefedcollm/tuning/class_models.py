"""What is different about loading a classifier of pictures or recordings: its head, and what would
couple records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.classifiers import HEAD, families, head_of, put_head
from securefedcollm.tuning.head import hears

PROJECTOR: Final = "projector"
"""A layer below the head that some classifiers of recordings have, and bare models lack."""
_MASK: Final = "masked_spec_embed"
_DRAWN: Final = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
"""Settings by which whole layers, moments or frequencies are left out by chance in training."""


def missing_elsewhere(missing: Iterable[str]) -> set[str]:
    """Weights that the files lack, without those that :func:`without_strangers` replaces."""
    return {
        key
        for key in missing
        if key.partition(".")[0] not in {HEAD, PROJECTOR} and not key.endswith(_MASK)
    }


def without_strangers(model: Any, missing: Iterable[str], source: str) -> Any:
    """``model`` without the random numbers that the library gave it in place of a head, and
    without a choice by chance of what it hears in training.

    Adversary: whoever supplies the files. Of a batch normalisation the statistics of a batch decide
    what every record in it becomes.

    Raises:
        ConfigError: it normalises over records, or its head is no linear layer.
    """
    for name, module in model.named_modules():
        # nn.modules.batchnorm._BatchNorm has SyncBatchNorm and all dimensions below it.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"its layer {name} is a batch normalisation: one record would change the others, "
                "and no adapter holds its statistics",
                where=source,
                hint=f"use a family with layer normalisation that {families(model)}",
            )
    if not isinstance(head_of(model), nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no linear layer called {HEAD} as its class head",
            where=source,
            hint=f"use a family that {families(model)}",
        )
    lacking = {key.partition(".")[0] for key in missing}
    if HEAD in lacking:
        put_head(model, nn.Identity())
    if PROJECTOR in lacking:
        setattr(model, PROJECTOR, nn.Identity())
    for key in missing:
        if key.endswith(_MASK):  # it stands for what is masked, and nothing is
            torch.nn.init.zeros_(model.get_parameter(key))
    if hears(model):
        hear_all(model)
    return model


def hear_all(model: Any) -> None:
    """Switch off LayerDrop and SpecAugment, in place.

    One draw decides for a whole batch, or the draws of a batch follow each other: with one record
    more or less, all others would lose other layers and moments.
    """
    for module in model.modules():
        for name, off in _DRAWN.items():
            for place in (module, getattr(module, "config", None)):
                if isinstance(getattr(place, name, None), bool | int | float):
                    setattr(place, name, off)
