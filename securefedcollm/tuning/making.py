"""Making a model on first use, once: a cache that several processes may ask at the same time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import uuid4

import torch

from securefedcollm.errors import StateError, TrainingError
from securefedcollm.tuning.recipe import Progress, quiet_transformers


class Making(NamedTuple):
    """How one model is made.

    ``directory``: where it is kept; ``steps``: of its progress; ``make``: the trained model, for
    whom it tells its progress; ``tokenizer``: what is saved beside it. Both can be pickled.
    """

    name: str
    directory: Path
    steps: int
    make: Callable[[Progress], Any]
    tokenizer: Callable[[], Any]


def made(making: Making, progress: Progress) -> Path:
    """The directory of the model, which is made now unless it is there.

    A second process that asks meanwhile waits for the first one's result.

    Raises:
        StateError: the cache cannot be written.
    """
    directory = making.directory
    if not directory.exists():
        with _only_one(directory):
            if not directory.exists():
                _store(making.make(progress), making.tokenizer(), directory)
    return directory


def make_all(
    makings: Sequence[Making], progress: Progress, context: BaseContext | None = None
) -> None:
    """Make all models that are not cached yet, in parallel: one process, one thread each.

    Args:
        context: how processes start; None: spawn.

    Raises:
        StateError: the cache cannot be written.
        TrainingError: a process ended without its model.
    """
    missing = [making for making in makings if not making.directory.exists()]
    for making in missing:
        _lock_file(making.directory).close()  # reports an unwritable cache
    total = sum(making.steps for making in missing)
    done: dict[Any, int] = {}  # pipe → steps
    whole: dict[Any, int] = {}
    makers: list[Any] = []
    start = context or multiprocessing.get_context("spawn")
    try:
        for making in missing:
            reader, writer = start.Pipe(duplex=False)
            makers.append(start.Process(target=_make, args=(making, writer)))  # type: ignore[attr-defined]
            makers[-1].start()
            writer.close()
            done[reader], whole[reader] = 0, making.steps
        working: list[Any] = list(done)
        ready: Any
        while working:
            for ready in wait(working):
                try:
                    done[ready] = ready.recv()
                except EOFError:  # a last part of a batch is not trained on, and not reported
                    working.remove(ready)
                    done[ready] = whole[ready]
            progress(sum(done.values()), total, "pretraining the built-in models")
        for making, maker in zip(missing, makers, strict=True):
            maker.join()
            if maker.exitcode:
                raise TrainingError(
                    f"pretraining of the built-in {making.name} ended with status {maker.exitcode}",
                    hint="the lines above say why; is there memory and disk space left?",
                )
    finally:
        for maker in makers:
            maker.terminate()


def _make(making: Making, progress: Connection[Any, Any]) -> None:
    """Make one model, in a process of its own; report the steps done to ``progress``."""
    made(making, lambda done, total, text: progress.send(done))


def place(cache_dir: Path, name: str, shaped_by: list[Any]) -> Path:
    """Where a model is kept; named by everything that shapes it."""
    key = hashlib.sha256(json.dumps(shaped_by).encode()).hexdigest()[:16]
    return cache_dir / "models" / f"{name}-{key}"


def _store(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write beside the final place, then rename: a reader never sees half a model."""
    fresh = directory.with_name(f".{directory.name}.{uuid4().hex}")
    try:
        with quiet_transformers():
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
        fresh.rename(directory)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise _unwritable(directory, error) from error


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the lock of one cache entry; it is also released if the process dies."""
    with _lock_file(directory) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _lock_file(directory: Path) -> IO[str]:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        return directory.with_suffix(".lock").open("w")
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> StateError:
    return StateError(
        f"the model cache {directory.parent} cannot be written: {error.strerror}",
        hint="free disk space, or set XDG_CACHE_HOME to a writable directory",
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
