"""Classifiers of pictures and recordings: their class head, and their scores of the classes.

A class is a choice, and a classifier is a model that predicts one token out of a vocabulary of
classes. So everything that scores, tunes, distils or audits choices does so here too.

**Head.** Two models of different width need a head each, over the same classes in the same order.
Nothing but the adapter is trained or summed, so it is frozen. Where a model knows all of the
study's labels by name (``id2label``), its own head stays, cut down to their rows. Otherwise the
head is made from the study's seed: orthonormal rows, so that no class is nearer to another. See
docs/adr/0024-class-heads.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.primitives import sha256
from securefedcollm.tuning.head import device_of, hears, text_config, unwrapped
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.signals import Signal
from securefedcollm.tuning.sounds import RATE

HEAD_FILE: Final = "head.safetensors"
"""It lies beside an adapter."""
HEAD: Final = "classifier"
"""What every family of ``transformers`` that is used here calls its class head."""


def class_logits(model: Any, signal: Signal) -> Tensor:
    """Logits of the classes, [B, C] in the model's type; differentiable."""
    causal = unwrapped(model)
    inputs = signal.to(device_of(causal)).inputs(causal.dtype)
    logits: Tensor = causal(**{causal.main_input_name: inputs}).logits
    return logits


def input_shape(model: Any) -> tuple[int, ...]:
    """The shape of one record's input: of a picture (channels, height, width); of a recording
    (samples,), AST's (frames, bins) or Whisper's (bins, frames)."""
    config = text_config(model)
    if hears(model):
        if hasattr(config, "max_source_positions"):
            return int(config.num_mel_bins), 2 * int(config.max_source_positions)
        if hasattr(config, "num_mel_bins") and hasattr(config, "time_stride"):
            return int(config.max_length), int(config.num_mel_bins)
        return (int(getattr(unwrapped(model), "heard", RATE)),)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def places_of(model: Any) -> int:
    """How many places a record is divided into: the rows of a product in a layer."""
    config, shape = text_config(model), input_shape(model)
    patch = getattr(config, "patch_size", None)
    if hears(model):
        return _times(config, shape)
    _, height, width = shape
    if not isinstance(patch, int):
        return height * width
    return (height // patch) * (width // patch) + 1


def _times(config: Any, shape: tuple[int, ...]) -> int:
    if hasattr(config, "max_source_positions"):
        return int(config.max_source_positions)
    if len(shape) == 2:  # AST: patches that may overlap, and two tokens
        steps = config.time_stride, config.frequency_stride
        counts = [
            (side - config.patch_size) // step + 1 for side, step in zip(shape, steps, strict=True)
        ]
        return int(counts[0] * counts[1] + 2)
    (count,) = shape
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        count = (count - kernel) // step + 1
    return int(count)


def noise_for(model: Any, kinds: Sequence[int]) -> Signal:
    """Signals of noise that the model can see or hear: equal numbers give equal ones."""
    shape, made = input_shape(model), {}
    for kind in {*kinds}:
        draw = np.random.default_rng([kind, *shape])
        made[kind] = torch.from_numpy(
            draw.standard_normal(shape, dtype=np.float32)
            if hears(model)
            else draw.integers(0, 256, shape, dtype=np.uint8)
        )
    values = torch.stack([made[kind] for kind in kinds])
    if hears(model):
        return Signal(values, torch.ones(1), torch.zeros(1))
    half = torch.full((shape[0], 1, 1), 1 / 127.5)
    return Signal(values, half, torch.full_like(half, -1.0))


def check_classifier(model: Any, where: str) -> None:
    """Refuse a model that cannot score pictures, or recordings, here.

    Raises:
        ConfigError: it does not run, or computes values that are not finite.
    """
    name = type(unwrapped(model)).__name__
    try:
        with inference_mode(unwrapped(model)):
            found = class_logits(model, noise_for(model, [0, 1]))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be run on a {'recording' if hears(model) else 'picture'} "
            f"({type(error).__name__}: {printable(error, 120)})",
            where=where,
            hint=f"use a family that {families(model)}",
        ) from error
    if found.ndim != 2 or not bool(torch.isfinite(found).all()):
        raise ConfigError(
            "it computes values that are not finite (NaN)",
            where=where,
            hint="its weights are damaged, or too large for this dtype: try float32",
        )


def families(model: Any) -> str:
    """Where it is written which models can be used."""
    if hears(model):
        return "docs/speech.md lists, such as Wav2Vec2, HuBERT, AST or Whisper"
    return "docs/vision.md lists, such as ViT, DeiT or CLIP"


def head_name(model: Any) -> str:
    """The name of the linear layer that is the class head: AST has a normalisation before it."""
    inner = getattr(getattr(model, HEAD, None), "dense", None)
    return HEAD if inner is None else f"{HEAD}.dense"


def head_of(model: Any) -> Any:
    """The class head, or None."""
    try:
        return model.get_submodule(head_name(model))
    except AttributeError:
        return None


def put_head(model: Any, head: nn.Module) -> None:
    """Replace the class head, in place."""
    model.set_submodule(head_name(model), head)


def own_labels(model: Any) -> list[str]:
    """The classes of the model's own head, in its order; none where it came without."""
    if not isinstance(head_of(model), nn.Linear):
        return []
    names = unwrapped(model).config.id2label
    return [str(names[i]).strip() for i in sorted(names)]


def width_of(model: Any) -> int:
    """How many numbers the head sees of a record."""
    head = head_of(model)
    if isinstance(head, nn.Linear):
        return head.in_features
    with inference_mode(model):
        return int(class_logits(model, noise_for(model, [0])).shape[1])


def set_head(model: Any, labels: Sequence[str], seed: int) -> bool:
    """Give a model, in place, a frozen head over ``labels``.

    Returns:
        whether it is the model's own.
    """
    known, old = own_labels(model), head_of(model)
    own = len(set(known)) == len(known) and set(labels) <= set(known)
    like = next(model.parameters())
    with torch.device(like.device):
        head = nn.Linear(width_of(model), len(labels), bias=not own or old.bias is not None)
    if own:
        rows = torch.tensor([known.index(label) for label in labels], device=like.device)
        head.weight.data = old.weight.data[rows].clone()
        if old.bias is not None:
            head.bias.data = old.bias.data[rows].clone()
    elif like.device.type != "meta":
        head.weight.data = orthogonal(len(labels), head.in_features, seed).to(like.device)
        nn.init.zeros_(head.bias)
    _put(model, head.to(like.dtype), labels)
    return own


def _put(model: Any, head: nn.Linear, labels: Sequence[str]) -> None:
    put_head(model, head.requires_grad_(False))
    model.num_labels = len(labels)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}


def head_bytes(model: Any) -> bytes:
    """The head as a safetensors file, whose tensors have the names of the whole model."""
    plain = unwrapped(model)
    named, head = head_name(plain), head_of(plain)
    parts = {
        f"{named}.{name}": p.detach().cpu().contiguous() for name, p in head.named_parameters()
    }
    content: bytes = save(parts)
    return content


def read_head(model: Any, labels: Sequence[str], directory: Path | None) -> None:
    """Give a model, in place, the head that an adapter in ``directory`` was tuned with, or its own.

    Raises:
        ConfigError: there is neither for these labels.
    """
    file = None if directory is None else directory / HEAD_FILE
    if file is None or not file.is_file():
        if not set(labels) <= set(own_labels(model)):
            raise ConfigError(
                "the model's own head does not know these labels",
                where="--label",
                hint=f"give an adapter with its {HEAD_FILE}: --adapter DIR",
            )
        set_head(model, labels, 0)
        return
    head = nn.Linear(width_of(model), len(labels))
    try:
        found = {
            name.removeprefix(f"{head_name(model)}."): p for name, p in load_file(file).items()
        }
        head.load_state_dict({"bias": torch.zeros(len(labels)), **found})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"holds no head over {len(labels)} labels for this model ({type(error).__name__})",
            where=str(file),
            hint="give the labels and the base model of the study that made it",
        ) from None
    _put(model, head.to(model.dtype), labels)


def orthogonal(classes: int, width: int, seed: int) -> Tensor:
    """A head made from a seed, float32 [classes, width]: orthonormal rows. Last bits are LAPACK's.

    More classes than numbers cannot be orthogonal; then the columns are, and rows have length 1 on
    average.
    """
    key = int.from_bytes(sha256(b"securefedcollm/class-head/v1\0", str(seed).encode())[:16], "big")
    words = np.random.Philox(key=key).random_raw(classes * width)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5
    table = uniform.reshape(classes, width)
    tall = table.T if classes <= width else table
    basis, triangle = np.linalg.qr(tall)
    basis = basis * np.sign(np.diag(triangle))  # the one factorisation with a positive diagonal
    rows = basis.T if classes <= width else basis * np.sqrt(classes / width)
    return torch.from_numpy(np.ascontiguousarray(rows)).float()
