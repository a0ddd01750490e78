"""Continue a prompt with a base model or a co-tuned one."""

from __future__ import annotations

from pathlib import Path

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import load_adapter
from securefedcollm.tuning.models import LoadedModel, quiet_transformers
from securefedcollm.tuning.recipe import inference_mode


def generate(
    loaded: LoadedModel, prompt: str, *, adapter: Path | None = None, max_tokens: int = 40
) -> str:
    """The greedy continuation of ``prompt``, without the prompt and without special tokens.

    Args:
        adapter: a PEFT directory (safetensors only) made for this base model.
        max_tokens: at most so many new tokens.

    Raises:
        ConfigError: the adapter cannot be read or does not fit the model, or the prompt is empty.
    """
    model = loaded.model if adapter is None else load_adapter(loaded.model, adapter)
    tokens = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if tokens["input_ids"].numel() == 0:
        raise ConfigError("the prompt has no tokens", where="--prompt", hint="give it some words")
    with inference_mode(model), quiet_transformers():
        out = model.generate(
            **tokens,
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
        )
    new = out[0, tokens["input_ids"].shape[1] :]
    text: str = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()
