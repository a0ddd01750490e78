"""``securefedcollm model generate|evaluate|merge``: use a tuned model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from securefedcollm.errors import ConfigError, DataError
from securefedcollm_cli.model_words import print_models, show_forms, show_scores
from securefedcollm_cli.options import Columns, Device, Json, Labels, TaskKind, task_of
from securefedcollm_cli.progress import Bars

if TYPE_CHECKING:
    from securefedcollm.study import Study
    from securefedcollm.study.config import Model
    from securefedcollm.tuning.models import LoadedModel
    from securefedcollm.tuning.question import Question
    from securefedcollm.tuning.questions import Scoring

Revision = Annotated[
    str | None, typer.Option("--revision", help="Commit hash of a hub: model (40 digits).")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the model.")]
Run = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Use a run's model and adapter.")
]
Role = Annotated[
    Literal["llm", "slm"] | None,
    typer.Option(help="Which of the run's models [llm, if the run has one; in a silo's home slm]."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Instead of --run: a model.")
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="A PEFT adapter on top.")
]
ModelDir = Annotated[
    Path,
    typer.Option(
        "--data", metavar="DIR", help="Directory of path: models and of the study's files."
    ),
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", help="The text to continue, as an option.")
    ] = None,
    run: Run = None,
    role: Role = None,
    model: ModelOption = None,
    revision: Revision = None,
    adapter: AdapterOption = None,
    data: ModelDir = Path(),
    instruction: Annotated[
        bool | None,
        typer.Option(
            "--instruction/--plain",
            help="Put the prompt as one turn of a chat, or continue it unchanged [as the run's "
            "task says; plain].",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Largest number of tokens to write.")
    ] = 40,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a prompt greedily, with a base model or a co-tuned one.

    `model generate --run runs/quickstart --prompt "…"` uses the LLM that the study made.
    """
    words = prompt if prompt is not None else prompt_option
    if not words:
        raise ConfigError("no prompt", where="--prompt", hint='give one: --prompt "…"')
    from securefedcollm.tuning.generate import generate as continue_text

    with Bars(quiet=as_json) as bars:
        chosen = choose_model(run, role, model, revision, adapter, data, device, bars)
        if chosen.study is not None and chosen.study.task.senses:
            raise ConfigError(
                "this run's models are classifiers, and write nothing",
                where="--run",
                hint="`model evaluate` measures them",
            )
        if instruction is None:
            instruction = chosen.study is not None and chosen.study.task.kind == "instruction"
        text = continue_text(
            chosen.loaded,
            words,
            adapter=chosen.adapter,
            max_tokens=max_tokens,
            instruction=instruction,
        )
    typer.echo(json.dumps({"prompt": words, "text": text}) if as_json else text)


def evaluate(
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="FILE", help="Records with answers [the run's test file]."),
    ] = None,
    run: Run = None,
    role: Role = None,
    model: ModelOption = None,
    revision: Revision = None,
    adapter: AdapterOption = None,
    data: ModelDir = Path(),
    task: TaskKind = None,
    label: Labels = None,
    column: Columns = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="As task.template, with {} for the text."),
    ] = None,
    score: Annotated[
        Literal["plain", "length", "pmi", "pmi-length"] | None,
        typer.Option(help="How choices are scored [as the run's task; plain]."),
    ] = None,
    ask: Annotated[
        Literal["cloze", "letters"] | None,
        typer.Option(
            help="As models.*.ask: how choices are put to the model [as the run's; cloze]."
        ),
    ] = None,
    score_temperature: Annotated[
        float | None,
        typer.Option(help="Predictions are softmax(score / this) [as the run's task; 1]."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="As task.max_tokens [256].")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Leave out the run's adapter: measure the untuned model.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Records in one pass of the model.")
    ] = 32,
    part: Annotated[
        Path | None,
        typer.Option(
            "--part", hidden=True, help="File with a 1 for each row of --test that counts."
        ),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a base model or a co-tuned one on labelled records.

    The columns of FILE (.jsonl, .csv, .parquet, .npz) depend on the task: question, choices (a
    list) and answer (index) for multiple_choice; text and label for classification; image and label
    for image_classification; audio and label for audio_classification; instruction and response for
    instruction; text for text. Each value of a column `subject` gets a line of the table.

    Prints accuracy and the mean log-probability of the right choice. For a classification it adds
    macro F1, AUROC (mean over the labels, each against the rest), both by label, and the confusion
    matrix. A score is "not defined" where no record has the label. For responses and texts it
    prints instead the share of tokens that are the most probable one, log-probability per token,
    perplexity, and the share of records that greedy decoding would write word by word.

    `model evaluate --run runs/NAME --data DIR` repeats the last line of the run's table.
    """
    from securefedcollm.federation.dealing import deal, layout_of
    from securefedcollm.tuning.data import read_questions
    from securefedcollm.tuning.evaluate import measure
    from securefedcollm.tuning.formats import Asking

    if score_temperature is not None and not 0 < score_temperature < math.inf:
        raise ConfigError(
            f"{score_temperature} is no temperature",
            where="--score-temperature",
            hint="give a number above 0",
        )
    with Bars(quiet=as_json) as bars:
        chosen = choose_model(
            run, role, model, revision, adapter, data, device, bars, base=base, task=task
        )
        plan = chosen.study.task if chosen.study else None
        rows = task_of(task, label, column, template, plan)
        ask = ask or (chosen.spec.ask if chosen.spec else "cloze")
        if test is not None:
            questions = read_questions(test, **layout_of(rows))
            questions = questions if part is None else _part_of(questions, test, part)
        elif chosen.study is not None and plan and (plan.data.builtin or plan.data.train):
            questions = list(deal(chosen.study, data).test)
        else:
            raise ConfigError("no records", where="--test", hint="give a file: --test FILE")
        result = measure(
            chosen.loaded,
            questions,
            adapter=chosen.adapter,
            asking=Asking(rows.rows, ask, rows.template),
            scoring=_scoring(chosen, ask, score, score_temperature),
            max_tokens=max_tokens or (plan.max_tokens if plan else 256),
            batch_size=batch_size,
            progress=bars.report,
        )
    show_scores(result, as_json)


def _scoring(
    chosen: Chosen,
    ask: Literal["cloze", "letters"],
    score: Literal["plain", "length", "pmi", "pmi-length"] | None,
    temperature: float | None,
) -> Scoring:
    """The scoring of the run's model, except where the options differ."""
    from securefedcollm.tuning.questions import Scoring

    if ask == "letters" and score not in {None, "plain"}:
        raise ConfigError(
            "a letter has no length and no prior", where="--score", hint="remove it, or --ask cloze"
        )
    plan, spec = chosen.study.task if chosen.study else None, chosen.spec
    rule = score or (plan.score if plan and ask == "cloze" else "plain")
    usual = (spec.temperature if spec else None) or (plan.score_temperature if plan else 1.0)
    return Scoring(rule, temperature or usual)


def calibrate(
    data_file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Labelled public records, at least some dozens.")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="builtin:, hub:, path: or a directory.")
    ],
    revision: Revision = None,
    data: ModelDir = Path(),
    task: TaskKind = None,
    label: Labels = None,
    column: Columns = None,
    template: Annotated[
        str | None, typer.Option("--template", help="As task.template, with {} for the text.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=2, help="As task.max_tokens.")
    ] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Records in one pass of the model.")
    ] = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find out how to ask a model: as a cloze or by letters, by which score, at which temperature.

    Every form is tried on FILE. The best one is the form under which the right choices are most
    probable. FILE must be neither the study's test questions nor anybody's private records: use
    public ones that you keep apart for this.
    """
    from dataclasses import asdict

    from securefedcollm.federation.dealing import layout_of
    from securefedcollm.tuning.calibrate import Plan
    from securefedcollm.tuning.calibrate import calibrate as tried
    from securefedcollm.tuning.data import read_questions
    from securefedcollm.tuning.formats import Asking

    rows = task_of(task, label, column, template)
    if rows.kind not in {"multiple_choice", "classification"}:
        raise ConfigError(
            f"{rows.kind} has no choices", where="--task", hint="multiple_choice or classification"
        )
    with Bars(quiet=as_json) as bars:
        chosen = choose_model(None, None, model, revision, None, data, device, bars)
        questions = read_questions(data_file, **layout_of(rows))
        plan = Plan(Asking(rows.rows, template=rows.template), max_tokens, batch_size)
        forms = tried(chosen.loaded, questions, plan, bars.report)
    if as_json:
        typer.echo(json.dumps([asdict(form) for form in forms], indent=2))
        return
    show_forms(forms)


def _part_of(questions: list[Question], test: Path, part: Path) -> list[Question]:
    """The records that take part in a silo's study (``client --training-loss``).

    Raises:
        DataError: the file has other rows than when they were counted.
    """
    counts = part.read_text()
    if len(counts) != len(questions):
        raise DataError(
            f"{len(questions)} records, and there were {len(counts)} when the run began here",
            where=str(test),
            hint="put the file back as it was",
        )
    return [question for question, here in zip(questions, counts, strict=True) if here == "1"]


def merge(
    out: Out,
    run: Run = None,
    role: Role = None,
    model: ModelOption = None,
    revision: Revision = None,
    adapter: AdapterOption = None,
    data: ModelDir = Path(),
    as_json: Json = False,
) -> None:
    """Write a plain model with the adapter merged into its weights.

    The result needs neither PEFT nor this program: AutoModelForCausalLM.from_pretrained(DIR), or
    `path:DIR` in another study. Weights are float32. The adapter of a run with privacy is as
    private merged as it is alone. Virtual tokens (a prompt or prefix) cannot be merged.
    """
    from securefedcollm.tuning.adapters import merged
    from securefedcollm.tuning.classifiers import HEAD_FILE, read_head
    from securefedcollm.tuning.identity import model_digest, model_parts
    from securefedcollm.tuning.models import save_model

    if run is None and adapter is not None and (adapter / HEAD_FILE).exists():
        raise ConfigError(
            "this adapter is of a classifier of pictures or recordings, whose labels its run's "
            "study names",
            where="--adapter",
            hint="merge it by --run DIR, or with PEFT: README.md beside it says how",
        )
    with Bars(quiet=as_json) as bars:
        chosen = choose_model(
            run, role, model, revision, adapter, data, "cpu", bars, dtype="float32"
        )
        if chosen.adapter is None:
            raise ConfigError(
                "nothing to merge", where="--adapter", hint="give --run, or --model with --adapter"
            )
        if chosen.study is not None and chosen.study.task.senses:
            read_head(chosen.loaded.model, chosen.study.task.labels, chosen.adapter)
        whole = merged(chosen.loaded.model, chosen.adapter)
        tokenizer = chosen.loaded.tokenizer
        save_model(whole, tokenizer, out)
        digest = model_digest(model_parts(whole, tokenizer))
    print_models({out.name: {"directory": str(out), "digest": digest}}, as_json)


class Chosen(NamedTuple):
    """A model, what goes on top of it, and the study of the run that it is from."""

    loaded: LoadedModel
    adapter: Path | None
    study: Study | None
    spec: Model | None
    """Which of the study's models."""


def choose_model(
    run: Path | None,
    role: Literal["llm", "slm"] | None,
    model: str | None,
    revision: str | None,
    adapter: Path | None,
    data: Path,
    device: str,
    bars: Bars,
    *,
    base: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    task: str | None = None,
) -> Chosen:
    """The model of a run, with its adapter unless ``base``, or the one that is named.

    Args:
        task: of the one that is named, by kind of record.
    """
    if (run is None) == (model is None):
        raise ConfigError(
            "exactly one of the two is needed", where="--run / --model", hint="e.g. --run runs/NAME"
        )
    from securefedcollm.federation.continuing import beside
    from securefedcollm.federation.export import seconds_beside
    from securefedcollm.federation.tuned import fold_earlier, part_of
    from securefedcollm.tuning.classifiers import set_head
    from securefedcollm.tuning.models import find_device, hearing, load_model
    from securefedcollm.tuning.quantised import check_quantization, quantise, round_weights

    place = find_device(device)
    study = spec = None
    if run is None:
        assert model is not None
        part = part_of(task or "")
        loaded = load_named(model, revision, dtype or "float32", base_dir=data, part=part)
        loaded = hearing(loaded, seconds_beside(adapter if part == "audio" else None))
    else:
        from securefedcollm.study import load_study

        study = load_study(run / "study.yaml")
        if role is None:
            only_slm = (run / "adapters" / "slm").exists() > (run / "adapters" / "llm").exists()
            role = "slm" if only_slm or study.models.llm is None else "llm"
        spec = study.models.llm if role == "llm" else study.models.slm
        if spec is None:
            raise ConfigError(
                "this run's study has no large model", where="--role", hint="choose --role slm"
            )
        rounded = (spec.quantization, f"models.{role}.quantization")
        check_quantization(*rounded, place)
        adapter = adapter or (None if base else run / "adapters" / role)
        loaded = load_model(
            spec.source,
            revision=spec.revision,
            # Pinned in the study's type: other bits have another digest.
            sha256=spec.sha256 if dtype in {None, spec.dtype} else None,
            dtype=dtype or spec.dtype,
            base_dir=data,
            progress=bars.report,
            part=part_of(study.task.kind),
        )
        loaded = hearing(loaded, study.task.max_seconds)
        if study.task.senses:
            set_head(loaded.model, study.task.labels, study.seed)
        with beside(run):
            fold_earlier(study, role, loaded, data)
        # An adapter that is merged fits the rounded weights, but not into them.
        if dtype is None:
            quantise(loaded.model, *rounded)
        else:
            round_weights(loaded.model, *rounded, spec.dtype)
    loaded.model.to(place)
    return Chosen(loaded, None if base else adapter, study, spec)


def load_named(
    source: str,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    base_dir: Path = Path(),
    part: Literal["causal", "body", "image", "audio"] = "causal",
) -> Any:
    """``load_model``, where a plain directory needs no ``path:``."""
    from securefedcollm.tuning.models import load_model

    if ":" not in source:
        source = f"path:{source}"
    return load_model(source, revision=revision, dtype=dtype, base_dir=base_dir, part=part)
