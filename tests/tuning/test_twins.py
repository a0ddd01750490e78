"""Models that compute alike are tested for independence once; any other is tested by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.tuning import independence
from securefedcollm.tuning.adapters import attach, layout_of, load_vector
from securefedcollm.tuning.independence import made_up_adapter
from securefedcollm.tuning.layers import decoder_layers
from securefedcollm.tuning.local import records_of
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.questions import Scoring
from securefedcollm.tuning.twins import fingerprint

RANK = 3  # of no other test: nobody has tested such a model in this process


def made(toy: Any, **changes: Any) -> Any:
    settings = {"method": "lora", "rank": RANK, "alpha": 4, "seed": 1} | changes
    base = toy.model(seed=settings.pop("base", 41))
    return attach(base, **settings)


def print_of(model: Any) -> bytes | None:
    with made_up_adapter(model, 0.1):
        return fingerprint(model)


def weight_of(model: Any) -> torch.Tensor:
    weight: torch.Tensor = decoder_layers(model.get_base_model())[1].mlp.down_proj.weight
    return weight


def test_an_adapter_s_own_numbers_do_not_matter(toy: Any) -> None:
    assert print_of(made(toy)) == print_of(made(toy, seed=2))
    assert print_of(made(toy)) is not None


def one_bit(model: Any) -> None:
    with torch.no_grad():
        weight_of(model).view(torch.int32)[3, 5] ^= 1


def other_layout(model: Any) -> None:
    weight = weight_of(model)
    weight.data = weight.data.t().contiguous().t()


def other_alignment(model: Any) -> None:
    weight = weight_of(model)
    memory = torch.empty(weight.numel() + 1)
    weight.data = memory[1:].view_as(weight).copy_(weight.data)


def other_setting(model: Any) -> None:
    model.get_base_model().config.attention_dropout = 0.1


def other_class(model: Any) -> None:
    class Bent(type(model.get_base_model().model.norm)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states * len(states)

    model.get_base_model().model.norm.__class__ = Bent


def hook(model: Any) -> None:
    decoder_layers(model.get_base_model())[0].register_forward_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    mlp = decoder_layers(model.get_base_model())[0].mlp
    mlp.forward = lambda states, plain=mlp.forward: plain(states)


def unknown(model: Any) -> None:
    model.get_base_model().remembered = iter([])


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        other_layout,
        other_alignment,
        other_setting,
        other_class,
        hook,
        own_forward,
        unknown,
    ],
)
def test_whatever_could_compute_otherwise_is_another_model(
    toy: Any, change: Callable[[Any], None]
) -> None:
    """Adversary: as in test_independence. What was found of one model says nothing of this one."""
    model = made(toy)
    change(model)
    found = print_of(model)
    assert found != print_of(made(toy))
    certain = change in {one_bit, other_layout, other_alignment, other_setting}
    assert (found is not None) == certain
    if not certain:  # not even like itself
        assert print_of(model) is None


@pytest.mark.parametrize("changes", [{"rank": 2}, {"alpha": 8}, {"base": 42}, {"top_layers": 1}])
def test_other_adapters_and_bases_are_other_models(toy: Any, changes: dict[str, Any]) -> None:
    assert print_of(made(toy, **changes)) != print_of(made(toy))


@pytest.mark.soak
def test_the_test_is_made_once_for_all_of_a_kind_and_anew_for_any_other(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up, counted = independence.made_up, []
    monkeypatch.setattr(
        independence, "made_up", lambda *given: counted.append(given[1]) or made_up(*given)
    )

    def tested(model: Any, **loss: Any) -> set[Any]:
        counted.clear()
        records_of(model, layout_of(model, "lora"), toy.encoded(5), LossPlan(**loss))
        return set(counted)

    first = tested(made(toy))
    assert len(first) > 2
    assert tested(made(toy)) == set()
    assert tested(made(toy, base=42)) == first
    assert tested(made(toy), kind="choices") >= first
    assert tested(made(toy), kind="choices", scoring=Scoring("length")) >= first
    bent = made(toy)
    hook(bent)
    assert tested(bent) == first
    assert tested(bent) == set()  # in the same model, once


def test_a_hostile_adapter_fails_no_silo_that_need_not_test(toy: Any) -> None:
    """Adversary: a server whose adapter overflows, sent to a silo of a model that another silo of
    the process has tested."""
    first, second = made(toy), made(toy)
    for model in (first, second):
        layout = layout_of(model, "lora")
        load_vector(model, layout, np.full(layout.size, 1e30))
        records_of(model, layout, toy.encoded(5), LossPlan())
