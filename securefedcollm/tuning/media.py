"""What a record may be about that is no text: a picture or a recording, one way for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from securefedcollm.foreign import decode_json
from securefedcollm.tuning import pictures, sounds
from securefedcollm.tuning.attached import UnreadableError, read_file
from securefedcollm.tuning.question import Question


@dataclass(frozen=True)
class Medium:
    """How one kind of signal is read, known and imitated.

    ``column``: where a row has it; ``noun``: what it is; ``file``: what it may be there.
    ``content``: a file's bytes as a signal; ``array``: the same of numbers; ``as_array``: back
    again. ``digest``: what identifies it; ``name``: what stands for it in a prompt. ``empty``:
    whether nothing can be seen or heard. ``noise_like``: one of its size that means nothing, by a
    seed. ``hint``: how to mend a row.
    """

    column: str
    noun: str
    file: str
    most_bytes: int
    content: Callable[[bytes], bytes]
    array: Callable[[Any], bytes]
    as_array: Callable[[bytes], list[Any]]
    digest: Callable[[bytes], bytes]
    name: Callable[[bytes], str]
    empty: Callable[[bytes], bool]
    noise_like: Callable[[bytes, int], bytes]
    question_of: Callable[..., Question]
    hint: str

    def read(self, value: Any, folder: Path) -> bytes:
        """The signal in a row's cell.

        Args:
            folder: what a path is relative to, and must not leave.

        Raises:
            UnreadableError: it is none, or one that cannot be used.
        """
        if isinstance(value, dict):  # the Image or Audio feature of ``datasets``
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self.content(value)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of CSV
            try:
                value = decode_json(value)
            except ValueError:
                raise UnreadableError("is no list of numbers") from None
        if isinstance(value, str):
            return self.content(read_file(folder, value.strip(), self.most_bytes))
        if isinstance(value, list):
            return self.array(value)
        raise UnreadableError(f"is a {type(value).__name__}, and no {self.noun}")


PICTURE: Final = Medium(
    column="image",
    noun="picture",
    file="image file",
    most_bytes=pictures.MOST_BYTES,
    content=pictures.from_content,
    array=pictures.from_array,
    as_array=pictures.as_array,
    digest=lambda picture: pictures.pixel_digest(pictures.unfold(picture)),
    name=pictures.name_of,
    empty=lambda picture: pictures.constant(pictures.unfold(picture)),
    noise_like=pictures.noise_like,
    question_of=pictures.question_of,
    hint=f"give a PNG, JPEG, WebP, BMP or TIFF file of one frame, at most "
    f"{pictures.MOST_BYTES >> 20} MiB and {pictures.MOST_PIXELS // 1_000_000} million pixels, "
    "beside the data file or in a folder there; or rows of whole numbers from 0 to 255",
)
SOUND: Final = Medium(
    column="audio",
    noun="recording",
    file="WAV or FLAC file",
    most_bytes=sounds.MOST_BYTES,
    content=sounds.from_content,
    array=sounds.from_array,
    as_array=sounds.as_array,
    digest=sounds.digest_of,
    name=sounds.name_of,
    empty=sounds.silent,
    noise_like=sounds.noise_like,
    question_of=sounds.question_of,
    hint=f"give a WAV or FLAC file of one channel, 16 bits and {sounds.RATE:,} samples a second "
    f"(ffmpeg -i FILE -ac 1 -ar {sounds.RATE} -c:a pcm_s16le FILE.wav), of a tenth of a second "
    f"to {sounds.MOST_SECONDS} seconds, beside the data file or in a folder there; or a list of "
    "whole numbers from -32768 to 32767",
)
MEDIA: Final[dict[str, Medium]] = {"image_classification": PICTURE, "audio_classification": SOUND}
"""By kind of task."""


def medium_of(signal: bytes) -> Medium:
    """Of a record's signal."""
    return SOUND if sounds.is_sound(signal) else PICTURE
