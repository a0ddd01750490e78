"""The rows of a comparison: what runs under every seed, and which row is subtracted from which.

The FedCoLLM paper (arXiv 2411.11707, table 1) gives one number per cell, and its FedAvg never sees
the server's auxiliary set, so the gain may come from that set alone. Here every experiment has the
controls as rows: FedAvg whose server tunes on the labelled auxiliary questions without
distillation, and the LLM tuned on them alone (one run gives both).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from securefedcollm.errors import ConfigError
from securefedcollm.experiment.intervals import interval, resampled_means
from securefedcollm.federation.results import method_of
from securefedcollm.foreign import printable
from securefedcollm.study import Study

if TYPE_CHECKING:
    from securefedcollm.tuning.question import Question


@dataclass(frozen=True)
class Arm:
    """One run under one seed.

    ``rows``: the method's name in the table, for each model that the run answers with. ``kind``:
    how it is run. ``loss``: the server's losses in a federation; None: the study's own.
    ``labels``: whether the server uses the answers of public questions. ``central``: whether it
    takes the study's central steps. ``weighted``: whether silos count by ``aggregation.weights``.
    """

    key: str
    rows: Mapping[str, str]
    kind: str = "federation"
    loss: str | None = None
    labels: bool = True
    central: bool = True
    weighted: bool = True
    noisy: int = 0


def arms(study: Study, noisy: int = 0, public: Sequence[Question] | None = None) -> list[Arm]:
    """The runs of one seed, the main one first.

    ``public``: the server's questions, where they lie in a file that the study does not describe.
    """
    if study.models.llm is None:
        return _arms_of_one(study, noisy)
    plan = study.distillation
    name = "FedCoLLM"
    found = [
        Arm("fedcollm", {"slm": name, "llm": name}),
        Arm("fedavg", {"slm": "FedAvg"}, kind="fedavg"),
    ]
    if plan.over == "choices" and plan.loss in {"entropy-pooled", "dual-min-ce"}:
        found.append(Arm("teacher", {"slm": _TEACHER}, kind="teacher"))
    if has_labels(study, public):
        rows = {"slm": "FedAvg + auxiliary", "llm": "auxiliary only"}
        found.append(Arm("auxiliary", rows, loss="none"))
        if has_prompts(study, public):
            found.append(Arm("prompts", {"slm": _PROMPTS, "llm": _PROMPTS}, labels=False))
    if study.aggregation.weights:
        found.append(Arm("uniform", {"slm": _UNIFORM, "llm": _UNIFORM}, weighted=False))
    if plan.loss != "mutual-kl":
        paper = f"{name} (mutual KL)"
        found.append(Arm("mutual-kl", {"slm": paper, "llm": paper}, loss="mutual-kl"))
    if study.server and study.server.central:
        found.append(_CENTRAL)
    found += [
        Arm("standalone", {"slm": "standalone"}, kind="standalone"),
        Arm("zero-shot", {"slm": "zero-shot", "llm": "zero-shot"}, kind="zero-shot"),
        Arm("centralized", {"llm": "centralized"}, kind="centralized"),
    ]
    if noisy:
        spoilt = f"{name}, {noisy} noisy"
        found += [
            Arm(f"fedcollm-noisy-{noisy}", {"slm": spoilt, "llm": spoilt}, noisy=noisy),
            Arm(
                f"fedavg-noisy-{noisy}",
                {"slm": f"FedAvg, {noisy} noisy"},
                kind="fedavg",
                noisy=noisy,
            ),
        ]
    return found


def chosen(every: list[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms with the keys ``only``, the study's own run, and what they need; all if it is empty.

    Raises:
        ConfigError: there is no such row.
    """
    if not only:
        return every
    known = [arm.key for arm in every]
    for key in only:
        if key not in known:
            raise ConfigError(
                f"{printable(key)} is no row of this experiment",
                where="--only",
                hint=f"its rows: {', '.join(known)}",
            )
    wanted = {known[0], *only}
    if "teacher" in wanted:  # it answers with the adapter of that run
        wanted.add("fedavg")
    return [arm for arm in every if arm.key in wanted]


def _arms_of_one(study: Study, noisy: int) -> list[Arm]:
    """The runs of a study that tunes one model; each part of the server's phase has its control."""
    main, server = method_of(study), study.server
    found = [Arm("fedavg", {"slm": "FedAvg"}, kind="fedavg")]
    if main != "FedAvg":
        found.insert(0, Arm("federated", {"slm": main}))
    if study.aggregation.weights:
        found.append(replace(found[0], key="uniform", rows={"slm": _UNIFORM}, weighted=False))
    if server and server.central:
        if server.outer:
            found.append(Arm("outer", {"slm": "FedOpt"}, central=False))
        found.append(_CENTRAL)
    found += [
        Arm("standalone", {"slm": "standalone"}, kind="standalone"),
        Arm("zero-shot", {"slm": "zero-shot"}, kind="zero-shot"),
        Arm("centralized", {"slm": "centralized"}, kind="centralized"),
    ]
    if noisy:
        rows = {"slm": f"FedAvg, {noisy} noisy"}
        found.append(Arm(f"fedavg-noisy-{noisy}", rows, kind="fedavg", noisy=noisy))
    return found


_CENTRAL: Final = Arm("central", {"slm": "central only"}, kind="central")
"""The server's own steps on public rows, as many as in the study's run, and no silo."""


def has_labels(study: Study, public: Sequence[Question] | None = None) -> bool:
    """Whether the auxiliary set teaches anything without distillation. ``public``: see `arms`."""
    data = study.task.data
    labelled = bool(data.builtin or data.public_labelled)
    if public is not None:
        labelled = any(question.answer is not None for question in public)
    return study.distillation.batch_labelled > 0 and labelled


def has_prompts(study: Study, public: Sequence[Question] | None = None) -> bool:
    """Whether distillation has something to work on when no public question's answer is used."""
    data, plan = study.task.data, study.distillation
    unlabelled = bool(data.builtin) or (data.public or 0) > data.public_labelled
    if public is not None:
        unlabelled = any(question.answer is None for question in public)
    return unlabelled and plan.batch_unlabelled > 0 and plan.loss != "none"


_PROMPTS: Final = "FedCoLLM (prompts only)"
"""Distillation by itself: it uses no answer of a public question. Then the auxiliary controls have
nothing to learn from; FedAvg and the untuned LLM are the rows to compare."""

_UNIFORM: Final = "uniform weights"
"""The study's own run, but every silo's update counts alike."""

_TEACHER: Final = "the pooled teacher"
"""FedAvg's SLM and the untuned LLM together: all that distillation could convey, before it does."""

_ORDER: Final = (
    "zero-shot",
    "standalone",
    "central only",
    "FedAvg",
    "FedOpt",
    _TEACHER,
    "auxiliary only",
    "FedAvg + auxiliary",
    "FedAvg + central",
    "FedOpt + central",
    "FedCoLLM",
    "FedCoLLM (mutual KL)",
    _PROMPTS,
    _UNIFORM,
    "centralized",
)

_MAIN: Final = {
    "slm": ("FedAvg + auxiliary", _UNIFORM),
    "llm": ("auxiliary only", "zero-shot", _UNIFORM),
}
"""FedCoLLM less these is what the comparison is about."""
_MAIN_OF_ONE: Final = {
    "FedOpt + central": ("FedOpt", "central only", _UNIFORM),
    "FedAvg + central": ("FedAvg", "central only", _UNIFORM),
    "FedOpt": ("FedAvg", _UNIFORM),
    "FedAvg": ("standalone", "zero-shot", _UNIFORM),
}
"""Where one model is tuned, these are subtracted from the study's own method."""
_MAIN_OF_PROMPTS: Final = {"slm": "FedAvg", "llm": "zero-shot"}


def main_of(names: Collection[tuple[str, str]]) -> str:
    """Which of the rows (model, method) is the study's own run."""
    methods = {method for _, method in names}
    return next(method for method in ("FedCoLLM", *_MAIN_OF_ONE) if method in methods)


def compare(
    names: list[tuple[str, str]], scores: Mapping[str, np.ndarray[Any, Any]], groups: list[str]
) -> dict[str, Any]:
    """Means, intervals and differences of rows.

    Args:
        names: (model, method) of every row.
        scores: by metric float64 [rows, seeds, questions].
        groups: of every question.
    """
    columns = {"all": np.ones(len(groups), dtype=bool)}
    if len(set(groups)) > 1:
        columns |= {g: np.array([h == g for h in groups]) for g in dict.fromkeys(groups)}
    rows: list[dict[str, Any]] = [{"model": m, "method": method} for m, method in names]
    pairs = _pairs(names)
    differences: list[dict[str, Any]] = [
        {"model": names[a][0], "method": names[a][1], "less": names[b][1], "main": main}
        for a, b, main in pairs
    ]
    for metric, values in scores.items():
        for column, chosen in columns.items():
            part = values[:, :, chosen]
            means = resampled_means(part)
            for i, row in enumerate(rows):
                row.setdefault(metric, {})[column] = interval(part[i], means[i])._asdict()
                row.setdefault("by_seed", {}).setdefault(metric, {})[column] = (
                    part[i].mean(axis=1).tolist()
                )
            for (a, b, _), difference in zip(pairs, differences, strict=True):
                found = interval(part[a] - part[b], means[a] - means[b])
                difference.setdefault(metric, {})[column] = found._asdict()
    return {"groups": list(columns), "rows": rows, "differences": differences}


def _pairs(names: list[tuple[str, str]]) -> list[tuple[int, int, bool]]:
    """The study's own run less every other row, noisy less clean, distillation alone less what it
    began with: (row, row to subtract, is it a main one)."""
    found = []
    best = main_of(names)
    place = {name: number for number, name in enumerate(names)}
    for a, (model, method) in enumerate(names):
        clean, _, noise = method.partition(", ")
        if noise or method == _PROMPTS:
            other = (model, clean if noise else _MAIN_OF_PROMPTS[model])
            if other in place:  # it may have been left out
                found.append((a, place[other], not noise))
        elif method == best:
            others = [b for b, (m, other) in enumerate(names) if m == model and other != method]
            main = _MAIN_OF_ONE.get(best) or _MAIN[model]
            found += [(a, b, names[b][1] in main) for b in others if ", " not in names[b][1]]
    return sorted(found, key=lambda pair: (names[pair[0]][0] != "slm", not pair[2]))


def place_of(method: str) -> tuple[int, str]:
    """Sorts methods as a table shows them, each after the one that it is a noisy run of."""
    clean, _, noise = method.partition(", ")
    return _ORDER.index(clean) + (len(_ORDER) if noise else 0), noise
