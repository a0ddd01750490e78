"""Virtual tokens before every row: soft prompts and prefixes, as PEFT makes them.

A *prompt* (Lester et al. 2021, arXiv 2104.08691) is p vectors of the embedding's width that
precede the tokens of a row. A *prefix* (Li and Liang 2021, arXiv 2101.00190, without its
reparametrisation) is p keys and values in every layer. The base model stays as it is. Both are one
matrix, [p, numbers of a token], and every row of a pass gets a copy of its own: the gradient of a
row's copy is the gradient of that row, and no kernel adds it to another's.

Packed rows (:mod:`.questions`) need nothing new: virtual tokens belong to the prompt's segment, so
all choices see them, and positions move by p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

KINDS: Final = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
"""PEFT's names of the two methods."""


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens of a model."""

    encoder: nn.Module
    """Numbers of tokens, int64 [B, p] → their values, float32 [B, p, w]."""
    count: int
    prefix: bool
    shape: tuple[int, int]
    """For a prefix: heads of a layer's keys and values, and their width."""

    @property
    def weight(self) -> nn.Parameter:
        """What is trained, float32 [p, w]."""
        return cast(nn.Parameter, cast(nn.Embedding, self.encoder.embedding).weight)

    def rows(self, size: int, device: torch.device) -> Rows:
        """A copy for each of ``size`` rows, in the graph."""
        numbers = torch.arange(self.count, device=device).expand(size, self.count)
        return Rows(self, self.encoder(numbers))


class Rows(NamedTuple):
    """Virtual tokens for the rows of one pass."""

    virtual: Virtual
    values: Tensor  # float32 [B, p, w]

    def each(self, times: int) -> Rows:
        """Repeat every row ``times`` times, one after the other."""
        size, count, width = self.values.shape
        values = self.values[:, None].expand(size, times, count, width)
        return Rows(self.virtual, values.reshape(size * times, count, width))

    def before(self, causal: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass of plain rows, with the virtual tokens before them.

        Args:
            given: ``input_ids`` [B, L]; ``attention_mask``: 1 for a token and 0 for padding
                [B, L], or additive and with the virtual tokens in it already (:func:`widened`);
                ``position_ids`` [B, L], from 0, if the family takes them.
        """
        given, count = dict(given), self.virtual.count
        values = self.values.to(causal.dtype)
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            given["attention_mask"] = F.pad(mask, (count, 0), value=1)
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + count
        if self.virtual.prefix:
            return {**given, "past_key_values": _cache(values, self.virtual.shape)}
        if "position_ids" in given:
            first = torch.arange(count, device=values.device).expand(len(values), count)
            given["position_ids"] = torch.cat([first, given["position_ids"]], 1)
        words = causal.get_input_embeddings()(given.pop("input_ids"))
        return {**given, "inputs_embeds": torch.cat([values, words], 1)}


def virtual_of(model: Any) -> Virtual | None:
    """The virtual tokens of a ``PeftModel``; None where it has none, or while they are disabled."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type not in KINDS.values() or model._adapters_disabled:
        return None
    return Virtual(
        model.prompt_encoder[model.active_adapter],
        config.num_virtual_tokens,
        config.peft_type == KINDS["prefix"],
        (config.num_attention_heads, config.token_dim // config.num_attention_heads),
    )


def virtual_count(model: Any) -> int:
    """How many virtual tokens precede every row of ``model``."""
    virtual = virtual_of(model)
    return 0 if virtual is None else virtual.count


def widened(segments: Tensor, virtual: Virtual) -> Tensor:
    """``segments`` [B, L] (:class:`.questions.EncodedQuestions`) with virtual tokens before them.

    They belong to the prompt.
    """
    return F.pad(segments, (virtual.count, 0), value=0)


def _cache(values: Tensor, shape: tuple[int, int]) -> Any:
    """Keys and values [B, p, layers · 2 · heads · width] as transformers keeps them."""
    from transformers import DynamicCache

    size, count, _ = values.shape
    parts = values.view(size, count, -1, *shape).permute(2, 0, 3, 1, 4)  # [2 · layers, B, h, p, w]
    return DynamicCache([(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)])
