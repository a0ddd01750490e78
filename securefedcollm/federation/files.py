"""Durable files: a crash at any moment leaves the old content or the new one, never a mixture."""

from __future__ import annotations

import os
from pathlib import Path

from securefedcollm.errors import StateError


def make_directory(path: Path) -> Path:
    """Create ``path`` (mode 0700) with its parents.

    Raises:
        StateError: naming the path, if it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write into it")
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint="choose another directory with --out",
        ) from None
    return path


def write_durably(path: Path, *content: bytes | memoryview) -> None:
    """Replace ``path`` by the joined ``content``, atomically (mode 0600); fsync file and directory.

    Raises:
        StateError: naming the path, e.g. when the disk is full; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StateError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint="free some space or choose another directory with --out, then --resume",
        ) from None
