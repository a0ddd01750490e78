"""What is different about loading a classifier of pictures: its head, and couplings of records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.classifiers import HEAD


def missing_elsewhere(missing: Iterable[str]) -> set[str]:
    """Weights that the files lack, without those of the class head: the study gives it one."""
    return {key for key in missing if key.partition(".")[0] != HEAD}


def without_strangers(model: Any, missing: Iterable[str], source: str) -> Any:
    """``model`` without the random numbers that the library gave it in place of a head.

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
                hint="use a family with layer normalisation, such as ViT, DeiT or CLIP",
            )
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no linear layer called {HEAD} as its class head",
            where=source,
            hint="use a family that docs/vision.md lists, such as ViT, DeiT or CLIP",
        )
    if any(key.partition(".")[0] == HEAD for key in missing):
        setattr(model, HEAD, nn.Identity())
    return model
