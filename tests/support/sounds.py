"""Tiny random classifiers of recordings, files of samples, and studies that tune them."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from securefedcollm.study import Study
from securefedcollm.tuning.audio_processor import AudioProcessor
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.sounds import LEAST, RATE, pack, question_of
from tests.support.signals import LABELS, NAMED, tiny_signal_study

SECONDS: Final = LEAST / RATE
BINS: Final = 8
SHAPE: Final = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
WAVES: Final = {
    "conv_dim": (8, 8),
    "conv_kernel": (40, 20),
    "conv_stride": (20, 20),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "layerdrop": 0.5,
    "mask_time_prob": 0.5,
    "mask_time_length": 2,
    "vocab_size": 9,
}
SPECTRA: Final = {
    "num_mel_bins": BINS,
    "max_length": 8,
    "patch_size": 4,
    "frequency_stride": 4,
    "time_stride": 4,
}
WHISPER: Final = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 1,
    "decoder_ffn_dim": 8,
    "vocab_size": 9,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_mel_bins": BINS,
    "max_source_positions": 50,
    "classifier_proj_size": 12,
    "init_std": 0.3,
    "encoder_layerdrop": 0.5,
}
FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "Wav2Vec2": lambda: Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**SHAPE, **WAVES, **NAMED)
    ),
    "HuBERT": lambda: HubertForSequenceClassification(HubertConfig(**SHAPE, **WAVES, **NAMED)),
    "AST": lambda: ASTForAudioClassification(ASTConfig(**SHAPE, **SPECTRA, **NAMED)),
    "Whisper": lambda: WhisperForAudioClassification(WhisperConfig(**WHISPER, **NAMED)),
}
HEADLESS: Final[dict[str, Callable[[], Any]]] = {
    "Wav2Vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SHAPE, **WAVES)),
    "AST": lambda: ASTModel(ASTConfig(**SHAPE, **SPECTRA)),
    "Whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
}
PROCESSORS: Final = {
    "Wav2Vec2": AudioProcessor("samples"),
    "HuBERT": AudioProcessor("samples", normal=False),
    "AST": AudioProcessor("kaldi", True, BINS, 8, -4.0, 2.0),
    "Whisper": AudioProcessor("whisper", False, BINS, 100),
}


def saved(directory: Path, family: str, make: Callable[[], Any], seed: int = 0) -> Path:
    """A random model of that kind, as a directory that ``path:`` reads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    model.save_pretrained(directory)
    PROCESSORS[family].save_pretrained(directory)
    return directory


def spoken(seed: int, count: int = LEAST) -> np.ndarray:
    """Samples of noise."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(count) * 6000).clip(-32000, 32000).astype(np.int16)


def noise(count: int, seed: int = 0, labels: tuple[str, ...] = LABELS) -> list[Question]:
    """Recordings of noise of different lengths with labels in turn."""
    return [
        question_of(pack(spoken(1000 * seed + i, LEAST + 97 * (i % 3))), labels, i % len(labels))
        for i in range(count)
    ]


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2) -> bytes:
    """A WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WAV file of chunks of one's own."""
    body = b"".join(name + struct.pack("<I", len(part)) + part for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def tiny_study(directory: Path, **changes: Any) -> Study:
    """The built-in wards on two tiny random Wav2Vec2 in ``directory``, with joint noise."""
    if not (directory / "slm").exists():
        for name, width in (("slm", 16), ("llm", 24)):
            config = Wav2Vec2Config(**{**SHAPE, "hidden_size": width}, **WAVES)
            saved(directory / name, "Wav2Vec2", lambda config=config: Wav2Vec2Model(config))
    task = {
        "kind": "audio_classification",
        "labels": ["yes", "no", "stop", "help", "pain", "water", "nurse", "light"],
        "max_seconds": 0.3,
    }
    return tiny_signal_study(task, "wards", **changes)
