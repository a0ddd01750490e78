"""Tuning inside a silo: plain, and with DP-SGD.

Both functions train the parameters of one adapter layout on the silo's questions and return the
change as one vector. Nothing else about the records leaves them: no loss, no gradient norm, no
batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, DataError, TrainingError
from securefedcollm.privacy.events import Event, PoissonGaussian
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import AdapterLayout, Vector, select, to_vector
from securefedcollm.tuning.questions import (
    PLAIN,
    EncodedQuestions,
    Scoring,
    choice_scores,
    shuffled_batches,
    sorted_by_length,
)
from securefedcollm.tuning.recipe import (
    Optimizer,
    Progress,
    evaluation_mode,
    make_optimizer,
    silent,
    training_mode,
)

Loss = Literal["answer", "choices"]

_DIVERGED = "lower local.learning_rate, or use a float32 model"


@dataclass(frozen=True)
class LocalResult:
    """What a silo's round of tuning made.

    ``delta``: float32 [d], the trained minus the received parameters, in layout order.
    ``events``: what DP-SGD did, for the accountant; empty without DP.
    """

    delta: Vector
    events: tuple[Event, ...] = ()


def question_losses(
    model: nn.Module, batch: EncodedQuestions, loss: Loss, scoring: Scoring
) -> Tensor:
    """Training loss of every question: float32 [B].

    ``answer``: the language-model cross-entropy of the right choice's tokens over the whole
    vocabulary, summed over them. ``choices``: the cross-entropy over the scores of the choices.
    """
    scores = choice_scores(model, batch, PLAIN if loss == "answer" else scoring)
    answers = batch.answers.to(scores.device)
    if loss == "answer":
        return -scores.gather(1, answers[:, None])[:, 0]
    return F.cross_entropy(scores, answers, reduction="none")


def train_plain(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    optimizer: Optimizer = "adam",
    loss: Loss = "answer",
    scoring: Scoring = PLAIN,
    max_grad_norm: float | None = None,
    micro_batch: int = 64,
    progress: Progress = silent,
) -> LocalResult:
    """Tune without differential privacy: ``steps`` shuffled minibatches, mean loss.

    Deterministic for a ``seed`` and a thread count. ``model`` is changed in place.

    Raises:
        DataError: a question has no answer.
        TrainingError: a loss or weight became NaN or infinite, or nothing moved.
    """
    parameters, start = _begin(model, layout, data)
    descend = make_optimizer(optimizer, parameters, learning_rate)
    batches = shuffled_batches(len(data), batch_size, torch.Generator().manual_seed(seed))
    with training_mode(model, seed=seed):
        for step in range(steps):
            batch = next(batches)
            descend.zero_grad()
            for rows in torch.split(sorted_by_length(data, batch), micro_batch):
                losses = question_losses(model, data.select(rows), loss, scoring)
                torch.autograd.backward(losses.sum() / len(batch))
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or torch.inf)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(f"the gradient of step {step} is not finite", hint=_DIVERGED)
            descend.step()
            progress(step + 1, steps, "local tuning")
    return LocalResult(_finish(model, layout, start))


def train_dp(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    noise_multiplier: float,
    clip_norm: float,
    noise: NoiseSource,
    optimizer: Optimizer = "adam",
    loss: Loss = "answer",
    scoring: Scoring = PLAIN,
    subjects: Sequence[str] | None = None,
    micro_batch: int = 64,
    progress: Progress = silent,
) -> LocalResult:
    """Tune with DP-SGD (Abadi et al. 2016): the returned delta is itself differentially private.

    Every step takes each unit with probability q = batch_size / units, clips the gradient of each
    taken unit to L2 norm ``clip_norm``, adds N(0, (noise_multiplier · clip_norm)²) to every
    coordinate of the sum, and divides by the *expected* batch. A step whose sample is empty is
    taken all the same, on noise alone. Sampling and noise come from ``noise``. The unit is a record
    or, with ``subjects`` (one name per record), all records of one subject, whose gradients are
    summed before clipping.

    The model runs in evaluation mode, without any dropout: a unit's gradient must depend on no
    other unit, or the clip does not bound what one unit changes (:func:`.evaluation_mode`).

    Adversary: anyone who sees the delta, the server included. Neighbours differ by one unit added
    or removed. The events are true only if the whole delta of every call is accounted for.

    Args:
        batch_size: expected number of units in a batch.
        micro_batch: records whose per-record gradients are in memory at a time; all records of a
            subject are always taken together.

    Raises:
        ConfigError: fewer units than ``batch_size``.
        DataError: a question has no answer.
        TrainingError: a gradient became NaN or infinite, or an adapter matrix got none.
    """
    parameters, start = _begin(model, layout, data)
    members = _members(len(data), subjects)
    if batch_size > len(members):
        raise ConfigError(
            f"an expected batch of {batch_size} needs as many units, the silo has {len(members)}",
            where="local.batch_size",
            hint=f"use at most {len(members)}",
        )
    rate = batch_size / len(members)
    descend = make_optimizer(optimizer, parameters, learning_rate)
    with evaluation_mode(model), watched(model) as calls:
        for step in range(steps):
            total = np.zeros(layout.size)
            taken = _by_length(noise.poisson_batch(len(members), rate), members, data)
            for units in _micro_batches(taken, members, micro_batch):
                losses = question_losses(
                    model, data.select(torch.from_numpy(np.concatenate(units))), loss, scoring
                )
                gradients = per_record_gradients(losses, parameters, calls)
                total += _clipped_sum(gradients, [len(unit) for unit in units], clip_norm)
            noised = noise.add_gaussian(total, noise_multiplier * clip_norm)
            _set_gradient(parameters, noised / batch_size)
            descend.step()
            descend.zero_grad()
            progress(step + 1, steps, "local tuning with DP-SGD")
    event = PoissonGaussian(q=rate, noise_multiplier=noise_multiplier, steps=steps)
    return LocalResult(_finish(model, layout, start), (event,))


def sampled_gradients(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    *,
    q: float,
    noise: NoiseSource,
    loss: Loss = "answer",
    scoring: Scoring = PLAIN,
    subjects: Sequence[str] | None = None,
    micro_batch: int = 64,
) -> Iterator[npt.NDArray[np.float64]]:
    """The gradient of every unit in one Poisson sample at rate ``q``: float64 [d], one by one.

    For a step of joint DP-SGD. They are neither clipped nor noised: whoever takes them does that,
    before anything leaves the silo. One that is not finite comes as zeros, see :func:`_finite`. The
    model runs in evaluation mode, as in :func:`train_dp` and for the same reason.

    Raises:
        DataError: a question has no answer.
        TrainingError: the model is not finite, or an adapter matrix got no gradient.
    """
    parameters, _ = _begin(model, layout, data)
    members = _members(len(data), subjects)
    taken = _by_length(noise.poisson_batch(len(members), q), members, data)
    with evaluation_mode(model), watched(model) as calls:
        for units in _micro_batches(taken, members, micro_batch):
            rows = torch.from_numpy(np.concatenate(units))
            losses = question_losses(model, data.select(rows), loss, scoring)
            gradients = per_record_gradients(losses, parameters, calls)
            blocks, _ = _finite([_by_unit(g, [len(unit) for unit in units]) for g in gradients])
            ordered = [
                block.reshape(len(units), *gradient.shape[1:]).transpose(0, 2, 1)
                for gradient, block in zip(gradients, blocks, strict=True)
            ]
            yield from np.concatenate([part.reshape(len(units), -1) for part in ordered], axis=1)


def _by_length(
    taken: npt.NDArray[np.int64], members: list[npt.NDArray[np.int64]], data: EncodedQuestions
) -> npt.NDArray[np.int64]:
    """Like lengths together: a micro-batch is as long as its longest record."""
    tokens = (data.segments >= 0).sum(1).numpy()
    length = np.array([tokens[members[unit]].max() for unit in taken])
    return taken[np.argsort(length, kind="stable")]


def _begin(
    model: nn.Module, layout: AdapterLayout, data: EncodedQuestions
) -> tuple[list[nn.Parameter], Vector]:
    if bool((data.answers < 0).any()):
        raise DataError(
            "local tuning needs an answer to every question",
            where="training questions",
            hint="remove the questions without an answer",
        )
    if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise TrainingError("the model has weights that are not finite", hint=_DIVERGED)
    return select(model, layout), to_vector(model, layout)


def _finish(model: nn.Module, layout: AdapterLayout, start: Vector) -> Vector:
    delta = to_vector(model, layout) - start
    if not np.isfinite(delta).all():
        raise TrainingError("the tuned adapter is not finite", hint=_DIVERGED)
    if not delta.any():
        raise TrainingError(
            "tuning changed nothing", hint="raise local.steps or local.learning_rate"
        )
    return delta


class Call(NamedTuple):
    """One run of a trainable linear layer in a forward pass."""

    weight: nn.Parameter  # [out, in]
    given: Tensor  # [B, T, in]
    output: Tensor  # [B, T, out], in the graph


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Call]]:
    """Note every run of a trainable linear layer, for :func:`per_record_gradients`."""
    calls: list[Call] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            calls.append(Call(cast(nn.Parameter, module.weight), given[0].detach(), output))

    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    hooks = [module.register_forward_hook(note) for module in linear]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def per_record_gradients(
    losses: Tensor, parameters: Sequence[nn.Parameter], calls: list[Call]
) -> list[Tensor]:
    """Gradient of every record's loss (``losses``: [B]): one [B, in, out] for every parameter.

    A record's gradient of a weight is Σ_t xₜ ⊗ gₜ over its tokens, with the layer's inputs x and
    the gradients g of its outputs: one batched product a layer. The weight's own gradient, over all
    records, is never computed, which is why this costs hardly more than a plain step. ``calls`` is
    what :func:`watched` noted in the forward pass; it is emptied.
    """
    noted = calls.copy()
    calls.clear()
    found: dict[nn.Parameter, Tensor] = {}
    outputs = [call.output for call in noted]
    gradients = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if noted else ()
    for call, gradient in zip(noted, gradients, strict=True):
        if gradient is None:
            continue
        if call.given.ndim != 3 or len(call.given) != len(losses):
            raise TrainingError(
                "an adapter sits on a layer that mixes the tokens of records",
                hint="choose other adapter.targets; routed expert layers cannot be used",
            )
        product = torch.bmm(call.given.mT, gradient)
        found[call.weight] = found[call.weight] + product if call.weight in found else product
    if any(parameter not in found for parameter in parameters):
        raise TrainingError(
            "an adapter matrix got no per-record gradient",
            hint="DP-SGD supports adapters on linear layers without gradient checkpointing",
        )
    return [found[parameter] for parameter in parameters]


def _members(records: int, subjects: Sequence[str] | None) -> list[npt.NDArray[np.int64]]:
    """The records of every unit."""
    if subjects is None:
        return list(np.arange(records)[:, None])
    if len(subjects) != records:
        raise ValueError("subjects needs one name per record")
    _, owner = np.unique(np.asarray(subjects), return_inverse=True)
    return [np.flatnonzero(owner == unit) for unit in range(int(owner.max()) + 1)]


def _micro_batches(
    units: npt.NDArray[np.int64], members: list[npt.NDArray[np.int64]], micro_batch: int
) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Group whole units into lists of at most ``micro_batch`` records (or one larger unit)."""
    group: list[npt.NDArray[np.int64]] = []
    size = 0
    for unit in units:
        records = members[int(unit)]
        if group and size + len(records) > micro_batch:
            yield group
            group, size = [], 0
        group.append(records)
        size += len(records)
    if group:
        yield group


def _clipped_sum(
    gradients: Sequence[Tensor], sizes: Sequence[int], clip_norm: float
) -> npt.NDArray[np.float64]:
    """Σ gᵢ · min(1, C/‖gᵢ‖) over the units: float64 [d], in the order of the layout.

    Args:
        gradients: for every parameter [records, in, out]; the records of a unit stand together.
        sizes: each unit's number of records.
        clip_norm: C.
    """
    blocks, norms = _finite([_by_unit(gradient, sizes) for gradient in gradients])
    scale = np.minimum(1.0, clip_norm / np.maximum(norms, np.finfo(np.float64).tiny))
    sums = [
        (scale @ block).reshape(gradient.shape[1:]).T.reshape(-1)
        for gradient, block in zip(gradients, blocks, strict=True)
    ]
    return np.concatenate(sums)


def _finite(
    blocks: list[npt.NDArray[np.float64]],
) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """``blocks`` [units, …] with zeros for a unit that is not finite, and the norms [units].

    Adversary: a server whose adapter makes one record's gradient overflow, to see the silo fail:
    before the noise, no record may decide that.
    """
    norms = np.sqrt(sum(np.einsum("ij,ij->i", block, block) for block in blocks))
    broken = ~np.isfinite(norms)
    if not broken.any():
        return blocks, norms
    return [np.where(broken[:, None], 0.0, b) for b in blocks], np.where(broken, 0.0, norms)


def _by_unit(gradient: Tensor, sizes: Sequence[int]) -> npt.NDArray[np.float64]:
    """float64 [units, in · out]: a unit's records summed."""
    records: npt.NDArray[np.float64] = gradient.flatten(1).double().cpu().numpy()
    if max(sizes) == 1:
        return records
    return np.add.reduceat(records, np.cumsum([0, *sizes[:-1]]), axis=0)


def _set_gradient(parameters: list[nn.Parameter], gradient: npt.NDArray[np.float64]) -> None:
    values = torch.from_numpy(gradient.astype(np.float32))
    at = 0
    for parameter in parameters:
        part = values[at : at + parameter.numel()].view(parameter.shape)
        parameter.grad = part.clone().to(parameter.device)
        at += parameter.numel()
