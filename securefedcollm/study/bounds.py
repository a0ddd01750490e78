"""Bounds on the values of a study: exact, finite, harmless to print, and of a sane size.

Adversary: a study's author, or the maker of a bundle with a study in it. A value that no study
needs must not hang, crash or fill the memory of a person who only wants to look at the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any, Final

from securefedcollm.aggregation.header import MAX_COHORT
from securefedcollm.errors import ConfigError

_DEEPEST: Final = 16
_EXACT: Final = 2**53
_ACTING: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Controls and bidi overrides. Other invisible characters belong to some languages' spelling."""

MOST: Final = {
    "task.data.public": 10**9,
    "task.data.public_labelled": 10**9,
    "task.data.per_silo": 10**9,
    "task.data.max_test": 10**9,
    "task.max_tokens": 2**24,
    "adapter.rank": 2**20,
    "adapter.top_layers": 10**6,
    "models.slm.top_layers": 10**6,
    "models.llm.top_layers": 10**6,
    "adapter.virtual_tokens": 2**20,
    "local.steps": 10**7,
    "local.batch_size": 10**10,
    "local.micro_batch": 10**9,
    "silos.minimum": MAX_COHORT,
    "silos.colluders": MAX_COHORT,
    "aggregation.threshold": MAX_COHORT,
    "server.central.steps": 10**9,
    "server.central.batch_size": 10**9,
    "distillation.steps": 10**9,
    "distillation.batch_labelled": 10**9,
    "distillation.batch_unlabelled": 10**9,
    "distillation.top_k": 10**9,
}
"""Far above any value used in training."""
_LARGEST: Final = 1e30
"""Largest float. Its square and products are finite too."""
_MOST_PARTICIPANTS: Final = MAX_COHORT + 2


def check_plain(tree: dict[Any, Any]) -> None:
    """Refuse plain values that no study may hold.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    for path, value in _walk(tree):
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, float) and not abs(value) < _LARGEST:
            what = "is not a number" if math.isnan(value) else "is too large"
            raise ConfigError(f"{value:g} {what}", where=path, hint="give a finite number")
        elif isinstance(value, int) and not abs(value) < _EXACT:
            raise ConfigError(
                "the number is beyond 2^53, and programs read it differently",
                where=path,
                hint="give a smaller one",
            )
        elif not isinstance(value, str | int | float | bool | dict | list | None):
            raise ConfigError(
                f"a {type(value).__name__} is no value of a study",
                where=path,
                hint="put a text in quotes",
            )
    roster = tree.get("roster")
    if isinstance(roster, list) and len(roster) > _MOST_PARTICIPANTS:
        raise ConfigError(
            f"{len(roster)} participants, {_MOST_PARTICIPANTS} are the most",
            where="roster",
            hint=f"{MAX_COHORT} silos, a server and an authority",
        )


def check_sizes(study: Any) -> None:
    """Refuse numbers far beyond any study's.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    for path, most in MOST.items():
        value = reduce(_inside, path.split("."), study)
        if value is not None and value > most:
            raise ConfigError(f"{value} is too large", where=path, hint=f"at most {most}")


def _inside(section: Any, key: str) -> Any:
    """A key's value; None inside of a section that the study leaves out."""
    return None if section is None else getattr(section, key)


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """(key path, value) of everything in ``tree``, keys included."""
    waiting = [("", tree, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        yield path or "study", value
        if depth == _DEEPEST and isinstance(value, dict | list) and value:
            raise ConfigError(
                f"nested more than {_DEEPEST} deep",
                where=path[:80],
                hint="no study needs that depth",
            )
        if isinstance(value, dict):
            for key, child in value.items():
                if not isinstance(key, str):
                    raise ConfigError(
                        f"the key {str(key)[:40]} is a {type(key).__name__}",
                        where=path or "study",
                        hint="keys are words; `securefedcollm study schema` lists them",
                    )
                yield path or "study", key
                waiting.append((f"{path}.{key}" if path else key, child, depth + 1))
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", child, depth + 1) for i, child in enumerate(value)]


def _check_text(path: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "the text has half a character (a lone surrogate)",
            where=path,
            hint="type the text again",
        ) from None
    if found := _ACTING.search(text):
        raise ConfigError(
            f"the text has the character U+{ord(found[0]):04X}, which is invisible but acts",
            where=path,
            hint="remove it",
        )
