"""Landlock: what the kernel lets FLARE's processes read and write, whatever they are made to do.

They may read the Python that runs them, this package, and what names, time zones and libraries need
of the system; they may read and write their kit. So nobody can get records, identity, ledger or
journal through them, nor what other processes are told and root may read.
Linux 6.2 or newer; before, files can still be emptied, and before 5.13 there is no wall. FLARE's
log and the terminal say what is missing.

Adversary: whoever finds another way to have FLARE read or write a file.
"""

from __future__ import annotations

import ctypes
import errno
import mimetypes
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
_LIST: Final = 0b1000
_WRITE_FILE: Final = 0b10
_RIGHTS: Final = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1)
"""By version of Landlock, all its rights on files: 2 added moves, 3 (Linux 6.2) truncation.

Later ones know of TCP (4), which FLARE needs; of commands to devices (5), of which the four within
the wall take none that matters; and of :data:`_SCOPES` (6).
"""
_SCOPES: Final = 0b11
"""No abstract sockets of processes outside the wall, and no signals to them."""
_OF_FILES: Final = 0b110 | 1 << 14 | 1
"""The rights that can be allowed on something that is not a directory."""

_CAPABILITIES: Final = struct.pack("=Ii", 0x20080522, 0)
"""The header of capget and capset: version 3, this thread."""
_BIND_PORTS: Final = 1 << 10
"""CAP_NET_BIND_SERVICE: a server may listen on a port below 1024."""

_NAMES: Final = Path("/etc/resolv.conf")
_SYSTEM: Final = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin"),
    *("/dev/zero", "/dev/random", "/dev/urandom"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys"),
    *("/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm"),
    # names
    *(str(_NAMES), "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/etc/passwd", "/etc/group"),
    # libraries and time
    *mimetypes.knownfiles,
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/localtime", "/etc/timezone"),
    # OpenSSL: not the private keys that lie beside
    *("/etc/ssl/openssl.cnf", "/etc/ssl/certs", "/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem"),
    *("/etc/pki/tls/openssl.cnf", "/etc/pki/tls/openssl.d", "/etc/pki/tls/certs"),
    *("/etc/pki/tls/cert.pem", "/etc/pki/ca-trust"),
    *("/etc/ca-certificates", "/etc/crypto-policies"),
)


def version() -> int:
    """The version of the kernel's Landlock.

    Raises:
        OSError: it has none, and why.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _checked(ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, 0, 1))


def shortcoming() -> str:
    """What the wall lacks on this machine, in a sentence for the operator; or nothing."""
    try:
        known = version()
    except OSError as error:
        why = f"this kernel has no Landlock ({error.strerror})"
        return f"{why}: FLARE's processes may read and write what this user may"
    if known < 3:
        return "this kernel is older than Linux 6.2: FLARE's processes may empty this user's files"
    return ""


def confine(kit: Path) -> None:
    """Let this process and its children touch no files but those, if the kernel can.

    The wall encloses the thread that raises it and whatever that one starts, so there must be no
    other. Root keeps only its right to listen on low ports: the others would lead to files of
    others within the wall, and to what their processes hold.

    Raises:
        StateError: there is another thread, or without root's rights the kit or Python is out of
            reach.
        OSError: the kernel can and would not.
    """
    if sys.platform != "linux":
        return
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        raise StateError(
            f"{threads - 1} threads run already and would stay outside the wall around FLARE",
            hint="what starts with Python here (sitecustomize, a .pth file) must start none",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    _drop_capabilities(libc)
    _checked(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))  # nor does a program that is started bring any
    for place in (kit, *_python()):
        if not os.access(place, os.R_OK | os.X_OK):
            raise StateError(
                f"{place}: out of reach for FLARE's processes, which have none of root's rights",
                hint="run this as the user whom the home and Python belong to",
            )
    try:
        known = version()
    except OSError:  # see shortcoming()
        return
    every = _RIGHTS[min(known, len(_RIGHTS) - 1)]
    attributes = struct.pack("=Q", every)
    if known >= 6:
        attributes += struct.pack("=QQ", 0, _SCOPES)
    rules = _checked(libc.syscall(_CREATE, attributes, len(attributes), 0))
    try:
        for readable in (*map(Path, _SYSTEM), *_python(), *_others(), *_names()):
            _allow(libc, rules, readable, _READ)
        for place in _ours():  # a job's process looks for them there
            _allow(libc, rules, place.parent, _LIST)
        _allow(libc, rules, Path(os.devnull), _READ | _WRITE_FILE)
        _allow(libc, rules, kit, every)
        _checked(libc.syscall(_RESTRICT, rules, 0))
    finally:
        os.close(rules)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    held = ctypes.create_string_buffer(24)
    _checked(libc.capget(_CAPABILITIES, held))
    keep = struct.unpack("=6I", held.raw)[1] & _BIND_PORTS  # of the permitted ones
    _checked(libc.capset(_CAPABILITIES, struct.pack("=6I", keep, keep, 0, 0, 0, 0)))


def _python() -> set[Path]:
    return {Path(sys.prefix), Path(sys.base_prefix), *_ours()}


def _ours() -> set[Path]:
    """The packages that FLARE's processes are made of, which may lie elsewhere."""
    specs = [find_spec(name) for name in ("securefedcollm", "nvflare")]
    return {Path(p) for spec in specs if spec for p in spec.submodule_search_locations or ()}


def _others() -> set[Path]:
    """Where else packages were installed, e.g. by ``pip install --user``."""
    found = {Path(p) for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}}
    return {place for place in found if place.is_absolute()}


def _names() -> set[Path]:
    """Where the file with the name servers lies, if ``/etc`` only links to it. It is replaced
    there when they change, so the directory counts."""
    return {_NAMES.resolve().parent} if _NAMES.is_symlink() else set()


def _allow(libc: ctypes.CDLL, rules: int, place: Path, rights: int) -> None:
    try:
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # out of reach in any case
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
