"""Certificates and start-up kits: a consortium's offline CA, requests, and kits with our policy.

FLARE's own command makes the RSA keys, requests and certificates (mutual TLS). This module adds
what it lacks: it keeps the CA's key encrypted, and installs a kit with a policy that runs our relay
and nothing else. These keys identify machines to each other. What a participant *says* is
signed with its Ed25519 identity, which the signed study lists; a false CA could connect somebody,
but not speak for anybody.

======  ==========================================================================
CA      ``consortium.yaml`` (public), ``rootCA.pem``, ``rootCA.key.sealed``
home    ``request/`` (own private key), ``kit/`` (FLARE's workspace, ready to run)
======  ==========================================================================
"""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml
from msgspec import structs

from securefedcollm.errors import ConfigError, CryptoError, StateError
from securefedcollm.federation.engines.flare.papers import (
    LEAD,
    PROFILE,
    UNZIPPING,
    Profile,
    check_participant,
    read_profile,
    read_request,
)
from securefedcollm.federation.engines.flare.policy import lock_down
from securefedcollm.federation.engines.flare.processes import plain_environment, require_flare
from securefedcollm.federation.engines.flare.ready import (
    read_at_once,
    require_in_place,
    require_valid,
)
from securefedcollm.federation.files import PrivateDirectory, make_directory, write_durably
from securefedcollm.primitives import NONCE_BYTES, seal, sha256, stretch_passphrase, unseal

_SEALED: Final = "rootCA.key.sealed"
_SALT_BYTES: Final = 16
_LABEL: Final = b"securefedcollm/consortium-ca/v1"
_FOLDER: Final = {"client": "kit", "server": "kit", "admin": "lead"}


@dataclass(frozen=True)
class Kit:
    """An installed start-up kit."""

    workspace: Path
    name: str
    org: str


def create_consortium(directory: Path, name: str, host: str, port: int, passphrase: str) -> Profile:
    """Make the CA in ``directory``: a new one, or empty, as a killed ``init`` leaves it.

    Raises:
        ConfigError: a name or the passphrase is unusable, or the directory exists.
        StateError: it cannot be written.
    """
    profile = Profile(name, host, port, "")
    profile.check("--name and --server", issued=False)
    if len(passphrase) < 8:
        raise ConfigError(
            "a passphrase of fewer than 8 characters protects nothing", where="passphrase"
        )
    require_flare()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(
            "exists already", where=str(directory), hint="choose another --out; a CA is kept"
        )
    make_directory(directory)
    with _scratch() as scratch, _in_memory() as memory:
        _write_yaml(scratch / "profile.yaml", _flare_profile(name, host, port))
        run_flare("cert", "init", "--profile", "profile.yaml", "-o", "ca", cwd=scratch, key=memory)
        certificate = (scratch / "ca" / "rootCA.pem").read_bytes()
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(NONCE_BYTES)
        key = os.pread(memory, 1 << 16, 0)
        if b"PRIVATE KEY" not in key:
            raise StateError(
                "FLARE's `cert init` gave no key",
                hint="is nvflare the version that this package names?",
            )
        sealed = seal(stretch_passphrase(passphrase, salt), nonce, key, _LABEL)
        write_durably(directory / _SEALED, salt + nonce + sealed)
        for file in ("rootCA.pem", "ca.json"):
            write_durably(directory / file, (scratch / "ca" / file).read_bytes())
    profile = structs.replace(profile, fingerprint=_fingerprint(certificate))
    _write_yaml(directory / PROFILE, msgspec.to_builtins(profile))
    return profile


def request_certificate(home: Path, profile: Profile, name: str, role: str) -> list[Path]:
    """Make keys in ``home`` and the requests to hand in; the keys stay.

    Args:
        role: ``silo``, ``authority`` or ``server``. A server also asks for a certificate to submit
            jobs with.

    Returns:
        the request files (ZIP), which hold nothing secret.

    Raises:
        ConfigError: the name cannot be one in FLARE, or is the server's, or there is a request
            already.
    """
    check_participant(name, role, profile, "--name")
    target = home / "request"
    if target.exists():
        raise ConfigError(
            "there is a request already",
            where=str(target),
            hint="hand that in; to begin anew remove the directory",
        )
    wanted = [(name, "client")]
    if role == "server":
        wanted = [(profile.host, "server"), (LEAD, "admin")]
    make_directory(home)
    with _scratch(home) as scratch:
        for who, kind in wanted:
            entry: dict[str, Any] = {"name": who, "type": kind, "org": _org(name)}
            if kind == "server":
                entry["fed_learn_port"] = profile.port
            if kind == "admin":
                entry["role"] = "lead"
            _write_yaml(scratch / "who.yaml", {"name": profile.name, "participants": [entry]})
            run_flare("cert", "request", "-p", "who.yaml", "--out", f"request/{kind}", cwd=scratch)
        (scratch / "request").rename(target)
    return sorted(target.glob("*/*.request.zip"))


def approve_request(ca: Path, request: Path, passphrase: str, out: Path) -> Path:
    """Sign one request with the CA in ``ca``; returns the signed file, which holds nothing secret.

    Raises:
        ConfigError: not a CA, not a request, one of another consortium, or a silo's for the name
            of the server.
        CryptoError: wrong passphrase.
    """
    profile = read_profile(ca / PROFILE)
    asked = read_request(request)
    if asked.kind == "site":
        check_participant(asked.name, "silo", profile, str(request))
    target = out / request.name.replace(".request.zip", ".signed.zip")
    if target.exists():
        raise ConfigError("exists already", where=str(target), hint="choose another --out")
    make_directory(out)
    with _scratch() as scratch, _in_memory() as memory:
        authority = make_directory(scratch / "ca")
        for file in ("rootCA.pem", "ca.json"):
            if not (ca / file).is_file():
                raise ConfigError("is missing", where=str(ca / file), hint="restore the authority")
            shutil.copy(ca / file, authority / file)
        os.pwrite(memory, _unsealed(ca / _SEALED, passphrase), 0)
        (authority / "rootCA.key").symlink_to(f"/proc/self/fd/{memory}")
        _write_yaml(
            scratch / "profile.yaml", _flare_profile(profile.name, profile.host, profile.port)
        )
        run_flare(
            *("cert", "approve", str(request.absolute()), "-c", "ca"),
            *("--profile", "profile.yaml", "--out", "signed.zip"),
            cwd=scratch,
            key=memory,
        )
        write_durably(target, (scratch / "signed.zip").read_bytes())
        write_durably(ca / "ca.json", (authority / "ca.json").read_bytes())  # counts the issued
    return target


def install_kits(home: Path, profile: Profile, signed: Sequence[Path], name: str) -> list[Kit]:
    """Build the kits from signed certificates and the keys in ``home/request``: all, or none.

    After a kill between the two of a server the same command installs what is missing.

    Adversary: whoever passes the files on. The CA's certificate in them must have the fingerprint
    of the profile, which the operator compared.

    Raises:
        ConfigError: a file is not the answer to a request that was made here, or there are kits
            already.
        StateError: FLARE could not build one.
    """
    kinds = {_kind_of(home, file): file for file in signed}
    targets = {kind: home / _FOLDER[kind] for kind in kinds}
    missing = [kind for kind in kinds if not _is_installed(targets[kind], kind, kinds[kind])]
    if not missing:
        raise ConfigError(
            "there is a kit already",
            where=str(targets[next(iter(kinds))]),
            hint="remove it to install another",
        )
    with contextlib.ExitStack() as stack:
        built = {}
        for kind in missing:
            scratch = stack.enter_context(_scratch(home))
            built[kind] = _build(home, profile, kinds[kind], kind, scratch)
        for kind, kit in built.items():  # only now, when all are whole
            kit.rename(targets[kind])
    return [
        Kit(target, LEAD if kind == "admin" else name, _org(name))
        for kind, target in targets.items()
    ]


def _build(home: Path, profile: Profile, signed: Path, kind: str, scratch: Path) -> Path:
    run_flare(
        *("package", str(signed.absolute()), "-w", "ws"),
        *("--request-dir", str((home / "request" / kind).absolute())),
        f"--fingerprint={profile.fingerprint}",
        cwd=scratch,
    )
    built = list((scratch / "ws").glob("*/prod_*/*"))
    if len(built) != 1:
        raise StateError(
            f"FLARE's `package` made {len(built)} kits of {signed.name}, one was wanted",
            hint="is it of this consortium, and is nvflare the version that this package names?",
        )
    (kit,) = built
    if kind != "admin":
        lock_down(kit, kind, final=(home / _FOLDER[kind]).absolute())
    os.chmod(kit, 0o700)  # noqa: PTH101
    return kit


def _is_installed(target: Path, kind: str, signed: Path) -> bool:
    """Whether the kit in ``target`` is of this very answer: an interrupted command goes on.

    Raises:
        ConfigError: it is of another one.
    """
    if not target.exists():
        return False
    certificate = target / "startup" / ("server.crt" if kind == "server" else "client.crt")
    name = signed.name.replace(".signed.zip", ".crt")
    try:
        with zipfile.ZipFile(signed) as archive, archive.open(name) as member:
            same = member.read(65536) == read_at_once(certificate)
    except UNZIPPING:
        same = False
    if not same:
        raise ConfigError(
            "there is a kit already, of another answer",
            where=str(target),
            hint="remove it to install this one",
        )
    return True


def installed(home: Path, name: str, *, lead: bool = False) -> Kit:
    """The kit in ``home``.

    Raises:
        ConfigError: there is none, or it cannot work: its certificate expired, or it was moved.
    """
    workspace = home / ("lead" if lead else "kit")
    if not (workspace / "startup").is_dir():
        raise ConfigError(
            "no start-up kit is installed here",
            where=str(workspace),
            hint="`securefedcollm join` asks for a certificate, and installs the answer",
        )
    require_valid(workspace)
    require_in_place(workspace)
    return Kit(workspace.absolute(), LEAD if lead else name, _org(name))


def _kind_of(home: Path, signed: Path) -> str:
    """Which request of ours this file answers."""
    stem = signed.name.removesuffix(".signed.zip")
    for request in (home / "request").glob("*/*.request.zip"):
        if request.name.removesuffix(".request.zip") == stem and zipfile.is_zipfile(signed):
            return request.parent.name
    raise ConfigError(
        "answers no request that was made here",
        where=str(signed),
        hint=f"the requests lie in {home / 'request'}; keep the file's name as it was sent",
    )


def _org(name: str) -> str:
    return name.replace("-", "_")


def _flare_profile(name: str, host: str, port: int) -> dict[str, Any]:
    return {
        "name": name,
        "scheme": "grpc",
        "connection_security": "mtls",
        "server": {"host": host, "fed_learn_port": port},
    }


def _write_yaml(path: Path, tree: Any) -> None:
    write_durably(path, yaml.safe_dump(tree, sort_keys=False).encode())


def _fingerprint(certificate: bytes) -> str:
    digest = sha256(ssl.PEM_cert_to_DER_cert(certificate.decode()))
    return "SHA256:" + digest.hex(":").upper()


def _unsealed(path: Path, passphrase: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the CA's key cannot be read ({error.strerror})",
            where=str(path),
            hint="name the directory that `securefedcollm consortium init` made",
        ) from None
    salt, nonce = raw[:_SALT_BYTES], raw[_SALT_BYTES : _SALT_BYTES + NONCE_BYTES]
    try:
        return unseal(
            stretch_passphrase(passphrase, salt), nonce, raw[_SALT_BYTES + NONCE_BYTES :], _LABEL
        )
    except (CryptoError, ValueError):
        raise CryptoError("the CA's key does not open", hint="wrong passphrase?") from None


def _scratch(inside: Path | None = None) -> PrivateDirectory:
    """A private directory for FLARE's command; in memory where the machine has such a place."""
    memory = Path("/dev/shm")  # noqa: S108 - a fresh private directory in it
    if inside is None:
        inside = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return PrivateDirectory(inside, ".securefedcollm-")


@contextlib.contextmanager
def _in_memory() -> Iterator[int]:
    """An open file that has no name anywhere and is gone with the processes that hold it.

    The CA's key passes to and from FLARE's command in it: a kill leaves nothing to be found.
    """
    descriptor = os.memfd_create("securefedcollm")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


_INIT: Final = """
import os, runpy, sys
from nvflare.tool.cert import cert_commands
descriptor = int(sys.argv.pop(1))
def keep(path, pem):
    os.write(descriptor, pem)
cert_commands._write_private_key = keep
runpy.run_module("nvflare.cli", run_name="__main__", alter_sys=True)
"""
"""FLARE's command, except that it writes a private key to a descriptor of ours, not to a file."""


def run_flare(*words: str, cwd: Path, key: int | None = None) -> None:
    """Run FLARE's command; its own records of requests stay out of the user's home.

    Args:
        key: a descriptor that the command inherits; ``init`` writes the CA's key there.
    """
    require_flare()
    start = ["-m", "nvflare.cli"]
    if words[:2] == ("cert", "init"):
        start = ["-c", _INIT, str(key)]
    done = subprocess.run(
        [sys.executable, *start, *words],
        cwd=cwd,
        env={**plain_environment(), "HOME": str(cwd)},
        pass_fds=() if key is None else (key,),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise StateError(
            f"FLARE's `{' '.join(words[:2])}` failed: {said[0][:200]}",
            hint="is the file whole, and of this consortium?",
        )
