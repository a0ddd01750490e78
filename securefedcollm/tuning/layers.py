"""The decoder layers of a model: running only some of them, and several passes in step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from securefedcollm.errors import ConfigError

T = TypeVar("T")

_HEAVY = 2**18
"""Bytes of a matrix from which it pays to wait for the others: measured with SmolLM2."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a transformers ``model``, whatever its family calls it.

    Raises:
        ConfigError: the model has no such list.
    """
    depth = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(
        f"no list of {depth} decoder layers in {type(model).__name__}",
        where="model",
        hint="use a decoder-only transformer with one list of layers",
    )


class Passed(nn.Module):
    """Stands in for a decoder layer: hands its input on, and keeps it for whoever asks."""

    seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states


@contextmanager
def passed_over(model: Any, start: int, stop: int) -> Iterator[Passed]:
    """Leave out the decoder layers ``start`` to ``stop`` − 1 of ``model`` for a while.

    The other layers keep their names, parameters and hooks.
    """
    layers = decoder_layers(model)
    kept = list(layers)
    passed = Passed()
    for index in range(start, stop):
        layers[index] = passed
    try:
        yield passed
    finally:
        for index in range(start, stop):
            layers[index] = kept[index]


def in_step(
    model: Any, tasks: Sequence[Callable[[], T]], after: Callable[[int], None] = lambda task: None
) -> list[T]:
    """What every task returns. Each is a forward pass of ``model``; they go layer by layer.

    A processor then reads a matrix from memory once for all of them, where one pass after the other
    reads it once a pass: with few tokens in a pass, reading takes as long as computing. What is
    computed is the same. Every pass calls the same kernels on the same numbers in the same order,
    and one of them runs at a time: the threads are there because each has a stack. Their operations
    are numbered alike, so a backward pass over all of them goes matrix by matrix as well (torch
    takes the operation with the highest number first).

    A pass must not leave anything in the model for its own next layer to find: another pass would
    find it. :func:`.independence.proved` sees where one does.

    Args:
        after: called with the task's index whenever it has stopped, before a matrix or at its end.
    """
    heavy = _heavy(model) if len(tasks) > 1 else []
    watched = _get_current_dispatch_mode() is not None  # a mode sees what its own thread does
    lanes = _lanes(tasks) if heavy and not watched else []
    if not lanes:
        return [_alone(task, i, after) for i, task in enumerate(tasks)]
    hooks = [module.register_forward_pre_hook(_pause) for module in heavy]
    try:
        while waiting := [i for i, lane in enumerate(lanes) if not lane.ended]:
            for i in waiting:
                lanes[i].resume()
                after(i)
        return [lane.result() for lane in lanes]
    finally:
        for lane in lanes:
            lane.abandon()
        for hook in hooks:
            hook.remove()


def _heavy(model: Any) -> list[nn.Module]:
    """What of the decoder layers holds a matrix that the nearest cache has no room for."""
    if next(model.parameters()).device.type != "cpu":
        return []
    try:
        modules = {module for layer in decoder_layers(model) for module in layer.modules()}
    except ConfigError:
        return []
    return [
        module
        for module in modules
        if sum(weight.nbytes for weight in module.parameters(recurse=False)) >= _HEAVY
    ]


def _lanes(tasks: Sequence[Callable[[], T]]) -> list[_Lane[T]]:
    """One for every task; none where the system has no room for so many threads."""
    lanes: list[_Lane[T]] = []
    try:
        for task in tasks:
            lanes.append(_Lane(task))
    except RuntimeError:
        for lane in lanes:
            lane.abandon()
        return []
    return lanes


def _alone(task: Callable[[], T], index: int, after: Callable[[int], None]) -> T:
    result = task()
    after(index)
    return result


def _pause(layer: nn.Module, given: Any) -> None:
    lane = threading.current_thread()
    if isinstance(lane, _Lane):
        lane.pause()


class _Abandoned(BaseException):
    """Ends a task of which nobody wants the result any more."""


class _Lane(threading.Thread, Generic[T]):
    """A task that runs only while :meth:`resume` waits for it."""

    def __init__(self, task: Callable[[], T]) -> None:
        super().__init__(name="lane", daemon=True)
        self.ended = False
        self._task, self._found, self._error = task, cast(T, None), cast(BaseException | None, None)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._threads, self._gradients = torch.get_num_threads(), torch.is_grad_enabled()
        self._abandoned = False
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                torch.set_num_threads(self._threads)  # OpenMP counts by the thread that asks
                with torch.set_grad_enabled(self._gradients):
                    self._found = self._task()
        except BaseException as error:
            self._error = error
        self.ended = True
        self._stopped.release()

    def pause(self) -> None:
        """In the task: let others go on."""
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def resume(self) -> None:
        """Run the task until it pauses or ends."""
        self._go.release()
        self._stopped.acquire()

    def abandon(self) -> None:
        """End the task, if it has not ended, and its thread."""
        self._abandoned = True
        self._go.release()
        self.join()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._found
