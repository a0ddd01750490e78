"""Recordings as records: read within bounds, identified by what is heard.

A recording is held as plain samples (:func:`pack`): one channel, 16 bits, 16,000 samples a second.
A file of another kind is refused, never converted: two programs would make different samples of it.
Its identity is a digest of its samples, so that it stays the same record under another file name,
in FLAC, or with other metadata. A recording that was cut, resampled, scaled or compressed with loss
is another record.

Adversary: whoever made the file. Its size and duration are bounded before anything is unfolded. An
error tells the rate, channels and bits that a file states, and nothing of its samples.
"""

from __future__ import annotations

import hashlib
import io
import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.question import Question

Samples = npt.NDArray[np.int16]
"""[T], :data:`RATE` a second."""

RATE: Final = 16_000
LEAST: Final = RATE // 10
"""Samples of a recording: the first layers of some models see no less."""
MOST_SECONDS: Final = 60
MOST: Final = RATE * MOST_SECONDS
MOST_BYTES: Final = 4 << 20
"""Of a file: twice what the samples need."""
FULL_SCALE: Final = 32767
_PLAIN: Final = b"\x93securefedcollm/samples/v1\0"
_SILENT: Final = 33  # peak: 60 dB below full scale
_CLIPPED: Final = 0.01  # of the samples, at either end of the scale
_MOST_PARTS: Final = 1000
_PCM: Final = 1
_EXTENSIBLE: Final = 0xFFFE
_PCM_GUID: Final = bytes.fromhex("0100000000001000800000aa00389b71")
_FORMAT: Final = struct.Struct("<HHIIHH")


def is_sound(signal: bytes) -> bool:
    """Whether a record's signal is packed samples."""
    return signal.startswith(_PLAIN)


def pack(samples: Samples) -> bytes:
    """Samples as the bytes that :func:`unfold` reads."""
    return _PLAIN + np.ascontiguousarray(samples, dtype="<i2").tobytes()


def unfold(sound: bytes) -> Samples:
    """The samples of a packed recording."""
    return np.frombuffer(memoryview(sound)[len(_PLAIN) :], dtype="<i2").astype(np.int16, copy=False)


def digest_of(sound: bytes) -> bytes:
    """SHA-256 (32 bytes) of a recording's samples."""
    found = hashlib.sha256(b"securefedcollm/sound/v1\0")
    found.update(memoryview(sound)[len(_PLAIN) :])
    return found.digest()


def name_of(digest: bytes) -> str:
    """What stands for a recording where a text's words stand: equal for equal recordings."""
    return f"audio {digest.hex()}"


def question_of(
    sound: bytes, choices: tuple[str, ...], answer: int | None, **more: Any
) -> Question:
    """A recording as a question whose choices are the classes; ``more``: other fields."""
    digest = digest_of(sound)
    return Question(name_of(digest), choices, answer, content=digest, signal=sound, **more)


def noise_like(sound: bytes, seed: int) -> bytes:
    """A packed recording of that length in which nothing can be understood."""
    drawn = np.random.default_rng(seed).integers(
        -FULL_SCALE, FULL_SCALE, len(unfold(sound)), dtype=np.int16
    )
    return pack(drawn)


def silent(sound: bytes) -> bool:
    """Whether nothing can be heard: no sample is further than 60 dB below full scale from 0."""
    return int(np.abs(unfold(sound).astype(np.int32)).max()) < _SILENT


def clipped(sound: bytes) -> bool:
    """Whether one sample in a hundred is at an end of the scale, as of speech that is too loud."""
    return float((np.abs(unfold(sound).astype(np.int32)) >= FULL_SCALE).mean()) >= _CLIPPED


def as_array(sound: bytes) -> list[Any]:
    """The samples as a list that :func:`from_array` reads back."""
    found: list[Any] = unfold(sound).tolist()
    return found


def from_array(value: list[Any]) -> bytes:
    """A list of whole numbers of 16 bits, packed.

    Adversary: a list with one long text. An array of it would hold every number as wide as that.

    Raises:
        UnreadableError: it is none, too short or too long.
    """
    _refuse_length(len(value))
    if not all(type(one) is int for one in value):
        raise UnreadableError("is no list of whole numbers")
    if min(value) < -FULL_SCALE - 1 or max(value) > FULL_SCALE:
        raise UnreadableError("has numbers outside of -32768 to 32767")
    return pack(np.array(value, dtype=np.int16))


def from_content(content: bytes) -> bytes:
    """A WAV or FLAC file's content, as somebody else wrote it, packed.

    Raises:
        UnreadableError: it is none, or of a kind that is not read.
        ConfigError: it is FLAC, and soundfile is not installed.
    """
    if len(content) > MOST_BYTES:
        raise UnreadableError(f"is over {MOST_BYTES >> 20} MiB long")
    if content.startswith(b"fLaC"):
        return pack(_flac(content))
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise UnreadableError("is no WAV or FLAC file")
    return pack(_wave(content))


def _wave(content: bytes) -> Samples:
    """The samples of a WAV file: Microsoft and IBM, "Multimedia Programming Interface and Data
    Specifications 1.0" (1991), and its extensible form."""
    wide = about = None
    for name, part in _chunks(content):
        if name == b"fmt ":
            if about is not None:
                raise UnreadableError("says twice what its samples are")
            about, wide = part, _bytes_of_a_sample(part)
        elif name == b"data":
            if wide is None:
                raise UnreadableError("does not say what its samples are")
            _refuse_length(len(part) // wide)
            whole = part[: len(part) // wide * wide]
            if wide == 1:  # unsigned
                return (np.frombuffer(whole, dtype=np.uint8).astype(np.int16) - 128) * np.int16(256)
            return np.frombuffer(whole, dtype="<i2").astype(np.int16)
    raise UnreadableError("holds no samples")


def _chunks(content: bytes) -> Any:
    """(name, bytes) of every part of a WAV file."""
    at = 12
    for _ in range(_MOST_PARTS):
        if at + 8 > len(content):
            return
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if at + 8 + size > len(content):
            raise UnreadableError("is shorter than it says")
        yield name, content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    raise UnreadableError(f"has over {_MOST_PARTS:,} parts")


def _bytes_of_a_sample(about: bytes) -> int:
    if len(about) < _FORMAT.size:
        raise UnreadableError("does not say what its samples are")
    tag, channels, rate, _, _, bits = _FORMAT.unpack_from(about)
    if tag == _EXTENSIBLE and about[24:40] == _PCM_GUID:
        tag = _PCM
    if tag != _PCM:
        raise UnreadableError("has samples that are no whole numbers (PCM)")
    _refuse_kind(channels, rate, bits)
    return int(bits) // 8


def _refuse_kind(channels: int, rate: int, bits: int) -> None:
    if channels != 1:
        raise UnreadableError(f"has {channels} channels")
    if rate != RATE:
        raise UnreadableError(f"has {rate:,} samples a second, and not {RATE:,}")
    if bits not in (8, 16):
        raise UnreadableError(f"has {bits} bits a sample")


def _refuse_length(samples: int) -> None:
    if samples < LEAST:
        raise UnreadableError("is shorter than a tenth of a second")
    if samples > MOST:
        raise UnreadableError(f"is longer than {MOST_SECONDS} seconds")


def _flac(content: bytes) -> Samples:
    """The samples of a FLAC file: RFC 9639."""
    module = soundfile()
    try:
        with module.SoundFile(io.BytesIO(content)) as file:
            if file.format != "FLAC":
                raise UnreadableError("is no WAV or FLAC file")
            bits = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}.get(file.subtype, 0)
            _refuse_kind(file.channels, file.samplerate, bits)
            _refuse_length(file.frames)
            found: Samples = file.read(MOST + 1, dtype="int16")
    except UnreadableError:
        raise
    except Exception as error:  # the library's own, of any kind, on broken files
        raise UnreadableError(f"cannot be decoded ({type(error).__name__})") from None
    _refuse_length(len(found))
    return found


def soundfile() -> Any:
    """The module ``soundfile``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import soundfile as module
    except ImportError:
        raise ConfigError(
            "FLAC files need the package soundfile",
            where="task.kind",
            hint="pip install 'securefedcollm[speech]', or convert them to WAV",
        ) from None
    return module
