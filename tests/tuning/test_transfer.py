"""POST's transfer: the large model learns what the small one says, and what its adapter changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.tuning.adapters import full_layout, layout_of, load_vector, to_vector
from securefedcollm.tuning.choice_distil import predict
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.head import without_adapter
from securefedcollm.tuning.plans import DistilLossPlan
from securefedcollm.tuning.questions import choice_scores
from securefedcollm.tuning.transfer import TransferObjective
from tests.support.plans import attached, distil_plan


def pair(toy: Any, method: Any) -> tuple[Any, Any]:
    """A wider LLM with a fresh adapter, and an SLM whose adapter says something."""
    llm = attached(toy.model(hidden=32, seed=5), method, rank=2)
    slm = attached(toy.model(), method, rank=2)
    layout = full_layout(slm)
    load_vector(slm, layout, np.random.default_rng(3).normal(scale=0.5, size=layout.size))
    return llm, slm


def carried(toy: Any, method: Any, *, steps: int, **settings: Any) -> tuple[Any, Any]:
    llm, slm = pair(toy, method)
    data = toy.encoded(24, labelled=False)
    plan = distil_plan(
        steps=steps,
        batch_labelled=0,
        batch_unlabelled=24,
        learning_rate_llm=0.05,
        learning_rate_slm=0.05,
        loss="transfer",
        **settings,
    )
    layouts = layout_of(llm, method), layout_of(slm, method)
    distil((llm, slm), layouts, (data, data), plan, seed=1)
    return llm, slm


def apart(toy: Any, llm: Any, slm: Any) -> float:
    """Mean KL of the LLM's predictions from the SLM's, on the questions that were learnt from."""
    data = toy.encoded(24, labelled=False)
    theirs, ours = predict(slm, data), predict(llm, data)
    return float((theirs * (theirs.clamp_min(1e-9) / ours.clamp_min(1e-9)).log()).sum(1).mean())


@pytest.mark.parametrize("method", ["prompt", "prefix", "ffa-lora"])
def test_the_large_model_learns_and_the_small_one_stays(toy: Any, method: Any) -> None:
    before = pair(toy, method)
    after = carried(toy, method, steps=60, change=0.0)
    small = full_layout(before[1])
    assert np.array_equal(to_vector(before[1], small), to_vector(after[1], small))
    assert apart(toy, *after) < 0.8 * apart(toy, *before)


def test_the_loss_is_the_papers(toy: Any) -> None:
    """By hand, on a question with two choices and one with three."""
    llm, slm = pair(toy, "prompt")
    data = toy.encoded(6, labelled=False)
    assert not bool(data.choice_mask.all())
    plan = DistilLossPlan(kind="transfer", weight=3.0, temperature=2.0, change=0.25)
    batch = torch.arange(6)
    found, nothing = TransferObjective((llm, slm), (data, data), plan).terms(batch, batch)
    assert nothing == 0
    wanted = 0.0
    for row in range(6):
        one = data.select(torch.tensor([row]))
        real = one.choice_mask[0]
        scores = []
        for model in (llm, slm):
            own = choice_scores(model, one)[0][real].detach().double()
            with without_adapter(model), torch.no_grad():
                scores.append((own, own - choice_scores(model, one)[0][real].double()))
        (large, moved), (small, change) = scores
        for share, teacher, student in ((0.75, small, large), (0.25, change, moved)):
            p, q = (torch.softmax(z / 2.0, 0) for z in (teacher, student))
            wanted += 3.0 * share * 4.0 * float((p * (p / q).log()).sum()) / 6
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_the_change_is_learnt_where_it_counts(toy: Any) -> None:
    """With change: 1 the LLM's own answers stay a part of what it says; with 0 they do not."""

    def moves(llm: Any, slm: Any) -> float:
        data, found = toy.encoded(24, labelled=False), []
        for model in (slm, llm):
            with torch.no_grad():
                own = choice_scores(model, data)
                with without_adapter(model):
                    plain = choice_scores(model, data)
            gone = (own - plain).masked_fill(~data.choice_mask, -torch.inf)
            found.append(torch.softmax(gone, 1).clamp_min(1e-9))
        return float((found[0] * (found[0] / found[1]).log()).sum(1).mean())

    start = moves(*pair(toy, "prompt"))
    by_change = moves(*carried(toy, "prompt", steps=60, change=1.0))
    by_answers = moves(*carried(toy, "prompt", steps=60, change=0.0))
    assert by_change < start
    assert by_change < by_answers


def test_leaving_the_adapter_out_for_a_while_trains_nothing_more(toy: Any) -> None:
    """PEFT makes A and B trainable when a disabled adapter comes back."""
    model = attached(toy.model(), "ffa-lora", rank=2)
    before = [p.requires_grad for p in model.parameters()]
    with without_adapter(model):
        pass
    assert [p.requires_grad for p in model.parameters()] == before
