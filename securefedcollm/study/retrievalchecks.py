"""What questions to documents need of the rest of a study. Refusals name the key and the fix."""

from __future__ import annotations

import re

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Model, Study
from securefedcollm.study.learning_checks import check_model
from securefedcollm.study.retrieval import Retrieval

_MOST_ANSWERS = 10_000


def check_retrieval(study: Study) -> None:
    """Refuse a section that cannot work, or that would leave silos with different embeddings.

    Raises:
        ConfigError: for the first fault found, with its key path and a hint.
    """
    plan = study.retrieval
    if plan is None:
        return
    encoder = plan.encoder
    if encoder.source.startswith("own:"):
        raise ConfigError(
            "own training code embeds no text",
            where="retrieval.encoder.source",
            hint="builtin:NAME, path:DIRECTORY or hub:ORG/NAME",
        )
    check_model("retrieval.encoder", Model(source=encoder.source, revision=encoder.revision))
    _check_terms(plan)
    reduction, data = plan.reduction, study.task.data
    if reduction is not None and not re.fullmatch(r"path:\s*\S.*", reduction.source):
        raise ConfigError(
            f"{reduction.source!r} is no file",
            where="retrieval.reduction.source",
            hint="path:FILE, as `securefedcollm index reduce` made it",
        )
    if reduction is None and data.builtin is None and data.train is None:
        raise ConfigError(
            "the study names no public rows to compute it from",
            where="retrieval.reduction",
            hint="make a file with `securefedcollm index reduce`, and name it here",
        )
    if study.roster:
        _check_pins(plan)
    if plan.mode == "answers":
        _check_answers(study)
    elif plan.threshold is not None or plan.epsilon is not None:
        raise ConfigError(
            "documents have no threshold and no ε",
            where="retrieval.threshold" if plan.threshold is not None else "retrieval.epsilon",
            hint="remove it, or choose retrieval.mode: answers",
        )


def _check_answers(study: Study) -> None:
    """What votes of records need. Adversary: the author of a study whose votes have no noise, or
    whose unit nobody charges for them."""
    plan, privacy = study.retrieval, study.privacy
    assert plan is not None
    if privacy is None or privacy.unit != "record":
        raise ConfigError(
            "a record's answer leaves only with noise, and the record pays for it",
            where="privacy",
            hint="give the study privacy with unit: record",
        )
    if plan.threshold is None:
        raise ConfigError(
            "nothing says which records a question retrieves",
            where="retrieval.threshold",
            hint="a cosine similarity, e.g. 0.9; choose it on public questions",
        )
    # One record's questions are counted by their noise. With more of them, the last digits of the
    # noise multiplier could be worth one question more than was charged for.
    if plan.questions > _MOST_ANSWERS:
        raise ConfigError(
            f"{plan.questions} answers of one record",
            where="retrieval.questions",
            hint=f"at most {_MOST_ANSWERS}",
        )
    if plan.questions < 1:
        raise ConfigError(
            "a record that may answer no question needs no noise",
            where="retrieval.questions",
            hint="at least 1, e.g. 100",
        )
    if study.task.kind in {"text", "own"}:
        raise ConfigError(
            f"records of kind {study.task.kind} have no question to compare and no answer to give",
            where="retrieval.mode",
            hint="documents, or records with answers",
        )
    if not study.masked:
        raise ConfigError(
            "votes are summed under masks",
            where="aggregation.scheme",
            hint="masking",
        )


def _check_terms(plan: Retrieval) -> None:
    """The numbers that the protocol takes, by its own limits."""
    from securefedcollm.retrieval.terms import Terms

    Terms(plan.documents, plan.dimension, plan.block_bytes, plan.fetched)


def _check_pins(plan: Retrieval) -> None:
    """Adversary: whoever hands one participant another encoder. Its question finds nothing there,
    and a shelf that only it can search tells the others' questions apart."""
    if plan.encoder.sha256 is None:
        raise ConfigError(
            "participants on several machines need the same encoder, to the bit",
            where="retrieval.encoder.sha256",
            hint="pin the digest that `securefedcollm model digest --encoder` prints",
        )
    if plan.reduction is None:
        raise ConfigError(
            "participants on several machines would compute different reductions",
            where="retrieval.reduction",
            hint="make one file with `securefedcollm index reduce`, and name it here",
        )
