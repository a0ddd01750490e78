"""Loading base models: from the project itself, a directory, or the Hugging Face hub.

Only safetensors weights are read, never a pickle (loading one runs whatever code it holds), and no
code that comes with a model is run. Every load ends with the model's digest (``identity.py``),
which a study may pin so that nobody tunes, or distils into, any model but the agreed one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import platformdirs
import torch

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.tuning import audio_processor, image_processor
from securefedcollm.tuning.audio_processor import AudioProcessor
from securefedcollm.tuning.broken import why_not_loaded
from securefedcollm.tuning.class_models import missing_elsewhere, without_strangers
from securefedcollm.tuning.head import text_config
from securefedcollm.tuning.identity import Parts, check_pin, model_digest, model_parts
from securefedcollm.tuning.recipe import Progress, quiet_transformers, silent
from securefedcollm.tuning.sounds import RATE

Dtype = Literal["float32", "bfloat16"]
Kind = Literal["causal", "body", "image", "audio"]
"""``causal``: a causal language model. ``body``: the layers of any text model, without its output
layer and pooler. ``image``, ``audio``: a classifier of pictures or of recordings, or a model that
lacks only the class head."""

PREPARED: Final = {
    "smollm2-135m": "securefedcollm model prepare smollm2",
    "smollm2-135m-18of30": "securefedcollm model prepare smollm2",
}
"""Built-in models that a command puts into the cache, and that command."""

HOSPITAL: Final[dict[str, Literal["llm", "slm"]]] = {"hospital-llm": "llm", "hospital-slm": "slm"}
CLASSIFIERS: Final[dict[str, Kind]] = {
    "digits-large": "image",
    "digits-small": "image",
    "wards-large": "audio",
    "wards-small": "audio",
}
"""The built-in ones, and what they classify."""
_SIGNALS: Final[dict[Kind, Any]] = {
    "image": image_processor.processor_of,
    "audio": audio_processor.processor_of,
}
"""What takes the place of a tokenizer."""
_OPTIONS: Final[dict[Kind, list[str]]] = {
    "body": ["--encoder"],
    "image": ["--images"],
    "audio": ["--audio"],
}
"""Of ``model digest``."""
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model (or a body, or a classifier of signals) in evaluation mode, its
    tokenizer, and what identifies both."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase; of a classifier of signals its processor
    parts: Parts

    @property
    def digest(self) -> str:
        """:func:`~securefedcollm.tuning.identity.model_digest`, 64 hexadecimal digits."""
        return model_digest(self.parts)


def default_cache() -> Path:
    """The user's cache directory for models; nothing in it is private."""
    return Path(platformdirs.user_cache_dir("securefedcollm"))


def local_path(base_dir: Path, name: str, source: str) -> Path:
    """Where the NAME of a study's ``path:NAME`` is; a relative one begins at ``base_dir``.

    Args:
        source: names the path in errors.

    Raises:
        ConfigError: it begins with the home directory of a user who has none.
    """
    try:
        return base_dir / Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(
            "begins with `~` and a user without a home directory",
            where=source,
            hint="write the path from --data, or from /",
        ) from None


def load_model(
    source: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    dtype: Dtype = "float32",
    base_dir: Path = Path(),
    cache_dir: Path | None = None,
    progress: Progress = silent,
    part: Kind = "causal",
) -> LoadedModel:
    """Load what a study's ``models.llm``, ``models.slm`` or ``retrieval.encoder`` names.

    Args:
        source: ``builtin:NAME``, ``path:DIR`` (a transformers directory with safetensors weights)
            or ``hub:ORG/NAME``.
        revision: the full commit hash of a hub model; mandatory there.
        sha256: refuse a model with another digest (computed in ``dtype``).
        dtype: the type that the weights are converted to.
        base_dir: what a relative DIR is relative to.
        cache_dir: where built-in models are kept; default :func:`default_cache`. Hub models stay
            in the Hugging Face cache, where other programs find them too.
        part: ``body`` loads an encoder, or a causal model without its output layer. The digest is
            then the body's. ``image`` and ``audio`` load a classifier.

    Raises:
        ConfigError: the source does not exist, is not safe to load, is no model of that kind or
            lacks weights, or its digest is not ``sha256``.
    """
    kind, _, name = source.partition(":")
    cache_dir = cache_dir or default_cache()
    match kind:
        case "builtin":
            check_builtin(name, part)
            model, tokenizer = _load_builtin(name, dtype, cache_dir, progress)
        case "path":
            directory = local_path(base_dir, name, source)
            model, tokenizer = _load_directory(directory, source, dtype, part)
        case "hub":
            model, tokenizer = _load_hub(name, revision, source, dtype, part)
        case _:
            raise ConfigError(
                "is no model source",
                where=source,
                hint="builtin:NAME, path:DIRECTORY or hub:ORG/NAME",
            )
    if part == "body":
        model = _body(model)
    loaded = LoadedModel(model.eval(), tokenizer, model_parts(model, tokenizer, source))
    if sha256 is not None:
        named = f"path:{local_path(base_dir, name, source)}" if kind == "path" else source
        words = [named, "--dtype", dtype, *(["--revision", revision] if revision else [])]
        check_pin(loaded.parts, sha256, source, [*words, *_OPTIONS.get(part, [])])
    return loaded


def _body(model: Any) -> Any:
    """The layers alone. A pooler is dropped: nothing here uses it, and many files lack it."""
    body = model.base_model
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body


def load_tokenizer(
    source: str,
    *,
    revision: str | None = None,
    base_dir: Path = Path(),
    cache_dir: Path | None = None,
) -> Any:
    """The tokenizer of a model, without its weights; arguments as of :func:`load_model`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    kind, _, name = source.partition(":")
    if kind == "builtin" and name in HOSPITAL:
        from securefedcollm.tuning.world import make_tokenizer

        return make_tokenizer()
    place: str | Path = name
    options: dict[str, Any] = {"revision": revision}
    if kind != "hub":
        place = local_path(base_dir, name, source)
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


def hearing(loaded: LoadedModel, seconds: float) -> LoadedModel:
    """The model for recordings of at most ``seconds``; one that does not hear stays as it is."""
    if not isinstance(loaded.tokenizer, AudioProcessor):
        return loaded
    loaded.model.heard = round(seconds * RATE)  # of an input of samples: classifiers.input_shape
    return replace(loaded, tokenizer=loaded.tokenizer.hearing(seconds))


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


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``directory`` if all goes well.

    Filled beside its final place and renamed, so that a killed process leaves no half model.

    Raises:
        StateError: the directory is not empty or cannot be written.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if directory.is_dir() and any(directory.iterdir()):
            raise StateError(
                f"{directory} is not empty", hint="choose a new directory, or remove that one"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():  # safetensors lets nobody else read its files
            file.chmod((partial / "config.json").stat().st_mode)
        if directory.is_dir():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise StateError(
            f"{directory} cannot be written ({error.strerror or type(error).__name__})",
            hint="choose a directory on a disk with room, where this user may write",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a transformers directory (safetensors, tokenizer, config) that ``path:`` reads.

    Raises:
        StateError: the directory is not empty or cannot be written.
    """
    with new_directory(directory) as fresh, quiet_transformers():
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)


def check_builtin(name: str, part: Kind) -> None:
    """Refuse a built-in classifier for words, and the other way round."""
    its = CLASSIFIERS.get(name, "causal")
    if its == part or name not in {*CLASSIFIERS, *HOSPITAL, *PREPARED}:
        return
    if part == "body" and its == "causal":
        return
    task = {"image": "image_classification", "audio": "audio_classification"}
    what = {"image": "classifies pictures", "audio": "classifies recordings"}
    fits = [known for known, kind in CLASSIFIERS.items() if kind == part]
    raise ConfigError(
        what.get(its, "reads text, and no pictures or recordings"),
        where=f"builtin:{name}",
        hint=f"with task.kind: {task[part]} use {' or '.join(fits)}"
        if fits
        else f"set task.kind (--task) {task[its]}; `model digest` takes {_OPTIONS[its][0]}",
    )


def _load_builtin(name: str, dtype: Dtype, cache_dir: Path, progress: Progress) -> tuple[Any, Any]:
    source = f"builtin:{name}"
    if name in HOSPITAL:
        from securefedcollm.tuning.builtin import builtin_models

        model, tokenizer = builtin_models(HOSPITAL[name], cache_dir=cache_dir, progress=progress)
        return model.to(getattr(torch, dtype)), tokenizer
    if name in CLASSIFIERS:
        from securefedcollm.tuning.class_builtin import classifier

        model, processor = classifier(name, cache_dir=cache_dir, progress=progress)
        return model.to(getattr(torch, dtype)), processor
    if name in PREPARED:
        directory = cache_dir / "models" / name
        if not directory.is_dir():
            raise ConfigError(
                "has not been prepared on this machine",
                where=source,
                hint=f"run `{PREPARED[name]}` once",
            )
        return _load_directory(directory, source, dtype)
    known = ", ".join(sorted({*HOSPITAL, *PREPARED, *CLASSIFIERS}))
    raise ConfigError("there is no such built-in model", where=source, hint=f"known: {known}")


def _load_directory(
    directory: Path, source: str, dtype: Dtype, part: Kind = "causal"
) -> tuple[Any, Any]:
    try:
        _check_directory(directory, source)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be read ({error.strerror})",
            where=source,
            hint="let this user read the directory and its files (chmod, chown)",
        ) from error
    return _from_pretrained(
        str(directory), source, dtype, directory, local_files_only=True, part=part
    )


def _check_directory(directory: Path, source: str) -> None:
    """Refuse a directory without a model, or with files that must not be loaded."""
    adapter = (directory / "adapter_config.json").is_file()
    if not (directory / "config.json").is_file():
        if adapter:
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
    if adapter:
        raise _brings_adapter(source)
    if not any(directory.glob("*.safetensors")):
        # Adversary: whoever supplies the weights. Unpickling a checkpoint runs its author's code.
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in _PICKLES)
        found = f"only {pickles[0]}, which is not loaded" if pickles else "no weights"
        raise ConfigError(
            f"{directory} holds {found}",
            where=source,
            hint="convert it: save_pretrained(directory, safe_serialization=True)",
        )


def _load_hub(
    name: str, revision: str | None, source: str, dtype: Dtype, part: Kind
) -> tuple[Any, Any]:
    # Adversary: whoever may push to that repository after the participants agreed.
    if revision is None or not _COMMIT.match(revision):
        raise ConfigError(
            "a hub model needs its full commit hash",
            where=source,
            hint="give the 40 hexadecimal digits; a branch or tag can be moved",
        )
    try:
        return _from_pretrained(
            name, source, dtype, None, part=part, revision=revision, local_files_only=True
        )
    except ConfigError as missing:
        if not isinstance(missing.__cause__, OSError):
            raise
    try:
        return _from_pretrained(name, source, dtype, None, part=part, revision=revision)
    except ConfigError as error:
        if isinstance(error.__cause__, ValueError):
            raise
        raise ConfigError(
            f"revision {revision[:12]} is not in the cache and cannot be downloaded",
            where=source,
            hint=f"connect once and run `hf download {name} --revision {revision}`, "
            "or copy the directory here and name it with path:",
        ) from error


AUTO: Final[dict[Kind, str]] = {
    "causal": "AutoModelForCausalLM",
    "body": "AutoModel",
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
}


def _from_pretrained(
    name: str, source: str, dtype: Dtype, directory: Path | None, *, part: Kind, **options: Any
) -> tuple[Any, Any]:
    """Model and tokenizer; every failure is a ConfigError whose cause is the library's own."""
    import transformers

    tokenizer = None
    kind = getattr(transformers, AUTO[part])
    try:
        with quiet_transformers():
            if part not in _SIGNALS:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    name, trust_remote_code=False, **options
                )
            model, info = kind.from_pretrained(
                name,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        # A broken file makes these libraries raise anything from OSError to AttributeError.
        why = why_not_loaded(directory, error, tokenizer=tokenizer is None and part not in _SIGNALS)
        raise ConfigError(f"cannot be loaded: {why.what}", where=source, hint=why.hint) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _brings_adapter(source)
    if any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise ConfigError(
            "its weights are quantised by bitsandbytes already",
            where=source,
            hint="use the unquantised weights, and the study's key quantization",
        )
    # The library fills a missing weight with random numbers and only logs it.
    missing = set(info["missing_keys"])
    if part in _SIGNALS:
        model = without_strangers(model, missing, source)
        tokenizer = _SIGNALS[part](name, text_config(model), source, **options)
        missing = missing_elsewhere(missing)
    elif part == "body":
        missing = {key for key in missing if "pooler." not in key}
    wrong = sorted(missing) or sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise ConfigError(
            f"its files lack {len(wrong)} weights, {wrong[0]} among them",
            where=source,
            hint="the download is incomplete, or the model is of another kind than the study's",
        )
    broken = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ConfigError(
            f"its weight {broken[0]} holds values that are not finite (NaN or infinite)",
            where=source,
            hint="the file is damaged, or the training that made it diverged"
            + ("; or it does not fit into bfloat16" if dtype == "bfloat16" else ""),
        )
    return model, tokenizer


def _brings_adapter(source: str) -> ConfigError:
    """Adversary: whoever supplies the files. The library puts an adapter that lies beside a model
    into it, or takes the base that the adapter names; its scale is in no weight."""
    return ConfigError(
        "comes with an adapter (adapter_config.json) that would change it",
        where=source,
        hint="move the adapter to a directory of its own and merge it (`securefedcollm model "
        "merge`), or remove it",
    )
