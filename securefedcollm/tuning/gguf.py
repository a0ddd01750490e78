"""Models from GGUF files, as llama.cpp and its users keep them: dequantised once, into safetensors.

The weights are then those of the quantised file, not of the release that it was made from.
transformers knows how an architecture's names and shapes were changed for GGUF. This module does
the rest tensor by tensor, so that memory holds one shard and never the whole model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from securefedcollm.errors import ConfigError, DataError, SecureFedCoLLMError
from securefedcollm.foreign import printable
from securefedcollm.tuning.models import Dtype, new_directory
from securefedcollm.tuning.recipe import Progress, quiet_transformers, silent

SHARD: Final = 1 << 29
"""Bytes of one safetensors file, at most, unless a single tensor is larger."""
_BLOCK: Final = 1 << 22
_ROTARY: Final = "rope_freqs.weight"
_LLAMA3: Final = ({"factor": 8.0}, {"factor": 32.0})
_LLAMA3_REST: Final = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Imported:
    """What was in a GGUF file."""

    sha256: str
    """The file's digest, 64 hexadecimal digits."""
    architecture: str
    """transformers' ``model_type``."""
    parameters: int
    quantization: str
    """The kind that most weights have, such as ``Q4_K``."""


def import_gguf(
    file: Path,
    out: Path,
    *,
    sha256: str | None = None,
    dtype: Dtype = "bfloat16",
    progress: Progress = silent,
) -> Imported:
    """Write the model in ``file`` as the directory ``out``, which ``path:`` reads.

    Args:
        file: one GGUF file with the whole model, its tokenizer among the metadata.
        sha256: refuse another file.
        dtype: type of the written weights. bfloat16 rounds a value by at most 2^-9 of itself, far
            less than quantisation to four bits has rounded it already; float32 is exact.
        progress: told of bytes read and tensors written.

    Raises:
        ConfigError: the ``gguf`` package is not installed; the architecture is not known, or needs
            something that a directory of transformers cannot express.
        DataError: it is no GGUF file, a damaged one, another than ``sha256``, or part of a model.
        StateError: ``out`` is not empty or cannot be written.
    """
    library = _library()
    from transformers import GenerationConfig

    found = _digest(file, progress)
    # Adversary: whoever hands over another file under the agreed name.
    if sha256 is not None and found != sha256.lower():
        raise DataError(
            f"has the SHA-256 {found}, not {printable(sha256)}",
            where=str(file),
            hint="get the agreed file, or agree on this one",
        )
    with quiet_transformers(), new_directory(out) as fresh, _parsing(file):
        reader = library.GGUFReader(str(file))
        _check_whole(reader, file)
        config, tokenizer = _described(file)
        _check_positions(reader, config, file)
        skeleton = _skeleton(config)
        count = _convert(reader, skeleton, getattr(torch, dtype), fresh, file, progress)
        config.architectures, config.dtype = [type(skeleton).__name__], getattr(torch, dtype)
        config.save_pretrained(fresh)
        GenerationConfig.from_model_config(config).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    return Imported(found, config.model_type, count, max(set(kinds), key=kinds.count))


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "reading GGUF needs a package that is not installed",
            where="gguf",
            hint="pip install 'securefedcollm[gguf]'",
        ) from None
    return gguf


def _digest(file: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            if (magic := opened.read(4)) != b"GGUF":
                raise DataError(
                    "is no GGUF file" + (" but a Git LFS pointer" if magic == b"vers" else ""),
                    where=str(file),
                    hint="GGUF files begin with the letters GGUF; download the file itself",
                )
            digest.update(magic)
            while block := opened.read(_BLOCK):
                digest.update(block)
                progress(opened.tell() >> 20, size >> 20, "checking the file (MB)")
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=str(file), hint="check the path"
        ) from None
    return digest.hexdigest()


@contextmanager
def _parsing(file: Path) -> Iterator[None]:
    """Adversary: whoever wrote the file. The parsers raise whatever its bytes lead them into."""
    try:
        yield
    except (SecureFedCoLLMError, OSError):
        raise
    except (ValueError, NotImplementedError) as error:
        if "not supported" not in str(error) and "Unknown gguf" not in str(error):
            raise _damaged(file, error) from None
        raise ConfigError(
            f"is of an architecture that transformers cannot read: {printable(error, 120)}",
            where=str(file),
            hint="see docs/models.md for what was tried; a newer transformers may know it",
        ) from None
    except Exception as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"is a damaged or unusual GGUF file ({type(error).__name__}: {printable(error, 120)})",
        where=str(file),
        hint="compare its SHA-256 with the publisher's, and download it again",
    )


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _check_whole(reader: Any, file: Path) -> None:
    parts = _field(reader, "split.count")
    if parts and parts > 1:
        raise DataError(
            f"is one of {parts} parts of a model",
            where=str(file),
            hint="join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    if not reader.tensors:
        raise DataError("holds no weights", where=str(file), hint="get the model's own file")
    # Adversary: whoever wrote the file. A layer costs memory before its weights are looked for.
    layers = _field(reader, f"{_field(reader, 'general.architecture')}.block_count") or 0
    if layers > len(reader.tensors):
        raise DataError(
            f"declares {layers} layers but holds {len(reader.tensors)} tensors",
            where=str(file),
            hint="get the whole model's file",
        )


def _described(file: Path) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where)
    # Left in, they would make every later load look for a GGUF file, or name its author's folder.
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    return config, AutoTokenizer.from_pretrained(**where)


def _skeleton(config: Any) -> Any:
    """The model without weights."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ConfigError(
            f"{printable(config.model_type)} is no causal language model",
            where="gguf",
            hint="encoders and speech models cannot be tuned here",
        ) from None


def _check_positions(reader: Any, config: Any, file: Path) -> None:
    """Refuse, or write down, a scaling of positions that transformers does not read from GGUF.

    Without it the model would run, slightly wrong on every text, and nobody would be told.
    """
    kind = _field(reader, f"{_field(reader, 'general.architecture')}.rope.scaling.type")
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if kind not in (None, "none", "") and parameters.get("rope_type", "default") == "default":
        raise ConfigError(
            f"scales its positions ({printable(str(kind))}), which transformers does not read from "
            "GGUF",
            where=str(file),
            hint="use the publisher's safetensors directory instead",
        )
    factors = next((t for t in reader.tensors if t.name == _ROTARY), None)
    if factors is None or np.all(factors.data == 1):
        return
    for scale in _LLAMA3:
        scaled = {**parameters, **_LLAMA3_REST, **scale}
        if np.allclose(factors.data, _llama3_factors(scaled, len(factors.data)), rtol=1e-3):
            config.rope_parameters = scaled
            return
    raise ConfigError(
        f"scales its positions by numbers of its own ({_ROTARY})",
        where=str(file),
        hint="use the publisher's safetensors directory instead",
    )


def _llama3_factors(scaled: Mapping[str, Any], count: int) -> np.ndarray[Any, Any]:
    """The divisors of frequencies that llama.cpp's converter writes for Llama 3.1 and 3.2.

    float32 [count], one for each pair of dimensions of a head.
    """
    theta, factor = float(scaled["rope_theta"]), float(scaled["factor"])
    low, high = float(scaled["low_freq_factor"]), float(scaled["high_freq_factor"])
    context = float(scaled["original_max_position_embeddings"])
    wavelength = 2 * math.pi * theta ** (np.arange(count) / count)
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(wavelength < context / high, 1.0, between)
    return np.where(wavelength > context / low, factor, found).astype(np.float32)


def _convert(
    reader: Any, skeleton: Any, dtype: torch.dtype, out: Path, file: Path, progress: Progress
) -> int:
    """Write every tensor of the skeleton from the file; returns the number of parameters."""
    wanted = {name: value.shape for name, value in skeleton.named_parameters()}
    wanted |= _kept_buffers(skeleton)
    shards = _Shards(out)
    for done, (name, weights) in enumerate(_tensors(reader, skeleton)):
        if name not in wanted:
            continue
        tensor = torch.from_numpy(np.require(weights, requirements=("C", "W")))
        if tensor.shape != (shape := wanted.pop(name)):
            raise DataError(
                f"its {printable(name)} has the shape {[*tensor.shape]}, not {[*shape]}",
                where=str(file),
                hint="the file contradicts itself: download it again",
            )
        shards.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        progress(done + 1, len(reader.tensors), "tensors")
    if wanted:
        raise DataError(
            f"lacks {len(wanted)} of the model's tensors, such as {printable(next(iter(wanted)))}",
            where=str(file),
            hint="get the whole model's file",
        )
    return shards.finish()


def _kept_buffers(skeleton: Any) -> dict[str, Any]:
    saved = skeleton.state_dict().keys()
    return {n: value.shape for n, value in skeleton.named_buffers() if n in saved}


def _tensors(reader: Any, skeleton: Any) -> Iterator[tuple[str, Any]]:
    """(transformers' name, dequantised numbers), one after the other."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = _field(reader, "general.architecture")
    gathered: dict[str, Any] = {}  # where several tensors of the file make one of the model
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
        config=skeleton.config.to_dict()
    )
    names = get_gguf_hf_weights_map(skeleton, processor)
    for tensor in reader.tensors:
        made = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": gathered},
        )
        if made.name in names:
            yield names[made.name], made.weights
    yield from ((name, value.numpy()) for name, value in gathered.items())


class _Shards:
    """Files of a few tensors each, and their index, as transformers reads them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = self._total = self.parameters = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > SHARD:
            self._flush()
        self._held[name] = tensor
        self._bytes += size
        self._total += size
        self.parameters += tensor.numel()

    def finish(self) -> int:
        """Name the files, now that their number is known; returns the number of parameters."""
        self._flush()
        count = len(self._files)
        where: dict[str, str] = {}
        for index, names in enumerate(self._files):
            final = (
                "model.safetensors"
                if count == 1
                else f"model-{index + 1:05}-of-{count:05}.safetensors"
            )
            self._path(index).rename(self._directory / final)
            where |= dict.fromkeys(names, final)
        if count > 1:
            index_file = self._directory / "model.safetensors.index.json"
            content = {"metadata": {"total_size": self._total}, "weight_map": where}
            index_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return self.parameters

    def _path(self, index: int) -> Path:
        return self._directory / f"part-{index}"

    def _flush(self) -> None:
        if self._held:
            save_file(self._held, self._path(len(self._files)), metadata={"format": "pt"})
            self._files.append([*self._held])
            self._held, self._bytes = {}, 0
