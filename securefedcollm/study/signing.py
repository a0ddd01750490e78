"""Participants' Ed25519 signatures over a study's canonical form, in a DSSE envelope.

The envelope (https://github.com/secure-systems-lab/dsse, v1) is next to the study as
``STUDY.signatures.json`` and grows by one signature per participant. It is verified against the
roster inside the signed study; a key that is not on the roster proves nothing.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import msgspec
import rfc8785

from securefedcollm.errors import ConfigError, CryptoError, StateError
from securefedcollm.primitives import SigningKey, equal, verify_statement
from securefedcollm.study.config import Study

PAYLOAD_TYPE = "application/vnd.securefedcollm.study.v1+json"
_MAX_BYTES = 8 << 20  # the study and the signatures of 10,000 participants are 3.4 MB


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``keyid`` is the participant's name; ``sig`` base64."""

    keyid: str
    sig: str


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A DSSE v1 envelope."""

    payload_type: str
    payload: str
    signatures: list[Signature]


def signatures_path(study_file: Path) -> Path:
    """Path of the signatures of a study file."""
    return study_file.with_name(study_file.name + ".signatures.json")


def sign_study(study: Study, name: str, key: SigningKey, path: Path) -> Envelope:
    """Add (or renew) one participant's signature in the envelope at ``path``.

    Raises:
        ConfigError: the study has no roster, the name is not on it with this key, or the envelope
            is for another version of the study.
        StateError: the envelope cannot be written.
    """
    listed = {p.name: p.key for p in study.roster}
    if name not in listed:
        raise ConfigError(
            f"{name} is not on the roster",
            where="roster",
            hint=f"add `- {{name: {name}, role: silo, key: {key.public.hex()}}}` to the study",
        )
    if listed[name] != key.public.hex():
        raise ConfigError(
            f"the roster has another key for {name}",
            where="roster",
            hint=f"this identity's key is {key.public.hex()}",
        )
    payload = _payload(study)
    previous = read_envelope(path, study).signatures if path.exists() else []
    signature = base64.b64encode(key.sign_statement(PAYLOAD_TYPE, payload)).decode()
    signatures = [s for s in previous if s.keyid != name] + [Signature(name, signature)]
    envelope = Envelope(
        PAYLOAD_TYPE,
        base64.b64encode(payload).decode(),
        sorted(signatures, key=lambda s: s.keyid),
    )
    try:
        path.write_bytes(encode_envelope(envelope))
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written ({error.strerror})", hint="make the directory writable"
        ) from None
    return envelope


def encode_envelope(envelope: Envelope) -> bytes:
    """The envelope as the file's bytes."""
    return msgspec.json.format(msgspec.json.encode(envelope)) + b"\n"


def read_envelope(path: Path, study: Study) -> Envelope:
    """Read the envelope at ``path`` and check that it is about exactly this study.

    Raises:
        ConfigError: missing, malformed, or about another study or version of it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
        envelope = msgspec.json.decode(content, type=Envelope)
    except FileNotFoundError:
        raise ConfigError(
            "nobody has signed this study", where=str(path), hint="run `securefedcollm study sign`"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"is not a signature envelope ({error})", where=str(path), hint="ask for it again"
        ) from None
    check_envelope(envelope, study, str(path))
    return envelope


def check_envelope(envelope: Envelope, study: Study, where: str) -> None:
    """Check that an envelope's payload is exactly this study.

    Raises:
        ConfigError: naming ``where``.
    """
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
    except binascii.Error as error:
        raise ConfigError(
            f"is not a signature envelope ({error})", where=where, hint="ask for it again"
        ) from None
    if envelope.payload_type != PAYLOAD_TYPE or not equal(payload, _payload(study)):
        raise ConfigError(
            "the signatures are for another version of the study",
            where=where,
            hint="the study changed after it was signed: everybody must sign again",
        )


def verify_signatures(study: Study, envelope: Envelope) -> dict[str, bool]:
    """Participant → has signed. Every participant of the roster appears.

    Raises:
        ConfigError: the study has no roster.
        CryptoError: a signature is not that of the participant whose name it bears, or of nobody
            on the roster. Adversary: whoever passes the envelope on.
    """
    if not study.roster:
        raise ConfigError(
            "the study names no participants",
            where="roster",
            hint="list every participant's name, role and key (`securefedcollm identity show`)",
        )
    listed = {p.name: bytes.fromhex(p.key) for p in study.roster}
    signed = dict.fromkeys(listed, False)
    payload = _payload(study)
    for signature in envelope.signatures:
        if signature.keyid not in listed:
            raise CryptoError(
                f"a signature by {signature.keyid[:64]!r}, who is not on the roster",
                hint="remove it, or add the participant and let everybody sign again",
            )
        try:
            raw = base64.b64decode(signature.sig, validate=True)
            verify_statement(listed[signature.keyid], PAYLOAD_TYPE, payload, raw)
        except (CryptoError, binascii.Error):
            raise CryptoError(
                f"the signature of {signature.keyid} does not verify",
                hint="ask them to sign this very file",
            ) from None
        signed[signature.keyid] = True
    return signed


def require_signed(study: Study, path: Path) -> Envelope:
    """Refuse a study that any participant has not signed; returns the signatures.

    Raises:
        ConfigError: naming who is missing.
        CryptoError: a signature does not verify.
    """
    envelope = read_envelope(path, study)
    signed = verify_signatures(study, envelope)
    missing = [name for name, done in signed.items() if not done]
    if missing:
        raise ConfigError(
            f"not signed yet by {', '.join(missing)}",
            where=str(path),
            hint="each of them runs `securefedcollm study sign`",
        )
    return envelope


def _payload(study: Study) -> bytes:
    """RFC 8785 form of the study: what :func:`securefedcollm.study.digest` hashes."""
    return rfc8785.dumps(study.tree)
