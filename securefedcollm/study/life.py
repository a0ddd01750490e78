"""A life: several studies in one YAML file, each of which goes on from the one before.

The first document is a whole study. Every later one says what changes. It is for `simulate` only:
a real consortium agrees on one study at a time, when it knows what the earlier one released.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from securefedcollm.errors import ConfigError
from securefedcollm.study.load import StrictLoader, change, load_study, read_text, study_from_tree

_MOST: Final = 64
_SOME_RUN: Final = {
    "run": "earlier",
    "study": "0" * 64,
    "entries": 1,
    "root": "0" * 64,
    "scale": 1.0,
    "slm": "0" * 64,
}
"""In place of a run that has not been, to check a later study by."""


def load_life(path: Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The studies of a file as plain dictionaries, each checked; one for an ordinary study file.

    What a later study starts from is not in it yet: ``continue.earlier`` is left out.

    Args:
        overrides: ``key.path=value`` for every study.

    Raises:
        ConfigError: names the document and the key.
    """
    documents = _documents(path)
    if len(documents) == 1:
        return [load_study(path, overrides).tree]
    trees: list[dict[str, Any]] = []
    for number, given in enumerate(documents, start=1):
        tree = _changed(trees[-1] if trees else {}, given)
        if number > 1 and "study" not in given:
            tree["study"] = f"{trees[0].get('study')}-{number}"
        for override in overrides:
            change(tree, override)
        try:
            _check(tree, later=number > 1)
        except ConfigError as error:
            where = f"{path}, study {number}" + (f": {error.where}" if error.where else "")
            raise ConfigError(error.problem, where=where, hint=error.hint) from None
        trees.append(tree)
    if len({tree["study"] for tree in trees}) < len(trees):
        raise ConfigError(
            "two of its studies have one name", where=str(path), hint="name them apart"
        )
    return trees


def _documents(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        found = list(yaml.load_all(text, Loader=StrictLoader))
    except Exception as error:
        load_study(path)  # names most faults of a file
        raise ConfigError(
            f"one of its studies cannot be read ({type(error).__name__}: {str(error)[:120]})",
            where=str(path),
            hint="correct the YAML syntax",
        ) from None
    if len(found) < 2:
        load_study(path)  # names what is wrong with an empty file, too
    elif len(found) > _MOST or not all(isinstance(one, dict) for one in found):
        raise ConfigError(
            "is no list of studies",
            where=str(path),
            hint=f"give 1 to {_MOST} mappings of keys, with --- between them",
        )
    return found


def _check(tree: dict[str, Any], *, later: bool) -> None:
    given = tree.get("continue") or {}
    if isinstance(given, dict) and "earlier" in given:
        raise ConfigError(
            "what its studies start from follows from the runs before them",
            where="continue.earlier",
            hint="remove it",
        )
    if later:
        tree = tree | {"continue": {**given, "earlier": [_SOME_RUN]}}
    study_from_tree(tree)


def _changed(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with the keys of ``given``, section by section; neither is altered."""
    found = copy.deepcopy(tree)
    for key, value in given.items():
        old = found.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found[key] = _changed(old, value)
        else:
            found[key] = copy.deepcopy(value)
    return found
