"""What a coordinator signs in every request, and the order in which a silo takes requests.

A request travels behind a *header*: the coordinator's signature and the SHA-256 of the frame. The
signature binds the study, the silo, the parcel, and the frame's length and hash. So a silo knows
from the first bytes whether the server of its study sent them, and how many are to come.

Requests are ordered by session, then number. A silo begins none that is older than the newest it
has begun, across restarts; it takes only that one again, because it needs it after a restart.

Adversary: whoever holds the server's place in the carrier without its identity (who runs the FLARE
server, or has a stolen or falsely issued TLS key), and may send what it makes up or has recorded.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from securefedcollm.errors import StateError
from securefedcollm.federation.files import write_durably
from securefedcollm.primitives import SIGNATURE_BYTES, SigningKey, sha256, verify

SESSION_BYTES: Final = 16
HEADER_BYTES: Final = SIGNATURE_BYTES + 32

_REQUEST: Final = b"securefedcollm/request/v2"
_encode = msgspec.msgpack.Encoder().encode


class Parcel(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Names one request: the coordinator's session (16 bytes), and its number in it."""

    session: bytes
    number: int


def sign_request(key: SigningKey, study: bytes, silo: str, parcel: Parcel, frame: bytes) -> bytes:
    """The header (96 bytes) behind which ``frame`` travels.

    Args:
        study: its 32-byte digest.
    """
    digest = sha256(frame)
    return key.sign(_REQUEST, _statement(study, silo, parcel, len(frame), digest)) + digest


def check_header(
    server: bytes, study: bytes, silo: str, parcel: Parcel, length: int, header: bytes
) -> bytes:
    """The SHA-256 of the frame of ``length`` bytes that follows ``header``.

    Raises:
        CryptoError: the server of the study, whose public key is ``server``, did not sign it.
    """
    signature, digest = header[:SIGNATURE_BYTES], header[SIGNATURE_BYTES:]
    verify(server, _REQUEST, _statement(study, silo, parcel, length, digest), signature)
    return digest


def _statement(study: bytes, silo: str, parcel: Parcel, length: int, digest: bytes) -> bytes:
    return _encode([study, silo, parcel.session, parcel.number, length, digest])


def new_session(memory: Path | None = None) -> bytes:
    """A session (16 bytes) that sorts after all earlier ones of the same server.

    Its first eight bytes ascend, the rest are random. They are the clock's milliseconds, or one
    more than the last where the clock was set back: so silos follow a server whose home was
    restored, and one whose clock is wrong.

    Args:
        memory: a file that keeps the last one.

    Raises:
        StateError: it cannot be written.
    """
    count = time.time_ns() // 1_000_000
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: then the clock alone
            count = max(count, int(memory.read_text()[:15]) + 1)
        write_durably(memory, str(count).encode())
    return count.to_bytes(8, "big") + os.urandom(SESSION_BYTES - 8)


class Followed:
    """The newest request that a silo has begun. Durable."""

    def __init__(self, path: Path) -> None:
        """Raises: StateError, if ``path`` is there and cannot be read."""
        self._path = path
        self.newest = Parcel(b"", -1)
        try:
            self.newest = msgspec.msgpack.decode(path.read_bytes(), type=Parcel)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            raise StateError(
                f"{path}: cannot be read ({error})",
                hint="remove it if it is damaged: an old request may then be taken once more",
            ) from None

    def begin(self, parcel: Parcel) -> None:
        """Note that ``parcel`` is about to be worked out.

        Raises:
            StateError: it cannot be written; the caller must not work anything out.
        """
        if parcel > self.newest:
            write_durably(self._path, _encode(parcel))
            self.newest = parcel
