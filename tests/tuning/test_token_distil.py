"""Distillation token by token: a step against float64 arithmetic on unpacked forward passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, layout_of, load_vector, select, to_vector
from securefedcollm.tuning.distil import DistilStep, distil
from securefedcollm.tuning.plans import DistilLossPlan, DistilPlan
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm.tuning.token_distil import TokenObjective

TAU, WEIGHT, SHARP, TOP = 1.7, 0.6, 3.0, 5


def pair(toy: Any) -> tuple[Any, Any]:
    """A larger and a smaller model whose adapters say something."""
    models = attach(toy.model(hidden=32), seed=1), attach(toy.model(seed=1), seed=1)
    for i, model in enumerate(models):
        layout = layout_of(model, "ffa-lora")
        load_vector(model, layout, np.random.default_rng(i).normal(scale=0.1, size=layout.size))
    return models


def some_data(toy: Any) -> EncodedQuestions:
    """Eight questions, three of them without a label."""
    data = toy.encoded(8)
    answers = data.answers.clone()
    answers[5:] = -1
    return replace(data, answers=answers)


def unpacked(model: Any, data: EncodedQuestions, over: str) -> list[dict[Any, tuple[Tensor, int]]]:
    """For every question: what is predicted where → (logits [V], gold or -1), pass by pass."""
    rows: list[dict[Any, tuple[Tensor, int]]] = []
    for i, answer in enumerate(data.answers.tolist()):
        prompt = data.tokens[i, : int(data.prompt_tokens[i])].tolist()
        owners = data.target_choices[i].tolist()
        found: dict[Any, tuple[Tensor, int]] = {}
        for c in range(int(data.choice_mask[i].sum())):
            if answer >= 0 and c != answer:
                continue
            chosen = [t for t, o in zip(data.targets[i].tolist(), owners, strict=True) if o == c]
            text = prompt + chosen
            logits = model(torch.tensor([text])).logits[0]
            for place in range(len(text) - 1):
                in_prompt = place < len(prompt) - 1
                if in_prompt and over == "answer":
                    continue
                key = (place,) if place < len(prompt) else (place, c)
                found[key] = (logits[place], text[place + 1] if answer >= 0 else -1)
        rows.append(found)
    return rows


def divergence(p: Tensor, q: Tensor, direction: str) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    middle = (p + q) / 2
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "js": (kl(p, middle) + kl(q, middle)) / 2,
    }[direction]


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


def teacher_of(loss: str, row: list[tuple[Tensor, Tensor, int]], own: int) -> list[Tensor] | None:
    """The teacher at every position of one question, from both models' p at the temperature."""
    if loss == "none":
        return None
    if loss == "mutual-kl":
        return [position[1 - own] for position in row]
    if loss == "entropy-pooled":
        shares = [torch.sigmoid(SHARP * (entropy(slm) - entropy(llm))) for llm, slm, _ in row]
    else:
        wrong = [
            sum(-both[w][gold].log() if gold >= 0 else entropy(both[w]) for *both, gold in row)
            for w in (0, 1)
        ]
        shares = [torch.tensor(float(wrong[0] <= wrong[1]))] * len(row)
    return [w * llm + (1 - w) * slm for w, (llm, slm, _) in zip(shares, row, strict=True)]


def reference(
    models: Sequence[Any], data: EncodedQuestions, loss: str, over: str, direction: str, top: int
) -> list[Tensor]:
    """(LLM, SLM) loss in float64, differentiable."""
    said = [unpacked(model, data, over) for model in models]
    places = sum(map(len, said[0]))
    labels = sum(gold >= 0 for row in said[0] for _, gold in row.values())
    losses = []
    for own in (0, 1):
        total = torch.zeros((), dtype=torch.float64)
        for llm_row, slm_row in zip(*said, strict=True):
            soft = [
                ((a[0] / TAU).softmax(-1).detach(), (b[0] / TAU).softmax(-1).detach(), a[1])
                for a, b in zip(llm_row.values(), slm_row.values(), strict=True)
            ]
            teachers = teacher_of(loss, soft, own)
            for at, (logits, gold) in enumerate((llm_row, slm_row)[own].values()):
                if gold >= 0:
                    total = total - logits.log_softmax(-1)[gold] / labels
                if teachers is not None:
                    p, q = teachers[at], (logits / TAU).softmax(-1)
                    if top:
                        listed = p.topk(top).indices
                        p, q = (torch.cat([x[listed], 1 - x[listed].sum()[None]]) for x in (p, q))
                    total = total + WEIGHT * TAU**2 * divergence(p, q, direction) / places
        losses.append(total)
    return losses


CASES = [
    ("none", "answer", "forward", 0),
    ("mutual-kl", "answer", "forward", 0),
    ("mutual-kl", "all", "reverse", 0),
    ("mutual-kl", "answer", "js", 0),
    ("entropy-pooled", "answer", "forward", 0),
    ("entropy-pooled", "all", "js", 0),
    ("entropy-pooled", "all", "forward", TOP),
    ("dual-min-ce", "answer", "forward", 0),
    ("dual-min-ce", "all", "reverse", TOP),
]


@pytest.mark.parametrize(("loss", "over", "direction", "top"), CASES)
def test_one_step_is_the_written_out_step(
    toy: Any, loss: Any, over: Any, direction: Any, top: int
) -> None:
    data, models = some_data(toy), pair(toy)
    if loss == "none":
        data = data.select(torch.arange(5))
    layouts = [layout_of(model, "ffa-lora") for model in models]
    doubles = [copy.deepcopy(model).double() for model in models]
    slopes = []
    expected = reference(doubles, data, loss, over, direction, top)
    for model, layout, value in zip(doubles, layouts, expected, strict=True):
        found = torch.autograd.grad(value, select(model, layout))
        slopes.append(torch.cat([g.flatten() for g in found]).numpy())
    before = [to_vector(model, layout) for model, layout in zip(models, layouts, strict=True)]

    plan = DistilLossPlan(
        kind=loss,
        over=over,
        top_k=top or None,
        sharpness=SHARP,
        weight=WEIGHT,
        temperature=TAU,
        direction=direction,
        micro_batch=3,
    )
    objective = TokenObjective(models, (data, data), plan)
    rows = torch.arange(len(data))
    for part in torch.split(rows, 3):
        for term in objective.terms(rows, part):
            term.backward()
    for model, layout, slope in zip(models, layouts, slopes, strict=True):
        got = torch.cat([p.grad.flatten() for p in select(model, layout)]).numpy()
        assert np.linalg.norm(got - slope) < 1e-4 * np.linalg.norm(slope)
        model.zero_grad()

    steps: list[DistilStep] = []
    phase = DistilPlan(
        steps=1,
        batch_labelled=5,
        batch_unlabelled=3,
        learning_rate_llm=1e-3,
        learning_rate_slm=1e-3,
        loss=plan,
    )
    distil(models, layouts, (data, data), phase, seed=0, on_step=steps.append)
    assert [steps[0].loss_llm, steps[0].loss_slm] == pytest.approx(
        [value.item() for value in expected], rel=1e-4
    )
    for model, layout, slope, start in zip(models, layouts, slopes, before, strict=True):
        adam = -1e-3 * slope / (np.abs(slope) + 1e-8)  # the first step of Adam
        clear = np.abs(slope) > 1e-4
        moved = to_vector(model, layout) - start
        assert clear.mean() > 0.5
        np.testing.assert_allclose(moved[clear], adam[clear], rtol=1e-3)


def test_a_padded_vocabulary_is_cut_to_the_tokens_that_both_have(toy: Any) -> None:
    llm, slm = toy.model(hidden=32), toy.model(seed=1)
    padded = copy.deepcopy(llm)
    padded.resize_token_embeddings(llm.config.vocab_size + 6)
    data = some_data(toy)
    losses = []
    for first in (llm, padded):
        models = attach(first, seed=1), attach(copy.deepcopy(slm), seed=1)
        plan = DistilLossPlan(kind="mutual-kl", over="all")
        objective = TokenObjective(models, (data, data), plan)
        rows = torch.arange(len(data))
        losses.append([term.item() for term in objective.terms(rows, rows)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
def test_who_does_not_learn_is_only_asked(toy: Any, kind: Any) -> None:
    data, models, rows = some_data(toy), pair(toy), torch.arange(8)
    plan = DistilLossPlan(kind=kind, over="answer")
    both = TokenObjective(models, (data, data), plan).terms(rows, rows)
    for learns in ((True, False), (False, True)):
        terms = TokenObjective(models, (data, data), plan, learns).terms(rows, rows)
        assert [term.requires_grad for term in terms] == list(learns)
        expected = [t.item() * own for t, own in zip(both, learns, strict=True)]
        assert [term.item() for term in terms] == expected


def test_tokens_need_a_position(toy: Any) -> None:
    data = toy.encoded(2)
    bare = replace(data, target_choices=torch.full_like(data.target_choices, 3))
    with pytest.raises(ConfigError, match="no token to compare"):
        TokenObjective(pair(toy), (bare, bare), DistilLossPlan(kind="none", over="answer"))


@pytest.mark.parametrize("over", ["choices", "answer"])
def test_a_bfloat16_base_keeps_its_adapter_in_float32(toy: Any, over: Any) -> None:
    """The same phase as in float32, but for the rounding of the frozen part."""
    data = some_data(toy)
    ends: list[list[DistilStep]] = []
    for dtype in (torch.float32, torch.bfloat16):
        bases = toy.model(hidden=32, dtype=dtype), toy.model(seed=1, dtype=dtype)
        models = [attach(base, seed=1) for base in bases]
        layouts = [layout_of(model, "ffa-lora") for model in models]
        for model, layout in zip(models, layouts, strict=True):
            assert {p.dtype for p in select(model, layout)} == {torch.float32}
        steps: list[DistilStep] = []
        plan = DistilPlan(
            steps=8,
            batch_labelled=5,
            batch_unlabelled=3,
            learning_rate_llm=2e-2,
            learning_rate_slm=2e-2,
            loss=DistilLossPlan(over=over),
        )
        distil(models, layouts, (data, data), plan, seed=0, on_step=steps.append)
        ends.append(steps)
    for exact, rounded in zip(*ends, strict=True):
        assert rounded.loss_llm == pytest.approx(exact.loss_llm, rel=0.08)
        assert rounded.loss_slm == pytest.approx(exact.loss_slm, rel=0.08)
    assert ends[1][-1].loss_llm < 0.9 * ends[1][0].loss_llm
