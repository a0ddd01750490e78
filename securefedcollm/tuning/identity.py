"""A model's identity: one digest over all that determines the function it computes.

Weights alone do not determine it. The same tensors under another activation, rotary base or
normalisation are another function; the same text under another tokenizer or chat template is
another input. So the digest has four parts, each the hash of a canonical form:

- **weights**: names, types, shapes and bytes;
- **configuration**: the model's class and its whole configuration, every default written out,
  except what differs between two copies of one model (where it lies, who saved it, type on disk);
- **tokenizer**: the serialised state of its backend, its added and special tokens, its settings;
- **chat template**.

``generation_config.json`` is left out: the study's training and scoring do not read it. What the
library makes of a file can change with its version, so participants compare digests made by the
same versions of ``transformers`` and ``tokenizers``.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.audio_processor import AudioProcessor
from securefedcollm.tuning.image_processor import ImageProcessor

Parts = dict[str, str]
"""The SHA-256 (hex) of ``weights``, ``configuration``, ``tokenizer`` and ``chat_template``."""

_INCIDENTAL: Final = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
)
"""Keys of a configuration that do not change the function. ``architectures`` and ``dtype`` are in
the digest as the class that was built and the types of the weights; ``auto_map`` is never run."""

_SETTINGS: Final = (
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "add_prefix_space",
    "chat_control_tokens",
)
"""Settings that the library's tokenizers obey in addition to the state of their backend."""

_CARRIERS: Final = frozenset(
    {
        "name_or_path",
        "is_local",
        "local_files_only",
        "backend",
        "tokenizer_class",
        "files_loaded",
        "added_tokens_decoder",
        "chat_template",
        "model_max_length",
        "processor_class",
        "auto_map",
        "verbose",
    }
)
"""Arguments of a slow tokenizer that say how it was loaded, or that are in the digest elsewhere."""


def model_digest(parts: Parts) -> str:
    """SHA-256 (hex) over :func:`model_parts`: what ``models.*.sha256`` and round headers name."""
    return hashlib.sha256(b"securefedcollm/model/v2\0" + _canonical(parts)).hexdigest()


def check_pin(parts: Parts, pinned: str, source: str, words: list[str]) -> None:
    """Refuse a model with another digest than the one that a study pins.

    Adversary: whoever hands a participant other files than the study was signed for.

    Args:
        words: that ``model digest`` needs to print this model's.

    Raises:
        ConfigError: it is another one.
    """
    digest, command = model_digest(parts), shlex.join(["securefedcollm", "model", "digest", *words])
    if digest == pinned:
        return
    if parts["weights"] == pinned:
        # Not accepted silently: that pin does not cover configuration, tokenizer and chat template.
        raise ConfigError(
            "the study pins the digest of the weights alone, as older versions did; a pin now "
            "covers configuration, tokenizer and chat template too",
            where=source,
            hint=f"agree on sha256: {digest} (`{command}` prints it), and sign the study again",
        )
    raise ConfigError(
        f"it has the digest {digest[:16]}…, the study pins {pinned[:16]}…",
        where=source,
        hint="get the agreed files (weights, config.json, tokenizer, chat template), or agree on "
        f"these: `{command}`; with --json it prints the digest of each part, to compare",
    )


def model_parts(model: Any, tokenizer: Any, source: str = "the tokenizer") -> Parts:
    """The digests of the four parts of a model as it was loaded (before PEFT, in its final dtype).

    Adversary: whoever hands participants the files. A silo with other files than the rest has
    another digest, so the others' headers and a pin refuse it.

    Raises:
        ConfigError: the tokenizer cannot be written down; ``source`` names the model.
    """
    return {
        "weights": weights_digest(model),
        "configuration": _digest([type(model).__name__, _configuration(model.config)]),
        "tokenizer": _digest(_tokenizer(tokenizer, source)),
        "chat_template": _digest(getattr(tokenizer, "chat_template", None)),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex) over every weight's name, type, shape and bytes, in the order of the names.

    Weights that share storage (tied embeddings) count once, under the name that sorts first, so
    that it does not matter how a file spells the tie. Sharding and file order do not matter either.
    """
    digest = hashlib.sha256(b"securefedcollm/weights/v1\0")
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        weight = tensor.detach().cpu().contiguous()
        label = json.dumps([name, str(weight.dtype), list(weight.shape)])
        digest.update(label.encode() + b"\0")
        digest.update(memoryview(weight.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _configuration(config: Any) -> dict[str, Any]:
    """The configuration as JSON values, with those of its parts (a language model's text part)."""
    from transformers import PreTrainedConfig

    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for key in tree:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            tree[key] = _configuration(part)
    return {key: value for key, value in tree.items() if key not in _INCIDENTAL}


def _tokenizer(tokenizer: Any, source: str) -> dict[str, Any]:
    if isinstance(tokenizer, ImageProcessor | AudioProcessor):
        return tokenizer.settings()
    state = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "extra": sorted(str(token) for token in getattr(tokenizer, "extra_special_tokens", ())),
        "settings": {name: getattr(tokenizer, name, None) for name in _SETTINGS},
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Every call sets these two anew, and leaves its own behind.
        return state | {"backend": backend | {"truncation": None, "padding": None}}
    return state | _slow(tokenizer, source)


def _slow(tokenizer: Any, source: str) -> dict[str, Any]:
    """A tokenizer without a backend: its vocabulary's files, what was added, and its arguments."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_vocabulary(scratch)
            files = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in Path(scratch).iterdir()
            }
    except Exception as error:  # a class of the library may not implement it
        raise ConfigError(
            f"its tokenizer cannot be written down ({type(error).__name__})",
            where=source,
            hint="use a model whose tokenizer has a tokenizer.json",
        ) from error
    added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    arguments = {
        key: repr(value)
        for key, value in tokenizer.init_kwargs.items()
        if not (key in _CARRIERS or key.endswith(("_file", "_token", "_tokens")))
    }
    return {
        "vocabulary": tokenizer.get_vocab(),
        "files": files,
        "added": added,
        "arguments": arguments,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    """One spelling of a JSON value: keys sorted, nothing but ASCII, shortest numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
