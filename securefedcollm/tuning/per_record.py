"""Every record's own gradient, untouched by the other records.

:func:`per_record_gradients` turns one forward pass into a gradient for each of its rows.
:class:`Records` takes a silo's records through fixed passes (:mod:`.passes`), so that a record's
gradient follows from the model and that record to the last bit. It is what DP-SGD's sensitivity
rests on: clipping bounds what a record contributes, not what it does to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import TrainingError
from securefedcollm.tuning.head import device_of, sees, unwrapped
from securefedcollm.tuning.passes import (
    Indices,
    Pass,
    Widths,
    one_thread_if,
    passes,
    shapes_of,
)
from securefedcollm.tuning.plans import Loss
from securefedcollm.tuning.questions import (
    PLAIN,
    EncodedQuestions,
    Scoring,
    choice_scores,
    last_hidden,
    scores_of,
    token_log_probs,
)
from securefedcollm.tuning.views import anew

FLATTENING: Final = {"opt"}
"""Families with layers that see [B · T, in]: rows and tokens in their order, none left out."""
Blocks = list[npt.NDArray[np.float64]]
"""Gradients of some units: for every parameter, in layout order, [units, out · in]."""


class Call(NamedTuple):
    """One run of a trainable layer in a forward pass: a linear one, or the virtual tokens."""

    weight: nn.Parameter  # [out, in]; of virtual tokens [p, w]
    given: (
        Tensor | None
    )  # [B, T, in]; [B, H, W, in]; or of several rows a record, or flat: [B · T, in]
    output: Tensor  # likewise, in the graph; of virtual tokens, a copy for each record: [B, p, w]
    whole: bool  # all tokens of all rows in their order, not what a router chose of them
    name: str  # of the layer that is adapted


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Call]]:
    """Note every run of a trainable layer, for :func:`per_record_gradients`."""
    calls: list[Call] = []
    config = getattr(unwrapped(model), "config", None)
    dimensions = {2, 3} if getattr(config, "model_type", None) in FLATTENING else {3}
    dimensions |= {4} if sees(model) else set()  # [B, H, W, in]

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        if output.requires_grad:
            weight, whole = cast(nn.Parameter, module.weight), output.ndim in dimensions
            inputs = given[0].detach() if isinstance(module, nn.Linear) else None
            calls.append(Call(weight, inputs, output, whole, name))

    hooks = [
        module.register_forward_hook(partial(note, name=layer_name(name)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def layer_name(name: str) -> str:
    """The model's name of the layer that an adapter's module or parameter sits on."""
    return name.partition(".lora_")[0].removeprefix("base_model.model.")


def question_losses(
    model: nn.Module, batch: EncodedQuestions, loss: Loss, scoring: Scoring
) -> Tensor:
    """Training loss of every question: float32 [B].

    ``answer``: the language-model cross-entropy of the right choice's tokens over the whole
    vocabulary, summed over them. ``choices``: the cross-entropy over the scores of the choices.
    """
    return _losses(choice_scores(model, batch, _rule(loss, scoring)), batch, loss)


def _rule(loss: Loss, scoring: Scoring) -> Scoring:
    return PLAIN if loss == "answer" else scoring


def _losses(scores: Tensor, batch: EncodedQuestions, loss: Loss) -> Tensor:
    answers = batch.answers.to(scores.device)
    if loss == "answer":
        return -scores.gather(1, answers[:, None])[:, 0]
    return F.cross_entropy(scores, answers, reduction="none")


def per_record_gradients(
    losses: Tensor, parameters: Sequence[nn.Parameter], calls: list[Call]
) -> list[Tensor]:
    """Gradient of every record's loss (``losses``: [B]): one [B, out, in] for every parameter.

    A record's gradient of a weight is Σ_t gₜ ⊗ xₜ over its tokens, with the layer's inputs x and
    the gradients g of its outputs: one batched product a layer. Of virtual tokens it is the
    gradient of the record's own copy of them. The weight's own gradient, over all records, is never
    computed, which is why this costs hardly more than a plain step. ``calls`` is what
    :func:`watched` noted in the forward pass; it is emptied.
    """
    noted = calls.copy()
    calls.clear()
    return _products([losses], parameters, [noted])[0]


def _products(
    losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], noted: Sequence[list[Call]]
) -> list[list[Tensor]]:
    """:func:`per_record_gradients` of several passes: their losses [B] and their calls."""
    outputs = [call.output for calls in noted for call in calls]
    ones = [torch.ones_like(loss) for loss in losses]
    found = torch.autograd.grad(losses, outputs, ones, allow_unused=True) if outputs else ()
    slopes = iter(found)
    gradients = []
    for loss, calls in zip(losses, noted, strict=True):
        by_weight: dict[nn.Parameter, Tensor] = {}
        for call in calls:
            slope = next(slopes)
            if slope is None:
                continue
            if not call.whole or len(call.output) % len(loss):
                raise _mixed(call.name)
            # A record's rows and tokens follow each other; .local.check_records tests it.
            product = slope.reshape(len(loss), -1, slope.shape[-1])
            if call.given is not None:
                given = call.given.reshape(len(loss), -1, call.given.shape[-1])
                product = torch.bmm(product.mT, given)
            known = by_weight.get(call.weight)
            by_weight[call.weight] = product if known is None else known + product
        if any(parameter not in by_weight for parameter in parameters):
            raise TrainingError(
                "an adapter matrix got no per-record gradient",
                hint="DP-SGD supports adapters on linear layers without gradient checkpointing",
            )
        gradients.append([by_weight[parameter] for parameter in parameters])
    return gradients


def _mixed(name: str) -> TrainingError:
    return TrainingError(
        f"the adapter on {name or 'a layer'} mixes the tokens of records",
        hint="choose other adapter.targets; routed experts and output layers cannot be used",
    )


class Records:
    """A silo's encoded records, and the gradients of any of them at the model as it is now.

    Args:
        parameters: what is trained, in layout order; linear weights, or the virtual tokens. All
            weights are for :class:`WholeRecords`.
        widths: of the fixed passes.
        members: the records of every privacy unit; by default each record is one. The gradient of
            a record with several views is their mean.

    Use it within ``evaluation_mode(model)``.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        data: EncodedQuestions,
        *,
        loss: Loss,
        scoring: Scoring,
        widths: Widths,
        members: Sequence[Indices] | None = None,
    ) -> None:
        self._model, self._parameters, self._data = model, list(parameters), data
        self._loss, self._scoring, self._widths = loss, scoring, widths
        self._shapes = shapes_of(data, widths)
        self._members = members
        self.units = len(data.groups) if members is None else len(members)

    def of_units(self, units: Indices) -> Iterator[Blocks]:
        """Gradients of ``units``, some at a time: every unit once, in no promised order.

        A unit's records are summed in float64, in an order that follows from them alone. Every call
        draws the views anew.
        """
        self._data = anew(self._data)
        if self._members is None and self._data.views == 1:
            for rows, found in self.of_records(units):
                yield [_flat(gradient)[: len(rows)] for gradient in found]
            return
        for block in self._blocks_of(units):
            yield self._summed([self._rows(unit) for unit in block])

    def of_records(self, rows: Indices) -> Iterator[tuple[Indices, list[Tensor]]]:
        """(rows of a pass, their gradients [rows, out, in] for every parameter)."""
        group: list[Pass] = []
        size = 0
        widths = self._widths
        with watched(self._model) as calls:
            for one in passes(self._data, self._shapes, rows, widths):
                # Wide shapes and narrow ones compute with other numbers of threads: never together.
                other = group and widths.wide(group[0].shape) != widths.wide(one.shape)
                alone = widths.apart(one.shape) or (group and widths.apart(group[0].shape))
                if group and (alone or other or size + len(one.batch) > widths.most):
                    yield from self._of_group(group, calls)
                    group, size = [], 0
                group.append(one)
                size += len(one.batch)
            if group:
                yield from self._of_group(group, calls)

    def _of_group(
        self, group: list[Pass], calls: list[Call]
    ) -> Iterator[tuple[Indices, list[Tensor]]]:
        """Several passes that share the output layer's chunks."""
        with one_thread_if(self._widths.wide(group[0].shape)):
            found = self._gradients(group, calls)
        for one, gradients in zip(group, found, strict=True):
            yield one.rows, [gradient[: len(one.rows)] for gradient in gradients]

    def _gradients(self, group: list[Pass], calls: list[Call]) -> list[list[Tensor]]:
        """Gradients of the rows of every pass."""
        causal = unwrapped(self._model)
        place = device_of(causal)
        batches = [one.batch.to(place) for one in group]
        states, noted = [], []
        for batch in batches:
            calls.clear()
            states.append(last_hidden(self._model, batch))
            noted.append(calls.copy())
        calls.clear()
        tokens = token_log_probs(causal, batches, states)
        if calls:  # the output layer itself is adapted, and sees positions without their records
            raise _mixed(calls[0].name)
        rule = _rule(self._loss, self._scoring)
        losses = [
            _losses(scores_of(log_probs, batch, rule), batch, self._loss)
            for log_probs, batch in zip(tokens, batches, strict=True)
        ]
        return _products(losses, self._parameters, noted)

    def _blocks_of(self, units: Indices) -> Iterator[list[int]]:
        """Units whose sums are in memory at a time; the grouping changes no sum."""
        block: list[int] = []
        size, room = 0, 2 * self._widths.most if self._widths.most > 1 else 1
        for unit in units.tolist():
            rows = len(self._rows(unit))
            if block and size + rows > room:
                yield block
                block, size = [], 0
            block.append(unit)
            size += rows
        if block:
            yield block

    def _rows(self, unit: int) -> Indices:
        """All views of all records of a unit."""
        records = np.array([unit]) if self._members is None else self._members[unit]
        views = self._data.views
        return (records[:, None] * views + np.arange(views)).reshape(-1)

    def _summed(self, members: list[Indices]) -> Blocks:
        """Each unit's rows summed, shape by shape and in the order of their numbers."""
        owner = {int(row): unit for unit, rows in enumerate(members) for row in rows}
        sums = [np.zeros((len(members), weight.numel())) for weight in self._parameters]
        for rows, found in self.of_records(np.concatenate(members)):
            for total, gradient in zip(sums, found, strict=True):
                with np.errstate(invalid="ignore"):  # ∞ − ∞: the unit counts as zero later
                    for row, values in zip(rows.tolist(), _flat(gradient), strict=True):
                        total[owner[row]] += values
        return sums if self._data.views == 1 else [total / self._data.views for total in sums]


class WholeRecords(Records):
    """The same where all weights are tuned: a gradient is as large as the model.

    Every record has a pass, and an output layer, of its own (``widths.alone`` is None). The
    gradient of that pass is the record's, so no rule for a kind of layer is needed. Where two
    layers share a weight it is their sum.
    """

    def of_records(self, rows: Indices) -> Iterator[tuple[Indices, list[Tensor]]]:
        place = device_of(unwrapped(self._model))
        for one in passes(self._data, self._shapes, rows, self._widths):
            losses = question_losses(self._model, one.batch.to(place), self._loss, self._scoring)
            # A weight that this record does not reach, such as an expert's, has a gradient of 0.
            found = torch.autograd.grad(losses.sum(), self._parameters, materialize_grads=True)
            yield one.rows, [gradient[None] for gradient in found]


def _flat(gradient: Tensor) -> npt.NDArray[np.float64]:
    """[rows, out, in] as float64 [rows, out · in]."""
    flat: npt.NDArray[np.float64] = gradient.flatten(1).double().cpu().numpy()
    return flat


def without_broken(blocks: Blocks) -> tuple[Blocks, npt.NDArray[np.float64]]:
    """``blocks`` with zeros for every unit that is not finite, and the L2 norms [units].

    Adversary: a server whose adapter makes one record's gradient overflow, to see the silo fail:
    before the noise, no record may decide that.
    """
    # Row by row: einsum and matrix products add in an order that depends on the number of rows.
    norms = np.sqrt(sum(np.square(block).sum(axis=1) for block in blocks))
    broken = ~np.isfinite(norms)
    if not broken.any():
        return blocks, norms
    return [np.where(broken[:, None], 0.0, b) for b in blocks], np.where(broken, 0.0, norms)
