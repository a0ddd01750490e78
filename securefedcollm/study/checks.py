"""What a study's fields must satisfy together. Every refusal names the key and the fix."""

from __future__ import annotations

from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm.study.bounds import check_sizes
from securefedcollm.study.config import (
    BUILTIN_SUBJECT,
    PLACEMENTS,
    Adapter,
    Data,
    Distillation,
    Model,
    Privacy,
    Study,
    Task,
)
from securefedcollm.study.learning import VIRTUAL

_MOST_RECORDS = 10**10  # above it, a slip of the pen


_CONTENT: Final = {
    "multiple_choice": {"question", "choices", "answer"},
    "classification": {"text", "label"},
    "instruction": {"instruction", "response"},
    "text": {"text"},
    "own": set(),
}
"""The columns that a record of each kind of task is made of."""
_FRAMED: Final = {"multiple_choice", "classification"}
_LONGEST_NAME, _LONGEST_TEMPLATE = 200, 10_000  # characters


def check(study: Study) -> None:
    """Refuse an impossible or unsafe combination.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    check_sizes(study)
    _check_silos(study)
    _check_own(study)
    _check_steps(study)
    _check_ring(study)
    _check_adapter(study)
    _check_privacy(study)
    _check_joint(study)
    _check_data(study)
    _check_task(study)
    if study.models.llm is not None:
        _check_model("models.llm", study.models.llm)
    _check_model("models.slm", study.models.slm)
    _check_distillation(study)
    _check_keep(study)
    _check_roster(study)


def _check_silos(study: Study) -> None:
    n, c, t = study.silos.count, study.silos.colluders, study.threshold
    if t > n:
        raise ConfigError(
            f"{t} of {n} silos can never be reached",
            where="aggregation.threshold",
            hint=f"at most {n}; leave it out for the default {(n + c) // 2 + 1}",
        )
    # Adversary: a server that shows two halves of the cohort different survivor sets and collects
    # both kinds of share for one silo. Two sets of t responders share more than c silos, so at
    # least one honest silo, exactly when 2t > n + c.
    if 2 * t <= n + c:
        raise ConfigError(
            f"a server with {c} colluding silo(s) could split {n} silos into two quorums of {t}",
            where="aggregation.threshold",
            hint=f"at least {(n + c) // 2 + 1} (twice the threshold must exceed count + colluders)",
        )
    # Adversary: the server and c silos subtract what they know from the sum; two honest vectors
    # must remain in it, or the rest is one silo's own.
    if study.minimum - c < 2:
        raise ConfigError(
            f"a sum over {study.minimum} silos, {c} of them colluding, bares one silo's update",
            where="silos.minimum",
            hint=f"at least colluders + 2 = {c + 2}",
        )
    if study.minimum > n:
        raise ConfigError(
            f"{study.minimum} survivors of {n} silos can never be reached",
            where="silos.minimum",
            hint=f"at most {n}",
        )


def _check_own(study: Study) -> None:
    """Code of the participants' own: what this project cannot promise, or would not read."""
    own, source = study.task.kind == "own", study.models.slm.source
    if own != source.startswith("own:"):
        raise ConfigError(
            f"{source!r} and kind: {study.task.kind} exclude each other",
            where="models.slm.source",
            hint="own:NAME and kind: own belong together",
        )
    if not own:
        return
    # One record's influence is bounded only where this project computes the gradients.
    if study.privacy is not None and study.privacy.unit != "silo":
        raise ConfigError(
            f"own training cannot promise anything about one {study.privacy.unit}",
            where="privacy.unit",
            hint="choose unit: silo with noise: distributed, or a kind of task that this project "
            "trains",
        )
    plain = Adapter(max_abs=study.adapter.max_abs)
    for where, unread in (
        ("models.llm", study.models.llm is not None),
        ("adapter", study.adapter != plain),
        ("task.data", study.task.data != Data()),
        ("task.template", study.task.template is not None),
        ("keep", study.keep is not None),
    ):
        if unread:
            raise ConfigError("own training has none", where=where, hint="remove it")


def _check_ring(study: Study) -> None:
    # Both the packed sum of all silos and one silo's sum of squares (the exact clip) must fit in a
    # 64-bit word; a sum that wrapped would be silently wrong.
    bits = study.aggregation.value_bits  # above 64 not even worked out
    if bits > 64 or study.field.bound < 2 ** (study.aggregation.value_bits - 1) - 1:
        raise ConfigError(
            f"sums and squares of {study.aggregation.value_bits}-bit values of "
            f"{study.silos.count} silos overflow the 64-bit ring",
            where="aggregation.value_bits",
            hint="lower it; 16 loses nothing that training would notice",
        )
    if study.aggregation.key_model == "authority" and study.aggregation.scheme != "ckks":
        raise ConfigError(
            "only CKKS has a key that an authority could hold",
            where="aggregation.key_model",
            hint="add aggregation.scheme: ckks, or remove the key model",
        )
    _ = study.ring  # refuses a CKKS sum that could wrap


def _check_privacy(study: Study) -> None:
    privacy = study.privacy
    if privacy is None:
        return
    if privacy.delta > 1e-2:
        raise ConfigError(
            f"δ = {privacy.delta:g} would allow publishing one record in "
            f"{max(1, round(1 / privacy.delta))}",
            where="privacy.delta",
            hint="below 1 / (number of records), e.g. 1e-5",
        )
    if (privacy.unit, privacy.noise) not in PLACEMENTS:
        pairs = " or ".join(f"{unit} with {noise}" for unit, noise in sorted(PLACEMENTS))
        raise ConfigError(
            f"no study can ask for unit: {privacy.unit} with noise: {privacy.noise}",
            where="privacy.noise",
            hint=f"choose {pairs}",
        )
    _check_subject(study, privacy)
    if privacy.adaptive is not None and privacy.unit != "silo":
        raise ConfigError(
            f"the clip norm of unit: {privacy.unit} is fixed",
            where="privacy.adaptive",
            hint="remove it, or choose unit: silo with noise: distributed",
        )
    # A batch draws its dropout masks together, so one record more changes the gradients of all.
    # DP-SGD therefore runs without dropout; a silo's whole update is clipped whatever made it.
    if study.adapter.dropout and privacy.unit != "silo":
        raise ConfigError(
            f"with dropout one {privacy.unit} changes the gradients of all the others, and no clip "
            "bounds that",
            where="adapter.dropout",
            hint="remove it, or choose privacy.unit: silo",
        )
    # The clip of a silo's whole update is what its sensitivity follows from: there is one of it.
    if privacy.unit == "silo" and privacy.clip_norm != study.aggregation.clip_norm:
        raise ConfigError(
            f"{privacy.clip_norm:g} and aggregation.clip_norm: {study.aggregation.clip_norm:g} "
            "bound the same update, a silo's whole one",
            where="privacy.clip_norm",
            hint="give both keys the same value",
        )


def _check_adapter(study: Study) -> None:
    """Low-rank matrices and virtual tokens have no size in common."""
    adapter, fresh = study.adapter, Adapter()
    if adapter.method not in VIRTUAL:
        unread, other = ["virtual_tokens"], "prompt or prefix"
    else:
        unread, other = ["rank", "alpha", "dropout", "targets", "top_layers"], "ffa-lora"
    for key in unread:
        if getattr(adapter, key) != getattr(fresh, key):
            raise ConfigError(
                f"an adapter of the method {adapter.method} has none",
                where=f"adapter.{key}",
                hint=f"remove it, or choose adapter.method: {other}",
            )


def _check_subject(study: Study, privacy: Privacy) -> None:
    """The column that says whose a record is."""
    if (privacy.unit == "subject") != (privacy.subject is not None):
        missing = privacy.subject is None
        raise ConfigError(
            "no column says whose a record is" if missing else f"unit: {privacy.unit} needs none",
            where="privacy.subject",
            hint="name the column" if missing else "remove it, or choose unit: subject",
        )
    columns = study.task.columns
    if privacy.subject in {columns.get(name, name) for name in _CONTENT[study.task.kind]}:
        raise ConfigError(
            f"{privacy.subject!r} is what a record says, not whose it is",
            where="privacy.subject",
            hint="name the column with the patient, client or author",
        )
    if privacy.subject not in {None, BUILTIN_SUBJECT} and study.task.data.builtin:
        raise ConfigError(
            f"the built-in world has no column {privacy.subject!r}",
            where="privacy.subject",
            hint=f"its column is {BUILTIN_SUBJECT}",
        )


def _check_steps(study: Study) -> None:
    local, privacy = study.local, study.privacy
    what = hint = ""
    if local.epochs is None:
        if not local.steps:
            what, hint = "no steps, and no epochs", "give the steps of a round, or local.epochs"
    elif local.steps:
        what, hint = "epochs say how long a round is as well", "keep one of steps and epochs"
    if what:
        raise ConfigError(what, where="local.steps", hint=hint)
    if local.epochs is not None and privacy is not None and privacy.unit != "silo":
        why = (
            "in joint DP-SGD all silos take every step together"
            if study.joint
            else "DP-SGD draws every batch anew, with as many steps as the study says"
        )
        raise ConfigError(
            f"{why}: there are no epochs",
            where="local.epochs",
            hint="set local.steps; records / batch_size of them are about one epoch",
        )


def _check_joint(study: Study) -> None:
    local = study.local
    if study.joint and local.sampling_rate is None:
        raise ConfigError(
            "joint DP-SGD needs the rate at which records take part in a step",
            where="local.sampling_rate",
            hint="local.batch_size over the records of all silos together, e.g. 0.02",
        )
    if local.sampling_rate is not None and local.batch_size / local.sampling_rate > _MOST_RECORDS:
        raise ConfigError(
            f"an expected batch of {local.batch_size} at rate {local.sampling_rate:g} means "
            f"{local.batch_size / local.sampling_rate:.3g} records in all silos",
            where="local.sampling_rate",
            hint="local.batch_size over the records of all silos together, e.g. 0.02",
        )
    if not study.joint and local.sampling_rate is not None:
        raise ConfigError(
            "only joint DP-SGD has a rate that all silos share",
            where="local.sampling_rate",
            hint="remove it, or set privacy.unit: record and privacy.noise: distributed",
        )
    if study.joint and study.adapter.method == "rolora":
        raise ConfigError(
            "rolora alternates between matrices from round to round, one optimiser has no place",
            where="adapter.method",
            hint="choose ffa-lora, which is exact under a sum too",
        )


def _check_data(study: Study) -> None:
    data = study.task.data
    if data.alpha != Data().alpha and data.partition != "dirichlet":
        raise ConfigError(
            "only a Dirichlet partition has a concentration",
            where="task.data.alpha",
            hint="remove it, or set task.data.partition: dirichlet",
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
        if study.models.llm is None:
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


def check_rows(task: Task) -> None:
    """Refuse labels, columns or a template that no row could be read by.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    if (task.kind == "classification") != bool(task.labels):
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
        hint = "remove it; instructions are put in the tokenizer's chat template"
    elif task.template.count("{}") != 1 or len(task.template) > _LONGEST_TEMPLATE:
        what = "the text's place {} must be there once"
        hint = f'e.g. "Note: {{}}\\nDepartment:", of at most {_LONGEST_TEMPLATE} characters'
    elif task.template != task.template.rstrip():
        what = "ends in white space; a choice follows after one space anyway"
        hint = "remove it; a YAML block needs |- in place of |"
    if what:
        raise ConfigError(what, where="task.template", hint=hint)


def _check_columns(task: Task) -> None:
    known = _CONTENT[task.kind] | {"subject"}
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
            what = "a column prompt is taken as it stands, without a template"
            hint = "leave this out, or rename the column in the files"
        if what:
            raise ConfigError(what, where=f"task.columns.{ours}", hint=hint)


def _check_task(study: Study) -> None:
    task, plan = study.task, study.distillation
    if task.data.builtin and task.kind != "multiple_choice":
        raise ConfigError(
            "the built-in world has multiple-choice questions",
            where="task.kind",
            hint="leave it out, or give files instead of task.data.builtin",
        )
    if task.data.builtin and (task.columns or task.template):
        raise ConfigError(
            "the built-in world has columns and a template of its own",
            where="task.columns" if task.columns else "task.template",
            hint="remove it, or give files instead of task.data.builtin",
        )
    check_rows(task)
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


def _check_model(where: str, model: Model) -> None:
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


def _check_distillation(study: Study) -> None:
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
    if plan.top_k is not None and plan.over == "choices":
        raise ConfigError(
            "over the choices of a question nothing is left out",
            where="distillation.top_k",
            hint="remove it, or choose over: answer or over: all",
        )
    if plan.top_k is not None and plan.loss not in {"entropy-pooled", "dual-min-ce"}:
        raise ConfigError(
            f"loss: {plan.loss} keeps no predictions that could be shortened",
            where="distillation.top_k",
            hint="remove it, or choose loss: entropy-pooled or dual-min-ce",
        )


def _check_keep(study: Study) -> None:
    keep, data = study.keep, study.task.data
    if keep is None:
        return
    if keep.best == "llm" and study.models.llm is None:
        raise ConfigError(
            "this study has no large model",
            where="keep.best",
            hint="choose slm, or give models.llm",
        )
    if data.train is not None and keep.rows > data.public_labelled:
        raise ConfigError(
            f"{keep.rows} of {data.public_labelled} public questions with answers",
            where="keep.rows",
            hint="at most task.data.public_labelled; the server distils from the rest",
        )
    if data.train is not None and study.models.llm is not None and keep.rows == data.public:
        raise ConfigError(
            "all public questions are kept apart, and none is left to distil from",
            where="keep.rows",
            hint="lower it, or raise task.data.public",
        )


def _check_roster(study: Study) -> None:
    if not study.roster:
        return
    names = [p.name for p in study.roster]
    for values, what in ((names, "name"), ([p.key for p in study.roster], "key")):
        twice = {v for v in values if values.count(v) > 1}
        if twice:
            raise ConfigError(
                f"the {what} {min(twice)[:16]} appears twice",
                where="roster",
                hint="every participant has a name and a key of its own",
            )
    silos = [p for p in study.roster if p.role == "silo"]
    if len(silos) != study.silos.count:
        raise ConfigError(
            f"{len(silos)} silos are listed, silos.count says {study.silos.count}",
            where="roster",
            hint="list every silo, or mend silos.count",
        )
    if sum(p.role == "server" for p in study.roster) != 1:
        raise ConfigError(
            "exactly one participant has the role server", where="roster", hint="mend the roles"
        )
    # The authority's key is on the roster, so that every silo's signature pins it: a server that
    # could name the key holder would name itself.
    authorities = sum(p.role == "authority" for p in study.roster)
    if authorities != (study.scheme == "ckks-authority"):
        raise ConfigError(
            f"{authorities} participants have the role authority, the key model is "
            f"{study.aggregation.key_model}",
            where="roster",
            hint="list one authority if, and only if, aggregation.key_model is authority",
        )
    for reserved in ("server", "authority"):  # what their evidence logs are called
        if any(p.name == reserved and p.role == "silo" for p in study.roster):
            raise ConfigError(
                f"a silo cannot be called {reserved}", where="roster", hint="choose another name"
            )
