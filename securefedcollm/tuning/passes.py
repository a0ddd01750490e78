"""Passes whose shape depends on one record alone.

A record's gradient is meant to be a function of the model and that record. In floating point it is
also a function of the *shape* of the pass: kernels choose the order of their additions by it. If a
micro-batch is padded to its longest record, one more record moves the low bits of everybody's
gradient, and an adapter from a hostile server can amplify low bits until they are the gradient.

So no shape here depends on who shares a pass. A record is padded to a length that follows from its
own length, and goes into a pass with one of a few numbers of rows for that length, all of which
were seen to give the same bits; dummies fill up what records do not. Where the model is large
enough, a pass is one record, without padding.

A kernel could still treat one row of a pass unlike another. Nothing here excludes that;
:mod:`.independence` tests it on the device and shapes at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.classifiers import places_of
from securefedcollm.tuning.head import device_of, routed, sees, unwrapped
from securefedcollm.tuning.layers import decoder_layers
from securefedcollm.tuning.questions import EncodedQuestions

Indices = npt.NDArray[np.int64]

_STEPS = 4  # padded lengths in an octave: at most a quarter of a row is padding, a tenth on average
# Multiply-adds of a decoder layer over all tokens of a pass, at which starting its kernels no
# longer shows: measured with benchmarks.privacy_overhead.
_WORTH_CPU = 5e7
_WORTH_ELSEWHERE = 3e10
_HEAD_ROWS = 32  # positions that the output layer sees at a time


class Shape(NamedTuple):
    """What a record's pass looks like; it follows from this record and nothing else."""

    length: int
    """Tokens of the padded row; 1 where a model sees, as all its inputs have one size."""
    choices: int


class Pass(NamedTuple):
    """One forward pass."""

    rows: Indices
    """The records in it, in the order of their rows; dummies follow."""
    batch: EncodedQuestions
    """As many rows as the shape has, of ``shape.length`` tokens each."""
    shape: Shape


class Widths(NamedTuple):
    """How many records go together; none of it depends on what the records are.

    ``tokens``: padded tokens in a pass, about. ``most``: records in memory at a time. ``head``:
    positions of one call of the output layer. ``alone``: shapes of which every record goes by
    itself, through the output layer too; None: all shapes. ``sizes``: rows that a pass of a shape
    may have, ascending, where :func:`.independence.proved` found that all of them give the same
    bits; of other shapes a pass has the largest number.
    """

    tokens: int
    most: int
    head: int = _HEAD_ROWS
    alone: frozenset[Shape] | None = frozenset()
    sizes: Mapping[Shape, tuple[int, ...]] = MappingProxyType({})

    def rows(self, shape: Shape) -> int:
        """Most rows of a pass of ``shape``: a power of two."""
        if self.apart(shape):
            return 1
        most = min(self.most, max(1, self.tokens // shape.length))
        return int(1 << (most.bit_length() - 1))

    def allowed(self, shape: Shape) -> tuple[int, ...]:
        """Rows that a pass of ``shape`` may have, ascending."""
        most = self.rows(shape)
        return (most,) if most == 1 else self.sizes.get(shape, (most,))

    def wide(self, shape: Shape) -> bool:
        """Whether rows of this shape may share a pass, however many are there."""
        return self.rows(shape) > 1

    def apart(self, shape: Shape) -> bool:
        """Whether a record of this shape shares nothing with another."""
        return self.alone is None or shape in self.alone


APART: Final = Widths(tokens=1, most=1, alone=None)
"""Every record by itself, and one in memory at a time."""


def widths_for(model: Any, most: int) -> Widths:
    """Widths that waste little on this model: public facts only, its size, kind and device.

    Small passes are slow, because starting a kernel takes longer than its work; wide ones need
    dummies. A decoder layer of a few million weights has work enough in one record.
    """
    if routed(model):
        return APART
    worth = _WORTH_CPU if device_of(model).type == "cpu" else _WORTH_ELSEWHERE
    try:
        layer: nn.Module = decoder_layers(unwrapped(model))[-1]
    except ConfigError:
        layer = model
    weights = sum(weight.numel() for weight in layer.parameters())
    work = max(1, weights * (places_of(model) if sees(model) else 1))
    return Widths(tokens=int(worth / work), most=most)


def padded_length(tokens: int) -> int:
    """The smallest of 1 … 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, … that holds ``tokens``."""
    step = max(1, (1 << (max(tokens - 1, 1).bit_length() - 1)) // _STEPS)
    return -(-tokens // step) * step


def shapes_of(data: EncodedQuestions, widths: Widths) -> list[Shape]:
    """The shape of every record: padded only if it is so short that others may share its pass."""
    lengths, choices = (data.segments >= 0).sum(1), data.choice_mask.sum(1)
    base = data.choice_mask.shape[1] + 1
    # Few, of many records. Pairs as numbers: torch sorts rows of a matrix 50 times slower.
    pairs, which = torch.unique(lengths * base + choices, return_inverse=True)
    shapes = [
        Shape(padded_length(n) if 2 * n <= widths.tokens and widths.most > 1 else n, c)
        for n, c in (divmod(pair, base) for pair in pairs.tolist())
    ]
    return [shapes[at] for at in which.tolist()]


def passes(
    data: EncodedQuestions, shapes: list[Shape], rows: Indices, widths: Widths
) -> Iterator[Pass]:
    """All ``rows``, each once, shape by shape, in the order of their numbers.

    ``shapes``: of every record.
    """
    by_shape: dict[Shape, list[int]] = {}
    for row in sorted(rows.tolist()):
        by_shape.setdefault(shapes[row // data.views], []).append(row)
    for shape in sorted(by_shape):
        allowed, members = widths.allowed(shape), by_shape[shape]
        for start in range(0, len(members), allowed[-1]):
            part = np.array(members[start : start + allowed[-1]], dtype=np.int64)
            size = next(size for size in allowed if size >= len(part))
            head = 0 if widths.apart(shape) else widths.head
            yield Pass(part, shaped(data, part, shape, size, head), shape)


@contextmanager
def one_thread_if(wide: bool) -> Iterator[None]:
    """One thread for shapes whose rows may share a pass: decided by the shape, not by who is there.

    Threads split a tensor in the middle of a row, and a kernel may compute in another way at the
    edge of a split: with three threads or more the same row was seen to come out of ``gelu``
    and ``silu`` with other last bits in another place.
    """
    threads = torch.get_num_threads()
    if wide:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wide:
            torch.set_num_threads(threads)


def shaped(
    data: EncodedQuestions, rows: Indices, shape: Shape, size: int, head: int
) -> EncodedQuestions:
    """The rows ``rows`` as a batch of exactly ``size`` rows of exactly ``shape``.

    Nothing in a row depends on another row. A dummy is one prompt of zeros.
    """
    index = torch.from_numpy(rows) // data.views
    length, width = shape.length, shape.length + shape.choices  # targets: slots - 1 + choices

    def fit(values: Tensor, columns: int, filler: int) -> Tensor:
        out = values.new_full((size, columns), filler)
        kept = min(columns, values.shape[1])
        out[: len(rows), :kept] = values[index, :kept]
        return out

    def whole(values: Tensor, filler: float) -> Tensor:
        out = values.new_full((size,), filler)
        out[: len(rows)] = values[index]
        return out

    signal = None if data.signal is None else data.signal.padded(torch.from_numpy(rows), size)
    choice_mask = torch.ones(size, shape.choices, dtype=torch.bool)
    lengths = torch.ones(size, shape.choices)
    lengths[: len(rows)] = data.choice_lengths[index, : shape.choices]
    segments = fit(data.segments, length, -1)
    segments[len(rows) :] = 0
    batch = replace(
        data,
        tokens=fit(data.tokens, length, 0),
        segments=segments,
        positions=fit(data.positions, length, 0),
        prompt_tokens=whole(data.prompt_tokens, 1),
        targets=fit(data.targets, width, 0),
        target_slots=fit(data.target_slots, width, 0),
        # Padding points behind the last choice, wherever that is.
        target_choices=fit(data.target_choices, width, shape.choices).clamp_max(shape.choices),
        choice_mask=choice_mask,
        choice_lengths=lengths,
        answers=whole(data.answers, 0),
        groups=("",) * size,
        prior=None,
        prefix=None,
        pieces=None,
        signal=signal,
        views=1,
        head=head,
    )
    if data.prior is not None:
        prior = data.prior.new_zeros(size, shape.choices)
        prior[: len(rows)] = data.prior[index, : shape.choices]
        batch = replace(batch, prior=prior)
    if data.prefix is not None:
        prefix = data.prefix.new_zeros(size, length, data.prefix.shape[2])
        kept = min(length, data.prefix.shape[1])
        prefix[: len(rows), :kept] = data.prefix[index, :kept]
        # How far the states of padding are stored depends on the longest record: none is used.
        prefix = prefix.masked_fill((segments < 0)[:, :, None], 0.0)
        batch = replace(batch, prefix=prefix)
    return batch
