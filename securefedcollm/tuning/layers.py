"""The decoder layers of a model, and running only some of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from securefedcollm.errors import ConfigError


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a transformers ``model``, whatever its family calls it.

    Raises:
        ConfigError: the model has no such list.
    """
    depth = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(
        f"no list of {depth} decoder layers in {type(model).__name__}",
        where="model",
        hint="use a decoder-only transformer with one list of layers",
    )


class Passed(nn.Module):
    """Stands in for a decoder layer: hands its input on, and keeps it for whoever asks."""

    seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states


@contextmanager
def passed_over(model: Any, start: int, stop: int) -> Iterator[Passed]:
    """Leave out the decoder layers ``start`` to ``stop`` − 1 of ``model`` for a while.

    The other layers keep their names, parameters and hooks.
    """
    layers = decoder_layers(model)
    kept = list(layers)
    passed = Passed()
    for index in range(start, stop):
        layers[index] = passed
    try:
        yield passed
    finally:
        for index in range(start, stop):
            layers[index] = kept[index]
