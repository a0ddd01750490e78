"""A silo's shelf, made from its own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.questions.space import Space, documents_of
from securefedcollm.retrieval import Index, Passage, split
from securefedcollm.study import Study
from securefedcollm.tuning.documents import read_documents
from securefedcollm.tuning.recipe import Progress, silent
from securefedcollm.tuning.world import World

BUILTIN: Final = "builtin:"


def passages_of(
    study: Study, files: Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> list[Passage]:
    """What the files say, cut to the study's blocks.

    Args:
        files: paths, or ``builtin:SILO``: the house rules of a hospital of the embedded world.
        columns: the files' own name of the column ``text``.

    Raises:
        ConfigError: the study has no such silo, or no embedded world.
        DataError: a file has a fault, or there are more passages than the study's shelf holds.
    """
    plan = documents_of(study)
    made = [str(file).removeprefix(BUILTIN) for file in files if str(file).startswith(BUILTIN)]
    paths = [Path(file) for file in files if not str(file).startswith(BUILTIN)]
    texts = [text for name in made for text in _house_rules(study, name)]
    texts += read_documents(paths, columns)
    found = [part for text in texts for part in split(Passage(*text), plan.block_bytes)]
    if len(found) > plan.documents:
        raise DataError(
            f"{len(found)} passages, and a shelf holds {plan.documents}",
            where="retrieval.documents",
            hint="give fewer documents, or agree on a larger shelf or larger blocks",
        )
    return found


def build_index(
    space: Space, passages: Sequence[Passage], block_bytes: int, progress: Progress = silent
) -> Index:
    """The index of these passages.

    Raises:
        DataError: there is none, an id is there twice, or a passage has no words that the encoder
            knows; names it by its id.
    """
    if not passages:
        raise DataError("no passages", where="FILES", hint="give at least one document")
    try:
        vectors = space.embed([passage.text for passage in passages], progress)
    except DataError as error:
        number = error.where.removeprefix("text ")
        where = passages[int(number) - 1].id if number.isdecimal() else error.where
        raise DataError(error.problem, where=where, hint=error.hint) from None
    return Index.build(passages, vectors, block_bytes=block_bytes, space=space.digest)


def _house_rules(study: Study, name: str) -> list[tuple[str, str]]:
    names = silo_names(study)
    if study.task.data.builtin is None or name not in names:
        raise ConfigError(
            f"there is no hospital {name!r} in an embedded world of this study",
            where=f"{BUILTIN}{name}",
            hint=f"with task.data.builtin: hospitals there are {', '.join(names)}",
        )
    world = World(seed=study.seed, silos=len(names))
    return world.house_rules(names.index(name))
