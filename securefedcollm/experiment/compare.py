"""Compares several finished runs: scores, privacy, cost, and how their studies differ.

It reads the files of the runs' makers (``study.yaml``, ``results.json``): their word, not evidence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import read_object
from securefedcollm.study import Study, load_study

METRICS: Final = ("accuracy", "perplexity")
_RECORDED: Final = {"accuracy": "evaluation", "perplexity": "perplexity"}
"""Their names in a round's record."""
_BYTES: Final = ("bytes_up", "bytes_down")


class Spent(msgspec.Struct, frozen=True):
    """Privacy of one run.

    ``epsilon``: that of the silo that spent most; None where the run's maker cannot know it, a
    server that sees no silo's ledger. ``budget``: what the study allows.
    """

    epsilon: float | None
    budget: float
    delta: float
    unit: str


class Run(msgspec.Struct, frozen=True):
    """One finished run.

    ``course``: after every round, ``{metric: {"model/group": value}}``. ``seconds`` of all rounds;
    ``bytes_up``, ``bytes_down`` of all silos together.
    """

    name: str
    directory: str
    study: str
    digest: str
    version: str
    rounds: int
    seconds: float | None
    bytes_up: int
    bytes_down: int
    privacy: Spent | None
    course: list[dict[str, dict[str, float]]]

    @property
    def final(self) -> dict[str, dict[str, float]]:
        """Scores after the last round."""
        return self.course[-1]


class Difference(msgspec.Struct, frozen=True):
    """A key of the study on which the runs do not agree; ``values`` in the order of the runs."""

    key: str
    values: list[Any]


class Comparison(msgspec.Struct, frozen=True):
    runs: list[Run]
    differences: list[Difference]

    def scores(self) -> list[tuple[str, str, list[float | None]]]:
        """(metric, ``model/group``, value of every run) of all that any run measured."""
        found = []
        for metric in METRICS:
            keys = dict.fromkeys(k for run in self.runs for k in run.final.get(metric, {}))
            for key in sorted(keys, key=lambda k: not k.startswith("slm/")):
                values = [run.final.get(metric, {}).get(key) for run in self.runs]
                found.append((metric, key, values))
        return found


def compare_runs(directories: Sequence[Path]) -> Comparison:
    """Read the runs, in that order.

    Raises:
        ConfigError: fewer than two, or one of them is no finished run.
    """
    if len(directories) < 2:
        raise ConfigError(
            "one run cannot be compared", where="RUN", hint="name two or more run directories"
        )
    names = _names(directories)
    read = [_read(path, name) for path, name in zip(directories, names, strict=True)]
    return Comparison([run for run, _ in read], differences([study for _, study in read]))


def differences(studies: Sequence[Study]) -> list[Difference]:
    """The keys on which the studies do not all agree, every default written out."""
    flat = [_flat(msgspec.to_builtins(study)) for study in studies]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    found = []
    for key in keys:
        values = [tree.get(key) for tree in flat]
        if any(value != values[0] for value in values):
            found.append(Difference(key, values))
    return found


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{before}{key}.")
        else:
            leaves[f"{before}{key}"] = value
    return leaves


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of every path, or the whole path where two have the same last part."""
    short = [path.resolve().name for path in directories]
    return [
        name if short.count(name) == 1 else str(path)
        for path, name in zip(directories, short, strict=True)
    ]


def _read(directory: Path, name: str) -> tuple[Run, Study]:
    path = directory / "results.json"
    if not path.exists():
        raise ConfigError("is not a finished run", where=str(directory), hint=_what_next(directory))
    study = load_study(directory / "study.yaml")
    try:
        results = read_object(path)
        run = _run(results, study, directory, name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"is not a run's results ({type(error).__name__})",
            where=str(path),
            hint="name the directory of a run, as `simulate` or `server` left it",
        ) from None
    if results["digest"] != study.digest.hex():
        raise ConfigError(
            "is of another study than the study.yaml beside it",
            where=str(path),
            hint="restore the run's own study.yaml",
        )
    return run, study


def _what_next(directory: Path) -> str:
    if (directory / "table.json").exists():
        return "an experiment is a comparison already: its table.md and plot.svg"
    if (directory / "server" / "state.json").exists():
        return "finish it with the same command (`simulate`: --resume)"
    return "name a directory that `simulate` made, or studies/… in a server's home"


def _run(results: dict[str, Any], study: Study, directory: Path, name: str) -> Run:
    history = results["rounds"]
    course = [
        {
            metric: {str(key): float(value) for key, value in record[recorded].items()}
            for metric, recorded in _RECORDED.items()
            if recorded in record
        }
        for record in history
    ]
    if not course:
        raise ValueError("no round is finished")
    times = [sum(record["seconds"].values()) for record in history if "seconds" in record]
    up, down = (sum(sum(record.get(way, {}).values()) for record in history) for way in _BYTES)
    return Run(
        name=name,
        directory=str(directory),
        study=study.study,
        digest=study.digest.hex(),
        version=str(results["version"]),
        rounds=len(history),
        seconds=round(float(sum(times)), 1) if len(times) == len(history) else None,
        bytes_up=int(up),
        bytes_down=int(down),
        privacy=_privacy(results, study),
        course=course,
    )


def _privacy(results: dict[str, Any], study: Study) -> Spent | None:
    if study.privacy is None:
        return None
    spent = [silo["epsilon_spent"] for silo in results.get("silos", [])]
    known = [float(epsilon) for epsilon in spent if epsilon is not None]
    return Spent(
        epsilon=max(known) if known else None,
        budget=study.privacy.epsilon,
        delta=study.privacy.delta,
        unit=study.privacy.unit,
    )


def as_plain(value: Any) -> str:
    """A study's value as a cell; ``none`` also where the run's study lacks the whole section."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
