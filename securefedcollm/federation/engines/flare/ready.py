"""Says at once what keeps an installed kit from working; FLARE says it in its log, or never.

Adversary: FLARE's process, which writes in the kit. What is read here only decides about a
message; files are read at once, up to a bound.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import ConfigError, CryptoError
from securefedcollm.foreign import printable
from securefedcollm.primitives import certificate_validity

_MOST: Final = 65536
_GOING: Final = 10.0
"""Seconds until a killed server's process has given its port back."""


def read_at_once(path: Path) -> bytes:
    """The beginning of a file. Adversary: a pipe there would have us wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MOST)
    finally:
        os.close(descriptor)


def require_valid(workspace: Path, now: float | None = None) -> None:
    """Raises: ConfigError, if a certificate in the kit has expired or is not valid yet."""
    now = time.time() if now is None else now
    for name in ("client.crt", "server.crt", "rootCA.pem"):
        path = workspace / "startup" / name
        try:
            begin, end = certificate_validity(read_at_once(path))
        except (OSError, CryptoError):  # none of that name; FLARE's log says what is wrong with it
            continue
        whose = "the consortium's certificate" if name == "rootCA.pem" else "this certificate"
        if now > end:
            renew = "make a new authority, and join it" if name == "rootCA.pem" else "join again"
            raise ConfigError(
                f"{whose} expired on {_day(end)}",
                where=str(path),
                hint=f"{renew}: docs/deploy.md#certificates; identity, ledger and runs stay",
            )
        if now < begin:
            raise ConfigError(
                f"{whose} is valid from {_day(begin)} on, and it is {_day(now)} here",
                where=str(path),
                hint="set this machine's clock",
            )


def require_in_place(workspace: Path) -> None:
    """Raises: ConfigError, if a server's kit was made for another directory: it names it within."""
    tree = _tree(workspace / "local" / "resources.json")
    with contextlib.suppress(KeyError, TypeError, StopIteration):
        jobs = next(c for c in tree["components"] if c["id"] == "job_manager")["args"]["uri_root"]
        made_for = Path(jobs).parent
        if made_for.resolve() != workspace.resolve():
            raise ConfigError(
                f"this kit was made for {printable(made_for)}",
                where=str(workspace),
                hint="move the home back, or remove kit/, lead/ and request/ and join again; "
                "identity and runs stay",
            )


def require_free_port(workspace: Path, most: float = _GOING) -> None:
    """Raises: ConfigError, if another process still listens where a server's kit would after
    ``most`` seconds."""
    tree = _tree(workspace / "startup" / "fed_server.json")
    try:
        port = int(str(tree["servers"][0]["service"]["target"]).rpartition(":")[2])
    except (KeyError, TypeError, IndexError, ValueError):
        return  # FLARE's log says what is wrong with it
    deadline = time.monotonic() + most
    while _in_use(port):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"port {port} is in use by another process",
                where=str(workspace),
                hint=f"stop it (`ss -ltnp 'sport = :{port}'` names it), or set up a consortium at "
                "another port",
            )
        time.sleep(0.2)


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _tree(path: Path) -> Any:
    try:
        return json.loads(read_at_once(path))
    except (OSError, ValueError, RecursionError):
        return {}


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))
