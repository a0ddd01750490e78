"""Which layers of a model get a low-rank adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.tuning.classifiers import HEAD
from securefedcollm.tuning.head import sees, text_config, unwrapped
from securefedcollm.tuning.layers import decoder_layers


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Each name must be a linear layer's, or the end of one: PEFT trains whatever it finds."""
    modules = {name: m for name, m in unwrapped(model).named_modules() if name}
    linear = [name for name, module in modules.items() if _is_linear(module)]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:20])
    for target in targets:
        fits = [n for n in modules if n == target or n.endswith(f".{target}")]
        others = [name for name in fits if not _is_linear(modules[name])]
        if others or not fits:
            what = f"is {type(modules[others[0]]).__name__}" if others else "fits no module"
            raise ConfigError(
                f"{printable(target)} {what}: only linear layers can be adapted",
                where="adapter.targets",
                hint=f"linear layers of this model: {known}",
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def layer_names(
    model: nn.Module, targets: str | Sequence[str], top_layers: int | None
) -> str | list[str]:
    """PEFT takes "all-linear" or a choice of layers, not both: spell the names out for it."""
    if not isinstance(targets, str):
        return list(targets)
    if sees(model):  # PEFT would put an adapter on the class head
        return below_head(model, top_layers)
    if top_layers is None:
        return targets
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in decoder_layers(unwrapped(model))[0].named_modules()
            if _is_linear(module)
        }
    )


def below_head(model: nn.Module, top_layers: int | None) -> list[str]:
    """Every linear layer's full name, without the class head: of the last layers, or of all."""
    causal = unwrapped(model)
    layers = list(decoder_layers(causal)) if top_layers is not None else []
    kept = {id(m) for layer in layers[-(top_layers or 0) :] for m in layer.modules()}
    return [
        name
        for name, module in causal.named_modules()
        if _is_linear(module)
        and name.partition(".")[0] != HEAD
        and (top_layers is None or id(module) in kept)
    ]


def top_numbers(model: nn.Module, top_layers: int | None) -> list[int] | None:
    if top_layers is None:
        return None
    depth = int(text_config(model).num_hidden_layers)
    if top_layers > depth:
        raise ConfigError(
            f"{top_layers} layers asked for, the model has {depth}",
            where="adapter.top_layers",
            hint=f"use at most {depth}, or give this model its own models.*.top_layers",
        )
    return None if sees(model) else list(range(depth - top_layers, depth))


def is_conv1d(model: nn.Module) -> bool:
    """GPT-2 stores its linear layers transposed."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
