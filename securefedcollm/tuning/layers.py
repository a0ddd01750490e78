"""The decoder layers of a model, running only some of them, and keeping less of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.head import text_config, unwrapped


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a transformers ``model``, whatever its family calls it.

    Raises:
        ConfigError: the model has no such list.
    """
    depth = text_config(model).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and not _filters(module):
            return module
    raise ConfigError(
        f"no list of {depth} decoder layers in {type(model).__name__}",
        where="model",
        hint="use a decoder-only transformer with one list of layers",
    )


def _filters(layers: nn.ModuleList) -> bool:
    """Whether they are convolutions without any matrix, as below a model that hears."""
    found = False
    for weight in layers.parameters():
        if weight.ndim == 2:
            return False
        found = True
    return found


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


def checkpointed(model: Any, where: str) -> None:
    """From now on ``model`` keeps only the input of each decoder layer in training mode.

    The backward pass computes each layer again, with the same dropout.

    Args:
        where: the study's key that asks for it.

    Raises:
        ConfigError: transformers cannot do so for this family.
    """
    causal = unwrapped(model)
    enable = getattr(causal, "activation_checkpointing_enable", None)
    try:
        # Older versions of the library know the second name alone.
        (enable or causal.gradient_checkpointing_enable)({"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"the layers of {type(causal).__name__} cannot be computed again for the gradients",
            where=where,
            hint="remove it",
        ) from error
    # The library lets the embeddings' output need a gradient, for an older kind of checkpointing.
    with suppress(AttributeError):
        causal.disable_input_require_grads()
