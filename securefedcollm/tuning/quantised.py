"""Frozen base weights in eight or four bits.

A quantised layer keeps its weight as bitsandbytes writes it down. It turns the weight back into
numbers whenever it uses them, forward and backward, and keeps none of these. Inputs are not
rounded. So a row of a pass comes out as it does in an ordinary layer with the rounded weight, and
no record meets another one (ADR 19).

Only this module imports bitsandbytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import ConfigError

Kind = Literal["int8", "nf4"]
Quantization = Literal["none", "int8", "nf4"]

_BLOCK: Final = 64
"""Weights that share a scale in nf4."""
_OUTER: Final = 256
"""Scales of nf4 that share a scale of their own: they are kept in eight bits."""
_LARGEST: Final = 127.0
"""Largest absolute value of an int8 weight."""


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Keep the package's advice about faster kernels off stderr; PEFT imports it too."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight [out, in] is frozen and kept in ``kind``.

    ``int8`` has a scale for each row. ``nf4`` is QLoRA's (Dettmers et al. 2023): four bits, a scale
    for each 64 weights, and these scales in eight bits. The product is computed in the type that
    the weight had.

    Args:
        layer: an ordinary layer with a weight of float32 or bfloat16; it stays as it is.
    """

    packed: nn.Parameter
    scales: Tensor

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        self.bias = layer.bias
        with torch.no_grad():
            packed, others = _packed(layer.weight.detach(), kind)
        self.packed = nn.Parameter(packed, requires_grad=False)
        for name, value in others.items():
            self.register_buffer(name, value)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weight [out, in], made anew; some families read it without the layer."""
        with torch.no_grad():
            if self.kind == "int8":
                return self.packed.to(self.dtype).mul_(self.scales)
            from bitsandbytes.functional import QuantState, dequantize_4bit

            outer = QuantState(
                self.outer_scales, code=self.outer_code, blocksize=_OUTER, dtype=torch.float32
            )
            state = QuantState(
                self.scales,
                shape=torch.Size((self.out_features, self.in_features)),
                code=self.code,
                blocksize=_BLOCK,
                quant_type="nf4",
                dtype=self.dtype,
                offset=self.offset,
                state2=outer,
            )
            weight: Tensor = dequantize_4bit(self.packed, state)
            return weight

    def forward(self, given: Tensor) -> Tensor:
        found: Tensor = _Product.apply(given, self)  # type: ignore[no-untyped-call]
        return found


class _Product(torch.autograd.Function):
    """x·Wᵀ + b, which keeps no weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(given, layer.weight, layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope @ ctx.layer.weight, None


def _packed(weight: Tensor, kind: Kind) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight [out, in] as bitsandbytes packs it, and what undoes that."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if kind == "int8":
        halves = weight.half()
        if not torch.isfinite(halves).all():
            raise ConfigError(
                "a weight is above 65,504, which int8 cannot scale",
                where="models.*.quantization",
                hint="choose nf4, or none",
            )
        packed, largest, _ = int8_vectorwise_quant(halves)
        return packed, {"scales": (largest / _LARGEST)[:, None]}
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, {
        "scales": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "outer_scales": state.state2.absmax,
        "outer_code": state.state2.code,
    }


def check_quantization(kind: Quantization, where: str, device: torch.device) -> None:
    """Refuse a machine that cannot compute with weights of ``kind``, before it loads a model.

    Args:
        where: the study's key of the kind, such as ``models.llm.quantization``.

    Raises:
        ConfigError: bitsandbytes is missing or broken here, or cannot use ``device``.
    """
    if kind == "none":
        return
    advice = "or agree on quantization: none"
    try:
        with quiet_bitsandbytes():
            import bitsandbytes  # noqa: F401
    except Exception as error:  # its compiled part may be missing or of another system
        raise ConfigError(
            f"{kind} needs the package bitsandbytes, which cannot be imported here "
            f"({type(error).__name__})",
            where=where,
            hint=f"pip install 'securefedcollm[gpu]', {advice}",
        ) from error
    try:
        with torch.random.fork_rng(devices=[]), quiet_bitsandbytes():
            torch.manual_seed(0)
            layer = QuantisedLinear(nn.Linear(_BLOCK, _BLOCK), kind)
            wanted = layer.weight
            found = layer.to(device).weight.cpu()
    except Exception as error:  # a device without the kernel
        raise ConfigError(
            f"bitsandbytes cannot compute {kind} on {device} ({type(error).__name__})",
            where=where,
            hint=f"choose another --device, {advice}",
        ) from error
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-6):
        raise ConfigError(
            f"bitsandbytes computes other {kind} weights on {device} than on the processor",
            where=where,
            hint=f"choose another --device, {advice}",
        )


def quantise(causal: Any, kind: Quantization, where: str) -> None:
    """Replace the linear layers of ``causal``, a transformers model in memory, by quantised ones.

    Embeddings, norms, the output layer, and experts whose weights are one tensor stay as they are.
    One layer is replaced after the other, so no second model is in memory.

    Args:
        where: as for :func:`check_quantization`, which has to come before.

    Raises:
        ConfigError: the model has no such layers.
    """
    if kind == "none":
        return
    with quiet_bitsandbytes():
        for name, layer in _layers(causal, where):
            parent, _, leaf = name.rpartition(".")
            setattr(causal.get_submodule(parent), leaf, QuantisedLinear(layer, kind))


def round_weights(
    causal: Any,
    kind: Quantization,
    where: str,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Give ``causal`` the weights that :func:`quantise` would compute with, in full numbers.

    For merging: a low-rank adapter fits the rounded weights, and its product needs more bits.

    Args:
        dtype: of the weights that were tuned on; the files may have more bits.
    """
    if kind == "none":
        return
    with quiet_bitsandbytes(), torch.no_grad():
        for _, layer in _layers(causal, where):
            tuned = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            tuned.weight = nn.Parameter(
                layer.weight.detach().to(getattr(torch, dtype)), requires_grad=False
            )
            layer.weight.copy_(QuantisedLinear(tuned, kind).weight)


def _layers(causal: Any, where: str) -> Iterator[tuple[str, nn.Linear]]:
    """The layers to quantise, by name, one at a time."""
    names = [name for name, _ in _quantisable(causal)]
    if not names:
        raise ConfigError(
            f"{type(causal).__name__} has no linear layers that can be quantised",
            where=where,
            hint="choose another model, or quantization: none",
        )
    for name in names:
        yield name, causal.get_submodule(name)


def _quantisable(causal: Any) -> list[tuple[str, nn.Linear]]:
    head = causal.get_output_embeddings()
    modules = causal.named_modules()
    return [(name, m) for name, m in modules if type(m) is nn.Linear and m is not head]


def weights_bytes(causal: Any, kind: Quantization, width: int) -> int:
    """Memory of the weights of ``causal`` (which may be on the meta device), in bytes.

    Args:
        width: bytes of a weight that is not quantised.
    """
    total: int = sum(p.numel() for p in {id(p): p for p in causal.parameters()}.values()) * width
    if kind == "none":
        return total
    for _, layer in _quantisable(causal):
        weights = layer.weight.numel()
        total -= weights * width
        if kind == "int8":
            total += weights + 4 * layer.out_features
        else:
            total += weights // 2 + weights // _BLOCK + 4 * weights // (_BLOCK * _OUTER)
    return total
