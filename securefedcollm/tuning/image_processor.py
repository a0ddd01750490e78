"""From a picture to a model's input: size, colours, scale, as the model was trained.

It takes the place of a tokenizer: it comes with the model, and the model's digest covers it. It is
written here, with Pillow for the resizing, and not taken from ``transformers``, because there the
result depends on which of two libraries is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.tuning.pictures import Pixels, pillow, unfold
from securefedcollm.tuning.processor_file import FILE, LARGEST, asks, processor_in_file
from securefedcollm.tuning.signals import Signal

_LUMA: Final = (19595, 38470, 7471)  # of 65536: ITU-R 601, as Pillow has it
_SHORTEST: Final = ("CLIP",)
"""Kinds of processor for which a single number is the length of the shorter side."""
_SQUARE: Final = ("VIT", "DEIT", "BEIT")
"""Kinds for which it is both sides."""
_STEPS: Final = frozenset({"resize", "center_crop", "rescale", "normalize", "convert_rgb"})
"""What a file may ask for with ``do_…``."""
_FILTERS: Final = range(6)
_MOST_SIDE: Final = 2048


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures become the input of one model.

    ``height``, ``width``, ``channels``: of the input. ``resize``: the size before a crop, or one
    number, the length of the shorter side; None: pictures must have the size already.
    ``resample``: Pillow's number of the filter. A byte b becomes (b · ``factor`` − mean) / std.
    """

    height: int
    width: int
    channels: int
    resize: tuple[int, ...] | None
    resample: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    chat_template: None = None

    def __call__(self, pictures: Sequence[bytes]) -> Signal:
        """The inputs made of some pictures, each for itself.

        Raises:
            UnreadableError: one is broken.
            ConfigError: one has to be resized, and Pillow is not installed.
        """
        values = np.stack([self._fitted(unfold(picture)) for picture in pictures])
        std = torch.tensor(self.std).view(-1, 1, 1)
        return Signal(
            values=torch.from_numpy(values),
            scale=self.factor / std,
            shift=-torch.tensor(self.mean).view(-1, 1, 1) / std,
            along=(1, 2),
        )

    def _fitted(self, pixels: Pixels) -> npt.NDArray[np.uint8]:
        """uint8 [channels, height, width]."""
        pixels = _coloured(pixels, self.channels)
        if self.resize is not None:
            pixels = _resized(pixels, self._target(pixels), self.resample)
        pixels = _cropped(pixels, self.height, self.width)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _target(self, pixels: Pixels) -> tuple[int, int]:
        assert self.resize is not None
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        height, width, _ = pixels.shape
        short = self.resize[0]
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short

    def settings(self) -> dict[str, Any]:
        """All that the input follows from, for the model's digest."""
        return {"class": type(self).__name__, **asdict(self)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a file that :func:`processor_of`, and ``transformers``, read."""
        size = self.resize or (self.height, self.width)
        plain = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": self.resize is not None,
            "size": {"height": size[0], "width": size[1]}
            if len(size) == 2
            else {"shortest_edge": size[0]},
            "do_center_crop": True,
            "crop_size": {"height": self.height, "width": self.width},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (Path(directory) / FILE).write_text(json.dumps(plain, indent=2) + "\n")


def _coloured(pixels: Pixels, channels: int) -> Pixels:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    red, green, blue = (pixels[..., i].astype(np.uint32) for i in range(3))
    grey = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + (1 << 15)) >> 16
    return grey.astype(np.uint8)[..., None]


def _resized(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    if pixels.shape[:2] == size:
        return pixels
    image = pillow().fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    found = np.asarray(image.resize((size[1], size[0]), resample=resample), dtype=np.uint8)
    return found if found.ndim == 3 else found[..., None]


def _cropped(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle; black where the picture is too small."""
    out = np.zeros((height, width, pixels.shape[2]), dtype=np.uint8)
    down, right = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    part = pixels[max(down, 0) : max(down, 0) + height, max(right, 0) : max(right, 0) + width]
    top, left = max(-down, 0), max(-right, 0)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def processor_of(name: str, config: Any, source: str, **options: Any) -> ImageProcessor:
    """The processor that comes with a model.

    Args:
        name: directory or repository; ``options``: as ``from_pretrained`` takes them.
        config: of the model's vision part.

    Raises:
        ConfigError: there is none, or it does what is not known here.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    return processor_in_file(
        lambda: ImageProcessingMixin.get_image_processor_dict(name, **options),
        lambda found: read_settings(found, config),
        source=source,
        scaled="pictures",
        hint="give size, image_mean and image_std in the form that ViT or CLIP have them",
    )


def read_settings(found: Mapping[str, Any], config: Any) -> ImageProcessor:
    """The processor that a ``preprocessor_config.json`` describes.

    Args:
        config: of the model's vision part, for the size of its input.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it describes none.
    """
    _refuse_steps(found)
    channels = int(getattr(config, "num_channels", 3))
    height, width = _pair(config.image_size)
    resize: tuple[int, ...] | None = None
    if asks(found, "do_resize", True):
        resize = _size(found["size"], _kind(found, config))
    if asks(found, "do_center_crop", False):
        given = found.get("crop_size", config.image_size)
        crop = _size(given, _SQUARE[0])
    else:
        crop = (height, width) if resize is None else resize
    if crop != (height, width):
        raise ValueError(f"inputs of {crop} for a model of {(height, width)}")
    normal = asks(found, "do_normalize", True)
    mean = [float(v) for v in found["image_mean"]] if normal else [0.0]
    std = [float(v) for v in found["image_std"]] if normal else [1.0]
    rescale = asks(found, "do_rescale", True)
    factor = float(found.get("rescale_factor", 1 / 255)) if rescale else 1.0
    if channels not in (1, 3) or not mean or len(mean) != len(std):
        raise ValueError("number of colours, image_mean or image_std")
    if not all(abs(v) <= LARGEST for v in mean) or not 0 < factor <= LARGEST:
        raise ValueError("image_mean or rescale_factor")
    if not all(1 / LARGEST <= v <= LARGEST for v in std):
        raise ValueError("image_std")
    if (resample := int(found.get("resample", 2))) not in _FILTERS:
        raise ValueError(f"resample {resample}")
    if len(mean) not in (1, channels):
        raise ValueError(f"image_mean of {len(mean)} colours for a model of {channels}")
    return ImageProcessor(
        height=height,
        width=width,
        channels=channels,
        resize=resize,
        resample=resample,
        factor=factor,
        mean=tuple(mean * (channels // len(mean))),
        std=tuple(std * (channels // len(std))),
    )


def _refuse_steps(found: Mapping[str, Any]) -> None:
    """Adversary: nobody; a step that is left out silently makes every picture a strange one."""
    for key, value in found.items():
        known = key.removeprefix("do_") in _STEPS or not key.startswith("do_")
        if (not known or key in ("rescale_offset", "crop_pct")) and value:
            raise ValueError(key)


def _kind(found: Mapping[str, Any], config: Any) -> str:
    """The processor's name, in capitals. Files of before 2022 call it a feature extractor; without
    a name the model's decides, as in ``transformers``."""
    named = found.get("image_processor_type") or found.get("feature_extractor_type")
    return str(named or getattr(config, "model_type", "")).upper()


def _size(given: Any, kind: str) -> tuple[int, ...]:
    if isinstance(given, Mapping):
        if "shortest_edge" in given:
            return (_side(given["shortest_edge"]),)
        return _side(given["height"]), _side(given["width"])
    if kind.startswith(_SHORTEST):
        return (_side(given),)
    if not kind.startswith(_SQUARE) and not isinstance(given, Sequence):
        raise ValueError(f"size {given} without height and width")
    height, width = _pair(given)
    return _side(height), _side(width)


def _side(given: Any) -> int:
    if not 0 < int(given) <= _MOST_SIDE:
        raise ValueError(f"a side of {int(given)} pixels")
    return int(given)


def _pair(given: Any) -> tuple[int, int]:
    if isinstance(given, Sequence):
        height, width = given
        return int(height), int(width)
    return int(given), int(given)
