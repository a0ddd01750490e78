"""What the losses take for a model's logits is what the model says; other models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach
from securefedcollm.tuning.head import check_output, output_logits

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def made(which: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match which:
            case "gemma2":
                config: Any = Gemma2Config(**SIZES, final_logit_softcapping=2.0)
                return Gemma2ForCausalLM(config).eval()
            case "cohere":
                return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()
            case _:
                return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()


@pytest.mark.parametrize("which", ["gemma2", "cohere", "granite"])
def test_capped_and_scaled_logits_are_the_model_s(which: str) -> None:
    model = made(which)
    check_output(model, "models.llm")
    tokens = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        bare = model.get_output_embeddings()(hidden)
        said = model(input_ids=tokens).logits
        torch.testing.assert_close(output_logits(model)(hidden), said)
    assert (bare - said).abs().max() > 0.1  # the cap or the scale does something here
    check_output(attach(model, rank=2), "models.llm")


def test_a_model_that_does_more_is_refused() -> None:
    model = made("granite")
    before = model.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        out = before(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = louder
    with pytest.raises(ConfigError, match=r"models.llm: GraniteForCausalLM turns its last hidden"):
        check_output(model, "models.llm")
