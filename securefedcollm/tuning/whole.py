"""Tuning all weights of a model: ``adapter.method: full``.

The vector that travels is the *difference* from the base model, float32, parameter by parameter in
the order of their names; a tied weight appears once. It starts at zero, and bounds on it
(``adapter.max_abs``) mean the same as for an adapter. What a run releases is a whole model that
transformers loads.

A gradient of all weights fills as much memory as the model, so there is one at a time: every record
goes through a pass of its own, and automatic differentiation of that pass *is* the record's
gradient, whatever layers the model has and however its weights are tied. No kernel ever sees two
records, so there is nothing to prove of kernels (:mod:`.independence`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.models import load_model
from securefedcollm.tuning.recipe import quiet_transformers

Vector = npt.NDArray[np.float32]
WHOLE: Final = "config.json"
"""It lies beside the weights of a whole model, and beside no adapter."""


class WholeModel(nn.Module):
    """A causal language model whose weights are all tuned, and the weights that it came with.

    Has the parts of ``PeftModel`` that this room uses. ``causal`` itself stays as it is, and shares
    memory with nothing here but the base weights.

    Raises:
        ConfigError: a weight is not float32, so that small steps would be rounded away.
    """

    def __init__(self, causal: Any) -> None:
        super().__init__()
        for name, parameter in causal.named_parameters():
            if parameter.dtype != torch.float32:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"{name} is {kind}: small steps of a whole model would be rounded away",
                    where="models.slm.dtype",
                    hint="choose float32, or adapter.method: ffa-lora",
                )
        self._base: dict[str, Tensor] = {name: p.detach() for name, p in causal.named_parameters()}
        self.causal = copy.deepcopy(causal)
        self.train(causal.training)

    def get_base_model(self) -> Any:
        """The transformers model with its weights as they are now."""
        return self.causal

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """Every weight once, by its name in the transformers model, sorted."""
        return sorted(self.causal.named_parameters())

    def base(self, name: str) -> Tensor:
        """The weight ``name`` before any tuning."""
        found: Tensor = self._base[name]
        return found

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The weights that the model came with, for a while."""
        kept = [(parameter, parameter.data) for _, parameter in self.weights()]
        for name, parameter in self.weights():
            parameter.data = self._base[name].to(parameter.device)
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def save_pretrained(self, directory: Path, **_: Any) -> None:
        """Write a transformers directory (safetensors, config) without the tokenizer."""
        with quiet_transformers():
            self.causal.save_pretrained(directory)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.causal(*args, **options)


def difference(model: WholeModel, names: Sequence[str]) -> Vector:
    """The weights ``names`` less those of the base, flattened row by row: float32 [d]."""
    weights = dict(model.weights())
    out = np.empty(sum(weights[name].numel() for name in names), dtype=np.float32)
    at = 0
    for name in names:
        now, base = weights[name].detach().cpu(), model.base(name).cpu()
        part = torch.from_numpy(out[at : at + now.numel()]).view(now.shape)
        torch.sub(now, base, out=part)
        at += now.numel()
    return out


def add_difference(model: WholeModel, names: Sequence[str], vector: npt.NDArray[Any]) -> None:
    """Make the weights ``names`` those of the base plus ``vector`` (float [d])."""
    weights = dict(model.weights())
    at = 0
    for name in names:
        weight, base = weights[name], model.base(name).cpu()
        part = np.ascontiguousarray(vector[at : at + weight.numel()], dtype=np.float32)
        # A view of a frame may be read-only, and is only read here.
        given = torch.from_numpy(part if part.flags.writeable else part.copy()).view(base.shape)
        weight.data.copy_(base + given)
        at += weight.numel()


def is_whole(directory: Path) -> bool:
    """Whether ``directory`` holds a whole model, and no adapter."""
    return (directory / WHOLE).is_file() and not (directory / "adapter_config.json").exists()


def load_weights(causal: Any, directory: Path) -> Any:
    """Give ``causal`` the weights of the whole model in ``directory``, bit for bit; returns it.

    Raises:
        ConfigError: there is no model there that can be loaded, or one of another kind.
    """
    found = load_model(f"path:{directory.absolute()}").model
    given = {name: parameter.detach() for name, parameter in found.named_parameters()}
    wanted = dict(causal.named_parameters())
    apart = sorted(
        name
        for name in given.keys() | wanted.keys()
        if name not in given or name not in wanted or given[name].shape != wanted[name].shape
    )
    if type(found) is not type(causal) or apart:
        what = f", {apart[0]} among them" if apart else ""
        raise ConfigError(
            f"the model there was tuned from another base model: {len(apart)} of its weights fit "
            f"no weight of this one{what}",
            where=str(directory),
            hint="load it on the model that it was tuned on",
        )
    for name, parameter in wanted.items():
        parameter.data.copy_(given[name])
    return causal


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a whole model's directory needs beside its weights, by name."""
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        tokenizer.save_pretrained(place)
        return {
            str(path.relative_to(place)): path.read_bytes()
            for path in sorted(Path(place).iterdir())
            if path.is_file()
        }
