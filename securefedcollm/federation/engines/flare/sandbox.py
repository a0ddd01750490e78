"""Landlock: what the kernel lets FLARE's processes read and write, whatever they are made to do.

Reading: the Python that runs them, this package, the system. Reading and writing: their kit. So
neither records, nor identity, ledger or journal, nor other users' files can be had through them.
Linux 5.13 or newer; elsewhere there is no such wall, and the log says so.

Adversary: whoever finds another way to have FLARE read or write a file.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from securefedcollm.errors import StateError

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""System calls; the same numbers on every architecture."""
_BENEATH: Final = 1
_NO_NEW_PRIVS: Final = 38
_READ: Final = 0b1101  # execute, read files, list directories
_WRITE_FILE: Final = 0b10
_RIGHTS: Final = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1)
"""By version of Landlock, all that it knows of files; later ones know no more that matters here."""
_OF_FILES: Final = 0b110 | 1 << 14 | 1
"""What can be allowed on something that is no directory."""

_SYSTEM: Final = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev")
_NAMES: Final = Path("/etc/resolv.conf")


def version() -> int:
    """Of the kernel's Landlock; 0 if it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE, None, 0, 1)))


def confine(kit: Path) -> bool:
    """Let this process and its children touch no files but those; False if the kernel cannot.

    The wall stands around the thread that raises it and what that one starts, so there must be no
    other.

    Raises:
        StateError: there is another.
        OSError: the kernel can and would not.
    """
    if sys.platform != "linux":
        return False
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        raise StateError(
            f"{threads - 1} threads run already and would stay outside the wall around FLARE",
            hint="what starts with Python here (sitecustomize, a .pth file) must start none",
        )
    if (known := version()) < 1:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    every = _RIGHTS[min(known, len(_RIGHTS) - 1)]
    attributes = struct.pack("=Q", every)
    rules = _checked(libc.syscall(_CREATE, attributes, len(attributes), 0))
    try:
        for place in (*_SYSTEM, *_python(), *_names()):
            _allow(libc, rules, Path(place), _READ & every)
        _allow(libc, rules, Path(os.devnull), _READ | _WRITE_FILE)
        _allow(libc, rules, kit, every)
        _checked(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT, rules, 0))
    finally:
        os.close(rules)
    return True


def _python() -> set[str]:
    found = {sys.prefix, sys.base_prefix}
    for name in ("securefedcollm", "nvflare"):  # which may lie elsewhere
        if (package := find_spec(name)) is not None:
            found |= set(package.submodule_search_locations or ())
    # What else was installed, e.g. by `pip install --user`.
    ends = {"site-packages", "dist-packages"}
    return found | {p for p in sys.path if Path(p).is_absolute() and Path(p).name in ends}


def _names() -> set[Path]:
    """Where the file with the name servers lies, if it is but linked into ``/etc``. It is replaced
    there when they change, so the directory counts."""
    return {_NAMES.resolve().parent} if _NAMES.is_symlink() else set()


def _allow(libc: ctypes.CDLL, rules: int, place: Path, rights: int) -> None:
    try:
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not place.is_dir():
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(libc.syscall(_ADD, rules, _BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
