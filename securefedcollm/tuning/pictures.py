"""Pictures as records: read within bounds, identified by what they show.

A picture is held as bytes, either an image file as it lay there, or plain pixels (:func:`pack`),
and is unfolded when a model's input is made of it. Its identity is a digest of its pixels, so that
a picture stays the same record under another file name, in another lossless format, or with other
metadata. A picture that was compressed again with loss, cropped or resized is another record.

Adversary: whoever made the file. Its size and the picture's are bounded before anything is
unfolded, only some formats are read, and nothing of the file is quoted.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import struct
import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.question import Question

Pixels = npt.NDArray[np.uint8]
"""[H, W, C]: C is 1 for shades of grey, 3 for red, green and blue."""

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MOST_BYTES: Final = 64 << 20
MOST_PIXELS: Final = 50_000_000
"""Of one picture: 150 MB as red, green and blue."""
MOST_RATIO: Final = 50
"""Of a picture's longer side to its shorter one."""
_PLAIN: Final = b"\x93securefedcollm/pixels/v1\0"
_SIZE: Final = struct.Struct(">III")
_DEEP: Final = ("I", "F")
"""How Pillow's names of modes begin whose pixels have more than 8 bits."""
_DEEP_RAW: Final = re.compile(r";16[BLN]")
"""What its names of colours of 16 bits in a file hold; "BGR;16" is one of 16 bits a pixel."""


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "image files need the package Pillow",
            where="task.kind",
            hint="pip install 'securefedcollm[vision]'",
        ) from None
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs numbers out of broken files
    return Image


def pack(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Plain pixels, [H, W] or [H, W, C], as bytes that :func:`unfold` reads without Pillow."""
    whole = pixels if pixels.ndim == 3 else pixels[..., None]
    return _PLAIN + _SIZE.pack(*whole.shape) + np.ascontiguousarray(whole).tobytes()


def unfold(picture: bytes) -> Pixels:
    """The pixels of a picture.

    Raises:
        UnreadableError: it is broken, too large or of a kind that is not read.
    """
    if not picture.startswith(_PLAIN):
        return _decoded(picture)
    body = memoryview(picture)[len(_PLAIN) :]
    shape = _SIZE.unpack_from(body)
    return np.frombuffer(body[_SIZE.size :], dtype=np.uint8).reshape(shape)


def _decoded(content: bytes) -> Pixels:
    """The pixels of an image file, turned as its camera noted."""
    image_module = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, which is not read
            with image_module.open(io.BytesIO(content), formats=FORMATS) as image:
                _refuse(image)
                image.load()
                plain = image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB")
                turned = _upright(plain, image)
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's readers raise anything on broken files
        raise UnreadableError(f"cannot be decoded ({type(error).__name__})") from None
    pixels = np.asarray(turned, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _refuse(image: Any) -> None:
    _refuse_size(*image.size)
    if _goes_on(image):
        raise UnreadableError("has several frames")
    # What Pillow would cut down to 8 bits, as two pictures' difference may be in the lower ones.
    cut = any(_DEEP_RAW.search(str(tile[3])) for tile in image.tile)
    if cut or image.mode.startswith(_DEEP):
        raise UnreadableError("has more than 8 bits a pixel and colour")


def _goes_on(image: Any) -> bool:
    """Whether there is a second frame.

    Adversary: a file of megabytes that is a chain of frames. Counting them takes the square of
    their number, so nothing counts them.
    """
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _refuse_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadableError(f"has {width * height:,} pixels, {MOST_PIXELS:,} are the most")
    # Scaled until its shorter side fits a model, a strip would fill the memory.
    if max(width, height) > MOST_RATIO * min(width, height):
        raise UnreadableError(f"is over {MOST_RATIO} times as long as it is wide")


def _upright(plain: Any, image: Any) -> Any:
    """As ``datasets`` shows it: by the orientation in the file's metadata, if there is one."""
    from PIL import ExifTags, ImageOps

    turn = image.getexif().get(ExifTags.Base.Orientation)
    if turn in (None, 1):
        return plain
    plain.getexif()[ExifTags.Base.Orientation] = turn
    return ImageOps.exif_transpose(plain)


def pixel_digest(pixels: Pixels) -> bytes:
    """SHA-256 (32 bytes) of a picture's size and colours. Grey is red = green = blue."""
    coloured = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    found = hashlib.sha256(b"securefedcollm/picture/v1\0" + _SIZE.pack(*coloured.shape))
    found.update(np.ascontiguousarray(coloured).tobytes())
    return found.digest()


def noise_like(picture: bytes, seed: int) -> bytes:
    """A packed picture of that size and number of colours in which nothing can be seen."""
    shape = unfold(picture).shape
    return pack(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def constant(pixels: Pixels) -> bool:
    """Whether all pixels are the same, so that there is nothing to see."""
    return bool((pixels == pixels[0, 0]).all())


def name_of(digest: bytes) -> str:
    """What stands for a picture where a text's words stand: equal for equal pictures."""
    return f"image {digest.hex()}"


def question_of(
    picture: bytes, choices: tuple[str, ...], answer: int | None, **more: Any
) -> Question:
    """A picture as a question whose choices are the classes; ``more``: other fields.

    Raises:
        UnreadableError: it cannot be used.
    """
    digest = pixel_digest(unfold(picture))
    return Question(name_of(digest), choices, answer, content=digest, signal=picture, **more)


def from_content(content: bytes) -> bytes:
    """An image file's content, as somebody else wrote it: never taken for plain pixels.

    Raises:
        UnreadableError: it is none, or too long.
    """
    if len(content) > MOST_BYTES:
        raise UnreadableError(f"is over {MOST_BYTES >> 20} MiB long")
    if not content or content.startswith(_PLAIN):
        raise UnreadableError("is no image file")
    return content


def as_array(picture: bytes) -> list[Any]:
    """The pixels as nested lists that :func:`from_array` reads back: [H][W], or [H][W][3]."""
    pixels = unfold(picture)
    found: list[Any] = (pixels[..., 0] if pixels.shape[2] == 1 else pixels).tolist()
    return found


def from_array(value: Any) -> bytes:
    """Nested lists of whole numbers from 0 to 255, [H][W] or [H][W][C], packed.

    Adversary: a list with one long text. An array of it would hold every number as wide as that.

    Raises:
        UnreadableError: they are no such numbers, or form no rectangle.
    """
    if not _numbers(value, 3):
        raise UnreadableError("is no rectangle of whole numbers")
    try:
        found = np.asarray(value)
    except ValueError:
        raise UnreadableError("is no rectangle of numbers") from None
    if found.dtype.kind not in "iu" or found.ndim not in (2, 3) or not found.size:
        raise UnreadableError("is no rectangle of whole numbers")
    if found.ndim == 3 and found.shape[2] not in (1, 3):
        raise UnreadableError(f"has {found.shape[2]} colours a pixel, 1 or 3 are possible")
    if int(found.min()) < 0 or int(found.max()) > 255:
        raise UnreadableError("has numbers outside of 0 to 255")
    _refuse_size(found.shape[1], found.shape[0])
    return pack(found.astype(np.uint8))


def _numbers(value: Any, depth: int) -> bool:
    """Whether a value is a number, or lists of numbers, at most ``depth`` within each other."""
    if isinstance(value, list):
        return depth > 0 and all(_numbers(one, depth - 1) for one in value)
    return isinstance(value, int | float)
