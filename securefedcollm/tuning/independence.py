"""Is a record's gradient the same, bit for bit, whoever shares its passes? Refusals, and a test.

Adversary: a server that sends an adapter which amplifies the last bits of floating-point sums. If
another record's presence moves those bits, it moves gradients by many clip norms, and no noise that
is scaled to one clip norm hides it. Fixed passes (:mod:`.passes`) take away what depends on the
shape. This module deals with the rest:

* :func:`refuse_coupling` refuses, by name, models whose layers mix rows on purpose.
* :func:`proved` takes known rows through the real passes on the real device, in different places
  and company, and compares bits. Shapes that fail go one record at a time, which needs no proof.
  It compares the outcome of whole passes, and kernels one by one (:mod:`.kernels`).

The rows are made up and so is the adapter, so the outcome says nothing about any record. The test
shows that these kernels, at these shapes, do not look at other rows' places and values. It is not
a proof for all inputs; a kernel whose *arithmetic* for one row branches on another
row's values would have to do so outside the values that were tried. None is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import full_layout, load_vector, to_vector
from securefedcollm.tuning.classifiers import noise_for
from securefedcollm.tuning.head import device_of, learned_positions, sees, text_config, unwrapped
from securefedcollm.tuning.kernels import Kernels, Reference
from securefedcollm.tuning.packing import row_limit
from securefedcollm.tuning.passes import Shape, Widths, padded_length
from securefedcollm.tuning.quantised import QuantisedLinear
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, encode_signals
from securefedcollm.tuning.twins import fingerprint
from securefedcollm.tuning.virtual import virtual_count

log = logging.getLogger(__name__)

Compute = Callable[[EncodedQuestions, Widths], Sequence[bytes]]
"""Computes what must be independent: the result of every row, as bytes, in row order."""

_ROWS = 16  # in one go, where a pass is one record and only the output layer is shared
_HEAD_SHAPES = (Shape(8, 1), Shape(8, 2))  # one choice takes another path than several
_SCALES = (0.1, 30.0)  # of the made-up adapters' values: ordinary, and amplifying
_COARSE = {torch.bfloat16, torch.float16}
"""Types whose rounding hides how a matrix product added: sizes of a pass may differ in one number
of a hundred thousand, which no comparison of made-up rows finds but a search for an adapter does.
A pass of such a model has one size."""
_ONE_BY_ONE = "they are taken one at a time"
_GROWING = {"dynamic", "longrope"}  # rotary scalings that follow the longest row seen


def refuse_coupling(model: Any, where: str, positions: int) -> None:
    """Refuse a model in which one record's pass changes another's, whatever its shape.

    Args:
        where: the study's key of the model.
        positions: tokens of the longest row that can occur (``task.max_tokens``).

    Raises:
        ConfigError: names the layer or the setting.
    """
    causal = unwrapped(model)
    for name, module in causal.named_modules():
        # nn.modules.batchnorm._BatchNorm has SyncBatchNorm and all dimensions below it.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _refusal(f"its layer {name} is a batch normalisation", where)
    config = text_config(causal)
    if getattr(config, "expert_capacity", None) or getattr(config, "capacity_factor", None):
        raise _refusal("its experts have a capacity that the tokens of all records share", where)
    virtual = virtual_count(model)
    for kind, most in _rotary(config):
        if kind in _GROWING and positions + virtual > most:
            raise _refusal(
                f"its rotary scaling ({kind}) follows the longest record beyond {most} tokens",
                where,
                hint=f"set task.max_tokens to at most {most - virtual}, or choose another model",
            )


def _refusal(
    what: str, where: str, hint: str = "choose another model, or privacy.unit: silo"
) -> ConfigError:
    return ConfigError(
        f"{what}: one record would change the gradients of others", where=where, hint=hint
    )


def _rotary(config: Any) -> Iterator[tuple[str, int]]:
    """(kind of scaling, positions up to which it stays as it is), for every kind of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = [given, *(v for v in given.values() if isinstance(v, dict))]
    for setting in settings:
        kind = setting.get("rope_type") or setting.get("type")
        if isinstance(kind, str):
            known = getattr(config, "max_position_embeddings", 0)
            yield kind, int(setting.get("original_max_position_embeddings") or known)


Found = dict[Any, tuple[int, ...]]
_known: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()
_alike: dict[bytes, Found] = {}
"""Findings by a model's fingerprint: the silos of a simulation have the same model."""


def proved(
    model: nn.Module, shapes: Sequence[Shape], widths: Widths, compute: Compute, what: str
) -> Widths:
    """``widths`` with the test's findings on every shape; see the module's docstring.

    A pass of a shape may have any number of rows that gives the same bits as the largest one.
    Records of a shape that fails the test go one by one. A process tests each shape and number of
    threads once for all models that compute alike (:mod:`.twins`).

    Args:
        shapes: those that occur.
        compute: what will be done to records, here done to made-up ones.
        what: names the computation.

    Raises:
        ConfigError: a pass leaves traces in the model, so that no order of records is safe.
    """
    if widths.alone is None:  # nothing is shared but what a pass leaves behind
        with made_up_adapter(model, 0.1), _without_traces(model):
            compute(made_up(model, _HEAD_SHAPES[1], [0]), widths)
        return widths
    known = _found_of(model)

    def tested(shape: Shape, given: Widths) -> tuple[int, ...]:
        place = (str(device_of(model)), torch.get_num_threads())
        key = (what, shape, given.rows(shape), given.head, given.most, *place)
        if key not in known:
            with _without_traces(model):
                known[key] = _same_bits(model, shape, given, compute)
        return known[key]

    # What all records share is the output layer. Its test has shapes of its own: which records
    # there are must not decide what happens to all of them.
    head = widths._replace(tokens=1, most=_ROWS)
    if not all(tested(shape, head) for shape in _HEAD_SHAPES):
        log.warning("%s: the output layer's last bits depend on company: %s", what, _ONE_BY_ONE)
        return widths._replace(alone=None)
    sizes: dict[Shape, tuple[int, ...]] = {}
    for shape in sorted(filter(widths.wide, set(shapes))):
        sizes[shape] = tested(shape, widths)
        if not sizes[shape]:
            log.warning(
                "%s: records of %d tokens change each other's last bits on this machine: %s",
                *(what, shape.length, _ONE_BY_ONE),
            )
    failed = {shape for shape, found in sizes.items() if not found}
    return widths._replace(alone=widths.alone | failed, sizes=sizes)


def _found_of(model: nn.Module) -> Found:
    """The findings so far on this model, or on one that is the same to the bit."""
    if model not in _known:
        with made_up_adapter(model, _SCALES[0]):  # as the test is made: its own does not matter
            # Adversary: a server whose adapter overflows, to see the silo fail in finding this out.
            row_limit(unwrapped(model))
            like = fingerprint(model)
        _known[model] = {} if like is None else _alike.setdefault(like, {})
    return _known[model]


def _same_bits(model: nn.Module, shape: Shape, widths: Widths, compute: Compute) -> tuple[int, ...]:
    """Numbers of rows, ascending, at which made-up records come out the same in every place.

    Three records of a shape, in different places and company, at an ordinary adapter and at one
    that amplifies, and random rows through every kernel. Empty if they differ even at the largest
    number of rows, or if everything comes out as zero and so shows nothing.
    """
    most = widths.rows(shape)
    sizes = [most >> n for n in range(0, most.bit_length(), 2)]  # a quarter, a sixteenth, …
    coarse = any(weight.dtype in _COARSE for weight in model.parameters())
    # A quantised layer's weight is made anew in every pass, so no product of one pass is known to
    # have the same weight as one of another pass.
    if coarse or any(isinstance(module, QuantisedLinear) for module in model.modules()):
        sizes = sizes[:1]
    seen: dict[tuple[float, int], bytes] = {}
    reference: Reference = {}
    allowed: list[int] = []
    for size in sizes:
        # Where a pass is one record, some share the output layer: as many as are in memory at once.
        count = min(_ROWS, widths.most) if most == 1 else size
        just = widths._replace(sizes={shape: (size,)})
        shared, threads = (size, 1) if most > 1 else (0, torch.get_num_threads())
        kernels = Kernels(model, shared, widths.head, threads, reference)
        alike = made_up(model, shape, [0] * size)
        with made_up_adapter(model, _SCALES[0]), kernels:
            compute(alike, just)
        same = not kernels.coupling
        for scale in _SCALES:
            with made_up_adapter(model, scale):
                for kinds in _arrangements(count, apart=scale == _SCALES[0]):
                    found = compute(made_up(model, shape, kinds), just)
                    for kind, values in zip(kinds, found, strict=True):
                        same = same and seen.setdefault((scale, kind), values) == values
        if same:
            allowed.append(size)
        elif size == most:
            return ()
    # One choice among one teaches nothing where choices are compared: its gradient is zero.
    shown = shape.choices == 1 or any(values.strip(b"\0") for values in seen.values())
    return tuple(sorted(allowed)) if shown else ()


def _arrangements(count: int, *, apart: bool) -> list[list[int]]:
    """Which of the three records is in each row; dummies fill up the rest.

    Args:
        apart: also try each by itself, so that a pass lacks the longest, or the one of a kind.
    """
    mixed = [
        [i % 3 for i in range(count)],
        [(i + 1) % 3 for i in range(count)],
        [(2 * i + 1) % 3 for i in range(count // 2 + 1)],
    ]
    return [*mixed, *([kind] * count for kind in range(3))] if apart else mixed


def made_up(model: nn.Module, shape: Shape, kinds: Sequence[int]) -> EncodedQuestions:
    """Records of one shape: 0 is as long as it gets, 1 as short, 2 has packed choices of its own.

    Where a shape has too few tokens for that, they are as different as it allows.
    """
    if sees(model):
        return _made_up_signals(model, shape.choices, kinds)
    embeddings = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    vocabulary = min(1000, embeddings.num_embeddings) if embeddings is not None else 2
    longest, choices = shape.length, shape.choices
    most = learned_positions(model) or longest
    shortest = longest
    while shortest > 1 and padded_length(shortest - 1) == longest:
        shortest -= 1
    rows = []
    for kind in kinds:
        draw = np.random.default_rng([kind, longest, choices])
        length = shortest if kind == 1 else longest
        packed = [0] * choices  # tokens of each choice behind its first
        spare = length - 1 if choices == 1 or kind == 2 else min(length - 1, choices)
        for i in range(spare):
            packed[i % choices] += 1
        rows.append((draw.integers(0, vocabulary, 2 * length + choices), length, packed))
    n, width = len(rows), longest + choices
    out = EncodedQuestions(
        tokens=torch.zeros(n, longest, dtype=torch.int64),
        segments=torch.full((n, longest), -1, dtype=torch.int8),
        positions=torch.zeros(n, longest, dtype=torch.int64),
        prompt_tokens=torch.zeros(n, dtype=torch.int64),
        targets=torch.zeros(n, width, dtype=torch.int64),
        target_slots=torch.zeros(n, width, dtype=torch.int64),
        target_choices=torch.full((n, width), choices, dtype=torch.int64),
        choice_mask=torch.ones(n, choices, dtype=torch.bool),
        choice_lengths=torch.ones(n, choices),
        answers=torch.zeros(n, dtype=torch.int64),
        groups=("",) * n,
        prior=torch.zeros(n, choices),
    )
    for i, (words, length, packed) in enumerate(rows):
        prompt, at, k = length - sum(packed), length - sum(packed), 0
        out.tokens[i, :length] = torch.from_numpy(words[:length])
        out.segments[i, :prompt] = 0
        out.positions[i, :prompt] = torch.arange(prompt) % most  # a model may have no more
        out.prompt_tokens[i] = prompt
        for choice, more in enumerate(packed):
            out.segments[i, at : at + more] = choice + 1
            out.positions[i, at : at + more] = torch.arange(prompt, prompt + more) % most
            first = at - prompt + 1
            out.targets[i, k : k + more + 1] = torch.from_numpy(words[length + k :][: more + 1])
            out.target_slots[i, k : k + more + 1] = torch.tensor([0, *range(first, first + more)])
            out.target_choices[i, k : k + more + 1] = choice
            at, k = at + more, k + more + 1
    return out


def _made_up_signals(model: nn.Module, choices: int, kinds: Sequence[int]) -> EncodedQuestions:
    """Noise that a model sees, each kind of record its own; the first ``choices`` classes."""
    names = tuple(map(str, range(choices)))
    return encode_signals([Question("", names, 0)] * len(kinds), noise_for(model, kinds))


@contextmanager
def made_up_adapter(model: nn.Module, scale: float) -> Iterator[None]:
    """Random adapter matrices for a while: with B = 0, half of the gradients would be zero."""
    layout = full_layout(model)
    kept = to_vector(model, layout) if layout.names else None
    if kept is not None:
        random = np.random.default_rng(1).normal(scale=scale, size=layout.size)
        load_vector(model, layout, random)
    try:
        yield
    finally:
        if kept is not None:
            load_vector(model, layout, kept)


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose passes change its buffers.

    Adversary: as above; a state that one record leaves behind is the next record's company.
    """
    before = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    yield
    now = dict(model.named_buffers())
    for name, buffer in before:
        if name not in now or not torch.equal(buffer, now[name]):
            raise _refusal(f"a pass changes its buffer {name}", "models.slm")


def bits(*values: Tensor) -> list[bytes]:
    """The bytes of every row of some tensors [n, …], to be compared: row by row."""
    rows = [v.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy() for v in values]
    return [row.tobytes() for row in np.concatenate(rows, axis=1)]
