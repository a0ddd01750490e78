"""The chunked loss and its gradient against a plain float64 computation over whole logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from securefedcollm.tuning.token_loss import Labels, Target, Teacher, chunked_loss

M, D, V, TAU = 11, 6, 17, 1.7


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def reference(
    logits: Tensor, gold: Tensor | None, teacher: Tensor | None, direction: str, tau: float
) -> Tensor:
    """0.3 · Σ CE + 0.7 · τ² · Σ D, straight from the definitions."""
    total = logits.new_zeros(())
    if gold is not None:
        p = logits.softmax(-1)
        total = total - 0.3 * sum(p[i, g].log() for i, g in enumerate(gold.tolist()) if g >= 0)
    if teacher is not None:
        q = (logits / tau).softmax(-1)
        middle = (q + teacher) / 2
        apart = {
            "forward": lambda: kl(teacher, q),
            "reverse": lambda: kl(q, teacher),
            "js": lambda: (kl(teacher, middle) + kl(q, middle)) / 2,
        }[direction]()
        total = total + 0.7 * tau**2 * apart
    return total


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, head, gold, teacher) in float64; every third position has no gold token."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    gold = torch.randint(V, (M,), generator=g)
    gold[::3] = -1
    teacher = (torch.randn(M, V, generator=g, dtype=torch.float64) * 2).softmax(-1)
    return hidden.requires_grad_(), head.requires_grad_(), gold, teacher


def taught(says: Tensor, **how: Any) -> Teacher:
    """A teacher that says these probabilities [M, V]."""
    return Teacher(targets=lambda where: Target(says[where].log()), scale=0.7, **how)


def compare(one: Tensor, two: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    mine = torch.autograd.grad(one * 3, inputs)
    theirs = torch.autograd.grad(two * 3, inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert b.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("direction", "tau", "chunk"),
    list(itertools.product(["forward", "reverse", "js"], [1.0, TAU], [1, 4, 64])),
)
def test_loss_and_gradient_are_those_of_the_whole(direction: Any, tau: float, chunk: int) -> None:
    hidden, head, gold, teacher = drawn()
    loss = chunked_loss(
        hidden,
        lambda h: h @ head.T,
        [head],
        labels=Labels(gold=gold, scale=0.3),
        teacher=taught(teacher, temperature=tau, direction=direction),
        chunk=chunk,
    )
    compare(loss, reference(hidden @ head.T, gold, teacher, direction, tau), (hidden, head))


@pytest.mark.parametrize("which", ["gold", "teacher"])
def test_each_term_alone(which: str) -> None:
    hidden, head, gold, teacher = drawn(1)
    terms: dict[str, Any] = {"labels": Labels(gold=gold, scale=0.3)}
    if which == "teacher":
        terms = {"teacher": taught(teacher)}
    loss = chunked_loss(hidden, lambda h: h @ head.T, [head], chunk=4, **terms)
    given = (gold, None) if which == "gold" else (None, teacher)
    compare(loss, reference(hidden @ head.T, *given, "forward", 1.0), (hidden, head))


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_a_short_list_of_tokens_and_the_rest_as_one_event(direction: Any) -> None:
    hidden, head, _, teacher = drawn(2)
    top = teacher.topk(4)
    loss = chunked_loss(
        hidden,
        lambda h: h @ head.T,
        [head],
        teacher=Teacher(
            targets=lambda where: Target(top.values[where].log(), top.indices[where]),
            scale=0.7,
            temperature=TAU,
            direction=direction,
        ),
        chunk=4,
    )

    def events(p: Tensor) -> Tensor:
        listed = p.gather(1, top.indices)
        return torch.cat([listed, 1 - listed.sum(1, keepdim=True)], dim=1)

    q, p = events((hidden @ head.T / TAU).softmax(-1)), events(teacher)
    middle = (p + q) / 2
    apart = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "js": (kl(p, middle) + kl(q, middle)) / 2,
    }[direction]
    compare(loss, 0.7 * TAU**2 * apart, (hidden, head))


def test_an_output_layer_that_is_more_than_a_product() -> None:
    hidden, head, gold, teacher = drawn(3)

    def capped(h: Tensor) -> Tensor:
        return 3 * torch.tanh(h @ head.T / 3)

    loss = chunked_loss(
        hidden,
        capped,
        [head],
        labels=Labels(gold=gold, scale=0.3),
        teacher=taught(teacher),
        chunk=4,
    )
    compare(loss, reference(capped(hidden), gold, teacher, "forward", 1.0), (hidden, head))


def test_a_frozen_output_layer_keeps_no_gradient() -> None:
    hidden, head, gold, _ = drawn(4)
    head.requires_grad_(False)
    labels = Labels(gold=gold)
    chunked_loss(hidden, lambda h: h @ head.T, [head], labels=labels, chunk=4).backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        alone = chunked_loss(hidden, lambda h: h @ head.T, labels=labels, chunk=4)
    assert not alone.requires_grad
