"""Earlier adapters become part of a base model, and a new adapter keeps out of their way.

Folding adds W += s·B·A for every matrix pair of a released adapter. Both it and the projection of
new matrices use only operations that IEEE 754 defines to the last bit, in one order, so every
participant gets the same weights.

Adversary: whoever supplies the file of an earlier adapter. It is read once, as safetensors, and its
digest is compared before anything is decoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.primitives import sha256
from securefedcollm.tuning.head import unwrapped

WEIGHTS: Final = "adapter_model.safetensors"
Matrix = npt.NDArray[np.float64]

_PREFIX: Final = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_ROWS: Final = 256  # rows of a weight at a time: the working set stays in the cache
_NOTHING: Final = 1e-6
"""A direction that keeps less than this part of its length after a projection counts as none."""


@dataclass(frozen=True)
class Released:
    """The low-rank matrices of one released adapter, and what identifies it."""

    sha256: str
    """Its file's digest, 64 hexadecimal digits."""
    scale: float
    """alpha / rank."""
    pairs: dict[str, tuple[Matrix, Matrix]]
    """Module of the base model → A [r, in] and B [out, r], float64."""


def read_released(
    paths: Sequence[Path], wanted: str, *, scale: float, max_abs: float, where: str
) -> Released:
    """The adapter of the first file among ``paths`` that has the digest ``wanted``.

    Args:
        max_abs: largest absolute value of an entry, as silos demand of a global adapter.
        where: the study's key that names the file.

    Raises:
        ConfigError: there is no such file, it is another one, or no low-rank adapter.
    """
    others = []
    for path in paths:
        try:
            with path.open("rb") as file:  # whatever lies there, it is not all in memory
                found = hashlib.file_digest(file, "sha256").hexdigest()
            content = path.read_bytes() if found == wanted else b""
        except OSError:
            continue
        if found == wanted == sha256(content).hex():
            return Released(wanted, scale, _pairs(content, max_abs, str(path)))
        others.append((path, found))
    if others:
        path, found = others[0]
        raise ConfigError(
            f"{path} is not the adapter that the study names: its digest is {found[:16]}…, the "
            f"study's {wanted[:16]}…",
            where=where,
            hint="get the file that the earlier run released, or a study that names this one "
            "(`securefedcollm study continue RUN`)",
        )
    raise ConfigError(
        f"the earlier run's adapter is not there ({paths[0]})",
        where=where,
        hint="put the earlier run's directory, or its `adapters`, under --data (`client` and "
        "`server`: --models)",
    )


def _pairs(content: bytes, max_abs: float, where: str) -> dict[str, tuple[Matrix, Matrix]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"is no safetensors file ({type(error).__name__})",
            where=where,
            hint="name the run's own adapter",
        ) from None
    names = {name.removesuffix(_A) for name in tensors if name.endswith(_A)}
    wanted = {name + part for name in names for part in (_A, _B)}
    if not names or wanted != set(tensors):
        odd = min(wanted ^ set(tensors), default="")
        raise ConfigError(
            f"holds no low-rank adapter ({printable(odd, 120) or 'nothing'})",
            where=where,
            hint="only runs of ffa-lora, rolora and lora can be continued: virtual tokens stand "
            "before every input, and no weight can hold them",
        )
    pairs = {}
    for name in sorted(names):
        a, b = tensors[name + _A], tensors[name + _B]
        sound = a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0
        if not sound or not all(m.dtype == np.float32 for m in (a, b)):
            raise ConfigError(
                f"{printable(name, 120)} is no pair of float32 matrices",
                where=where,
                hint="name the run's own adapter",
            )
        if not all(bool((np.abs(m) <= max_abs).all()) for m in (a, b)):  # NaN is no less
            raise ConfigError(
                f"{printable(name, 120)} has values above adapter.max_abs ({max_abs:g})",
                where=where,
                hint="no tuning gives such values: ask where the earlier adapter comes from",
            )
        pairs[name.removeprefix(_PREFIX)] = (a.astype(np.float64), b.astype(np.float64))
    return pairs


def fold(model: nn.Module, earlier: Iterable[Released], source: str) -> None:
    """Add the earlier adapters to the weights of ``model`` (float32), in place, in this order.

    Args:
        source: names the model in errors.

    Raises:
        ConfigError: an adapter fits no module of the model, or a weight that it would change is
            shared with another module.
    """
    modules = dict(unwrapped(model).named_modules())
    uses: dict[int, int] = {}
    for module in modules.values():
        own = getattr(module, "weight", None)
        uses[id(own)] = uses.get(id(own), 0) + 1
    for released in earlier:
        for name, (a, b) in released.pairs.items():
            weight = getattr(modules.get(name), "weight", None)
            turned = type(modules.get(name)).__name__ == "Conv1D"  # GPT-2 stores [in, out]
            shape = (len(b), a.shape[1])
            if weight is None or tuple(weight.shape) != (shape[::-1] if turned else shape):
                raise ConfigError(
                    f"the earlier adapter {released.sha256[:16]}… was made for another model: "
                    f"{printable(name, 120)} does not fit",
                    where=source,
                    hint="continue with the base models of the earlier study",
                )
            if uses[id(weight)] > 1:
                raise ConfigError(
                    f"{printable(name, 120)} shares its weight with another layer, which folding "
                    "would change as well",
                    where=source,
                    hint="continue a run whose adapter.targets leave that layer out",
                )
            _add(weight, a, b * released.scale, turned)


def _add(weight: nn.Parameter, a: Matrix, b: Matrix, turned: bool) -> None:
    """W += B·A in float64, rank by rank, elementwise: the same bits everywhere."""
    whole = weight.data.t() if turned else weight.data
    for first in range(0, len(b), _ROWS):
        rows = slice(first, first + _ROWS)
        part = whole[rows].double().cpu().numpy()
        for left, right in zip(b[rows].T, a, strict=True):
            part += left[:, None] * right[None, :]
        whole[rows] = torch.from_numpy(part.astype(np.float32)).to(weight.device)


def keep_apart(adapted: Any, earlier: Sequence[Released], source: str) -> None:
    """Project the new adapter's every A off the rows of the earlier ones, in place.

    DOLFIN (arXiv 2510.13567): the new A then maps every input in the span of the earlier A's rows
    to zero, whatever B becomes. Rows keep the length that they were drawn with.

    Args:
        adapted: a ``PeftModel`` with LoRA matrices.
        source: names the model in errors.

    Raises:
        ConfigError: the earlier adapters leave no room for the new rows.
    """
    for full, parameter in adapted.named_parameters():
        if ".lora_A." not in full:
            continue
        name = full.partition(".lora_A.")[0].removeprefix(_PREFIX)
        taken = [released.pairs[name][0] for released in earlier if name in released.pairs]
        if not taken:
            continue
        drawn = parameter.detach().double().cpu().numpy()
        apart = project_off(drawn, np.concatenate(taken))
        if apart is None:
            raise ConfigError(
                f"the earlier adapters leave no room for {len(drawn)} more directions among the "
                f"{drawn.shape[1]} inputs of {name}",
                where=source,
                hint="lower adapter.rank, or set continue.orthogonal: false",
            )
        parameter.data.copy_(torch.from_numpy(apart.astype(np.float32)))


def project_off(rows: Matrix, taken: Matrix) -> Matrix | None:
    """``rows`` [r, n] less their parts in the span of ``taken`` [k, n], each as long as before.

    None if nothing is left of a row. Two passes of Gram–Schmidt ("twice is enough").
    """
    basis: list[Matrix] = []
    for row in taken:
        rest, left = _less(row, basis)
        if left > _NOTHING:
            basis.append(rest / _norm(rest))
    apart = []
    for row in rows:
        rest, left = _less(row, basis)
        if left <= _NOTHING:
            return None
        apart.append(rest * (_norm(row) / _norm(rest)))
    return np.stack(apart)


def _less(row: Matrix, basis: Sequence[Matrix]) -> tuple[Matrix, float]:
    """``row`` [n] without its parts along ``basis``, and how much of its length is left."""
    before = _norm(row)
    rest = row
    for _ in range(2):
        for direction in basis:
            rest = rest - _dot(rest, direction) * direction
    return rest, _norm(rest) / before if before else 0.0


def _dot(a: Matrix, b: Matrix) -> float:
    """Correctly rounded, so in any order: a library's sum differs from processor to processor."""
    return math.fsum((a * b).tolist())


def _norm(row: Matrix) -> float:
    return math.sqrt(_dot(row, row))
