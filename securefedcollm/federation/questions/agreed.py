"""What a study says of questions to documents, read without any model."""

from __future__ import annotations

from securefedcollm.errors import ConfigError
from securefedcollm.retrieval import Terms
from securefedcollm.retrieval.terms import space_digest
from securefedcollm.study import Study
from securefedcollm.study.retrieval import Retrieval


def plan_of(study: Study) -> Retrieval:
    """The section of the study.

    Raises:
        ConfigError: it has none.
    """
    if study.retrieval is None:
        raise ConfigError(
            "this study has no questions to documents",
            where="retrieval",
            hint="add the section; configs/retrieval.yaml shows it",
        )
    return study.retrieval


def documents_of(study: Study) -> Retrieval:
    """The section of a study that asks documents.

    Raises:
        ConfigError: it has none, or asks records. Those go on no shelf, and nobody reads them.
    """
    plan = plan_of(study)
    if plan.mode != "documents":
        raise ConfigError(
            "this study asks records, which go on no shelf",
            where="retrieval.mode",
            hint="`securefedcollm ask` takes them as they are; in Python, ask_records",
        )
    return plan


def terms_of(study: Study, space: bytes) -> Terms:
    """What asker and silos agreed on; ``space``: :attr:`.space.Space.digest`."""
    plan = plan_of(study)
    return Terms(plan.documents, plan.dimension, plan.block_bytes, plan.fetched, space)


def pinned_terms(study: Study) -> Terms:
    """The terms of a study that pins encoder and reduction, as each one with a roster does.

    Raises:
        ConfigError: it has no such section, asks records, or pins none.
    """
    plan = documents_of(study)
    if plan.encoder.sha256 is None or plan.reduction is None:
        raise ConfigError(
            "participants on several machines need the same encoder and map, to the bit",
            where="retrieval",
            hint="pin encoder.sha256 and reduction: `securefedcollm index reduce` makes the map",
        )
    reduction = bytes.fromhex(plan.reduction.sha256)
    return terms_of(study, space_digest(plan.encoder.sha256, plan.encoder.layer, reduction))
