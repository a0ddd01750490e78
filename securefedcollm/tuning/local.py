"""Tuning inside a silo: plain, and with DP-SGD.

:func:`train_plain` and :func:`train_dp` train the parameters of one adapter layout on the silo's
questions and return the change as one vector. Nothing else about the records leaves them: no loss,
no gradient norm, no batch size. :func:`train_public` is the server's, on public rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, DataError, TrainingError
from securefedcollm.privacy.events import Event, PoissonGaussian
from securefedcollm.privacy.noise import GridSum, NoiseSource, batch_cap
from securefedcollm.tuning.adapters import (
    PROMPT,
    AdapterLayout,
    Vector,
    full_layout,
    select,
    to_vector,
)
from securefedcollm.tuning.independence import bits, made_up, made_up_adapter, proved
from securefedcollm.tuning.passes import APART, Indices, Shape, Widths, shapes_of, widths_for
from securefedcollm.tuning.per_record import (
    Records,
    WholeRecords,
    layer_name,
    per_record_gradients,
    question_losses,
    watched,
    without_broken,
)
from securefedcollm.tuning.plans import LossPlan, Protection, TrainPlan
from securefedcollm.tuning.questions import EncodedQuestions, shuffled_batches, sorted_by_length
from securefedcollm.tuning.recipe import (
    Progress,
    evaluation_mode,
    make_optimizer,
    silent,
    training_mode,
)
from securefedcollm.tuning.views import anew, views_of
from securefedcollm.tuning.whole import WholeModel

_DIVERGED = "lower local.learning_rate, or use a float32 model"


@dataclass(frozen=True)
class LocalResult:
    """The result of a silo's round of tuning.

    ``delta``: float32 [d], the trained minus the received parameters, in layout order.
    ``events``: what DP-SGD did, for the accountant; empty without DP.
    """

    delta: Vector
    events: tuple[Event, ...] = ()


def train_plain(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    plan: TrainPlan,
    *,
    seed: int,
    max_grad_norm: float | None = None,
    progress: Progress = silent,
) -> LocalResult:
    """Tune without differential privacy: ``plan.steps`` shuffled minibatches, mean loss.

    Deterministic for a ``seed`` and a thread count. ``model`` is changed in place.

    Args:
        seed: of shuffling and dropout.
        max_grad_norm: clips the gradient of a whole batch to this L2 norm; None: no clip.

    Raises:
        DataError: a question has no answer.
        TrainingError: a loss or weight became NaN or infinite, or nothing moved.
    """
    _, start = _begin(model, layout, data)

    def report(step: int, loss: Tensor) -> None:
        progress(step + 1, plan.steps, "local tuning")

    _descend(model, layout, data, plan, seed=seed, max_grad_norm=max_grad_norm, on_step=report)
    return LocalResult(_finish(model, layout, start))


def train_public(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    plan: TrainPlan,
    *,
    seed: int,
    progress: Progress = silent,
) -> tuple[float, float]:
    """The same steps as :func:`train_plain`, on rows that are public, as their losses are.

    Returns:
        The mean loss of the first step's rows and of the last one's, in nats.

    Raises:
        DataError: a row has no answer.
        TrainingError: a loss or weight became NaN or infinite.
    """
    _begin(model, layout, data)
    losses: list[Tensor] = []

    def report(step: int, loss: Tensor) -> None:
        losses.append(loss)
        progress(step + 1, plan.steps, "tuning on public rows")

    _descend(model, layout, data, plan, seed=seed, on_step=report)
    if not np.isfinite(to_vector(model, layout)).all():
        raise TrainingError("the tuned adapter is not finite", hint=_DIVERGED)
    return losses[0].item(), losses[-1].item()


def _descend(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    plan: TrainPlan,
    *,
    seed: int,
    max_grad_norm: float | None = None,
    on_step: Callable[[int, Tensor], None],
) -> None:
    """The steps of ``plan`` on shuffled minibatches; ``on_step(number, mean loss)`` after each."""
    parameters = select(model, layout)
    loss, optimizer = plan.loss, _optimizer(plan, parameters)
    batches = shuffled_batches(len(data), plan.batch_size, torch.Generator().manual_seed(seed))
    if loss.augmentation is not None:
        data = views_of(data, loss.augmentation, seed.to_bytes(8, "big"))
    views = torch.arange(data.views)
    with training_mode(model, seed=seed):
        for step in range(plan.steps):
            batch, data = next(batches), anew(data)
            optimizer.zero_grad()
            total = torch.zeros(())
            every = (sorted_by_length(data, batch)[:, None] * data.views + views).flatten()
            for rows in torch.split(every, loss.micro_batch):
                losses = question_losses(model, data.select(rows), loss.kind, loss.scoring)
                mean = losses.sum() / len(every)
                torch.autograd.backward(mean)
                total = mean.detach() + total.to(mean.device)
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or torch.inf)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(f"the gradient of step {step} is not finite", hint=_DIVERGED)
            plan.pace.set(optimizer, plan.learning_rate, step)
            optimizer.step()
            on_step(step, total)


def train_dp(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    plan: TrainPlan,
    protection: Protection,
    *,
    noise: NoiseSource,
    subjects: Sequence[str] | None = None,
    progress: Progress = silent,
) -> LocalResult:
    """Tune with DP-SGD: the returned delta is itself differentially private.

    Abadi et al. 2016, algorithm 1, with Poisson samples.

    Every step takes each unit with probability q = ``plan.batch_size`` / units, clips the gradient
    of each taken unit to L2 norm C = ``protection.clip_norm``, adds N(0, (z · C)²), where z =
    ``protection.noise_multiplier``, to every coordinate of the sum, and divides by the *expected*
    batch. A step whose sample is empty is taken all the same, on noise alone. Sampling and noise
    come from ``noise``. The unit is a record or, with ``subjects`` (one name per record), all
    records of one subject, whose gradients are summed before clipping.

    A unit's gradient depends on no other unit, to the last bit (:class:`.per_record.Records`), and
    the sum is one of integers: so one unit more changes the sum by what it contributes itself.

    Adversary: anyone who sees the delta, the server included; the server also chose the adapter
    that ``model`` holds. Neighbours differ by one unit added or removed. The events are true only
    if the whole delta of every call is accounted for.

    Raises:
        ConfigError: fewer units than ``plan.batch_size``, or more of them than sums can hold.
        DataError: a question has no answer.
        TrainingError: the model is not finite, or an adapter matrix got no gradient.
    """
    parameters, start = _begin(model, layout, data)
    members = members_of(len(data), subjects)
    units = len(data) if members is None else len(members)
    rate, sigma = _sampling_rate(plan.batch_size, units), protection.sigma
    total = GridSum(layout.size, protection.clip_norm, sigma, batch_cap(units, rate))
    descend = _optimizer(plan, parameters)
    records = records_of(model, layout, data, plan.loss, members, views=noise)
    with evaluation_mode(model):
        for step in range(plan.steps):
            sum_clipped(total, records, noise.poisson_batch(units, rate))
            noised = noise.add_gaussian(total.integers, sigma)
            noised /= plan.batch_size
            _set_gradient(parameters, noised)
            plan.pace.set(descend, plan.learning_rate, step)
            descend.step()
            descend.zero_grad()
            progress(step + 1, plan.steps, "local tuning with DP-SGD")
    event = PoissonGaussian(q=rate, noise_multiplier=protection.noise_multiplier, steps=plan.steps)
    return LocalResult(_finish(model, layout, start), (event,))


def sampled_gradients(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    loss: LossPlan,
    *,
    q: float,
    noise: NoiseSource,
    subjects: Sequence[str] | None = None,
) -> Iterator[npt.NDArray[np.float64]]:
    """The gradient of every unit in one Poisson sample at rate ``q``: float64 [d], one by one.

    For a step of joint DP-SGD. They are neither clipped nor noised: whoever takes them does that,
    before anything leaves the silo. One that is not finite comes as zeros. As in :func:`train_dp`,
    none of them depends on another.

    Raises:
        DataError: a question has no answer.
        TrainingError: the model is not finite, or an adapter matrix got no gradient.
    """
    _begin(model, layout, data)
    members = members_of(len(data), subjects)
    units = len(data) if members is None else len(members)
    records = records_of(model, layout, data, loss, members, views=noise)
    with evaluation_mode(model):
        for blocks in records.of_units(noise.poisson_batch(units, q)):
            yield from np.concatenate(without_broken(blocks)[0], axis=1)


def sum_clipped(total: GridSum, records: Records, taken: Indices) -> None:
    """``total`` becomes the sum of the clipped gradients of the units ``taken``."""
    total.clear()
    for found in records.of_units(taken):
        blocks, norms = without_broken(found)
        total.add(blocks, norms)


def records_of(
    model: nn.Module,
    layout: AdapterLayout,
    data: EncodedQuestions,
    loss: LossPlan,
    members: list[Indices] | None = None,
    *,
    views: NoiseSource | None = None,
) -> Records:
    """The silo's records, in passes for which the test of independence holds.

    Args:
        members: the records of every unit; None: each record is one.
        views: draws them, where ``loss`` augments; None: they follow from the records alone.
    """
    parameters, whole = select(model, layout), isinstance(model, WholeModel)
    among = partial(
        WholeRecords if whole else Records, model, parameters, loss=loss.kind, scoring=loss.scoring
    )

    def compute(questions: EncodedQuestions, widths: Widths) -> list[bytes]:
        found: dict[int, bytes] = {}
        records = among(questions, widths=widths)
        for rows, gradients in records.of_records(np.arange(len(questions))):
            found |= zip(rows.tolist(), bits(*gradients), strict=True)
        return [found[row] for row in range(len(questions))]

    widths = APART if whole else widths_for(model, loss.micro_batch)
    with evaluation_mode(model):
        widths = proved(
            model,
            shapes_of(data, widths),
            widths,
            compute,
            f"gradients of {layout.digest[:8]} by {loss.kind} {tuple(loss.scoring)}",
        )
    if loss.augmentation is not None:
        key = b"" if views is None else views.key()
        data = views_of(data, loss.augmentation, key)
    return among(data, widths=widths, members=members)


def check_records(model: nn.Module, loss: LossPlan) -> None:
    """Refuse a model on which records have no gradients of their own, before any is touched.

    It compares two made-up records in one pass with each in a pass of its own. Where all weights
    are tuned, no two records share a pass.

    Raises:
        ConfigError: names the layer.
    """
    if isinstance(model, WholeModel):
        return
    layout = full_layout(model)
    parameters = select(model, layout)
    data = made_up(model, Shape(8, 2), [0, 2])
    with evaluation_mode(model), made_up_adapter(model, 0.1):
        try:
            with watched(model) as calls:
                losses = question_losses(model, data, loss.kind, loss.scoring)
                called = {id(call.weight) for call in calls}
                unseen = [
                    n for n, p in zip(layout.names, parameters, strict=True) if id(p) not in called
                ]
                if unseen:
                    raise _cannot_adapt(unseen[0], "is not called as a layer of its own")
                found = per_record_gradients(losses, parameters, calls)
        except TrainingError as error:
            raise ConfigError(str(error), where="adapter.targets", hint=error.hint) from None
        for row in range(len(data)):
            single = data.select(torch.tensor([row]))
            alone = question_losses(model, single, loss.kind, loss.scoring)
            wanted = torch.autograd.grad(alone.sum(), parameters)
            for name, ours, theirs in zip(layout.names, found, wanted, strict=True):
                apart = (ours[row] - theirs).norm() / theirs.norm().clamp_min(1e-9)
                if not bool(apart < (1e-2 if theirs.dtype == torch.float32 else 0.3)):
                    raise _cannot_adapt(name, "mixes the tokens of records")


def _cannot_adapt(name: str, why: str) -> ConfigError:
    if name == PROMPT:
        return ConfigError(
            f"virtual tokens cannot be tuned under record-level privacy: this model {why}",
            where="adapter.method",
            hint="choose ffa-lora, or privacy.unit: silo",
        )
    return ConfigError(
        f"{layer_name(name)} cannot be adapted under record-level privacy: it {why}",
        where="adapter.targets",
        hint="leave it out of adapter.targets, or choose privacy.unit: silo",
    )


def _sampling_rate(batch_size: int, units: int) -> float:
    """The q at which ``units`` units give the expected batch."""
    if batch_size > units:
        raise ConfigError(
            f"an expected batch of {batch_size} needs as many units, the silo has {units}",
            where="local.batch_size",
            hint=f"use at most {units}",
        )
    return batch_size / units


def _optimizer(plan: TrainPlan, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(plan.optimizer, parameters, plan.learning_rate, plan.pace.weight_decay)


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


def members_of(records: int, subjects: Sequence[str] | None) -> list[Indices] | None:
    """The records of every unit; None where every record is one."""
    if subjects is None:
        return None
    if len(subjects) != records:
        raise ValueError("subjects needs one name per record")
    _, owner = np.unique(np.asarray(subjects), return_inverse=True)
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner))[:-1])


def _set_gradient(parameters: list[nn.Parameter], gradient: npt.NDArray[np.float64]) -> None:
    at = 0
    for parameter in parameters:
        part = gradient[at : at + parameter.numel()].astype(np.float32)
        parameter.grad = torch.from_numpy(part).view(parameter.shape).to(parameter.device)
        at += parameter.numel()
