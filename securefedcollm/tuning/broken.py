"""Explains why a model's directory cannot be loaded: the libraries' errors seldom do.

It runs only after a load has failed, so nothing here decides what is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from securefedcollm.foreign import printable, read_object

_POINTER: Final = b"version https://git-lfs"
_TOKENIZERS: Final = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "*.tiktoken"),
)
_AGAIN: Final = "get the directory again: the download is incomplete"
_MOST_HEADER: Final = 100_000_000  # bytes, the format's own limit


class Why(NamedTuple):
    """What is wrong, and what to do."""

    what: str
    hint: str


def why_not_loaded(directory: Path | None, error: Exception, *, tokenizer: bool) -> Why:
    """What is wrong with the model in ``directory`` (None: on the hub), which raised ``error``.

    Args:
        tokenizer: the tokenizer failed to load, not the weights.
    """
    try:
        found = next(_faults(directory, error, tokenizer), None) if directory else None
    except OSError as unreadable:
        found = Why(f"{unreadable.strerror}: {unreadable.filename}", "let this user read it")
    part = "its tokenizer: " if tokenizer else ""
    return found or Why(
        f"{part}{type(error).__name__}: {printable(error, 160)}",
        "it needs a causal language model with safetensors weights and a tokenizer, and none of "
        "its own code",
    )


def _faults(directory: Path, error: Exception, tokenizer: bool) -> Iterator[Why]:
    for file in sorted(directory.iterdir()):
        if file.is_file() and _begins(file, len(_POINTER)) == _POINTER:
            yield Why(
                f"{printable(file.name)} is a Git LFS pointer, not the file itself",
                "run `git lfs pull` in the repository it came from",
            )
    config = _json(directory / "config.json")
    kind = config.get("model_type")
    if not config:
        yield Why("its config.json is no JSON object", _AGAIN)
    if tokenizer and not any(any(directory.glob(name)) for name in _TOKENIZERS):
        yield Why(
            "its tokenizer is missing (no tokenizer.json)",
            "copy the tokenizer's files there: tokenizer.save_pretrained(directory)",
        )
    yield from _architecture(kind)
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and not tokenizer:
        method = printable(quantised.get("quant_method") or "bitsandbytes", 40)
        yield Why(
            f"its weights are quantised by {method}, which is not there or cannot be used here "
            f"({type(error).__name__})",
            "use the model's unquantised weights",
        )
    if not tokenizer:
        yield from _weights(directory)


def _architecture(kind: Any) -> Iterator[Why]:
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if known and kind not in CAUSAL:
        yield Why(f"{kind} is no causal language model", "use a decoder such as Llama or GPT-2")
    if not known:
        yield Why(
            f"transformers {__version__} does not know its architecture {printable(kind, 60)!r}",
            "use another model; code that comes with a model is never run",
        )


def _weights(directory: Path) -> Iterator[Why]:
    shards = _json(directory / "model.safetensors.index.json").get("weight_map")
    if isinstance(shards, dict):
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not (directory / Path(name).name).is_file():
                yield Why(f"{printable(name)} is missing, one of {len(names)} shards", _AGAIN)
    for file in sorted(directory.glob("*.safetensors")):
        size, needed = file.stat().st_size, _needed(file)
        if needed is None:
            yield Why(f"{printable(file.name)} is no safetensors file", _AGAIN)
        elif size != needed:
            cut = f"{printable(file.name)} has {size:,} bytes of {needed:,}: it is cut off"
            yield Why(cut if size < needed else cut.replace("cut off", "damaged"), _AGAIN)


def _needed(file: Path) -> int | None:
    """Bytes that a safetensors file should have, as its header says."""
    length = int.from_bytes(_begins(file, 8), "little")
    if length > _MOST_HEADER:
        return None
    with file.open("rb") as stream:
        stream.seek(8)
        header = stream.read(length)
    if len(header) < length:
        return 8 + length
    try:
        table = json.loads(header)
        ends = [row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"]
        return 8 + length + max(map(int, ends), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


def _begins(file: Path, count: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(count)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        return read_object(file)
    except (ValueError, FileNotFoundError):
        return {}
