"""May the choices of a question share one row? A test on the model itself, and what to do if not.

A packed row (:mod:`.questions`) needs attention that obeys a block mask and position ids. Families
without such attention score packed choices wrongly and silently: a state space or a convolution
has seen the choice that was packed before, ALiBi measures distances in the row, a sliding window
is not in our mask. So :func:`row_limit` compares packed states with those of one plain pass for
each choice, once for a model. Where they differ, :func:`states_apart` gives every choice a row of
its own, and all that scores, tunes or distils goes on as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.tuning.classifiers import check_classifier
from securefedcollm.tuning.head import (
    check_output,
    device_of,
    routed,
    sees,
    text_config,
    unwrapped,
)
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.virtual import Rows

ANY_LENGTH: Final = 1 << 60
_WINDOWS: Final = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
# How far states may differ, relative to their length, in float32 and in anything shorter:
_UNMOVED: Final = (1e-6, 1e-3)  # passes of one shape, and nothing that a token sees has changed
_ROUNDED: Final = (2e-5, 0.05)  # other shapes
_LOOSE: Final = (1e-3, 0.05)  # other shapes, where a difference means that the model is refused
_PROMPT, _CHOICE = 5, 4  # tokens of the test's prompt and of each of its two choices

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Keyed by the embedding's weight, which all copies of a model's modules share."""


def check_model(model: Any, where: str) -> None:
    """Refuse a model that cannot be scored here.

    Raises:
        ConfigError: as :func:`row_limit` and :func:`.head.check_output`, or it does not even run.
    """
    if sees(model):
        check_classifier(model, where)
        return
    try:
        row_limit(model, where)
        check_output(model, where)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} cannot be run on plain tokens "
            f"({type(error).__name__}: {printable(error, 120)})",
            where=where,
            hint="use a decoder that docs/models.md lists",
        ) from error


def row_limit(model: Any, where: str = "models") -> int:
    """Tokens up to which a packed row is right: 0, a window's length, or :data:`ANY_LENGTH`.

    A window that the configuration names is believed, not measured: within it every token sees
    all before it, so nothing depends on how it is applied.

    Raises:
        ConfigError: the model looks ahead, says NaN, or is wrong even for one choice in a row.
    """
    causal = unwrapped(model)
    if sees(causal):
        return ANY_LENGTH
    embedding = getattr(causal, "get_input_embeddings", lambda: None)()
    if embedding is None:  # no model of transformers
        return ANY_LENGTH
    if embedding.weight not in _known:
        with inference_mode(causal):
            _known[embedding.weight] = _tested(causal, embedding.num_embeddings, where)
    limit: int = _known[embedding.weight]
    return limit


def _tested(causal: Any, vocabulary: int, where: str) -> int:
    name, device = type(causal).__name__, device_of(causal)
    words = np.random.default_rng(0).integers(0, vocabulary, _PROMPT + 2 * _CHOICE)
    prompt, one, two = (
        torch.from_numpy(part).to(device)[None]
        for part in np.split(words, [_PROMPT, _PROMPT + _CHOICE])
    )
    first, second = (
        run(causal, input_ids=torch.cat([prompt, choice], 1))[0] for choice in (one, two)
    )
    wanted = torch.cat([first, second[_PROMPT:]])
    if not bool(torch.isfinite(wanted).all()):
        raise ConfigError(
            "it computes values that are not finite (NaN)",
            where=where,
            hint="its weights are damaged, or too large for this dtype: try float32",
        )
    # An expert sees other tokens if others precede or follow, which changes last bits.
    unmoved = _LOOSE if routed(causal) else _UNMOVED
    if not _alike(first[:_PROMPT], second[:_PROMPT], unmoved):
        raise ConfigError(
            f"{name} sees the tokens that follow: it is no causal language model",
            where=where,
            hint="use a decoder such as Llama, Qwen, GPT-2 or Gemma, not an encoder such as BERT",
        )
    tokens = torch.cat([prompt, one, two], 1)
    places = [*range(_PROMPT + _CHOICE), *range(_PROMPT, _PROMPT + _CHOICE)]
    positions = torch.tensor([places], device=device)
    owners = [0] * _PROMPT + [1] * _CHOICE + [2] * _CHOICE
    segments = torch.tensor([owners], dtype=torch.int8, device=device)
    try:
        mask = block_mask(segments, causal.dtype)
        found, other = (
            run(causal, input_ids=row, position_ids=positions, attention_mask=mask)[0]
            for row in (tokens, torch.cat([prompt, two, two], 1))
        )
        packs = _alike(found, wanted) and _alike(found[-_CHOICE:], other[-_CHOICE:], unmoved)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it knows no such mask
        packs = False
    if packs:
        return min(_windows(text_config(causal)), default=ANY_LENGTH)
    found = states_apart(causal, tokens, positions, segments, 2)
    if not _alike(found[0], wanted, _LOOSE):
        raise ConfigError(
            f"{name} gives other results for a row when padding follows it",
            where=where,
            hint="this family cannot be used; docs/models.md lists those that can",
        )
    return 0


def _windows(config: Any) -> list[int]:
    found = (getattr(config, name, None) for name in _WINDOWS)
    return [window for window in found if isinstance(window, int) and window > 0]


def _alike(found: Tensor, wanted: Tensor, tolerances: tuple[float, float] = _ROUNDED) -> bool:
    """Whether all hidden states [m, D] agree."""
    tolerance = tolerances[found.dtype != torch.float32]
    wanted, apart = wanted.float(), (found.float() - wanted.float()).norm(dim=-1)
    return bool((apart <= tolerance * wanted.norm(dim=-1).clamp_min(1e-6)).all())


def run(causal: Any, virtual: Rows | None = None, **given: Any) -> Tensor:
    """Hidden states after the last layer, [B, L, D]; omits arguments that the family does not take.

    Args:
        virtual: tokens before every row; the states are those of the rows alone.
    """
    base = causal.base_model
    names, open_ended = _takes(type(base).forward)
    options = {"use_cache": False, **given}
    options = {name: value for name, value in options.items() if name in names or open_ended}
    if virtual is None:
        states: Tensor = base(**options).last_hidden_state
        return states
    length = given["input_ids"].shape[1]
    # Kept even if the family does not take them: then it says so.
    states = base(**virtual.before(causal, options)).last_hidden_state
    return states[:, -length:]


@cache
def _takes(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The arguments of a family's forward pass, and whether it takes any other."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] of ``dtype``: a choice sees the prompt and itself."""
    key, query = segments[:, None, :], segments[:, :, None]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    allowed = causal & ((key == 0) | ((key == query) & (key >= 0)))
    # A padded query attends to itself: a softmax over nothing would be NaN.
    allowed |= torch.eye(length, dtype=torch.bool, device=key.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=key.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def states_apart(
    causal: Any,
    tokens: Tensor,
    positions: Tensor,
    segments: Tensor,
    choices: int,
    width: int | None = None,
    virtual: Rows | None = None,
) -> Tensor:
    """The states of packed rows, [B, L, D], from a plain row for each of their choices.

    Every row ends in at least one place of padding: transformers drops the mask if *all* rows of a
    pass are full, and that must not decide anything.

    Args:
        choices: rows for each packed row, choice by choice; 1 where nothing needs packing.
        width: tokens of the longest row; default that of these.
        virtual: tokens before every packed row; each of its plain rows gets them.
    """
    size, width = len(tokens), int(positions.max()) + 1 if width is None else width
    rows = tokens.new_zeros(size, choices, width + 1)
    mask = rows.clone()
    for choice in range(choices):
        own = (segments == 0) | (segments == choice + 1)
        where = positions.masked_fill(~own, width)
        rows[:, choice].scatter_(1, where, tokens)
        mask[:, choice].scatter_(1, where, 1)
    rows[..., width] = mask[..., width] = 0
    rows, mask = rows.flatten(0, 1), mask.flatten(0, 1)
    options = {"input_ids": rows, "attention_mask": mask}
    if "position_ids" in _takes(type(causal.base_model).forward)[0]:
        options["position_ids"] = torch.arange(width + 1, device=rows.device) * mask
    states = run(causal, None if virtual is None else virtual.each(choices), **options)
    row = torch.arange(size, device=rows.device)[:, None] * choices
    return states[row + (segments.long() - 1).clamp(0, choices - 1), positions]
