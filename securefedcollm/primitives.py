"""Cryptographic primitives: the only module that imports ``cryptography``.

Thin, typed wrappers that make the safe call the short one: every key derivation takes a salt and an
``info``, every signature a context, every X25519 result is checked, every secret has a redacted
``repr``. Random bytes come through an injected :data:`RandomSource` (``os.urandom`` outside tests),
so that a protocol run can be replayed from recorded randomness.

References: X25519 RFC 7748, Ed25519 RFC 8032, HKDF RFC 5869, AES-CTR NIST SP 800-38A,
ChaCha20-Poly1305 RFC 8439, scrypt RFC 7914.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from securefedcollm.errors import CryptoError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RandomSource = Callable[[int], bytes]
"""``random(n)`` returns ``n`` unpredictable bytes; ``os.urandom`` everywhere but in vectors."""

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
AEAD_OVERHEAD: Final = 16
NONCE_BYTES: Final = 12

_FIELD: Final = 2**255 - 19
_BLOCK = 16
_CHUNK = 128 * 1024  # zero source of the keystream; stays in L2
_ZEROS: Final = bytes(_CHUNK)  # shared by every stream: a round may hold a thousand of them


def sha256(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of the concatenation of ``parts`` (32 bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256 (RFC 2104, 32 bytes): a digest that only who holds ``key`` can compute."""
    return hmac.digest(key, message, "sha256")


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of ``leaves`` (RFC 9162 §2.1.1; SHA-256, 32 bytes).

    Leaves and nodes are hashed under different prefixes, so that no node passes for a leaf.
    """
    if len(leaves) < 2:
        return sha256(b"\0", leaves[0]) if leaves else sha256()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two below the count
    return sha256(b"\1", merkle_root(leaves[:split]), merkle_root(leaves[split:]))


def equal(a: bytes, b: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(a, b)


def hkdf(secret: bytes, *, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869). ``salt`` and ``info`` are mandatory: every key is bound."""
    if not salt or not info:
        raise ValueError("hkdf needs a salt and an info")
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


class SigningKey:
    """An Ed25519 private key (RFC 8032). Its ``repr`` shows the public half only."""

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        """``seed``: 32 secret bytes."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: RandomSource = os.urandom) -> SigningKey:
        return cls(random(KEY_BYTES))

    def sign(self, context: bytes, message: bytes) -> bytes:
        """64-byte signature over ``context ‖ 0x00 ‖ message``.

        ``context`` names what kind of statement is signed, so that a signature made for one purpose
        never verifies for another.
        """
        return self._key.sign(_bound(context, message))

    def sign_statement(self, payload_type: str, payload: bytes) -> bytes:
        """64-byte signature over the DSSE v1 pre-authentication encoding, for other tools too."""
        return self._key.sign(_pae(payload_type, payload))

    def sign_note(self, text: bytes) -> bytes:
        """64-byte signature over ``text`` as it is: C2SP signed notes and cosignatures.

        Raises:
            ValueError: ``text`` could pass for a message of :meth:`sign` or :meth:`sign_statement`.
        """
        return self._key.sign(_note(text))

    def seed(self) -> bytes:
        """The 32 secret bytes; only for storing the key encrypted."""
        return self._key.private_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()[:16]}…)"


def verify(public: bytes, context: bytes, message: bytes, signature: bytes) -> None:
    """Check an Ed25519 signature made by :meth:`SigningKey.sign`.

    Raises:
        CryptoError: the key is malformed or the signature does not verify.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _bound(context, message))
    except (InvalidSignature, ValueError) as error:
        raise CryptoError("the signature does not verify") from error


def verify_statement(public: bytes, payload_type: str, payload: bytes, signature: bytes) -> None:
    """Check a signature of :meth:`SigningKey.sign_statement`.

    Raises:
        CryptoError: the key is malformed or the signature does not verify.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _pae(payload_type, payload))
    except (InvalidSignature, ValueError) as error:
        raise CryptoError("the signature does not verify") from error


def verify_note(public: bytes, text: bytes, signature: bytes) -> None:
    """Check a signature of :meth:`SigningKey.sign_note`.

    Raises:
        CryptoError: the key is malformed or the signature does not verify.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _note(text))
    except (InvalidSignature, ValueError) as error:
        raise CryptoError("the signature does not verify") from error


def _note(text: bytes) -> bytes:
    # Messages of sign() hold a NUL byte, DSSE's begin with its name: no note is either.
    if not text.endswith(b"\n") or b"\0" in text or text.startswith(b"DSSEv1 "):
        raise ValueError("a note is text that ends in a newline")
    return text


def _pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1: "DSSEv1" SP len SP type SP len SP payload. Never begins like :func:`_bound`."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _bound(context: bytes, message: bytes) -> bytes:
    if not context or b"\0" in context:
        raise ValueError("a signature context is non-empty and has no NUL byte")
    return context + b"\0" + message


def well_spelled(public: bytes) -> bool:
    """Whether these are the bytes that :class:`AgreementKey` writes for an X25519 public key.

    Adversary: a silo that repeats another's key. RFC 7748 ignores the top bit and takes numbers
    beyond 2^255 - 19, so one key has several spellings, and "no key twice" compares bytes.
    """
    return len(public) == KEY_BYTES and int.from_bytes(public, "little") < _FIELD


class AgreementKey:
    """An X25519 private key (RFC 7748), fresh for every round. Its ``repr`` is redacted."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def agree(self, peer_public: bytes) -> bytes:
        """The 32-byte shared point. Feed it to :func:`hkdf`; it is not a key.

        Raises:
            CryptoError: ``peer_public`` is not :func:`well_spelled`, or of small order (all-zero
                result), with which a malicious relay would fix the secret.
        """
        try:
            if not well_spelled(peer_public):
                raise ValueError("a second spelling of another key")
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError as error:
            raise CryptoError("the X25519 public key is malformed or of small order") from error

    def __repr__(self) -> str:
        return f"AgreementKey(public={self.public.hex()[:16]}…)"


def seal(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439). ``(key, nonce)`` must never repeat; 16 bytes longer."""
    return ChaCha20Poly1305(key).encrypt(nonce, plaintext, associated)


def unseal(key: bytes, nonce: bytes, ciphertext: bytes, associated: bytes) -> bytes:
    """Open what :func:`seal` made.

    Raises:
        CryptoError: the ciphertext, key, nonce or associated data is not what was sealed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, associated)
    except InvalidTag as error:
        raise CryptoError("the sealed box does not open") from error


def stretch_passphrase(passphrase: str, salt: bytes) -> bytes:
    """scrypt (RFC 7914; N=2^16, r=8, p=1: 64 MiB): a 32-byte key from a passphrase."""
    kdf = Scrypt(salt=salt, length=KEY_BYTES, n=2**16, r=8, p=1)
    return kdf.derive(passphrase.encode())


class Keystream:
    """The AES-256-CTR keystream of one key, seekable, written into caller-owned buffers.

    Each 32-byte key is used for one stream only, so the initial counter block is the block index:
    big-endian, 128 bit, from zero (SP 800-38A §6.5).
    """

    __slots__ = ("_context",)

    def __init__(self, key: bytes, *, offset: int = 0) -> None:
        """``offset``: bytes to skip; a multiple of 16."""
        if len(key) != KEY_BYTES:
            raise ValueError("an AES-256 key has 32 bytes")
        if offset % _BLOCK:
            raise ValueError("seek in whole 16-byte blocks")
        counter = (offset // _BLOCK).to_bytes(_BLOCK, "big")
        self._context = Cipher(AES256(key), CTR(counter)).encryptor()

    def into(self, buffer: memoryview) -> None:
        """Overwrite ``buffer`` (writable, bytes, contiguous) with the next keystream bytes."""
        view = buffer.cast("B")
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            self._context.update_into(memoryview(_ZEROS)[: len(part)], part)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next ``count`` keystream words, little-endian, as uint64 [count]."""
        import numpy as np  # here, so that commands that need no arrays start without it

        out = np.empty(count, dtype="<u8")
        self.into(out.data)
        return out.astype(np.uint64, copy=False)

    def __repr__(self) -> str:
        return "Keystream(<redacted>)"


def certificate_validity(pem: bytes) -> tuple[float, float]:
    """From when until when an X.509 certificate is valid, seconds since the epoch.

    Raises:
        CryptoError: it is none.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
        return found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    except ValueError as error:
        raise CryptoError(f"not a certificate ({error})") from None
