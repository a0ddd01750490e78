"""Files that survive a crash whole, and private directories that do not outlive their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from securefedcollm.errors import ConfigError, StateError

_FILES_OF_A_PROCESS: Final = 512
"""Open files beside the silos': models, libraries, pipes."""

LOCK: Final = ".lock"
"""In a directory that one process at a time may work in."""


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


def allow_open_files(count: int) -> None:
    """Let this process have so many files open, beside what it has; or as many as it may.

    Raises:
        StateError: the system allows fewer.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _FILES_OF_A_PROCESS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    wanted = needed if most == resource.RLIM_INFINITY else min(needed, most)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        except (ValueError, OSError):  # macOS has a limit of its own below the hard one
            wanted = soft
    if wanted < needed:
        raise StateError(
            f"the silos of one process need {needed} open files, and this system allows {wanted}",
            hint="raise the limit (ulimit -Hn), or spread the silos over more processes with "
            "--workers",
        )


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


def copy_tree(source: Path, target: Path) -> None:
    """Have ``source`` in place of ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A fresh directory (mode 0700) that takes the place of ``directory`` if all goes well.

    Raises:
        StateError: it cannot be made, or moved there.
    """
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield make_directory(fresh)
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)
    except OSError as error:
        raise StateError(
            f"{directory}: cannot be written ({error.strerror or error})",
            hint="choose another directory with --out",
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Get every file below ``directory``, and their names, onto the disk before this returns."""
    for path in (*directory.rglob("*"), directory, directory.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_OF_MKDTEMP = "[a-z0-9_]"


@contextlib.contextmanager
def alone(directory: Path, what: str, hint: str) -> Iterator[None]:
    """Hold ``directory``, which exists, against every other process and part of this one.

    The lock goes with the process, however that ends.

    Args:
        what, hint: of the error.

    Raises:
        ConfigError: somebody holds it.
        StateError: it cannot be written.
    """
    try:
        lock = (directory / LOCK).open("w")
    except OSError as error:
        raise StateError(
            f"{directory}: cannot be written ({error.strerror or error})",
            hint="check its permissions and free space",
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(what, where=str(directory), hint=hint) from None
        yield


class PrivateDirectory:
    """A fresh directory (mode 0700) that a killed process does not leave behind for long.

    Its owner holds a lock on it, which ends with the process in any case. The next one to make a
    directory of the same prefix there removes those that nobody holds.

    Adversary: other users of a shared place. Only this user's own directories are touched, and no
    link is followed.
    """

    def __init__(self, place: Path, prefix: str) -> None:
        """Raises: StateError, if ``place`` cannot be written."""
        for old in place.glob(prefix + 8 * _OF_MKDTEMP):
            with contextlib.suppress(BlockingIOError):
                if (lock := _hold(old)) is not None:
                    shutil.rmtree(old, ignore_errors=True)
                    os.close(lock)
        self._lock: int | None = None
        for _ in range(10):
            try:
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            except OSError as error:
                raise StateError(
                    f"{place}: cannot be written ({error.strerror or error})",
                    hint="free some space, or choose another directory with --home or TMPDIR",
                ) from None
            with contextlib.suppress(BlockingIOError):  # another's sweep was faster, and removes it
                self._lock = _hold(self.path)
                # Else it is gone already; or there are no locks here, and nobody sweeps.
                if self._lock is not None or self.path.exists():
                    break

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def _hold(directory: Path) -> int | None:
    """Lock one of this user's private directories; None if it is none, or cannot be locked.

    Raises:
        BlockingIOError: somebody holds it.
    """
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, named = os.fstat(lock), directory.lstat()
        private = held.st_uid == os.getuid() and stat.S_IMODE(held.st_mode) == 0o700
        if private and os.path.samestat(held, named):  # not removed meanwhile
            return lock
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:
        pass
    os.close(lock)
    return None
