"""How many records (or subjects) a study's silos have, from the options of `study check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from securefedcollm.errors import ConfigError
from securefedcollm.federation.sizes import builtin_units
from securefedcollm_cli.options import files_of

if TYPE_CHECKING:
    from securefedcollm.study import Study


class Units(NamedTuple):
    """Records, or subjects where they are the unit, by silo; empty if the number is unknown."""

    counts: tuple[int, ...]
    source: str
    """The source of the numbers, as a part of a sentence."""


def units_of(
    study: Study, data: Path | None, records: int | None, silos: Sequence[str] = ()
) -> Units:
    """Look at the options first, then at the study's files, then at what the study says.

    Args:
        data: directory of the study's files; files that are not there are no error.
        records: ``--records``: of the smallest silo.
        silos: ``--silo NAME=FILE``, as many as are at hand.

    Raises:
        ConfigError: an option is not NAME=FILE, or both options are given.
        DataError: a file cannot be read as the study's.
    """
    if records and silos:
        raise ConfigError(
            "the files say how many records there are", where="--records", hint="leave it out"
        )
    if records:
        return Units((records,), "as --records says")
    if silos:
        return Units(
            tuple(_in_file(study, path) for _, path in files_of(silos)), "in the files given"
        )
    spec = study.task.data
    if spec.train is not None and data is not None and (data / spec.train).exists():
        return Units(_dealt(study, data), f"dealt from {spec.train}")
    said = "by the study's task.data"
    if spec.builtin and study.subject is not None:
        if spec.per_silo is None and spec.skew == 1 and spec.partition is None:
            return Units((builtin_units(study),), said)
        return Units(_dealt(study, data), "in the built-in world")
    mean = spec.per_silo or (builtin_units(study) if spec.builtin else None)
    if mean is None or study.subject is not None:
        return Units((), "")
    if spec.skew == 1:
        return Units((mean,), said)
    from securefedcollm.tuning.splits import silo_sizes

    return Units(tuple(silo_sizes(study.silos.count, mean, spec.skew)), said)


def _in_file(study: Study, path: Path) -> int:
    from securefedcollm.federation.cotuning import count_units
    from securefedcollm.federation.dealing import read_records

    return count_units(study, read_records(study, path))


def _dealt(study: Study, data: Path | None) -> tuple[int, ...]:
    from securefedcollm.federation.cotuning import count_units
    from securefedcollm.federation.dealing import deal

    return tuple(count_units(study, silo) for silo in deal(study, data).silos.values())
