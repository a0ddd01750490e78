"""Signed heads of a log: checkpoints and cosignatures as C2SP signed notes.

::

    securefedcollm/v1/3f0c…/server                          origin: study digest and participant
    42                                                      entries
    dGhlIHJvb3QgaGFzaCBvZiA0MiBlbnRyaWVzLi4uLi4=            RFC 9162 root, base64

    — securefedcollm/v1/3f0c…/server AbCd…                  the keeper's signature
    — securefedcollm/v1/3f0c…/silo-1 EfGh…                  a silo's cosignature

References: https://c2sp.org/signed-note (Ed25519, type 0x01), https://c2sp.org/tlog-checkpoint,
https://c2sp.org/tlog-cosignature (type 0x04, with the time).

Adversary: a log's keeper who shows different people different logs. A witness that cosigned one
head signs only heads that extend it, so two logs cannot both collect a quorum.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

import msgspec

from securefedcollm.errors import CryptoError, EvidenceError
from securefedcollm.primitives import SIGNATURE_BYTES, SigningKey, sha256, verify_note

_SIGNATURE: Final = b"\x01"
_COSIGNATURE: Final = b"\x04"
_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_MAX_NOTE: Final = 4 << 20
"""Characters of a note: 10,000 cosignatures take 2.5 MB."""


def origin(study: bytes, name: str) -> str:
    """The log of participant ``name`` in the study with this digest; also its key's name."""
    return f"securefedcollm/v1/{study.hex()}/{name}"


class Checkpoint(msgspec.Struct, frozen=True):
    """A parsed note. Nothing in it is verified before :meth:`verify` or :meth:`verify_cosigned`."""

    origin: str
    size: int
    root: bytes
    lines: tuple[tuple[str, bytes], ...]
    """(key name, key id ‖ signature) of every signature line."""

    @property
    def text(self) -> str:
        """The signed text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @property
    def note(self) -> str:
        """The whole note."""
        lines = (f"— {name} {base64.b64encode(blob).decode()}\n" for name, blob in self.lines)
        return self.text + "\n" + "".join(lines)

    def with_line(self, name: str, blob: bytes) -> Checkpoint:
        """With one more signature line."""
        return msgspec.structs.replace(self, lines=(*self.lines, (name, blob)))

    def verify(self, public: bytes) -> None:
        """Check the keeper's own signature.

        Raises:
            CryptoError: there is none by this key, or it does not verify.
        """
        blob = self._blob(self.origin, public, _SIGNATURE, SIGNATURE_BYTES)
        verify_note(public, self.text.encode(), blob)

    def verify_cosigned(self, name: str, public: bytes) -> int:
        """Check the cosignature of key ``name``; returns its time, seconds since the epoch.

        Raises:
            CryptoError: there is none by this key, or it does not verify.
        """
        blob = self._blob(name, public, _COSIGNATURE, _TIME_BYTES + SIGNATURE_BYTES)
        when = int.from_bytes(blob[:_TIME_BYTES], "big")
        verify_note(public, _cosigned(self.text, when), blob[_TIME_BYTES:])
        return when

    def _blob(self, name: str, public: bytes, kind: bytes, length: int) -> bytes:
        key_id = _key_id(name, kind, public)
        for signer, blob in self.lines:
            if signer == name and blob[:_ID_BYTES] == key_id and len(blob) == _ID_BYTES + length:
                return blob[_ID_BYTES:]
        raise CryptoError(f"the checkpoint has no signature by {name}")


def sign_checkpoint(key_name: str, key: SigningKey, size: int, root: bytes) -> Checkpoint:
    """The keeper's signed head: ``size`` entries with this 32-byte root."""
    bare = Checkpoint(key_name, size, root, ())
    signature = key.sign_note(bare.text.encode())
    return bare.with_line(key_name, _key_id(key_name, _SIGNATURE, key.public) + signature)


def cosign(checkpoint: Checkpoint, key_name: str, key: SigningKey, when: int) -> bytes:
    """The signature-line bytes by which a witness vouches for a head at time ``when`` (seconds)."""
    signature = key.sign_note(_cosigned(checkpoint.text, when))
    head = _key_id(key_name, _COSIGNATURE, key.public) + when.to_bytes(_TIME_BYTES, "big")
    return head + signature


def parse_checkpoint(note: str) -> Checkpoint:
    """Read a note.

    Raises:
        EvidenceError: it is not a checkpoint in its one canonical spelling.
    """
    try:
        if len(note) > _MAX_NOTE:
            raise ValueError("too long")
        text, rest = note.split("\n\n", 1)
        name, size, root = text.split("\n")
        lines = []
        for line in rest.removesuffix("\n").split("\n"):
            dash, signer, blob = line.split(" ")
            if dash != "—":
                raise ValueError("a signature line begins with a dash")
            lines.append((signer, base64.b64decode(blob, validate=True)))
        if len(size) > 18:
            raise ValueError("an impossible size")
        found = Checkpoint(name, int(size), base64.b64decode(root, validate=True), tuple(lines))
    except (ValueError, binascii.Error):
        found = None
    if found is None or len(found.root) != 32 or found.size < 0 or found.note != note:
        raise EvidenceError(
            "a checkpoint is not a well-formed signed note", hint="ask for the evidence again"
        )
    return found


def _key_id(name: str, kind: bytes, public: bytes) -> bytes:
    return sha256(name.encode(), b"\n", kind, public)[:_ID_BYTES]


def _cosigned(text: str, when: int) -> bytes:
    return f"cosignature/v1\ntime {when}\n{text}".encode()
