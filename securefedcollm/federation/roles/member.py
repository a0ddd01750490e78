"""A participant that takes part in a signed study: who it is, and where its requests arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from securefedcollm.aggregation import Authority, Roster
from securefedcollm.errors import ConfigError
from securefedcollm.federation.anchors import check_ledger
from securefedcollm.federation.engines import SiloPort
from securefedcollm.federation.engines.link import SiloInbox
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.engines.requests import (
    Followed,
    Parcel,
    check_header,
    new_session,
    sign_request,
)
from securefedcollm.federation.files import alone, make_directory, write_durably
from securefedcollm.federation.plan import authority_of
from securefedcollm.primitives import SigningKey
from securefedcollm.study import Study, digest, dump_study
from securefedcollm.study.identity import open_identity, read_identity
from securefedcollm.study.signing import encode_envelope, require_signed, signatures_path

IDENTITY: Final = "identity.json"
LEDGER: Final = "ledger.sqlite"
_SESSION: Final = ".session"
_FOLLOWED: Final = ".followed"


@dataclass(frozen=True)
class Member:
    """One participant in one study, ready to take part."""

    study: Study
    name: str
    role: str
    key: SigningKey
    roster: Roster
    server: bytes
    """The server's Ed25519 public key."""
    authority: Authority | None
    """The holder of the decryption key, in a study that has one."""
    home: Path
    run: Path
    """The study's directory in ``home``."""

    @property
    def ledger(self) -> Path:
        """A silo's privacy ledger, of all its studies."""
        return self.home / LEDGER


@contextmanager
def take_part(
    study: Study, study_file: Path, home: Path, role: str, passphrase: Callable[[], str]
) -> Iterator[Member]:
    """Enter the study as the participant whose home this is, and keep others out meanwhile.

    The lock is the operating system's and ends with the process, so that a killed one leaves none.

    Raises:
        ConfigError: not signed by everybody, not on the roster in this role, or already running.
        CryptoError: a signature or the passphrase is wrong.
        StateError: a silo's privacy ledger is older than its own evidence.
    """
    envelope = require_signed(study, signatures_path(study_file))
    file = read_identity(home / IDENTITY)
    listed = {p.name: p for p in study.roster}
    me = listed.get(file.name)
    if me is None or me.key != file.public or me.role != role:
        raise ConfigError(
            f"{file.name} is not on this study's roster as {role} with this key",
            where=str(study_file),
            hint=f"`securefedcollm identity show {home / IDENTITY}` prints the line it needs",
        )
    key = open_identity(file, passphrase() if file.encrypted else None)
    server = next((p for p in study.roster if p.role == "server"), None)
    if server is None:
        raise ConfigError(
            "the study names no server", where="roster", hint="add a participant of role: server"
        )
    home.chmod(0o700)
    run = make_directory(run_in(home, study))
    what, hint = (
        "another process is running this study here",
        "stop it first; one home, one process",
    )
    with alone(run, what, hint):
        if role == "silo":
            check_ledger(home, home / LEDGER, file.name)
        # Adversary: whoever may exchange the files meanwhile. We keep exactly what we checked.
        write_durably(run / "study.yaml", dump_study(study).encode())
        write_durably(signatures_path(run / "study.yaml"), encode_envelope(envelope))
        yield Member(
            study=study,
            name=file.name,
            role=role,
            key=key,
            roster=Roster(study.silo_keys),
            server=bytes.fromhex(server.key),
            authority=authority_of(study),
            home=home,
            run=run,
        )


def run_in(home: Path, study: Study) -> Path:
    """The study's directory in a participant's home."""
    return home / "studies" / f"{study.study}-{digest(study).hex()[:12]}"


def sign_for(member: Member) -> Callable[[str, Parcel, bytes], bytes]:
    """The function by which this server signs what it sends."""
    return partial(sign_request, member.key, digest(member.study))


def session_of(member: Member) -> bytes:
    """A new session of this server's, which sorts after all that it had in this study."""
    return new_session(member.run / _SESSION)


def inbox_for(member: Member, port: SiloPort, limit: int, pace: Pace | None = None) -> SiloInbox:
    """Where the requests of the study's server arrive, and nobody else's.

    Args:
        port: what answers them.
        limit: bytes of the largest.
        pace: the port's, where the time of its replies is hidden.
    """
    check = partial(check_header, member.server, digest(member.study), member.name)
    return SiloInbox(port, limit, check, Followed(member.run / _FOLLOWED), pace)
