"""Hidden states of the frozen layers, kept on disk: a large model reads each public text once.

An experiment asks the same frozen layers about the same public prompts in every row and seed, and
again when it goes on after a kill. One file holds the states of one text, under the digest of all
that they depend on: the model, the number of layers, the row, the kind of device and the
libraries' versions. The last bits of states may depend on the texts that shared a pass, so a
result with kept states can differ by rounding from one without.

Only what a server may show anybody is kept: public prompts and test questions. A silo's records
never are. Adversary: whoever can write to the directory. The states there decide what the server
learns from its prompts, as the prompts do, and nothing about any silo. A digest in every file finds
damage, not intent.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final
from uuid import uuid4

import torch
import transformers
from torch import Tensor

from securefedcollm.errors import StateError
from securefedcollm.tuning.questions import EncodedQuestions

_DIGEST: Final = 32
_ROOM: Final = 0.9
"""The part of the bound that stays filled when files have to be removed."""
_FOLDER: Final = re.compile("[0-9a-f]{2}")
_NAME: Final = re.compile("[0-9a-f]{64}")
_KIND: Final = "securefedcollm/states/v1"


class KeptStates:
    """A directory of states, never larger than its bound; the least recently used go first."""

    def __init__(self, directory: Path, limit: int) -> None:
        """
        Args:
            directory: made if it is not there.
            limit: bytes of all files together.

        Raises:
            StateError: it cannot be made or read.
        """
        self._directory, self._limit = directory, limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._size = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise self._unusable(error) from error

    def read(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The states under ``key``, [L, D]; None unless they are there in full."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        values = content[_DIGEST:]
        wanted = shape[0] * shape[1] * dtype.itemsize
        if len(values) != wanted or hashlib.sha256(values).digest() != content[:_DIGEST]:
            return None
        return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape)

    def write(self, key: str, states: Tensor) -> None:
        """Keep ``states`` ([L, D], on the processor) under ``key``.

        Raises:
            StateError: the directory cannot be written, e.g. because the disk is full.
        """
        values = states.contiguous().view(torch.uint8).numpy().tobytes()
        path = self._path(key)
        fresh = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            self._make_room(_DIGEST + len(values))
            fresh.write_bytes(hashlib.sha256(values).digest() + values)
            fresh.rename(path)  # nobody reads half a file
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise self._unusable(error) from error
        self._size += _DIGEST + len(values)

    def _make_room(self, size: int) -> None:
        """Remove files until ``size`` more bytes fit."""
        if self._size + size <= self._limit:
            return
        files = sorted(self._files())  # others may write here, too
        self._size = sum(size for _, size, _ in files)
        for _, length, path in files:
            if self._size + size <= _ROOM * self._limit:
                break
            Path(path).unlink(missing_ok=True)
            self._size -= length

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last used, bytes, path) of every file of states, and of no other: the directory may be
        somebody's."""
        for folder in os.scandir(self._directory):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)):
                continue
            for file in os.scandir(folder):
                if not (_NAME.fullmatch(file.name) and file.is_file(follow_symlinks=False)):
                    continue
                try:
                    found = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # another process made room
                yield found.st_mtime, found.st_size, file.path

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / key

    def _unusable(self, error: OSError) -> StateError:
        return StateError(
            f"{self._directory}: states cannot be kept there ({error.strerror or error})",
            hint="free some space, choose another directory, or do without --states",
        )


_kept: ContextVar[KeptStates | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_states(directory: Path | None, limit: int = 20_000_000_000) -> Iterator[None]:
    """Within it, keep the frozen layers' states of public texts in ``directory``.

    Args:
        directory: None keeps nothing.
        limit: bytes of all files together.

    Raises:
        StateError: the directory cannot be made or read.
    """
    token = _kept.set(KeptStates(directory, limit) if directory is not None else None)
    try:
        yield
    finally:
        _kept.reset(token)


def states_kept() -> KeptStates | None:
    """Where states are kept at present, if anywhere."""
    return _kept.get()


def keys_of(
    encoded: EncodedQuestions, base: bytes, layers: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """The digest (hex) of all that the states of each row depend on.

    Args:
        base: digest of the model.
        layers: how many of its layers, from the first one.
    """
    versions = (torch.__version__, transformers.__version__)
    made_by = repr((_KIND, base.hex(), layers, str(dtype), device.type, *versions))
    keys = []
    for row, length in enumerate(lengths(encoded)):
        digest = hashlib.sha256(made_by.encode())
        for values in (encoded.tokens, encoded.segments, encoded.positions):
            digest.update(values[row, :length].to(torch.int64).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def lengths(encoded: EncodedQuestions) -> list[int]:
    """Tokens of every row, without padding."""
    counts: list[int] = (encoded.segments >= 0).sum(1).tolist()
    return counts
