"""Continue a prompt with a base model or a co-tuned one."""

from __future__ import annotations

from pathlib import Path

import torch

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import load_adapter, quiet_peft
from securefedcollm.tuning.head import check_positions, check_vocabulary, device_of
from securefedcollm.tuning.models import LoadedModel
from securefedcollm.tuning.prompts import check_virtual
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.recipe import inference_mode, quiet_transformers
from securefedcollm.tuning.tokenise import tokenise


def generate(
    loaded: LoadedModel,
    prompt: str,
    *,
    adapter: Path | None = None,
    max_tokens: int = 40,
    instruction: bool = False,
) -> str:
    """The greedy continuation of ``prompt``, without the prompt and without special tokens.

    Args:
        adapter: a PEFT directory (safetensors only) made for this base model.
        max_tokens: the most new tokens.
        instruction: put the prompt as the task ``instruction`` does: in the tokenizer's chat
            template, or framed by plain words.

    Raises:
        ConfigError: the adapter cannot be read or does not fit the model, or the prompt is empty.
    """
    model = loaded.model if adapter is None else load_adapter(loaded.model, adapter)
    check_virtual(model, "--adapter")
    if instruction:
        asked = tokenise([Question(prompt, (), None)], loaded.tokenizer, 2**30, "instruction")
        ids = torch.tensor([asked[0][0].ids], device=device_of(model))
    else:
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=device_of(model))
    if ids.numel() == 0:
        raise ConfigError("the prompt has no tokens", where="--prompt", hint="give it some words")
    check_vocabulary(model, loaded.tokenizer, ids)
    check_positions(model, ids.shape[1] + max_tokens, "that continues it", "--max-tokens")
    with inference_mode(model), quiet_transformers(), quiet_peft():
        out = model.generate(
            input_ids=ids.long(),
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
        )
    new = out[0, ids.shape[1] :]
    text: str = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()
