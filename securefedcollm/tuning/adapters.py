"""Adapters as PEFT objects, and the flat float vector that a secure sum carries.

``ffa-lora`` (Sun et al. 2024, "Improving LoRA in privacy-preserving federated learning") freezes
every A at a value that all participants derive from the study's seed, and trains B: the product BA
is linear in what is trained, so the mean of the silos' vectors *is* the mean of their updates, and
noise stays noise. ``rolora`` (Chen et al. 2024) trains B in even rounds and A in odd ones: exact
within each round. ``lora`` trains both at once, as the FedCoLLM paper does; the mean of products is
not the product of means, so its average carries a bias. ``prompt`` and ``prefix`` are virtual
tokens (:mod:`.prompts`): the mean of prompts *is* the prompt of the mean. ``full`` is no adapter,
but all weights (:mod:`.whole`): the vector is their difference from the base.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import rfc8785
import torch
from safetensors import SafetensorError
from torch import nn

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.foreign import printable, read_object
from securefedcollm.primitives import sha256
from securefedcollm.tuning.head import sees, unwrapped
from securefedcollm.tuning.quantised import quiet_bitsandbytes
from securefedcollm.tuning.targets import check_targets, is_conv1d, layer_names, top_numbers
from securefedcollm.tuning.virtual import KINDS, virtual_of
from securefedcollm.tuning.whole import (
    WholeModel,
    add_difference,
    difference,
    is_whole,
    load_weights,
)

Method = Literal["ffa-lora", "rolora", "lora", "prompt", "prefix", "full"]
PROMPT: Final = "prompt_embeddings"
"""PEFT's checkpoint name of the virtual tokens."""
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AdapterLayout:
    """What one round's vector holds: parameters in this order, each flattened row by row.

    Two participants may add their vectors only if their ``digest`` is equal.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Length d of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the RFC 8785 form of dtype, names and shapes."""
        entries: list[Any] = [[n, list(s)] for n, s in zip(self.names, self.shapes, strict=True)]
        return sha256(rfc8785.dumps({"dtype": self.dtype, "parameters": entries})).hex()


def attach(
    model: nn.Module,
    *,
    method: Method = "ffa-lora",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    top_layers: int | None = None,
    seed: int = 0,
) -> Any:
    """Put a fresh adapter on ``model`` and return the ``PeftModel``; the base is frozen.

    A is drawn from ``seed`` and the parameter's name, bit for bit the same on every machine and in
    every version; B is zero, so the adapter starts as the identity. Global random state is neither
    read nor changed.

    Args:
        targets: ``"all-linear"`` (every linear layer but the output layer) or module names.
        top_layers: adapt only this many layers, counted from the last.

    Raises:
        ConfigError: a name in ``targets`` fits no linear layer, or the model has fewer layers than
            ``top_layers``.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(targets, str):
        check_targets(model, targets)
    training = model.training
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # a float α is fine: scaling = α / r
        lora_dropout=dropout,
        target_modules=layer_names(model, targets, top_layers),
        layers_to_transform=top_numbers(model, top_layers),
        fan_in_fan_out=is_conv1d(model),
        task_type=None if sees(model) else "CAUSAL_LM",
    )
    try:
        # PEFT draws an A of its own (replaced below).
        with torch.random.fork_rng(devices=[]), quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"the adapter does not fit the model: {printable(error)}",
            where="adapter.targets",
            hint="use all-linear, or names of linear modules such as q_proj",
        ) from error
    for name, parameter in _adapter_parameters(adapted):
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])  # PEFT's Kaiming range
            fresh = shared_uniform(b"adapter/A\0", f"{seed}\0{name}", parameter.shape, bound)
            parameter.data.copy_(torch.from_numpy(fresh))
        else:
            parameter.data.zero_()
    select(adapted, layout_of(adapted, method))
    return adapted.train(training)


def layout_of(model: nn.Module, method: Method, round_number: int = 0) -> AdapterLayout:
    """The layout of what ``method`` trains in round ``round_number`` (from 0)."""
    if method == "full":
        return full_layout(model)
    parts = {
        "ffa-lora": (".lora_B.",),
        "rolora": (".lora_B.",) if round_number % 2 == 0 else (".lora_A.",),
        "lora": (".lora_A.", ".lora_B."),
        "prompt": (PROMPT,),
        "prefix": (PROMPT,),
    }[method]
    return _layout(
        (n, p) for n, p in _adapter_parameters(model) if any(part in n for part in parts)
    )


def full_layout(model: nn.Module) -> AdapterLayout:
    """The layout of the whole adapter, trained or not: what a checkpoint must hold."""
    return _layout(_adapter_parameters(model))


def _layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> AdapterLayout:
    chosen = list(parameters)
    return AdapterLayout(
        names=tuple(name for name, _ in chosen),
        shapes=tuple(tuple(parameter.shape) for _, parameter in chosen),
    )


def select(model: nn.Module, layout: AdapterLayout) -> list[nn.Parameter]:
    """Make exactly the parameters of ``layout`` trainable; return them in layout order."""
    parameters = _checked(model, layout)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def to_vector(model: nn.Module, layout: AdapterLayout) -> Vector:
    """The parameters of ``layout`` as one float32 [d]."""
    parameters = _checked(model, layout)
    if isinstance(model, WholeModel):
        return difference(model, layout.names)
    flat: Vector = torch.cat([p.detach().reshape(-1).float().cpu() for p in parameters]).numpy()
    return flat


def load_vector(model: nn.Module, layout: AdapterLayout, vector: npt.NDArray[Any]) -> None:
    """Overwrite the parameters of ``layout`` with ``vector`` (float [d]).

    Raises:
        ConfigError: the model or the vector has another shape.
    """
    parameters = _checked(model, layout)
    if vector.shape != (layout.size,):
        raise ConfigError(
            f"the vector has shape {vector.shape}, the layout needs ({layout.size},)",
            where="adapter.layout",
            hint="every participant must run the same study with the same base model",
        )
    if isinstance(model, WholeModel):
        add_difference(model, layout.names, vector)
        return
    values = torch.from_numpy(np.array(vector, dtype=np.float32))
    at = 0
    for parameter in parameters:
        part = values[at : at + parameter.numel()].view(parameter.shape)
        parameter.data.copy_(part)
        at += parameter.numel()


def save_adapter(model: Any, directory: Path, beside: Mapping[str, bytes] | None = None) -> None:
    """Write the adapter in PEFT's format (safetensors) for ``PeftModel.from_pretrained``.

    The directory is replaced as a whole: a reader sees the old adapter or the new one.

    Args:
        beside: further files, name → content; they replace PEFT's files of the same name.

    Raises:
        StateError: the directory cannot be written.
    """
    fresh = directory.with_name(f".{directory.name}.{uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
        # False: PEFT would look the base model up on the hub to compare vocabularies.
        model.save_pretrained(fresh, safe_serialization=True, save_embedding_layers=False)
        for name, content in (beside or {}).items():
            (fresh / name).write_bytes(content)
        if directory.exists():
            shutil.rmtree(directory)
        fresh.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise StateError(
            f"cannot write the adapter to {directory}: {getattr(error, 'strerror', error)}",
            hint="choose a writable output directory with --out",
        ) from error


def load_adapter(model: nn.Module, directory: Path) -> Any:
    """The ``PeftModel`` of a base ``model`` and an adapter that :func:`save_adapter` wrote.

    For a whole model that was tuned (``full``) it is ``model`` itself, with those weights.

    Raises:
        ConfigError: the directory holds no safetensors adapter, or one of another model.
    """
    from peft import PeftModel

    if is_whole(directory):
        return load_weights(model, directory)

    try:
        there = (directory / "adapter_model.safetensors").is_file()
        config = read_object(directory / "adapter_config.json") if there else {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"its adapter_config.json cannot be read ({type(error).__name__})",
            where=str(directory),
            hint="give the directory of one adapter, such as runs/NAME/adapters/slm",
        ) from error
    if not there:
        raise ConfigError(
            "no adapter_model.safetensors there",
            where=str(directory),
            hint="give the directory of one adapter, such as runs/NAME/adapters/slm",
        )
    kind = config.get("peft_type")
    if kind not in {"LORA", *KINDS.values()} or config.get("prefix_projection"):
        raise ConfigError(
            f"is an adapter of the kind {printable(kind, 60)}, and only LoRA, prompts and prefixes "
            "without a projection can be used",
            where=str(directory),
            hint="use an adapter such as those that this program writes",
        )
    try:
        with torch.random.fork_rng(devices=[]), quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _of_another_base(directory) from error
    _check_names(adapted, directory)
    _check_width(model, adapted, directory)
    return adapted


def _check_width(model: nn.Module, adapted: Any, directory: Path) -> None:
    """Refuse virtual tokens whose width or number of layers is that of another model."""
    from peft import PrefixTuningConfig, get_peft_model

    virtual = virtual_of(adapted)
    if virtual is None:
        return
    config = adapted.active_peft_config
    if not virtual.prefix:
        fits = config.token_dim == unwrapped(model).get_input_embeddings().embedding_dim
    else:
        own = PrefixTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]), quiet_peft():
            own = get_peft_model(model, own).active_peft_config  # completed by PEFT
        sizes = ("num_layers", "num_attention_heads", "token_dim")
        fits = all(getattr(config, size) == getattr(own, size) for size in sizes)
    if not fits:
        raise _of_another_base(directory)


def _check_names(adapted: Any, directory: Path) -> None:
    """Refuse an adapter that the library loaded only in part: it merely warns.

    Raises:
        ConfigError: names a tensor that is missing or fits no module.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        given = set(file.keys())
    foreign = sorted(n for n in given - wanted if ".lora_" in n or wanted == {PROMPT})
    if foreign:
        raise _of_another_base(directory, f"{len(foreign)} of its tensors fit", foreign[0])
    if wanted - given:
        raise _of_another_base(directory, "it lacks tensors for", min(wanted - given))


def _of_another_base(directory: Path, how: str = "", name: str = "") -> ConfigError:
    detail = f": {how} no module of this model, {printable(name, 120)} among them" if name else ""
    return ConfigError(
        f"the adapter was made for another base model{detail}",
        where=str(directory),
        hint="load it on the model that it was tuned on",
    )


def merged(model: nn.Module, directory: Path) -> Any:
    """A plain transformers model: the base ``model``, in place, plus an adapter's product B·A.

    Raises:
        ConfigError: as :func:`load_adapter`, the model's weights have too few bits, or the adapter
            is one of virtual tokens.
    """
    if next(model.parameters()).dtype != torch.float32:
        raise ConfigError(
            "merging into rounded weights would round the adapter away",
            where="--dtype",
            hint="merge in float32; the result can be loaded as bfloat16",
        )
    adapted = load_adapter(model, directory)
    if adapted is model:  # a whole model: there is nothing to add up
        return adapted.eval()
    if virtual_of(adapted) is not None:
        raise ConfigError(
            "virtual tokens stand before every input, and no weight of the model can hold them",
            where=str(directory),
            hint="use it as it is, with PEFT: README.md beside it says how",
        )
    return adapted.merge_and_unload().eval()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence warnings that do not concern users: PEFT reads a property that transformers 5 has
    renamed, and drops position ids that transformers made, which it then makes itself."""
    with warnings.catch_warnings(), quiet_bitsandbytes():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "Position ids are not supported")
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # it is refused
        yield


def _adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA matrices by PEFT's checkpoint name (``default`` left out), sorted: A before B.

    Or the virtual tokens, which are one matrix; or all weights, by their own names.
    """
    if isinstance(model, WholeModel):
        return iter(model.weights())
    virtual = virtual_of(model)
    if virtual is not None:
        return iter([(PROMPT, virtual.weight)])
    found = [
        (name.replace(".default.", "."), parameter)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]
    return iter(sorted(found, key=lambda item: item[0]))


def _checked(model: nn.Module, layout: AdapterLayout) -> list[nn.Parameter]:
    """The parameters of ``layout`` in its order, or a ConfigError that names the difference."""
    have = dict(_adapter_parameters(model))
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        found = tuple(have[name].shape) if name in have else None
        if found != shape:
            raise ConfigError(
                f"{name} has shape {shape} in the layout and {found or 'no place'} in this model",
                where="adapter.layout",
                hint="every participant must run the same study with the same base model",
            )
    return [have[name] for name in layout.names]


def shared_uniform(domain: bytes, name: str, shape: Sequence[int], bound: float) -> Vector:
    """Uniform in ±``bound``, made from raw Philox words only, keyed by ``domain`` and ``name``.

    NumPy promises the stream of a bit generator for ever, but not that of its distributions.
    """
    key = int.from_bytes(sha256(domain, name.encode())[:16], "little")
    words = np.random.Philox(key=key).random_raw(math.prod(shape))
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (unit * np.float32(bound)).reshape(tuple(shape))
