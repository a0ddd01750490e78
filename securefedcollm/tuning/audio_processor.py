"""From a recording to a model's input: samples or a log-mel spectrogram, as the model was trained.

Takes the place of a tokenizer, as :mod:`.image_processor` does for pictures, and is written here
for the same reason: in ``transformers`` the result depends on which libraries are installed.

A recording longer than the model hears is cut at its end. A shorter one is followed by silence, up
to one length for all records. No mask says where the silence begins: a mask of the records of a
batch would couple them. So the model hears it, as those whose files have ``return_attention_mask:
false`` were trained to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.tuning.processor_file import FILE, LARGEST, asks, processor_in_file
from securefedcollm.tuning.signals import Signal
from securefedcollm.tuning.sounds import RATE, Samples, unfold

Floats = npt.NDArray[np.float32]
Wave = npt.NDArray[np.floating[Any]]
Form = Literal["samples", "kaldi", "whisper"]
_FORMS: Final[dict[str, Form]] = {
    "Wav2Vec2FeatureExtractor": "samples",
    "ASTFeatureExtractor": "kaldi",
    "WhisperFeatureExtractor": "whisper",
}
_HOP: Final = RATE // 100
_FRAME: Final = 400
_EMPHASIS: Final = 0.97
_FLOOR: Final = {"kaldi": 2.0**-23, "whisper": 1e-10}
_MOST_FRAMES: Final = 6000
_MOST_BINS: Final = 512


@dataclass(frozen=True)
class AudioProcessor:
    """How recordings become the input of one model.

    ``form``: samples, scaled to mean 0 and variance 1 where ``normal``; or logarithms of mel bands,
    ``bins`` of them in ``frames`` steps of 10 ms, as Kaldi (AST) or Whisper has them. AST's are
    scaled to (x − ``mean``) / 2 ``std`` where ``normal``. ``heard``: samples of a recording that
    count. The study says it, so the model's digest does not cover it.
    """

    form: Form
    normal: bool = True
    bins: int = 0
    frames: int = 0
    mean: float = 0.0
    std: float = 0.5
    heard: int = RATE

    chat_template: None = None

    def hearing(self, seconds: float) -> AudioProcessor:
        """The same, for a study of recordings of at most ``seconds``."""
        return replace(self, heard=round(seconds * RATE))

    def __call__(self, sounds: Sequence[bytes]) -> Signal:
        """The inputs made of some recordings, each for itself: a batch has no part in them."""
        heard = [unfold(sound)[: self.heard] for sound in sounds]
        values = np.stack([self._input(samples) for samples in heard])
        return Signal(
            torch.from_numpy(values),
            torch.ones(1),
            torch.zeros(1),
            along=(1,) if self.form == "whisper" else (0,),
            lengths=torch.tensor([self._length(samples) for samples in heard]),
        )

    def _length(self, samples: Samples) -> int:
        """Samples, or frames, of the input that hold the recording."""
        if self.form == "samples":
            return len(samples)
        # Whisper's frames are around their places, and Kaldi's begin there.
        whole = len(samples) if self.form == "whisper" else len(samples) - _FRAME + _HOP
        return min(self.frames, whole // _HOP)

    def _input(self, samples: Samples) -> Floats:
        wave: Wave = samples.astype(np.float32) / 32768
        if self.form == "samples":
            if self.normal:
                wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
            return np.pad(wave, (0, self.heard - len(wave))).astype(np.float32)
        if self.form == "whisper":
            whole = self.frames * _HOP
            wave = wave[:whole]
            wave = np.pad(np.pad(wave, (0, whole - len(wave))), _FRAME // 2, mode="reflect")
            bands = np.log10(_bands(wave, self.form, self.bins))[:-1]
            found = ((np.maximum(bands, bands.max() - 8) + 4) / 4).T
            return np.ascontiguousarray(found, dtype=np.float32)
        bands = np.log(_bands(wave, self.form, self.bins))[: self.frames]
        bands = np.pad(bands, ((0, self.frames - len(bands)), (0, 0)))
        found = (bands - self.mean) / (2 * self.std) if self.normal else bands
        return found.astype(np.float32)

    def settings(self) -> dict[str, Any]:
        """All that the input follows from but the study, for the model's digest."""
        return {"class": type(self).__name__, **asdict(self), "heard": None}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a file that :func:`processor_of`, and ``transformers``, read."""
        plain: dict[str, Any] = {
            "feature_extractor_type": next(k for k, form in _FORMS.items() if form == self.form),
            "sampling_rate": RATE,
            "padding_value": 0.0,
            "return_attention_mask": False,
            "feature_size": 1,
            "do_normalize": self.normal,
        }
        if self.form == "kaldi":
            plain |= {"num_mel_bins": self.bins, "max_length": self.frames}
            plain |= {"mean": self.mean, "std": self.std}
        if self.form == "whisper":
            del plain["do_normalize"]
            plain |= {"feature_size": self.bins, "n_fft": _FRAME, "hop_length": _HOP}
            plain |= {"chunk_length": self.frames * _HOP // RATE}
        (Path(directory) / FILE).write_text(json.dumps(plain, indent=2) + "\n")


def _bands(wave: Wave, form: Form, bins: int) -> npt.NDArray[np.float64]:
    """The power of every mel band, [frames, bins]; ``wave``: at least a frame."""
    starts = np.arange(0, len(wave) - _FRAME + 1, _HOP)
    frames = wave.astype(np.float64)[starts[:, None] + np.arange(_FRAME)]
    if form == "kaldi":
        frames = frames - frames.mean(1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        frames = frames - _EMPHASIS * before
    window, filters = _window(form), _filters(form, bins)
    spectrum = np.fft.rfft(frames * window, 2 * (len(filters) - 1), axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    return np.maximum(power @ filters, _FLOOR[form])


@cache
def _window(form: Form) -> npt.NDArray[np.float64]:
    """A Hann window: symmetric for Kaldi, periodic for Whisper."""
    return np.hanning(_FRAME) if form == "kaldi" else np.hanning(_FRAME + 1)[:-1]


@cache
def _filters(form: Form, bins: int) -> npt.NDArray[np.float64]:
    """The mel bands as sums of the spectrum's, [frequencies, bins]."""
    from transformers.audio_utils import mel_filter_bank

    own = (
        {
            "min_frequency": 20,
            "norm": None,
            "mel_scale": "kaldi",
            "triangularize_in_mel_space": True,
        }
        if form == "kaldi"
        else {"min_frequency": 0.0, "norm": "slaney", "mel_scale": "slaney"}
    )
    found: npt.NDArray[np.float64] = mel_filter_bank(
        num_frequency_bins=257 if form == "kaldi" else _FRAME // 2 + 1,
        num_mel_filters=bins,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        **own,
    )
    return found


def processor_of(name: str, config: Any, source: str, **options: Any) -> AudioProcessor:
    """The processor that comes with a model; arguments as of :func:`.image_processor.processor_of`.

    Raises:
        ConfigError: there is none, or it does what is not known here.
    """
    from transformers import FeatureExtractionMixin

    return processor_in_file(
        lambda: FeatureExtractionMixin.get_feature_extractor_dict(name, **options),
        lambda found: read_settings(found, config),
        source=source,
        scaled="recordings",
        hint="use a family that docs/speech.md lists, such as Wav2Vec2, HuBERT, AST or Whisper",
    )


def read_settings(found: Mapping[str, Any], config: Any) -> AudioProcessor:
    """The processor that a ``preprocessor_config.json`` describes.

    Args:
        config: of the model, for the size of its input.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it describes none.
    """
    by_samples = "Wav2Vec2FeatureExtractor" if hasattr(config, "conv_stride") else ""
    kind = str(found.get("feature_extractor_type", by_samples))  # older files name none
    if kind not in _FORMS:
        raise ValueError(f"feature_extractor_type {kind}")
    if int(found.get("sampling_rate", RATE)) != RATE:
        raise ValueError(f"sampling_rate {int(found['sampling_rate'])}")
    for key, harmless in (("dither", 0.0), ("padding_value", 0.0), ("n_fft", _FRAME)):
        if found.get(key, harmless) != harmless:
            raise ValueError(key)
    if found.get("hop_length", _HOP) != _HOP:
        raise ValueError("hop_length")
    if (form := _FORMS[kind]) == "samples":
        if int(found.get("feature_size", 1)) != 1:
            raise ValueError("feature_size")
        return AudioProcessor(form, asks(found, "do_normalize", True))
    if form == "whisper":
        if found.get("do_normalize"):
            raise ValueError("do_normalize")
        size = int(config.num_mel_bins), 2 * int(config.max_source_positions)
        asked = int(found.get("feature_size", 80)), int(found.get("chunk_length", 30)) * 100
        return _of_size(AudioProcessor(form, False, *asked), size)
    mean, std = float(found.get("mean", -4.2677393)), float(found.get("std", 4.5689974))
    if not abs(mean) <= LARGEST or not 1 / LARGEST <= std <= LARGEST:
        raise ValueError("mean or std")
    asked = int(found.get("num_mel_bins", 128)), int(found.get("max_length", 1024))
    made = AudioProcessor(form, asks(found, "do_normalize", True), *asked, mean, std)
    return _of_size(made, (int(config.num_mel_bins), int(config.max_length)))


def _of_size(made: AudioProcessor, size: tuple[int, int]) -> AudioProcessor:
    if (made.bins, made.frames) != size:
        raise ValueError(f"inputs of {(made.bins, made.frames)} for a model of {size}")
    if not 0 < made.frames <= _MOST_FRAMES or not 0 < made.bins <= _MOST_BINS:
        raise ValueError(f"inputs of {size}")
    return made
