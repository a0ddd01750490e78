"""Which models compute alike, so that a finding on one holds for the other."""

from __future__ import annotations

import hashlib
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

_PLAIN: Final = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OF_TORCH: Final = frozenset(vars(nn.Module())) - {"training"}
"""What every module has: parameters, buffers, submodules and hooks, which are looked at here."""
_ALIGNED: Final = 64
"""Bytes of the widest register: a kernel may take another path in memory not aligned to it."""


class _UnlikeAnyOtherError(Exception):
    pass


def fingerprint(model: nn.Module) -> bytes | None:
    """32 bytes that two models of a process share only if they run the same code on the same
    numbers.

    They cover the class and the settings of every layer and configuration, and every weight and
    buffer: its bits, type, shape, strides and device, and how its memory is aligned.

    Returns None for a model that no other can match: one with hooks, a layer whose forward is its
    own, or a setting that cannot be compared.
    """
    found = hashlib.sha256()
    try:
        for name, module in model.named_modules():
            found.update(repr((name, _plain(type(module)), _settings(module))).encode())
    except _UnlikeAnyOtherError:
        return None
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found.update(repr((name, _place(value))).encode())
        found.update(_bits(value))
    return found.digest()


def _settings(module: nn.Module) -> list[object]:
    own, of_class = vars(module), type(module)
    hooked = any(own[key] for key in own if key.startswith(("_forward", "_backward")))
    if hooked or any(callable(getattr(of_class, key, None)) for key in own):
        raise _UnlikeAnyOtherError
    return [(key, _plain(own[key])) for key in sorted(own.keys() - _OF_TORCH)]


def _plain(value: Any) -> object:
    """What a setting is, without addresses."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return [(str(key), _plain(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, set | frozenset):
        return [_plain(each) for each in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return _place(value), hashlib.sha256(_bits(value)).digest()
    if hasattr(value, "to_dict"):  # a configuration of transformers or PEFT
        return type(value), _plain(value.to_dict())
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return _plain(type(value.__self__)), _plain(value.__func__)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        place = f"{value.__module__}.{value.__qualname__}"
        if "<" not in place:  # made within a function: there may be two of one name
            return place
    raise _UnlikeAnyOtherError


def _place(value: Tensor) -> object:
    aligned = value.data_ptr() % _ALIGNED
    return value.dtype, value.shape, value.stride(), value.device, aligned, value.requires_grad


def _bits(value: Tensor) -> memoryview:
    flat = value.detach().cpu().contiguous().reshape(-1)
    octets: Any = flat.view(torch.uint8).numpy()
    return memoryview(octets)
