"""Layers that are computed again for the gradients: the same bits, and less in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, full_layout, load_vector, to_vector
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.layers import checkpointed
from securefedcollm.tuning.local import train_plain
from securefedcollm.tuning.prompts import attach_prompt
from securefedcollm.tuning.recipe import training_mode
from tests.support.models import Toy
from tests.support.plans import distil_plan, train_plan

KEY = "models.llm.checkpointing"


def model_of(toy: Toy, seed: int, *, again: bool, **options: Any) -> Any:
    base = toy.model(hidden=32, seed=seed)
    if "tokens" in options:
        model = attach_prompt(base, method="prompt", seed=0, **options)
    else:
        model = attach(base, method="lora", rank=4, seed=1, **options)
        layout = full_layout(model)
        values = np.random.default_rng(seed).normal(scale=0.1, size=layout.size)
        load_vector(model, layout, values)
    if again:
        checkpointed(model, KEY)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.3}, {"top_layers": 1}, {"tokens": 3}],
    ids=["lora", "with dropout", "top layers", "prompt"],
)
def test_distillation_ends_at_the_same_bits(toy: Toy, options: dict[str, Any]) -> None:
    ends = []
    for again in (False, True):
        models = [model_of(toy, seed, again=again, **options) for seed in (0, 1)]
        layouts = [full_layout(model) for model in models]
        data = toy.encoded(16)
        both = [data] * 2
        if "top_layers" in options:  # frozen layers below: their states are kept
            both = [with_prefix(model, data, 1) for model in models]
        plan = distil_plan(
            steps=4,
            batch_labelled=4,
            batch_unlabelled=4,
            learning_rate_llm=1e-2,
            learning_rate_slm=1e-2,
        )
        starts = [to_vector(*pair) for pair in zip(models, layouts, strict=True)]
        distil(tuple(models), tuple(layouts), tuple(both), plan, seed=3)
        found = [to_vector(*pair) for pair in zip(models, layouts, strict=True)]
        assert not any(np.array_equal(*pair) for pair in zip(starts, found, strict=True))
        ends.append(found)
    for plain, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(plain, other)


def test_a_silos_tuning_ends_at_the_same_bits(toy: Toy) -> None:
    found = []
    for again in (False, True):
        model = model_of(toy, 0, again=again, dropout=0.2)
        layout = full_layout(model)
        found.append(
            train_plain(
                model,
                layout,
                toy.encoded(16),
                train_plan(steps=3, batch_size=6, learning_rate=1e-2),
                seed=1,
            ).delta
        )
    assert found[0].any()
    np.testing.assert_array_equal(*found)


def kept(model: Any, *, train: bool = True) -> int:
    """Numbers that one forward pass keeps for the backward one, weights left out."""
    sizes: list[int] = []
    weights = {weight.data_ptr() for weight in model.parameters()}

    def note(value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() not in weights:
            sizes.append(value.numel())
        return value

    with training_mode(model, seed=0), torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        model.train(train)
        model(input_ids=torch.arange(20)[None], use_cache=False)
    return sum(sizes)


def test_less_is_kept(toy: Toy) -> None:
    plain, less = (model_of(toy, 0, again=again) for again in (False, True))
    assert kept(less) < 0.4 * kept(plain)
    assert kept(less, train=False) == kept(plain, train=False)


def test_a_family_that_cannot_is_refused(toy: Toy) -> None:
    model = model_of(toy, 0, again=False)
    model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=rf"^{KEY}: the layers of LlamaForCausalLM cannot"):
        checkpointed(model, KEY)
