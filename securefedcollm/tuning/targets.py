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
    if sees(model):  # the class head stays as it is: docs/adr/0024-class-heads.md
        for target in targets:
            if any(_named(name, target) and _in_head(name) for name in modules):
                raise ConfigError(
                    f"{printable(target)} is the class head, which is frozen",
                    where="adapter.targets",
                    hint="name layers below it, or leave adapter.targets out",
                )
    linear = [name for name, module in modules.items() if _is_linear(module)]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:20])
    for target in targets:
        fits = [name for name in modules if _named(name, target)]
        others = [name for name in fits if not _is_linear(modules[name])]
        if others or not fits:
            what = f"is {type(modules[others[0]]).__name__}" if others else "fits no module"
            raise ConfigError(
                f"{printable(target)} {what}: only linear layers can be adapted",
                where="adapter.targets",
                hint=f"linear layers of this model: {known}",
            )


def _named(module: str, target: str) -> bool:
    """Whether PEFT takes a module for that target: by its name, or the end of it."""
    return module == target or module.endswith(f".{target}")


def _in_head(name: str) -> bool:
    return name.partition(".")[0] == HEAD


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def layer_names(
    model: nn.Module, targets: str | Sequence[str], top_layers: int | None
) -> str | list[str]:
    """PEFT takes "all-linear" or a choice of layers, not both: spell the names out for it."""
    if sees(model):  # PEFT would put an adapter on the class head
        below = below_head(model, top_layers)
        if isinstance(targets, str):
            return below
        found = [name for name in below if any(_named(name, target) for target in targets)]
        if not found:
            raise ConfigError(
                f"none of the named layers is among the last {top_layers}",
                where="adapter.targets",
                hint="name layers of the blocks, or raise adapter.top_layers",
            )
        return found
    if not isinstance(targets, str):
        return list(targets)
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
        if _is_linear(module) and not _in_head(name) and (top_layers is None or id(module) in kept)
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
