"""The output layer of a model: hidden states after the last layer → logits.

Losses here compute logits a few positions at a time, so they apply the output layer themselves
instead of asking the model for its logits. A few families do more than a matrix product there;
:func:`check_output` finds out, on the model itself, whether this module knows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.virtual import virtual_count

Logits = Callable[[Tensor], Tensor]


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PeftModel (its LoRA layers stay active) or a WholeModel, or
    ``model``."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sees(model: Any) -> bool:
    """Whether the model's input is a signal, a picture or a recording, and no tokens."""
    return str(getattr(unwrapped(model), "main_input_name", "input_ids")) != "input_ids"


def hears(model: Any) -> bool:
    """Whether that signal is a recording: samples, or the spectrum of them."""
    name = str(getattr(unwrapped(model), "main_input_name", "input_ids"))
    return name in {"input_values", "input_features"}


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base model alone for a while; what is trainable stays so."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            yield
    finally:  # PEFT makes all of a low-rank adapter trainable when it comes back
        for parameter, kept in trained:
            parameter.requires_grad_(kept)


def device_of(model: Any) -> torch.device:
    """Where the model's weights are."""
    device: torch.device = next(model.parameters()).device
    return device


def text_config(model: Any) -> Any:
    """The configuration of the model's language part; of the part that sees, where it is that."""
    config = unwrapped(model).config
    if sees(model):
        return getattr(config, "vision_config", config)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def learned_positions(model: Any) -> int | None:
    """How many positions a model has a table for; None where it computes them (rotary).

    Those that its virtual tokens take do not count.
    """
    causal = unwrapped(model)
    if sees(causal):
        return None
    known: int | None = getattr(text_config(causal), "max_position_embeddings", None)
    base = getattr(causal, "base_model", None)
    if base is None or hasattr(base, "rotary_emb") or known is None:
        return None
    return known - virtual_count(model)


def routed(model: Any) -> bool:
    """Whether tokens are sent to experts: how many tokens an expert sees depends on all rows."""
    config = text_config(model)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def check_positions(model: Any, tokens: int, name: str, where: str = "task.max_tokens") -> None:
    """Refuse rows of ``tokens`` tokens where the model ``name`` has no position for the last.

    Raises:
        ConfigError: gives both numbers.
    """
    known = learned_positions(model)
    if known is not None and tokens > known:
        virtual = virtual_count(model)
        beside = f" beside its {virtual} virtual tokens" if virtual else ""
        raise ConfigError(
            f"{tokens} tokens, the model {name} has positions for {known}{beside}",
            where=where,
            hint=f"at most {known}" + (", or fewer adapter.virtual_tokens" if virtual else ""),
        )


def check_vocabulary(model: Any, tokenizer: Any, *tokens: Tensor) -> None:
    """Refuse tokens without an embedding.

    Adversary: a server that sees a silo fail in the very step that samples such a record.

    Raises:
        ConfigError: gives the sizes of both.
    """
    if sees(model):
        return
    known = unwrapped(model).get_input_embeddings().num_embeddings
    greatest = max((int(some.max()) for some in tokens if some.numel()), default=0)
    if greatest >= known:
        count = len(tokenizer) if hasattr(tokenizer, "__len__") else greatest + 1
        raise ConfigError(
            f"the tokenizer has {count} tokens, the model has embeddings for {known}",
            where="models",
            hint="use the tokenizer that the model was trained with, or the model that was saved "
            "after resize_token_embeddings",
        )


def output_logits(model: Any) -> Logits:
    """The function [M, D] → float32 logits [M, V] of ``model``'s output layer.

    Of a model that sees, the states are its logits already (:func:`.classifiers.class_logits`).
    Gemma 2 and 3 squash their logits to ±c by c·tanh(z / c); Cohere multiplies and Granite divides
    them by a constant.
    """
    causal = unwrapped(model)
    if sees(causal):
        return lambda hidden: hidden.float()
    head = causal.get_output_embeddings()
    config = text_config(causal)
    cap = getattr(config, "final_logit_softcapping", None)
    factor = float(getattr(config, "logit_scale", None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden).float()
        if factor != 1.0:
            values = values * factor
        return values if cap is None else cap * torch.tanh(values / cap)

    return logits


def trained_head(model: Any) -> list[nn.Parameter]:
    """The weights of the output layer that are trained; none unless the adapter is on it."""
    causal = unwrapped(model)
    head = None if sees(causal) else causal.get_output_embeddings()
    weights = head.parameters() if isinstance(head, nn.Module) else ()
    return [weight for weight in weights if weight.requires_grad]


def check_output(model: Any, where: str) -> None:
    """Refuse a model whose own logits are not those of :func:`output_logits`.

    Raises:
        ConfigError: they differ on three tokens.
    """
    causal = unwrapped(model)
    vocabulary = causal.get_input_embeddings().num_embeddings
    padding = getattr(causal.config, "pad_token_id", None)  # at an end, it makes the library warn
    words = [token for token in range(4) if token != padding][:3]
    tokens = torch.tensor([words], device=device_of(causal)) % vocabulary
    with inference_mode(causal):
        whole = causal(input_ids=tokens, use_cache=False).logits.float()
        hidden = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = output_logits(causal)(hidden)
    tolerance = 1e-3 if causal.dtype == torch.float32 else 0.02
    apart = (whole - ours).abs().max() / whole.abs().max().clamp_min(1e-6)
    if not bool(apart < tolerance):  # a NaN is refused as well
        raise ConfigError(
            f"{type(causal).__name__} turns its last hidden states into logits in a way that is "
            "not known here",
            where=where,
            hint="use a causal language model whose output layer is one linear layer, such as "
            "Llama, GPT-2, OPT, Qwen or Gemma",
        )
