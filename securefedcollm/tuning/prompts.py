"""Soft prompts and prefixes as adapters: attaching them, and a test that the model heeds them."""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.tuning.adapters import layout_of, quiet_peft, select, shared_uniform
from securefedcollm.tuning.head import device_of, output_logits, text_config, unwrapped
from securefedcollm.tuning.independence import made_up, made_up_adapter
from securefedcollm.tuning.passes import Shape
from securefedcollm.tuning.questions import EncodedQuestions, last_hidden
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.virtual import virtual_of

_SMALL: Final = 0.02
_SHAPE: Final = Shape(12, 2)  # of the rows that the test takes
# How far logits may differ, relative to their length, in float32 and in anything shorter:
_SAME: Final = (1e-3, 0.05)
_UNMOVED: Final = (1e-6, 1e-3)


def attach_prompt(
    model: nn.Module,
    *,
    method: Literal["prompt", "prefix"],
    tokens: int,
    seed: int = 0,
) -> Any:
    """Put fresh virtual tokens before ``model`` and return the ``PeftModel``; the base is frozen.

    They are drawn from ``seed``, bit for bit the same on every machine and in every version, and so
    small that they say little: the model starts near what it was. Global random state is neither
    read nor changed.

    Args:
        tokens: how many.

    Raises:
        ConfigError: the model's configuration does not say what PEFT has to know.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    training = model.training
    config: PrefixTuningConfig | PromptTuningConfig = PrefixTuningConfig(
        num_virtual_tokens=tokens, task_type="CAUSAL_LM"
    )
    if method == "prompt":  # PEFT would guess the width, and asks families without heads for them
        config = PromptTuningConfig(
            num_virtual_tokens=tokens,
            task_type="CAUSAL_LM",
            token_dim=unwrapped(model).get_input_embeddings().embedding_dim,
            num_attention_heads=getattr(text_config(model), "num_attention_heads", None) or 1,
        )
    try:
        # PEFT draws values of its own (replaced below).
        with torch.random.fork_rng(devices=[]), quiet_peft():
            adapted = get_peft_model(model, config)
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"virtual tokens do not fit the model: {printable(error)}",
            where="adapter.method",
            hint="choose ffa-lora",
        ) from error
    (values,) = select(adapted, layout_of(adapted, method))
    fresh = shared_uniform(b"adapter/prompt\0", f"{seed}", values.shape, _SMALL)
    values.data.copy_(torch.from_numpy(fresh))
    return adapted.train(training)


def check_virtual(model: Any, where: str) -> None:
    """Refuse a model that does not heed virtual tokens, or not as PEFT's own forward pass has it.

    It puts made-up records, with packed choices and padding, behind made-up virtual tokens. The
    logits must be those of PEFT for plain rows one by one, and not those of the base model. Models
    without virtual tokens pass.

    Raises:
        ConfigError: names the model.
    """
    if virtual_of(model) is None:
        return
    coarse = unwrapped(model).dtype != torch.float32
    batch = made_up(model, _SHAPE, [2, 1]).to(device_of(model))
    try:
        with inference_mode(model), made_up_adapter(model, 0.5), quiet_peft():
            ours = output_logits(model)(last_hidden(model, batch))
            for row in range(len(batch)):
                for places in _plain_rows(batch, row):
                    tokens = batch.tokens[row, places][None]
                    theirs = _logits(model, tokens)
                    if not _alike(ours[row, places], theirs, _SAME[coarse]):
                        raise _refused(model, where, "they do not do what PEFT makes them do")
                    if _alike(_logits(unwrapped(model), tokens), theirs, _UNMOVED[coarse]):
                        raise _refused(model, where, "they change nothing")
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(model, where, error) from error


def _plain_rows(batch: EncodedQuestions, row: int) -> list[Tensor]:
    """The places [n] of prompt and choice in a packed row, for each of its choices."""
    segments, choices = batch.segments[row], batch.choice_mask.shape[1]
    return [
        ((segments == 0) | (segments == choice + 1)).nonzero()[:, 0] for choice in range(choices)
    ]


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """The library's own logits behind each of ``tokens`` [1, n]: [n, V]."""
    mask = torch.ones_like(tokens)
    logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
    return logits[0, -tokens.shape[1] :].float()


def _alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    apart = (found - wanted).norm(dim=-1)
    return bool((apart <= tolerance * wanted.norm(dim=-1).clamp_min(1e-6)).all())


def _refused(model: Any, where: str, why: str | Exception) -> ConfigError:
    if isinstance(why, Exception):
        why = f"{type(why).__name__}: {printable(why, 120)}"
    return ConfigError(
        f"{type(unwrapped(model)).__name__} cannot be tuned by virtual tokens: {why}",
        where=where,
        hint="choose adapter.method: ffa-lora, or a model that docs/models.md lists for prompts",
    )
