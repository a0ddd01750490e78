"""Conditions on a study's fields together. Every refusal names the key and the fix."""

from __future__ import annotations

from collections import Counter

from securefedcollm.aggregation.header import MAX_SILOS, MOST_ATTEMPTS
from securefedcollm.errors import ConfigError
from securefedcollm.study.bounds import check_sizes
from securefedcollm.study.config import (
    BUILTIN_SUBJECT,
    PLACEMENTS,
    Adapter,
    Data,
    Privacy,
    Study,
)
from securefedcollm.study.continuechecks import check_continue
from securefedcollm.study.learning import VIRTUAL
from securefedcollm.study.learning_checks import (
    CONTENT,
    check_data,
    check_distillation,
    check_keep,
    check_memory,
    check_model,
    check_steps,
    check_task,
)
from securefedcollm.study.retrievalchecks import check_retrieval
from securefedcollm.study.serverchecks import check_server
from securefedcollm.study.signalchecks import check_signals
from securefedcollm.study.validationchecks import check_validation

_MOST_RECORDS = 10**10  # above it, a slip of the pen
MOST_UNEQUAL = 1000
"""Largest weight of a silo by the smallest. 1/1000 leaves 6 of 16 bits of an update."""


def check(study: Study) -> None:
    """Refuse an impossible or unsafe combination.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    check_sizes(study)
    _check_cohort(study)
    _check_silos(study)
    _check_graph(study)
    _check_own(study)
    check_steps(study)
    _check_ring(study)
    _check_weights(study)
    _check_adapter(study)
    _check_privacy(study)
    _check_joint(study)
    check_data(study)
    check_task(study)
    check_signals(study)
    if study.models.llm is not None:
        check_model("models.llm", study.models.llm)
    check_model("models.slm", study.models.slm)
    check_memory(study)
    check_distillation(study)
    check_server(study)
    check_keep(study)
    check_continue(study)
    check_validation(study)
    check_retrieval(study)
    _check_roster(study)


def _check_cohort(study: Study) -> None:
    """What works among every pair of silos: refuse it for too many of them."""
    n = study.silos.count
    if n <= MAX_SILOS:
        return
    if study.aggregation.graph is None:
        raise ConfigError(
            f"{n} silos, and {MAX_SILOS} are the most without aggregation.graph",
            where="silos.count",
            hint="with `aggregation: {graph: {}}` each silo shares masks with some hundred others "
            "that it draws, instead of with all",
        )
    if study.retrieval is not None:
        raise ConfigError(
            f"{n} silos, and {MAX_SILOS} are the most that answer questions",
            where="retrieval",
            hint="leave it out, or take part with fewer silos",
        )


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
            f"a sum over {study.minimum} silos, {c} of them colluding, reveals one silo's update",
            where="silos.minimum",
            hint=f"at least colluders + 2 = {c + 2}",
        )
    if study.minimum > n:
        raise ConfigError(
            f"{study.minimum} survivors of {n} silos can never be reached",
            where="silos.minimum",
            hint=f"at most {n}",
        )


def _check_graph(study: Study) -> None:
    """Masks on a random graph: refuse one that a server could use, and what does not know it."""
    if study.aggregation.graph is None:
        return
    plan, privacy = study.aggregation, study.privacy
    for where, wrong, hint in (
        ("aggregation.scheme", plan.scheme != "masking", "masking"),
        ("privacy.excess_noise", privacy and privacy.excess_noise == "remove", "keep"),
    ):
        if wrong:
            raise ConfigError(
                "a study with aggregation.graph cannot have it", where=where, hint=hint
            )
    found = study.graph_bounds
    assert found is not None
    found.check()
    found.check_run(MOST_ATTEMPTS, study.sums)
    # Adversary: a server that leaves honest survivors out of the sum, besides its colluders.
    if study.noise_shares() - study.silos.colluders < 2:
        raise ConfigError(
            f"a sum over {study.minimum} silos may lack {found.hidden} of them on this graph, and "
            "would reveal one silo's update",
            where="silos.minimum",
            hint=f"at least colluders + {found.hidden} + 2 = "
            f"{study.silos.colluders + found.hidden + 2}",
        )


def _check_own(study: Study) -> None:
    """Own training code: refuse impossible promises, and keys that nothing would read."""
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
            f"own training code cannot promise anything about one {study.privacy.unit}",
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
            raise ConfigError(
                "a study with own training code has none", where=where, hint="remove it"
            )


def _check_ring(study: Study) -> None:
    # Both the packed sum of all silos and one silo's sum of squares (the exact clip) must fit in a
    # 64-bit word; a sum that wrapped would be silently wrong.
    bits = study.aggregation.value_bits  # above 64 not even worked out
    if bits > 64 or study.field.bound < 2 ** (study.aggregation.value_bits - 1) - 1:
        raise ConfigError(
            f"sums and squares of {study.aggregation.value_bits}-bit values of "
            f"{study.silos.count} silos overflow the 64-bit ring",
            where="aggregation.value_bits",
            hint="lower it; 16 bits lose nothing that training would notice",
        )
    if study.aggregation.key_model == "authority" and study.aggregation.scheme != "ckks":
        raise ConfigError(
            "only CKKS has a key that an authority can hold",
            where="aggregation.key_model",
            hint="add aggregation.scheme: ckks, or remove the key model",
        )
    _ = study.ring  # refuses a CKKS sum that could wrap


def _check_weights(study: Study) -> None:
    weights, where = study.aggregation.weights, "aggregation.weights"
    if weights is None:
        return
    listed = {p.name for p in study.roster if p.role == "silo"}
    if len(weights) != study.silos.count or (listed and listed != {*weights}):
        raise ConfigError(
            f"{len(weights)} silos have a weight, the study has {study.silos.count}"
            if len(weights) != study.silos.count
            else "not the silos of the roster",
            where=where,
            hint="give every silo one, or none" + f": {', '.join(sorted(listed))}" * bool(listed),
        )
    if study.joint:
        raise ConfigError(
            "joint DP-SGD counts every record alike already", where=where, hint="remove it"
        )
    if study.privacy is not None and study.privacy.adaptive is not None:
        raise ConfigError(
            "a clip norm that adapts to updates of several sizes is not supported",
            where=where,
            hint="remove it or privacy.adaptive",
        )
    if max(weights.values()) > MOST_UNEQUAL * min(weights.values()):
        raise ConfigError(
            f"the largest weight is over {MOST_UNEQUAL} times the smallest, whose update would be "
            "lost in rounding",
            where=where,
            hint="raise the small ones, or leave those silos out",
        )


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
    if privacy.excess_noise == "remove" and (
        privacy.noise != "distributed" or study.scheme != "masking"
    ):
        raise ConfigError(
            "only masked sums with distributed noise have noise that can be removed",
            where="privacy.excess_noise",
            hint="remove the key, or choose privacy.noise: distributed and "
            "aggregation.scheme: masking",
        )
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
            "bound the same update, a silo's whole update",
            where="privacy.clip_norm",
            hint="give both keys the same value",
        )


def _check_adapter(study: Study) -> None:
    """Low-rank matrices and virtual tokens have no size in common, and all weights have none."""
    adapter, fresh = study.adapter, Adapter()
    virtual, low_rank = ["virtual_tokens"], ["rank", "alpha", "dropout", "targets", "top_layers"]
    if adapter.method == "full":
        unread, other = [*low_rank, *virtual], "ffa-lora"
        _check_full(study)
    elif adapter.method in VIRTUAL:
        unread, other = low_rank, "ffa-lora"
    else:
        unread, other = virtual, "prompt or prefix"
    for key in unread:
        if getattr(adapter, key) != getattr(fresh, key):
            raise ConfigError(
                f"an adapter of the method {adapter.method} has none",
                where=f"adapter.{key}",
                hint=f"remove it, or choose adapter.method: {other}",
            )


def _check_full(study: Study) -> None:
    """All weights of one model, in full precision."""
    if study.models.llm is not None:
        raise ConfigError(
            "all weights of the large model would be tuned as well",
            where="adapter.method",
            hint="remove models.llm, or choose ffa-lora",
        )
    if study.models.slm.quantization != "none":
        raise ConfigError(
            "rounded weights are frozen, and full tunes all weights",
            where="models.slm.quantization",
            hint="choose none, or adapter.method: ffa-lora",
        )
    if study.models.slm.dtype != "float32":
        raise ConfigError(
            f"small steps of a whole model would be rounded away in {study.models.slm.dtype}",
            where="models.slm.dtype",
            hint="choose float32, or adapter.method: ffa-lora",
        )


def _check_subject(study: Study, privacy: Privacy) -> None:
    """The column that names the subject of a record."""
    if (privacy.unit == "subject") != (privacy.subject is not None):
        missing = privacy.subject is None
        raise ConfigError(
            "no column names the subject of a record"
            if missing
            else f"unit: {privacy.unit} needs none",
            where="privacy.subject",
            hint="name the column" if missing else "remove it, or choose unit: subject",
        )
    columns = study.task.columns
    if privacy.subject in {columns.get(name, name) for name in CONTENT[study.task.kind]}:
        raise ConfigError(
            f"{privacy.subject!r} is the content of a record, not its subject",
            where="privacy.subject",
            hint="name the column with the patient, client or author",
        )
    world = study.task.data.builtin
    if world and privacy.subject not in {None, BUILTIN_SUBJECT[world]}:
        raise ConfigError(
            f"the built-in world has no column {privacy.subject!r}",
            where="privacy.subject",
            hint=f"its column is {BUILTIN_SUBJECT[world]}",
        )


def _check_joint(study: Study) -> None:
    local = study.local
    if study.joint and local.sampling_rate is None:
        raise ConfigError(
            "joint DP-SGD needs the rate at which records take part in a step",
            where="local.sampling_rate",
            hint="local.batch_size divided by the records of all silos together, e.g. 0.02",
        )
    if local.sampling_rate is not None and local.batch_size / local.sampling_rate > _MOST_RECORDS:
        raise ConfigError(
            f"an expected batch of {local.batch_size} at rate {local.sampling_rate:g} means "
            f"{local.batch_size / local.sampling_rate:.3g} records in all silos",
            where="local.sampling_rate",
            hint="local.batch_size divided by the records of all silos together, e.g. 0.02",
        )
    if not study.joint and local.sampling_rate is not None:
        raise ConfigError(
            "only joint DP-SGD has a rate that all silos share",
            where="local.sampling_rate",
            hint="remove it, or set privacy.unit: record and privacy.noise: distributed",
        )
    if study.joint and study.adapter.method == "rolora":
        raise ConfigError(
            "rolora alternates between matrices from round to round, so one optimiser does not fit",
            where="adapter.method",
            hint="choose ffa-lora, which is exact under a sum too",
        )


def _check_roster(study: Study) -> None:
    if not study.roster:
        return
    names = [p.name for p in study.roster]
    for values, what in ((names, "name"), ([p.key for p in study.roster], "key")):
        twice = [value for value, times in Counter(values).items() if times > 1]
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
            hint="list every silo, or correct silos.count",
        )
    if sum(p.role == "server" for p in study.roster) != 1:
        raise ConfigError(
            "exactly one participant has the role server", where="roster", hint="correct the roles"
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
