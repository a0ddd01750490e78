"""What the members of a consortium send each other: its profile, and requests for certificates.

Both are public and arrive by mail. Adversary: whoever wrote or passed them on. Every field must
match a pattern before it is shown, put into a command or believed, so that none can hold an
option, a path or what moves a terminal's cursor.
"""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import yaml
from msgspec import Meta

from securefedcollm.errors import ConfigError
from securefedcollm.study.load import StrictLoader

PROFILE: Final = "consortium.yaml"
LEAD: Final = "lead@consortium.org"
"""Who submits jobs: the server's operator. FLARE wants a mail address for a name."""

UNZIPPING: Final = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""Exceptions from reading a file of a stranger's archive."""

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_FINGERPRINT: Final = re.compile(r"SHA256:[0-9A-F]{2}(:[0-9A-F]{2}){31}")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``consortium.yaml``: what every participant needs to know to ask for a certificate."""

    name: str
    host: str
    port: int
    fingerprint: str
    """SHA-256 of the CA's certificate, as FLARE writes it; compare it over another channel."""

    def check(self, where: str, *, issued: bool = True) -> None:
        """Check every field.

        Args:
            issued: there is a CA already, and so its fingerprint.

        Raises:
            ConfigError: naming the field.
        """
        check_name(self.name, where)
        if ":" in self.host:
            raise ConfigError(
                f"{self.host[:80]!r} is an IPv6 address, and FLARE listens on IPv4 alone",
                where=where,
                hint="a name or address that leads to the server by IPv4, e.g. fl.example.org:8002",
            )
        if not _HOST.fullmatch(self.host) or not 0 < self.port < 65536:
            raise ConfigError(
                f"{self.host[:80]!r}:{self.port} is no address",
                where=where,
                hint="a host's name and a port, e.g. fl.example.org:8002",
            )
        # Adversary: who passes the profile on. With none, FLARE would take any CA's certificate.
        if issued and not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ConfigError(
                f"{self.fingerprint[:110]!r} is no fingerprint of a certificate",
                where=where,
                hint="SHA256: and 32 pairs of hexadecimal digits, as `consortium init` wrote it",
            )


def read_profile(path: Path) -> Profile:
    """Raises: ConfigError, if ``path`` is no consortium's profile."""
    try:
        with path.open("rb") as file:
            text = file.read(65536).decode("utf-8")
        tree = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a subclass of SafeLoader
        profile = msgspec.convert(tree, Profile)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(
            f"is no consortium's profile ({(str(error).splitlines() or [''])[0][:120]!a})",
            where=str(path),
            hint=f"ask for the {PROFILE} that `securefedcollm consortium init` wrote",
        ) from None
    profile.check(str(path))
    return profile


class Request(msgspec.Struct, frozen=True):
    """What a certificate request says of itself; FLARE checks that the key in it is this one."""

    project: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,63}\Z")]
    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9.@-]{1,253}\Z")]
    org: Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,63}\Z")]
    kind: Literal["site", "server", "user"]
    cert_role: Annotated[str, Meta(pattern=r"\A[a-z_-]{1,20}\Z")] | None
    public_key_sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]

    @property
    def needed(self) -> bool:
        """Whether it is one of those that ``join`` makes."""
        match self.kind:
            case "site":
                return self.cert_role is None and _NAME.fullmatch(self.name) is not None
            case "server":
                return self.cert_role is None and _HOST.fullmatch(self.name) is not None
            case "user":
                return self.cert_role == "lead" and self.name == LEAD

    @property
    def sentence(self) -> str:
        """For whoever keeps the authority."""
        what = {"site": "silo or authority", "server": "SERVER", "user": "SUBMITTER OF JOBS"}
        key = self.public_key_sha256[:16]
        return f"{self.name} ({what[self.kind]}), of {self.org}, key {key}…"


def read_request(path: Path) -> Request:
    """Read a certificate request.

    Adversary: whoever sends one under another's name, in a file with the right name.

    Raises:
        ConfigError: it is none, bears another name than its file, or asks for more than any
            participant needs.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("request.json") as member:
            request = msgspec.json.decode(member.read(65536), type=Request)
    except UNZIPPING as error:
        raise ConfigError(
            f"is no certificate request ({str(error)[:80]!a})",
            where=str(path),
            hint="`securefedcollm join` makes one",
        ) from None
    if request.name != path.name.removesuffix(".request.zip"):
        raise ConfigError(
            f"bears the name {request.name[:64]!r}",
            where=str(path),
            hint="a request's file is called NAME.request.zip; ask who sent it",
        )
    if not request.needed:
        raise ConfigError(
            f"asks for {request.kind!r} as {request.cert_role!r}",
            where=str(path),
            hint="no participant needs that; do not sign it",
        )
    return request


def check_name(name: str, where: str) -> None:
    """Raises: ConfigError, if ``name`` cannot be one in FLARE's certificates."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:80]!r} cannot be a name in certificates",
            where=where,
            hint="lower-case letters, digits and '-', e.g. hospital-a",
        )


def check_participant(name: str, role: str, profile: Profile, where: str) -> None:
    """Raises: ConfigError, if a participant of ``role`` cannot have ``name``.

    Adversary: a silo that asks for a certificate by which FLARE tells the server from others.
    """
    check_name(name, where)
    if role != "server" and name in {"server", profile.host.lower()}:
        raise ConfigError(
            f"{name!r} is the server's name in certificates",
            where=where,
            hint="a silo or an authority has another; do not sign it for one",
        )
