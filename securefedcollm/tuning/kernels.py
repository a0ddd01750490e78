"""Every kernel of a pass by itself: does a row come out the same in every place and company?

Comparing what a whole pass says of made-up records has a blind spot: a kernel that treats a few
numbers of some rows otherwise may change the result of one record in thousands, and a server that
searches for such an adapter finds it. So :class:`Kernels` looks at the kernels one by one while
made-up records pass.

* Kernels that move numbers, or round each once, have one right answer.
* A model has no business looking across rows, however exactly: at the largest position of a pass,
  or at a number of some row to choose a branch. Kernels that do are named.
* An elementwise kernel takes whole vectors; the numbers that are left over at the end come from
  other instructions (``silu`` differs in one of thirty of them, another in one of a thousand). They
  belong to the last row, and which row is last depends on its company. There must be none.
* All others add up. Matrix products were seen to depend on where a row's memory starts. Each is
  run anew with random numbers in the shapes, strides and places that it has here, and its rows are
  compared, bit for bit, in other places, other company and passes of other sizes.

Adversary: as in :mod:`.independence`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

_TWO_VECTORS: Final = 128
"""Bytes that an elementwise kernel takes at a time: twice the widest register."""
_SHARE: Final = 32768
"""The least count of numbers that a kernel gives a thread."""
_RECORDS: Final = 23
"""Made-up records that every kernel sees: a prime, so that they get to every place."""
_LOUD: Final = _RECORDS
"""It and the next only keep the others company: their numbers are a thousand times as large, and
opposite."""
_MOVING: Final = """
    _reshape_alias _to_copy _unsafe_view alias as_strided cat clamp clamp_max clamp_min
    clone constant_pad_nd copy_ detach diagonal embedding empty empty_like expand fill_ flip
    full full_like gather index index_put index_put_ index_select lift_fresh masked_fill
    masked_fill_ masked_scatter masked_scatter_backward max maximum min minimum new_empty
    new_empty_strided new_full new_ones new_zeros nll_loss_backward nll_loss_forward ones
    ones_like permute relu repeat roll scalar_tensor scatter select select_backward
    select_scatter slice slice_backward slice_scatter split split_with_sizes squeeze stack t
    threshold_backward topk transpose tril triu unbind unsqueeze view where zero_ zeros
    zeros_like
"""
# scatter_add adds one number after the other, in the order of their places in the row.
_ROUNDING: Final = """
    abs add add_ div div_ mul mul_ neg reciprocal rsub scatter_add scatter_add_ sqrt sub sub_
"""
_ADDING: Final = """
    _fused_rms_norm _fused_rms_norm_backward _log_softmax _log_softmax_backward_data
    _safe_softmax _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward _softmax _softmax_backward_data addmm
    baddbmm bmm convolution convolution_backward cumsum linalg_solve_triangular mean mm
    native_layer_norm native_layer_norm_backward sum
"""
_ACROSS: Final = """
    all amax amin any argmax argmin argsort cummax cummin cumprod cumsum flip kthvalue max mean
    median min mode nansum prod roll scatter_add scatter_add_ scatter_reduce sort std sum topk var
"""
# Kernels that look across one dimension, or across all. Across the rows each couples them, however
# exactly: the largest position of a pass is an example.
_TELLING: Final = "_local_scalar_dense _unique2 equal is_nonzero nonzero unique_dim"
# Kernels that let a number of a row decide what the program does.
_ALIKE: Final = frozenset((_MOVING + _ROUNDING).split())
_SUMS: Final = frozenset(_ADDING.split())
_LOOKING: Final = frozenset(_ACROSS.split())
_DECIDING: Final = frozenset(_TELLING.split())


Reference = dict[tuple[str, int], Tensor]
"""A kernel's result for each record, to compare passes of several sizes: [records, numbers] for
every kind of call and every tensor that comes out."""


class Kernels(TorchDispatchMode):
    """Tries every kernel that runs within it; ``coupling`` names those that couple rows.

    Args:
        model: its weights and buffers are nobody's rows.
        rows: records of the pass, all alike; 0 if they share the output layer alone.
        head: positions that the output layer sees at a time.
        threads: of every kernel.
        known: results of the first pass of a shape; the others of that shape are compared with it.
    """

    def __init__(
        self, model: nn.Module, rows: int, head: int, threads: int, known: Reference
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coupling: set[str] = set()
        self._rows, self._head, self._threads, self._known = rows, head, threads, known
        self._tried: dict[str, bool] = {}
        self._within = 0  # modules whose forward is under way: then it is the model that asks
        self._hooks: list[Any] = []
        self._nobodys = _Nobodys()
        self._nobodys.take([*model.parameters(), *model.buffers()])

    def __enter__(self) -> Kernels:
        def step(by: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._within += by

            return hook

        self._hooks = [
            register_module_forward_pre_hook(step(1)),
            register_module_forward_hook(step(-1), always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *ended: Any) -> None:
        super().__exit__(*ended)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        given, found = [*_tensors((args, kwargs))], [*_tensors(result)]
        if all(value in self._nobodys for value in given):  # made of weights and constants
            self._nobodys.take(found)
            return result
        if op._schema.is_mutable:
            self._nobodys.drop(found)
        looking = name in _LOOKING and _across_rows(op, args, kwargs)
        if self._rows and self._within and (looking or name in _DECIDING):
            self.coupling.add(name)
        elif not _exact(name, args, kwargs, found):
            rows = self._rows_of([*given, *found])
            if not rows:
                alike = not self._rows  # then it is within one record
            elif name not in _SUMS and any(_left_over(v, self._threads) for v in found):
                alike = False
            else:
                with torch.no_grad():
                    alike = self._alike(op, name, args, kwargs, rows)
            if not alike:
                self.coupling.add(name)
        return result

    def _rows_of(self, values: Sequence[Tensor]) -> int:
        """The number of parts of a kernel's tensors that may belong to different records."""
        sizes = {len(v) for v in values if v.ndim and v not in self._nobodys}
        if self._head in sizes:
            return self._head
        return self._rows if self._rows and any(not n % self._rows for n in sizes) else 0

    def _alike(self, op: Any, name: str, args: Any, kwargs: Any, rows: int) -> bool:
        """Whether random rows come out the same wherever they are; tried once a kind of call."""
        kind = repr(_replaced((name, args, kwargs), _laid_out))
        if kind not in self._tried:
            about = partial(self._of_one_row, rows=rows)
            same = repr(_replaced((name, args, kwargs), about))
            make = _Maker(args, kwargs, self._nobodys, rows, same)
            alike, seen = True, False
            for who in _arrangements(rows):
                made = make.of(who)
                for at, value in enumerate(_tensors(op(*made[0], **made[1]))):
                    if value.is_floating_point() and value.ndim and not len(value) % rows:
                        parts = value.reshape(rows, -1)
                        alike &= self._same((same, at), torch.tensor(who), parts)
                        seen = True
            self._tried[kind] = alike and seen  # a kernel that sums over all rows gives none back
        return self._tried[kind]

    def _of_one_row(self, value: Tensor, rows: int) -> str:
        """An argument's kind, without what depends on the number of rows."""
        if value in self._nobodys:
            return f"{_memory(value)} {_laid_out(value)}"
        if not value.ndim or len(value) % rows:
            return f"{value.dtype} {tuple(value.shape)}"
        order = [*np.argsort(value.stride(), kind="stable").tolist(), *map(bool, value.stride())]
        return f"{value.dtype} {len(value) // rows} {tuple(value.shape[1:])} {order}"

    def _same(self, key: tuple[str, int], who: Tensor, values: Tensor) -> bool:
        """Whether every row [n, …] equals those that its record (``who``: [n]) had before."""
        quiet = who < _LOUD
        values, who = values[quiet], who[quiet].to(values.device)
        if key not in self._known:
            self._known[key] = values.new_full((_RECORDS, values.shape[1]), torch.inf)
        known = self._known[key]
        if known.shape[1] != values.shape[1]:
            return False
        fresh = known[who].isposinf().all(1)  # never seen, or of no finite number
        known[who[fresh]] = values[fresh]
        wanted = known[who]
        same = (wanted == values) & (wanted.signbit() == values.signbit())
        return bool((same | (wanted.isnan() & values.isnan())).all())


def _arrangements(rows: int) -> list[list[int]]:
    """Which record is in each row of some passes: each in several places and companies."""
    starts = {0, 7} if rows >= _RECORDS else {0, 1 % rows, rows // 2}
    passes = [
        [(first + i) % _RECORDS for i in range(rows)]
        for start in sorted(starts)
        for first in range(start, _RECORDS if rows < _RECORDS else start + 1, rows)
    ]
    loud = [
        [other if i % 4 == 0 else 2 * i % _RECORDS for i in range(rows)]
        for other in (_LOUD, _LOUD + 1)
    ]
    return [*passes, *loud]


# torch's own walks through trees cost as much as the kernels of a small model.
def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a kernel is given or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A kernel's arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_replaced(each, change) for each in value)
    if isinstance(value, list):
        return [_replaced(each, change) for each in value]
    if isinstance(value, dict):
        return {key: _replaced(each, change) for key, each in value.items()}
    return value


class _Nobodys:
    """Tensors made of weights and constants alone, while their memory is theirs.

    They are not kept: the weights that quantised layers make on the way are as large as a model.
    """

    def __init__(self) -> None:
        self._memory: dict[int, StorageWeakRef] = {}

    def __contains__(self, value: Tensor) -> bool:
        place = _memory(value)
        if place not in self._memory:
            return False
        # Memory that was given back may be a record's by now. Empty tensors have none: place 0.
        return place == 0 or not self._memory[place].expired()  # type: ignore[no-untyped-call]

    def take(self, values: Sequence[Tensor]) -> None:
        for value in values:
            storage = value.untyped_storage()
            self._memory[_memory(value)] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def drop(self, values: Sequence[Tensor]) -> None:
        for value in values:
            self._memory.pop(_memory(value), None)


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _laid_out(value: Tensor) -> str:
    place = (tuple(value.shape), value.stride(), value.storage_offset())
    return f"{value.dtype} {place}"


def _left_over(value: Tensor, threads: int) -> bool:
    """Whether an elementwise kernel has numbers left at the end, or where a thread's end."""
    numbers = value.numel()
    share = -(-numbers // max(1, min(threads, -(-numbers // _SHARE))))
    return bool(share * value.itemsize % _TWO_VECTORS)


def _across_rows(op: Any, args: Any, kwargs: Any) -> bool:
    """Whether a kernel of ``_ACROSS`` goes along the first dimension, where the rows are."""
    asked = op._schema.arguments
    given = {a.name: a.default_value for a in asked if a.has_default_value()}
    given |= {a.name: value for a, value in zip(asked, args, strict=False)} | kwargs
    if "other" in given:
        return False  # of two tensors, number by number
    along = next((given[key] for key in ("dim", "dims") if given.get(key) is not None), None)
    if along is None:
        return True
    size = max(1, given["self"].ndim)
    dims = along if isinstance(along, list | tuple) else [along]
    return not dims or any(dim % size == 0 for dim in dims)


def _exact(name: str, args: Any, kwargs: Any, found: Sequence[Tensor]) -> bool:
    """Whether a kernel has one right answer."""
    if name in ("pow", "pow_"):
        return isinstance(args[1], (int, float)) and args[1] in (2, 3)
    if name == "rsqrt":  # rounds twice: once more in bfloat16
        return all(value.dtype in (torch.float32, torch.float64) for value in found)
    if not any(value.is_floating_point() for value in found):
        return True
    return name in _ALIKE and kwargs.get("alpha", 1) == 1


class _Maker:
    """Arguments with random numbers for rows, in memory that is laid out as that of the given."""

    def __init__(self, args: Any, kwargs: Any, nobodys: _Nobodys, rows: int, seed: str) -> None:
        self._given, self._rows = (args, kwargs), rows
        self._seed = [*hashlib.sha256(seed.encode()).digest()[:8]]
        self._records: dict[int, Tensor] = {}
        self._nobodys = nobodys

    def of(self, who: Sequence[int]) -> Any:
        places = count()
        return _replaced(self._given, lambda value: self._made(value, next(places), who))

    def _made(self, value: Tensor, place: int, who: Sequence[int]) -> Tensor:
        of_rows = value.is_floating_point() and value.ndim and not len(value) % self._rows
        if not of_rows or value.stride(0) == 0 or value in self._nobodys:
            return value
        memory = value.new_empty(value.untyped_storage().nbytes() // value.itemsize)
        laid = inner = memory.as_strided(value.shape, value.stride(), value.storage_offset())
        for dim, step in enumerate(value.stride()):
            inner = inner if step else inner.narrow(dim, 0, 1)  # numbers that are there once
        shape = (len(inner) // self._rows, *inner.shape[1:])
        if place not in self._records:
            draw = np.random.default_rng([*self._seed, place])
            numbers = draw.standard_normal((_RECORDS + 2, *shape), np.float32)
            numbers[_LOUD] *= 1e3
            numbers[_LOUD + 1] = -numbers[_LOUD]
            self._records[place] = torch.from_numpy(numbers)
        inner.copy_(self._records[place][list(who)].flatten(0, 1))
        return laid
