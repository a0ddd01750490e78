"""A participant's long-lived identity: one Ed25519 key in one file, encrypted by default.

The file is JSON, mode 0600. The key is sealed with ChaCha20-Poly1305 under scrypt(passphrase); the
name and public key are its associated data, so a file cannot be relabelled.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec
import platformdirs
import rfc8785

from securefedcollm.errors import ConfigError, CryptoError, StateError
from securefedcollm.primitives import (
    KEY_BYTES,
    NONCE_BYTES,
    RandomSource,
    SigningKey,
    seal,
    stretch_passphrase,
    unseal,
)
from securefedcollm.study.config import Hex32, Name

_KIND = "securefedcollm-identity-v1"
_SALT_BYTES = 16
_MAX_BYTES = 4096
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]*(?!\n)$", max_length=256)]


class IdentityFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is on disk. ``salt`` and ``nonce`` are empty if, and only if, ``key`` is not sealed."""

    kind: str
    name: Name
    public: Hex32
    salt: Hex
    nonce: Hex
    key: Hex

    def __repr__(self) -> str:
        return f"IdentityFile(name={self.name!r}, public={self.public[:16]}…)"

    @property
    def encrypted(self) -> bool:
        return bool(self.salt)


def default_path(name: str) -> Path:
    """Where ``identity new NAME`` puts the file."""
    return Path(platformdirs.user_config_dir("securefedcollm")) / "identities" / f"{name}.json"


def create_identity(
    name: str, path: Path, passphrase: str | None, random: RandomSource = os.urandom
) -> IdentityFile:
    """Make a key and write its file (mode 0600). Never overwrites an existing file.

    Args:
        passphrase: None stores the key unencrypted: only for machines whose disk is protected.

    Raises:
        ConfigError: the name or passphrase is unusable, or the file exists.
        StateError: the file cannot be written.
    """
    if passphrase is not None and len(passphrase) < 8:
        raise ConfigError(
            "a passphrase of fewer than 8 characters protects nothing",
            where="passphrase",
            hint="several words are easy to remember",
        )
    key = SigningKey.generate(random)
    salt = nonce = b""
    stored = key.seed()
    if passphrase is not None:
        salt, nonce = random(_SALT_BYTES), random(NONCE_BYTES)
        stored = seal(
            stretch_passphrase(passphrase, salt), nonce, stored, _label(name, key.public.hex())
        )
    content = {
        "kind": _KIND,
        "name": name,
        "public": key.public.hex(),
        "salt": salt.hex(),
        "nonce": nonce.hex(),
        "key": stored.hex(),
    }
    try:
        identity = msgspec.convert(content, IdentityFile)
    except msgspec.ValidationError:
        raise ConfigError(
            f"{name!r} is no participant name",
            where="name",
            hint="lower-case letters, digits, '.', '_' and '-', e.g. hospital-a",
        ) from None
    _write_new(path, rfc8785.dumps(content) + b"\n")
    return identity


def read_identity(path: Path) -> IdentityFile:
    """Read an identity's file without opening the key.

    Raises:
        ConfigError: there is no such file, it is no identity, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()[: _MAX_BYTES + 1]
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            hint="make one with `securefedcollm identity new NAME`",
        ) from None
    # Adversary: another user of this machine. A key that they could have read is not an identity.
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"others may read it (mode {stat.S_IMODE(mode):04o})",
            where=str(path),
            hint="chmod 600 it; if anybody could have read it, make a new identity",
        )
    try:
        identity = msgspec.json.decode(content, type=IdentityFile)
        if identity.kind != _KIND:
            raise msgspec.ValidationError(f"kind is {identity.kind!r}")
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"is not an identity file ({error})", where=str(path), hint="restore it from a backup"
        ) from None
    return identity


def open_identity(identity: IdentityFile, passphrase: str | None) -> SigningKey:
    """The signing key.

    Raises:
        CryptoError: wrong passphrase, or the file was changed.
        ConfigError: the key is encrypted and no passphrase was given.
    """
    stored = bytes.fromhex(identity.key)
    if identity.encrypted:
        if passphrase is None:
            raise ConfigError(
                "the identity is encrypted",
                where=identity.name,
                hint="set SECUREFEDCOLLM_PASSPHRASE or give --passphrase-file",
            )
        try:
            stored = unseal(
                stretch_passphrase(passphrase, bytes.fromhex(identity.salt)),
                bytes.fromhex(identity.nonce),
                stored,
                _label(identity.name, identity.public),
            )
        except (CryptoError, ValueError):
            raise CryptoError(
                f"the identity {identity.name} does not open",
                hint="wrong passphrase, or the file was changed",
            ) from None
    if len(stored) != KEY_BYTES or SigningKey(stored).public.hex() != identity.public:
        raise CryptoError(
            f"the identity {identity.name} holds another key than it names",
            hint="restore the file from a backup",
        )
    return SigningKey(stored)


def _label(name: str, public: str) -> bytes:
    return rfc8785.dumps([_KIND, name, public])


def _write_new(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if not path.exists():
            raise StateError(
                f"{path}: cannot be written ({error.strerror})",
                hint="choose another place with --out",
            ) from None
        raise ConfigError(
            "an identity exists already",
            where=str(path),
            hint="an identity is never overwritten; choose another name or --out",
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink()  # half a key is no identity, and would keep the whole one from its place
        raise StateError(
            f"{path}: cannot be written ({error.strerror})", hint="free some space on its disk"
        ) from None
