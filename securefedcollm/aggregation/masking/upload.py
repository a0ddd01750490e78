"""The upload frame: a fixed head and the masked words, built and read without copying the words.

::

    offset  bytes
         0      8  "sfcmupl1"
         8     32  header digest
        40     32  delivery digest
        72      8  silo index, little-endian
        80     64  Ed25519 signature over header, index, delivery and the digest of the words
       144    8·w  masked words, little-endian uint64

The digest of the words is SHA-256 over the SHA-256 digests of their 1 MiB pieces, so that threads
can share it.
"""

from __future__ import annotations

import io
from typing import ClassVar, Final

import numpy as np

from securefedcollm.aggregation.header import Digest, RingParameters
from securefedcollm.aggregation.masking.masks import WORD_BYTES, Words, each_part
from securefedcollm.aggregation.messages import Signed
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import sha256

MAGIC: Final = b"sfcmupl1"
HEAD_BYTES: Final = 144
_SIGNATURE_AT: Final = 80
_PIECE_WORDS: Final = 1 << 17  # 1 MiB


class Upload(Signed, frozen=True, tag="upload"):
    """The content that an upload's signature covers; never encoded as msgpack.

    Args:
        delivery: 32-byte digest that fixes whose masks are in the words.
        words: 32-byte digest of the masked words.
    """

    CONTEXT: ClassVar[bytes] = b"securefedcollm/v1/upload"

    delivery: Digest
    words: Digest

    def signed(self) -> bytes:
        return Signed.signed(self) + self.delivery + self.words


class UploadBuffer:
    """A frame under construction. Its ``words`` hold the silo's own vector until it is masked."""

    def __init__(self, parameters: RingParameters) -> None:
        # BytesIO hands its buffer out as bytes without a copy, once no view of it is left.
        self._buffer = io.BytesIO()
        self._buffer.seek(HEAD_BYTES + WORD_BYTES * parameters.words - 1)
        self._buffer.write(b"\0")
        self.words: Words = np.frombuffer(self._buffer.getbuffer(), dtype="<u8", offset=HEAD_BYTES)

    def finish(self, upload: Upload) -> bytes:
        """The complete frame; the buffer is empty afterwards."""
        self.words = np.empty(0, dtype="<u8")  # the buffer must have no view left
        self._buffer.seek(0)
        self._buffer.write(MAGIC + upload.header + upload.delivery)
        self._buffer.write(upload.index.to_bytes(8, "little") + upload.signature)
        frame = self._buffer.getvalue()
        self._buffer = io.BytesIO()
        return frame

    def __repr__(self) -> str:
        return "UploadBuffer(<redacted>)"


def words_digest(words: Words, threads: int = 1) -> bytes:
    """SHA-256 over the SHA-256 digests of the 1 MiB pieces of ``words`` (32 bytes)."""
    view = words.data.cast("B")
    size = _PIECE_WORDS * WORD_BYTES
    pieces = [b""] * -(-len(view) // size)

    def work(start: int, stop: int) -> None:
        for piece in range(-(-start // _PIECE_WORDS), -(-stop // _PIECE_WORDS)):
            pieces[piece] = sha256(view[piece * size : (piece + 1) * size])

    each_part(len(words), threads, work)
    return sha256(*pieces)


def split(
    frame: bytes | memoryview, parameters: RingParameters, peer: str, threads: int = 1
) -> tuple[Upload, Words]:
    """Read a frame; the words are a view of it.

    Raises:
        RemoteProtocolError: not an upload of exactly the agreed length.
    """
    expected = HEAD_BYTES + WORD_BYTES * parameters.words
    if len(frame) != expected or frame[: len(MAGIC)] != MAGIC:
        raise RemoteProtocolError(
            f"not an upload of {expected} bytes ({len(frame)} bytes)",
            peer=peer,
            hint="the vector length and packing come from the study; this silo runs another one",
        )
    words = np.frombuffer(frame, dtype="<u8", offset=HEAD_BYTES)
    head = bytes(frame[:HEAD_BYTES])
    upload = Upload(
        header=head[8:40],
        delivery=head[40:72],
        index=int.from_bytes(head[72:_SIGNATURE_AT], "little"),
        words=words_digest(words, threads),
        signature=head[_SIGNATURE_AT:],
    )
    return upload, words
