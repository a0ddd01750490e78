"""Loading base models: from the project itself, a directory, or the Hugging Face hub.

Only safetensors weights are read, never a pickle (loading one runs whatever code it holds), and no
code that comes with a model is run. Every load ends with the digest of the weights, which a study
may pin so that nobody tunes, or distils into, another model than the one agreed upon.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import platformdirs
import torch
from torch import nn

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.tuning.recipe import Progress, silent

Dtype = Literal["float32", "bfloat16"]

PREPARED: Final = {
    "smollm2-135m": "securefedcollm model prepare smollm2",
    "smollm2-135m-18of30": "securefedcollm model prepare smollm2",
}
"""Built-in models that a command of their own puts into the cache, and that command."""

_HOSPITAL: Final[dict[str, Literal["llm", "slm"]]] = {"hospital-llm": "llm", "hospital-slm": "slm"}
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and :func:`weights_digest`."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    digest: str


def default_cache() -> Path:
    """The user's cache directory for models; nothing in it is private."""
    return Path(platformdirs.user_cache_dir("securefedcollm"))


def load_model(
    source: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    dtype: Dtype = "float32",
    base_dir: Path = Path(),
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> LoadedModel:
    """Load what a study's ``models.llm`` or ``models.slm`` names.

    Args:
        source: ``builtin:NAME``, ``path:DIR`` (a transformers directory with safetensors weights)
            or ``hub:ORG/NAME``.
        revision: the full commit hash of a hub model; mandatory there.
        sha256: refuse weights with another :func:`weights_digest` (computed in ``dtype``).
        dtype: the type that the weights are converted to.
        base_dir: what a relative DIR is relative to.
        cache_dir: where built-in models are kept; default :func:`default_cache`. Hub models stay
            in the Hugging Face cache, where other programs find them too.

    Raises:
        ConfigError: the source does not exist, is not safe to load, is not a causal language model
            or lacks weights, or its digest is not ``sha256``.
    """
    kind, _, name = source.partition(":")
    cache_dir = cache_dir or default_cache()
    match kind:
        case "builtin":
            model, tokenizer = _load_builtin(name, dtype, cache_dir, progress)
        case "path":
            model, tokenizer = _load_directory(base_dir / Path(name).expanduser(), source, dtype)
        case "hub":
            model, tokenizer = _load_hub(name, revision, source, dtype)
        case _:
            raise ConfigError(
                "is no model source",
                where=source,
                hint="builtin:NAME, path:DIRECTORY or hub:ORG/NAME",
            )
    digest = weights_digest(model)
    if sha256 is not None and digest != sha256:
        raise ConfigError(
            f"its weights have the digest {digest[:16]}…, the study pins {sha256[:16]}…",
            where=source,
            hint="get the agreed weights, or agree on these: "
            f"`securefedcollm model digest {source} --dtype {dtype}`",
        )
    return LoadedModel(model.eval(), tokenizer, digest)


def load_tokenizer(
    source: str,
    *,
    revision: str | None = None,
    base_dir: Path = Path(),
    cache_dir: Path | None = None,
) -> Any:
    """The tokenizer of a model, without its weights; arguments as of :func:`load_model`.

    Raises:
        ConfigError: it cannot be had.
    """
    from transformers import AutoTokenizer

    kind, _, name = source.partition(":")
    if kind == "builtin" and name in _HOSPITAL:
        from securefedcollm.tuning.world import make_tokenizer

        return make_tokenizer()
    place: str | Path = name
    options: dict[str, Any] = {"revision": revision}
    if kind != "hub":
        place = base_dir / Path(name).expanduser()
        if kind == "builtin":
            place = (cache_dir or default_cache()) / "models" / name
        options = {"local_files_only": True}
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # a broken file makes the library raise anything
        raise ConfigError(
            f"its tokenizer cannot be loaded ({type(error).__name__})",
            where=source,
            hint=f"run `{PREPARED[name]}` once"
            if name in PREPARED
            else "a path: model needs --data DIR; a hub model the network, once",
        ) from error


def meta_model(source: str, *, revision: str | None = None, base_dir: Path = Path()) -> Any:
    """The architecture of a model on torch's meta device; arguments as of :func:`load_model`.

    Nothing but its ``config.json`` is read (of a hub model: downloaded).

    Raises:
        ConfigError: there is no such file, or it is no causal language model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, _, name = source.partition(":")
    if kind == "builtin" and name in _HOSPITAL:
        from securefedcollm.tuning.builtin import RECIPES, architecture

        config = architecture(RECIPES[_HOSPITAL[name]])
    else:
        place: str | Path = name
        options: dict[str, Any] = {"revision": revision}
        if kind != "hub":
            place = base_dir / Path(name).expanduser()
            if kind == "builtin":
                place = default_cache() / "models" / name
            options = {"local_files_only": True}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
        except Exception as error:  # a broken file makes the library raise anything
            raise ConfigError(
                f"its config.json cannot be read ({type(error).__name__})",
                where=source,
                hint=f"run `{PREPARED[name]}` once"
                if name in PREPARED
                else "a path: model needs --data DIR; a hub model the network, once",
            ) from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ConfigError(
            f"cannot be built ({type(error).__name__})",
            where=source,
            hint="it needs the config.json of a causal language model that transformers knows",
        ) from error


def find_device(name: str) -> torch.device:
    """The device called ``name``: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …

    Raises:
        ConfigError: there is no such device, or torch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ConfigError(
            f"torch cannot compute on {name!r}",
            where="--device",
            hint=f"usable here: {', '.join(['cpu', *found])}",
        ) from None
    return device


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a transformers directory (safetensors, tokenizer, config) that ``path:`` reads.

    Written beside its final place and renamed, so that a killed process leaves no half model.

    Raises:
        StateError: the directory is not empty or cannot be written.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if directory.is_dir() and any(directory.iterdir()):
            raise StateError(
                f"{directory} is not empty", hint="choose a new directory, or remove that one"
            )
        partial.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if directory.is_dir():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise StateError(
            f"{directory} cannot be written ({error.strerror or type(error).__name__})",
            hint="choose a directory on a disk with room, where this user may write",
        ) from None


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


def _load_builtin(name: str, dtype: Dtype, cache_dir: Path, progress: Progress) -> tuple[Any, Any]:
    source = f"builtin:{name}"
    if name in _HOSPITAL:
        from securefedcollm.tuning.builtin import builtin_models

        model, tokenizer = builtin_models(_HOSPITAL[name], cache_dir=cache_dir, progress=progress)
        return model.to(getattr(torch, dtype)), tokenizer
    if name in PREPARED:
        directory = cache_dir / "models" / name
        if not directory.is_dir():
            raise ConfigError(
                "has not been prepared on this machine",
                where=source,
                hint=f"run `{PREPARED[name]}` once",
            )
        return _load_directory(directory, source, dtype)
    known = ", ".join(sorted({*_HOSPITAL, *PREPARED}))
    raise ConfigError("there is no such built-in model", where=source, hint=f"known: {known}")


def _load_directory(directory: Path, source: str, dtype: Dtype) -> tuple[Any, Any]:
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ConfigError(
                "is an adapter, not a model",
                where=source,
                hint="name the base model here and give the adapter with --adapter",
            )
        raise ConfigError(
            f"{directory} is no transformers directory (it has no config.json)",
            where=source,
            hint="give a directory written by save_pretrained; a relative one starts at --data",
        )
    if not any(directory.glob("*.safetensors")):
        # Adversary: whoever supplies the weights. Unpickling a checkpoint runs its author's code.
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in _PICKLES)
        found = f"only {pickles[0]}, which is not loaded" if pickles else "no weights"
        raise ConfigError(
            f"{directory} holds {found}",
            where=source,
            hint="convert it: save_pretrained(directory, safe_serialization=True)",
        )
    return _from_pretrained(str(directory), source, dtype, local_files_only=True)


def _load_hub(name: str, revision: str | None, source: str, dtype: Dtype) -> tuple[Any, Any]:
    # Adversary: whoever may push to that repository after the participants agreed.
    if revision is None or not _COMMIT.match(revision):
        raise ConfigError(
            "a hub model needs its full commit hash",
            where=source,
            hint="give the 40 hexadecimal digits; a branch or tag can be moved",
        )
    try:
        return _from_pretrained(name, source, dtype, revision=revision, local_files_only=True)
    except ConfigError as missing:
        if not isinstance(missing.__cause__, OSError):
            raise
    try:
        return _from_pretrained(name, source, dtype, revision=revision)
    except ConfigError as error:
        if isinstance(error.__cause__, ValueError):
            raise
        raise ConfigError(
            f"revision {revision[:12]} is not in the cache and cannot be downloaded",
            where=source,
            hint=f"connect once and run `hf download {name} --revision {revision}`, "
            "or copy the directory here and name it with path:",
        ) from error


def _from_pretrained(name: str, source: str, dtype: Dtype, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer; every failure is a ConfigError whose cause is the library's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        # A broken file makes these libraries raise anything from OSError to AttributeError.
        raise ConfigError(
            f"cannot be loaded ({type(error).__name__})",
            where=source,
            hint="it needs a causal language model with safetensors weights and a tokenizer, "
            "and none of its own code",
        ) from error
    # The library fills a missing weight with random numbers and only logs it.
    wrong = sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise ConfigError(
            f"its files lack {len(wrong)} weights, {wrong[0]} among them",
            where=source,
            hint="the download is incomplete, or the model is not a causal language model",
        )
    return model, tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off stderr, which belongs to the CLI."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
