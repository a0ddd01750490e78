"""Cross-entropy and divergence over the whole vocabulary, without the logits of a whole batch.

At a vocabulary of 49k, 512 positions of logits, log-probabilities and their gradients take most of
a gigabyte for student and teacher together. Here both enter as hidden states with their output
layers, a few positions at a time; loss and gradient are computed together in the forward pass, so
that the backward pass needs only one gradient of the size of the hidden states. The same
idea is in Liger Kernel (arXiv 2410.10989) as a GPU kernel; this is plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from securefedcollm.tuning.head import Logits

Direction = Literal["forward", "reverse", "js"]

CHUNK = 64  # positions at a time: 64 × 49k × 4 B = 13 MB for each of some eight buffers


@dataclass(frozen=True)
class Target:
    """A teacher's predictions at m positions: finite log-probabilities at the loss's temperature.

    Over the whole vocabulary, or over the ``tokens`` that are listed; all others then form one
    event, whose probability is what is left.
    """

    log_probs: Tensor  # float32 [m, V], or [m, k]
    tokens: Tensor | None = None  # int64 [m, k]


Targets = Callable[[slice], Target]
"""The teacher at a range of the positions; called once for every chunk."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The cross-entropy term.

    Attributes:
        gold: int64 [M], the token that follows; negative where none counts.
        scale: factor of the sum over the positions.
    """

    gold: Tensor
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The divergence term.

    Attributes:
        targets: the teacher's predictions, constant.
        scale: factor of the sum over the positions, in addition to τ².
        temperature: τ of both distributions.
        direction: ``forward`` KL(teacher‖student), ``reverse`` KL(student‖teacher), ``js`` their
            Jensen–Shannon divergence.
    """

    targets: Targets
    scale: float = 1.0
    temperature: float = 1.0
    direction: Direction = "forward"


def chunked_loss(
    hidden: Tensor,
    logits: Logits,
    head_parameters: Sequence[Tensor] = (),
    *,
    labels: Labels | None = None,
    teacher: Teacher | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Σ cross-entropy + τ² · Σ divergence, each times its scale: a scalar to differentiate.

    Float64 if ``hidden`` is, otherwise float32; in nats.

    Args:
        hidden: the student's states after its last layer, [M, D].
        logits: its output layer, [m, D] → float32 [m, V].
        head_parameters: those weights of the output layer that are trained, if any.
        labels: None: no cross-entropy.
        teacher: None: no divergence.
        chunk: positions at a time.
    """
    trained = [p for p in head_parameters if p.requires_grad]

    def part(states: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        """(loss, its gradient with respect to the logits) of one chunk."""
        values = states.detach()
        log_q = F.log_softmax(values, dim=-1)
        total, slope = values.new_zeros(()), None
        if teacher is not None:
            tau = teacher.temperature
            if tau != 1.0:
                log_q = F.log_softmax(values / tau, dim=-1)
            total, slope = _divergence(log_q, teacher.targets(where), teacher.direction)
            total = total * (teacher.scale * tau**2)
            slope.mul_(teacher.scale * tau)
            if tau != 1.0 and labels is not None:
                log_q = F.log_softmax(values, dim=-1)
        if labels is not None:
            more, slope = _cross_entropy(log_q, labels.gold[where], labels.scale, slope)
            total = total + more
        return total, torch.zeros_like(values) if slope is None else slope

    result: Tensor = _Chunked.apply(part, logits, chunk, hidden, *trained)  # type: ignore[no-untyped-call]
    return result


class _Chunked(torch.autograd.Function):
    """Runs ``part`` chunk by chunk and keeps the gradients of its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        logits: Logits,
        chunk: int,
        hidden: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        wanted = hidden.requires_grad or any(w.requires_grad for w in weights)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads = [torch.zeros_like(t) for t in (hidden, *weights)] if wanted else []
        for start in range(0, len(hidden), chunk):
            where = slice(start, min(start + chunk, len(hidden)))
            with torch.set_grad_enabled(wanted):
                states = hidden[where].detach().requires_grad_(wanted)
                values = logits(states)
            loss, slope = part(values, where)
            total += loss
            if wanted:
                found = torch.autograd.grad(
                    values, (states, *weights), grad_outputs=slope, allow_unused=True
                )
                grads[0][where] = found[0]
                for kept, more in zip(grads[1:], found[1:], strict=True):
                    if more is not None:
                        kept += more
        ctx.save_for_backward(*grads)
        return total.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(g * outer[0].to(g.dtype) for g in ctx.saved_tensors))


def gold_log_probs(hidden: Tensor, logits: Logits, gold: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """log softmax(logits(hidden))[gold] at every position: float [M], differentiable in ``hidden``.

    Args:
        hidden: [M, D].
        logits: an output layer without trained weights, [m, D] → float32 [m, V].
        gold: int64 [M].
    """
    found: Tensor = _Gold.apply(logits, gold, chunk, hidden)  # type: ignore[no-untyped-call]
    return found


class _Gold(torch.autograd.Function):
    """The gradient at a position is its own slope, scaled: the slopes are kept, [M, D]."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, gold: Tensor, chunk: int, hidden: Tensor) -> Tensor:
        found, slopes = [], []
        for start in range(0, len(hidden), chunk):
            with torch.set_grad_enabled(hidden.requires_grad):
                states = hidden[start : start + chunk].detach().requires_grad_(hidden.requires_grad)
                values = logits(states)
            at = gold[start : start + chunk, None]
            found.append(F.log_softmax(values.detach(), dim=-1).gather(1, at)[:, 0])
            if hidden.requires_grad:
                # Not exp(log_p): threads would share out its numbers in the middle of a position.
                slope = F.softmax(values.detach(), dim=-1).neg_()
                slope.scatter_add_(1, at, torch.ones_like(found[-1])[:, None])
                slopes.append(torch.autograd.grad(values, states, grad_outputs=slope)[0])
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return None, None, None, None
        (slopes,) = ctx.saved_tensors
        return None, None, None, slopes * outer[0][:, None].to(slopes.dtype)


def _cross_entropy(
    log_q: Tensor, gold: Tensor, scale: float, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """scale · Σ −log q[gold] over the rows with a gold token; its slope is added to ``slope``."""
    weight = (gold >= 0).to(log_q.dtype)[:, None] * scale
    at = gold.clamp_min(0)[:, None]
    loss = -(log_q.gather(1, at) * weight).sum()
    q = log_q.exp_()
    slope = q.mul_(weight) if slope is None else slope.addcmul_(q, weight)
    return loss, slope.scatter_add_(1, at, -weight)


def _divergence(log_q: Tensor, target: Target, direction: Direction) -> tuple[Tensor, Tensor]:
    """Σ D and its slope at the logits over τ: with u = ∂D/∂q, that is q · (u − Σ q·u)."""
    if target.tokens is None:
        return _pointwise(log_q, target.log_probs, direction)
    # The listed tokens and the rest are the k + 1 events of both distributions.
    mine = _with_rest(log_q.gather(1, target.tokens))
    theirs = _with_rest(target.log_probs)
    loss, slope = _pointwise(mine, theirs, direction)
    share = slope[:, -1:] / mine[:, -1:].exp()
    return loss, log_q.exp().mul_(share).scatter_(1, target.tokens, slope[:, :-1])


def _with_rest(log_probs: Tensor) -> Tensor:
    """[m, k] → [m, k + 1]: the last column is the logarithm of what the others leave."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(log_probs.dtype).eps)
    return torch.cat([log_probs, rest.log()], dim=-1)


def _pointwise(log_q: Tensor, log_p: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Σ D(p, q) and q · (u − Σ q·u), u = ∂D/∂q, both from log-probabilities [m, V]."""
    q = log_q.exp()
    if direction == "forward":
        p = log_p.exp()
        loss = torch.linalg.vecdot(p, log_p - log_q).sum()
        return loss, q.sub_(p)
    if direction == "reverse":
        u = log_q - log_p
        mean = torch.linalg.vecdot(q, u)[:, None]
        return mean.sum(), q.mul_(u.sub_(mean))
    log_m = torch.logaddexp(log_q, log_p).sub_(math.log(2.0))
    u = log_q - log_m
    mean = torch.linalg.vecdot(q, u)[:, None]
    loss = (torch.linalg.vecdot(log_p.exp(), log_p - log_m).sum() + mean.sum()) / 2
    return loss, q.mul_(u.sub_(mean)).mul_(0.5)
