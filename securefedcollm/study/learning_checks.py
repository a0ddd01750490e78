"""What a study's fields say about data, training and distillation, and must satisfy together.

Part of :mod:`~.checks`: every refusal names the key and the fix.
"""

from __future__ import annotations

from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Data, Distillation, Model, Study, Task
from securefedcollm.study.learning import VIRTUAL

CONTENT: Final = {
    "multiple_choice": {"question", "choices", "answer"},
    "classification": {"text", "label"},
    "instruction": {"instruction", "response"},
    "text": {"text"},
    "image_classification": {"image", "label"},
    "audio_classification": {"audio", "label"},
    "own": set(),
}
"""The columns that a record of each kind of task is made of."""
_WORLDS: Final = {
    "hospitals": frozenset({"multiple_choice", "text"}),
    "digits": frozenset({"image_classification"}),
    "wards": frozenset({"audio_classification"}),
}
"""What each built-in world's records can be."""
LABELLED: Final = frozenset({"classification", "image_classification", "audio_classification"})
_FRAMED: Final = {"multiple_choice", "classification"}
_LONGEST_NAME, _LONGEST_TEMPLATE = 200, 10_000  # characters


def check_steps(study: Study) -> None:
    """How long a round is, by steps or epochs."""
    local, privacy = study.local, study.privacy
    what = hint = ""
    if local.epochs is None:
        if not local.steps:
            what, hint = "no steps, and no epochs", "give the steps of a round, or local.epochs"
    elif local.steps:
        what, hint = "local.epochs also sets the length of a round", "keep one of steps and epochs"
    if what:
        raise ConfigError(what, where="local.steps", hint=hint)
    if local.epochs is not None and privacy is not None and privacy.unit != "silo":
        why = (
            "in joint DP-SGD all silos take every step together"
            if study.joint
            else "DP-SGD draws every batch anew, with the study's number of steps"
        )
        raise ConfigError(
            f"{why}: there are no epochs",
            where="local.epochs",
            hint="set local.steps; records / batch_size steps are about one epoch",
        )


def check_data(study: Study) -> None:
    """Where questions and records come from."""
    data = study.task.data
    if data.alpha != Data().alpha and data.partition != "dirichlet":
        raise ConfigError(
            "only a Dirichlet partition has a concentration",
            where="task.data.alpha",
            hint="remove it, or set task.data.partition: dirichlet",
        )
    if data.part_of is not None:
        number, parts = data.part_of
        if data.builtin != "hospitals" or number >= parts:
            raise ConfigError(
                f"there is no part {data.part}",
                where="task.data.part",
                hint="remove it; only the hospitals have parts"
                if data.builtin != "hospitals"
                else "write e.g. 2/3, the second of three",
            )
    files = [name for name in ("train", "test", "public") if getattr(data, name)]
    if data.builtin and files:
        raise ConfigError(
            "the built-in world and files exclude each other",
            where=f"task.data.{files[0]}",
            hint="remove task.data.builtin, or the file keys",
        )
    if not data.builtin and data == Data(max_test=data.max_test):
        return  # every participant gives a file of its own
    if not data.builtin:
        needed = ["train", "test", "public", "per_silo"]
        if not study.needs_public:
            needed.remove("public")
        for name in needed:
            if getattr(data, name) is None:
                raise ConfigError(
                    "this key is missing",
                    where=f"task.data.{name}",
                    hint=f"give {', '.join(needed[:-1])} and {needed[-1]}, or builtin: hospitals; "
                    "or leave all out where every participant gives its own file",
                )
        for name in ("train", "test"):
            file = getattr(data, name)
            if file.startswith(("/", "~")) or ".." in file.split("/"):
                raise ConfigError(
                    f"{file!r} is not a plain file name",
                    where=f"task.data.{name}",
                    hint="name it relative to the directory that --data gives",
                )
        public = data.public or 0
        if data.public_labelled > public:
            raise ConfigError(
                f"{data.public_labelled} labelled of {public} public questions",
                where="task.data.public_labelled",
                hint="at most task.data.public",
            )


def check_task(study: Study) -> None:
    """What a record is, and what may be asked of it."""
    task, plan = study.task, study.distillation
    world = task.data.builtin
    if world and task.kind not in _WORLDS[world]:
        raise ConfigError(
            {
                "digits": "the built-in digits are pictures",
                "wards": "the built-in wards are recordings",
            }.get(world, "the built-in world has multiple-choice questions, and the same as text"),
            where="task.kind",
            hint="leave it out, choose text, or give files instead of task.data.builtin"
            if world == "hospitals"
            else f"choose {', '.join(_WORLDS[world])}",
        )
    if task.data.builtin and (task.columns or task.template):
        raise ConfigError(
            "the built-in world has its own columns and template",
            where="task.columns" if task.columns else "task.template",
            hint="remove it, or give files instead of task.data.builtin",
        )
    check_rows(task)
    _check_asked(study)
    if not study.generative:
        return
    for value, right, where in (
        (task.score, "plain", "task.score"),
        (task.score_temperature, 1.0, "task.score_temperature"),
        (study.local.loss, "answer", "local.loss"),
    ):
        if value != right:
            raise ConfigError(
                f"{value} is about choices, and kind: {task.kind} has none",
                where=where,
                hint=f"choose {right}",
            )
    if study.models.llm is None:
        return
    if plan.over == "choices":
        raise ConfigError(
            f"kind: {task.kind} has no choices",
            where="distillation.over",
            hint="choose answer, or all for the tokens of the prompt as well",
        )
    bare = task.data.public is not None and task.data.public != task.data.public_labelled
    if bare and study.needs_responses:
        raise ConfigError(
            "a public instruction without its response has no answer to compare",
            where="distillation.over",
            hint="choose all, set task.data.public_labelled to task.data.public, "
            "or set distillation.batch_unlabelled to 0",
        )


def _check_asked(study: Study) -> None:
    """``models.*.ask`` and ``temperature`` need choices, and letters a distillation over them."""
    models = {"slm": study.models.slm, "llm": study.models.llm}
    for name, model in models.items():
        if model is None:
            continue
        for key, given in (("ask", model.ask != "cloze"), ("temperature", model.temperature)):
            if given and study.generative:
                raise ConfigError(
                    f"is about choices, and kind: {study.task.kind} has none",
                    where=f"models.{name}.{key}",
                    hint="remove it",
                )
        if model.ask == "letters" and study.models.llm and study.distillation.over != "choices":
            raise ConfigError(
                "a letter is no text that two models could compare token by token",
                where=f"models.{name}.ask",
                hint="choose distillation.over: choices, or ask: cloze",
            )


def check_rows(task: Task) -> None:
    """Refuse labels, columns or a template with which no row can be read.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    if (task.kind in LABELLED) != bool(task.labels):
        raise ConfigError(
            f"{task.kind} has no labels" if task.labels else "the labels are missing",
            where="task.labels",
            hint="remove it" if task.labels else "list them, e.g. [negative, positive]",
        )
    if task.labels and (len(set(task.labels)) < max(2, len(task.labels)) or "" in task.labels):
        raise ConfigError(
            "a classification needs two or more different labels",
            where="task.labels",
            hint="list each label once, e.g. [negative, positive]",
        )
    if spaced := next((label for label in task.labels if label != label.strip()), None):
        raise ConfigError(
            f"{spaced!r} begins or ends with a space, and no row's label does",
            where="task.labels",
            hint="remove the space; labels in the files are read without it",
        )
    _check_columns(task)
    if task.template is None:
        return
    what = hint = ""
    if task.kind not in _FRAMED:
        what = f"kind: {task.kind} has no prompt to frame"
        hint = "remove it; instructions use the tokenizer's chat template"
    elif task.template.count("{}") != 1 or len(task.template) > _LONGEST_TEMPLATE:
        what = "it must contain {}, the text's place, exactly once"
        hint = f'e.g. "Note: {{}}\\nDepartment:", of at most {_LONGEST_TEMPLATE} characters'
    elif task.template != task.template.rstrip():
        what = "ends in white space; a choice follows after one space anyway"
        hint = "remove it; a YAML block needs |- in place of |"
    if what:
        raise ConfigError(what, where="task.template", hint=hint)


def _check_columns(task: Task) -> None:
    known = CONTENT[task.kind] | {"subject"}
    if task.kind == "instruction":
        known |= {"input", "messages"}
    called = [task.columns.get(name, name) for name in known]
    for ours, name in task.columns.items():
        what = ""
        if ours not in known:
            what = f"kind: {task.kind} reads no such column"
            hint = f"choose among {', '.join(sorted(known))}: our name first, then the file's"
        elif not name or name != name.strip() or len(name) > _LONGEST_NAME:
            what, hint = f"{name[:40]!r} is no column's name", "write it as the file's header does"
        elif called.count(name) > 1:
            what, hint = f"two fields would be read from {name!r}", "give each a column of its own"
        elif name == "prompt" and task.kind in _FRAMED:
            what = "a column prompt is used unchanged, without a template"
            hint = "leave this out, or rename the column in the files"
        if what:
            raise ConfigError(what, where=f"task.columns.{ours}", hint=hint)


def check_model(where: str, model: Model) -> None:
    """Where one model comes from, ``where`` in the study."""
    kind, _, rest = model.source.partition(":")
    if kind not in {"builtin", "path", "hub", "own"} or not rest:
        raise ConfigError(
            f"{model.source!r} is no model source",
            where=f"{where}.source",
            hint="builtin:NAME, path:DIRECTORY or hub:ORG/NAME",
        )
    if kind == "hub" and model.revision is None:
        raise ConfigError(
            "a hub model without a revision can change under the participants' feet",
            where=f"{where}.revision",
            hint="give the full 40-digit commit hash",
        )
    if kind != "hub" and model.revision is not None:
        raise ConfigError(
            "only hub models have a revision",
            where=f"{where}.revision",
            hint="pin the model with sha256 instead",
        )


def check_memory(study: Study) -> None:
    """Keys of ``models.*`` about memory and layers where they would do nothing, or harm."""
    own, record = study.task.kind == "own", study.privacy and study.privacy.unit != "silo"
    for name, model in (("slm", study.models.slm), ("llm", study.models.llm)):
        if model is None:
            continue
        where, what, hint = f"models.{name}.checkpointing", "", "remove it"
        if own and (model.checkpointing or model.quantization != "none"):
            what = "a study with own training code has none"
            where = where if model.checkpointing else f"models.{name}.quantization"
        elif model.top_layers and (own or study.adapter.method in {*VIRTUAL, "full"}):
            where = f"models.{name}.top_layers"
            what = "only a low-rank adapter can leave layers out"
            hint = "remove it, or choose adapter.method: ffa-lora"
        elif model.checkpointing and study.adapter.method == "prefix":
            what = "the library drops a prefix where it computes a layer again"
            hint = "remove it, or choose adapter.method: prompt or ffa-lora"
        elif model.checkpointing and name == "slm" and record:
            what = "gradients of single records do not use it"
            hint = "remove it, and lower local.micro_batch"
        if what:
            raise ConfigError(what, where=where, hint=hint)


def check_distillation(study: Study) -> None:
    """What the server's phase learns from."""
    plan = study.distillation
    if study.models.llm is None:
        if plan != Distillation():
            raise ConfigError(
                "there is no large model to distil with",
                where="distillation",
                hint="remove the section, or give models.llm",
            )
        return
    if plan.batch_labelled + plan.batch_unlabelled == 0:
        raise ConfigError(
            "both batches are empty",
            where="distillation.batch_unlabelled",
            hint="give at least one of batch_labelled and batch_unlabelled",
        )
    if plan.loss == "none" and plan.batch_labelled == 0:
        raise ConfigError(
            "without distillation only labelled questions teach anything",
            where="distillation.batch_labelled",
            hint="raise it above 0, or choose loss: entropy-pooled",
        )
    if plan.loss == "transfer" and plan.over != "choices":
        raise ConfigError(
            "a transfer compares what the models say of the choices of a question",
            where="distillation.over",
            hint="choose over: choices, or loss: entropy-pooled for responses and texts",
        )
    if plan.change != Distillation().change and plan.loss != "transfer":
        raise ConfigError(
            f"loss: {plan.loss} compares no changes of predictions",
            where="distillation.change",
            hint="remove it, or choose loss: transfer",
        )
    _check_turns(plan)
    if plan.top_k is not None and plan.over == "choices":
        raise ConfigError(
            "over: choices always keeps all choices of a question",
            where="distillation.top_k",
            hint="remove it, or choose over: answer or over: all",
        )
    if plan.top_k is not None and plan.loss not in {"entropy-pooled", "dual-min-ce"}:
        raise ConfigError(
            f"loss: {plan.loss} keeps no predictions to shorten",
            where="distillation.top_k",
            hint="remove it, or choose loss: entropy-pooled or dual-min-ce",
        )


def _check_turns(plan: Distillation) -> None:
    """Who learns when, and what counts how much."""
    if plan.order != "together" and plan.loss in {"transfer", "none"}:
        raise ConfigError(
            f"with loss: {plan.loss} no model learns from what the other one has learnt",
            where="distillation.order",
            hint="remove it, or choose loss: entropy-pooled",
        )
    if plan.weighting != "none" and plan.over != "choices":
        raise ConfigError(
            "only the choices of a question tell how sure a model is of its answer",
            where="distillation.weighting",
            hint="remove it, or choose over: choices",
        )
    if plan.weighting != "none" and plan.loss in {"transfer", "none"}:
        raise ConfigError(
            f"loss: {plan.loss} weighs all questions alike",
            where="distillation.weighting",
            hint="remove it, or choose loss: entropy-pooled, dual-min-ce or mutual-kl",
        )


def check_keep(study: Study) -> None:
    """By what rounds are compared."""
    keep, data = study.keep, study.task.data
    if keep is None:
        return
    if keep.best == "llm" and study.models.llm is None:
        raise ConfigError(
            "this study has no large model",
            where="keep.best",
            hint="choose slm, or give models.llm",
        )
    if keep.metric == "private":  # no public question is set aside
        return
    if data.train is not None and keep.rows > data.public_labelled:
        raise ConfigError(
            f"{keep.rows} of {data.public_labelled} public questions with answers",
            where="keep.rows",
            hint="at most task.data.public_labelled; the server distils from the rest",
        )
    if data.train is not None and study.models.llm is not None and keep.rows == data.public:
        raise ConfigError(
            "all public questions are set aside for measuring, and none is left to distil from",
            where="keep.rows",
            hint="lower it, or raise task.data.public",
        )
