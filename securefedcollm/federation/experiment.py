"""Every row of the co-tuning comparison, over several seeds, with paired intervals.

The FedCoLLM paper (arXiv 2411.11707, table 1) gives one number a cell, and its FedAvg never sees
the server's auxiliary set, so that its gain may come from that set alone. Here the controls are
rows of every experiment: FedAvg whose server tunes on the labelled auxiliary questions without
distillation, and the LLM tuned on them alone (one run gives both).

A row's run under one seed lies in a directory of its own and is never repeated once its answers are
there; a federation that was killed continues in the middle.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.engines.embedded import process_context
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.intervals import LEVEL, RESAMPLES, interval, resampled_means
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.simulate import PRELOAD, Say, Simulation, for_each, planned
from securefedcollm.federation.simulation_plan import ExperimentPlan, SiloPlan, SimulationPlan
from securefedcollm.federation.workload import Progress
from securefedcollm.study import Study, digest, dump_study
from securefedcollm.study.checks import check
from securefedcollm.version import __version__

METRICS: Final = ("accuracy", "gold_log_prob")


@dataclass(frozen=True)
class Arm:
    """One run under one seed.

    ``rows``: the method's name in the table, for each model that the run answers with. ``kind``:
    how it is run. ``loss``: the server's losses in a federation; None: the study's own.
    ``labels``: whether the server uses the answers of public questions.
    """

    key: str
    rows: Mapping[str, str]
    kind: str = "federation"
    loss: str | None = None
    labels: bool = True
    noisy: int = 0


def arms(study: Study, noisy: int = 0) -> list[Arm]:
    """The runs of one seed, the main one first."""
    if study.models.llm is None:
        return _arms_of_one(noisy)
    plan = study.distillation
    name = "FedCoLLM"
    found = [
        Arm("fedcollm", {"slm": name, "llm": name}),
        Arm("fedavg", {"slm": "FedAvg"}, kind="fedavg"),
    ]
    if plan.over == "choices" and plan.loss in {"entropy-pooled", "dual-min-ce"}:
        found.append(Arm("teacher", {"slm": _TEACHER}, kind="teacher"))
    if has_labels(study):
        rows = {"slm": "FedAvg + auxiliary", "llm": "auxiliary only"}
        found.append(Arm("auxiliary", rows, loss="none"))
        if has_prompts(study):
            found.append(Arm("prompts", {"slm": _PROMPTS, "llm": _PROMPTS}, labels=False))
    if plan.loss != "mutual-kl":
        paper = f"{name} (mutual KL)"
        found.append(Arm("mutual-kl", {"slm": paper, "llm": paper}, loss="mutual-kl"))
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


def _arms_of_one(noisy: int) -> list[Arm]:
    """The runs of a study that tunes one model: FedAvg is the main one."""
    found = [
        Arm("fedavg", {"slm": "FedAvg"}, kind="fedavg"),
        Arm("standalone", {"slm": "standalone"}, kind="standalone"),
        Arm("zero-shot", {"slm": "zero-shot"}, kind="zero-shot"),
        Arm("centralized", {"slm": "centralized"}, kind="centralized"),
    ]
    if noisy:
        rows = {"slm": f"FedAvg, {noisy} noisy"}
        found.append(Arm(f"fedavg-noisy-{noisy}", rows, kind="fedavg", noisy=noisy))
    return found


def has_labels(study: Study) -> bool:
    """Whether the auxiliary set teaches anything without distillation."""
    data = study.task.data
    return study.distillation.batch_labelled > 0 and bool(data.builtin or data.public_labelled)


def has_prompts(study: Study) -> bool:
    """Whether distillation has something to work on when no public question's answer is used."""
    data, plan = study.task.data, study.distillation
    unlabelled = bool(data.builtin) or (data.public or 0) > data.public_labelled
    return unlabelled and plan.batch_unlabelled > 0 and plan.loss != "none"


_PROMPTS: Final = "FedCoLLM (prompts only)"
"""What distillation does by itself: no answer of a public question is used. Then there is nothing
for the auxiliary controls to learn from; FedAvg and the LLM as it came are the rows to compare."""

_TEACHER: Final = "the pooled teacher"
"""FedAvg's SLM and the untuned LLM together: what there is to convey, before anybody learns it."""

_ORDER: Final = (
    "zero-shot",
    "standalone",
    "FedAvg",
    _TEACHER,
    "auxiliary only",
    "FedAvg + auxiliary",
    "FedCoLLM",
    "FedCoLLM (mutual KL)",
    _PROMPTS,
    "centralized",
)

_MAIN: Final = {
    "slm": ("FedAvg + auxiliary",),
    "llm": ("auxiliary only", "zero-shot"),
}
"""FedCoLLM less these is what the comparison is about."""
_MAIN_OF_ONE: Final = ("standalone", "zero-shot")
"""Where one model is tuned, FedAvg less these."""
_MAIN_OF_PROMPTS: Final = {"slm": "FedAvg", "llm": "zero-shot"}


class Experiment:
    """Runs all arms of a study under several seeds into one directory."""

    def __init__(self, study: Study, plan: ExperimentPlan) -> None:
        """
        Raises:
            ConfigError: nearly all silos would be noisy.
        """
        if not 0 <= plan.noisy <= study.silos.count // 2:
            raise ConfigError(
                f"{plan.noisy} of {study.silos.count} silos cannot be noisy",
                where="--noisy-silos",
                hint=f"from 0 to {study.silos.count // 2}",
            )
        study = msgspec.structs.replace(study, keep=None)  # all rows run all rounds
        self._study, self._plan, self._out = study, plan, plan.out
        self._seeds = [study.seed + i for i in range(plan.seeds)]
        self._workers = study.silos.count if plan.workers is None else plan.workers
        self._cores = len(os.sched_getaffinity(0))
        self._arms = arms(study, plan.noisy)
        for arm in self._arms:
            check(self._study_of(arm, study.seed))

    def run(self, progress: Progress, say: Say) -> dict[str, Any]:
        """Run what is still to do; writes and returns the content of ``table.json``.

        The table is written after every seed, from the seeds that are done.

        Raises:
            SecureFedCoLLMError: with all finished runs kept for ``resume``.
        """
        from securefedcollm.federation.experiment_page import markdown, plot
        from securefedcollm.federation.tuned import remembering

        self._open_directory()
        table: dict[str, Any] = {}
        # A seed's rows share both models, test and public set, and each silo's records and tuning.
        with remembering(8 + 4 * self._study.silos.count):
            for done, seed in enumerate(self._seeds, start=1):
                for arm in self._arms:
                    self._run(arm, seed, progress, say)
                table = self._table(self._seeds[:done])
                for name, text in (
                    ("table.json", json.dumps(table, indent=1)),
                    ("table.md", markdown(table)),
                    ("plot.svg", plot(table)),
                ):
                    write_durably(self._out / name, text.encode())
        return table

    def _open_directory(self) -> None:
        path = self._out / "experiment.json"
        mine = {"study": digest(self._study).hex()}
        if self._plan.overwrite and self._out.exists():
            if any(self._out.iterdir()) and not path.exists():
                raise ConfigError(
                    "is not an experiment's directory; it will not be removed",
                    where=str(self._out),
                    hint="choose another --out",
                )
            shutil.rmtree(self._out)
        if path.exists() and not self._plan.resume:
            raise ConfigError(
                "there is an experiment in this directory already",
                where=str(self._out),
                hint="continue it with --resume, replace it with --overwrite, or choose --out",
            )
        if path.exists() and _read(path) != mine:
            raise ConfigError(
                "the experiment in this directory belongs to another study",
                where=str(self._out),
                hint="resume with the study.yaml that lies in it, or choose another --out",
            )
        if self._plan.resume and not path.exists():
            raise ConfigError(
                "there is no experiment to resume",
                where=str(self._out),
                hint="leave out --resume",
            )
        make_directory(self._out)
        write_durably(self._out / "study.yaml", dump_study(self._study).encode())
        write_durably(path, json.dumps(mine).encode())

    def _study_of(self, arm: Arm, seed: int) -> Study:
        plan = self._study.distillation
        if arm.loss is not None:
            plan = msgspec.structs.replace(plan, loss=arm.loss, top_k=None)
        if not arm.labels:
            plan = msgspec.structs.replace(plan, batch_labelled=0)
        return msgspec.structs.replace(self._study, seed=seed, distillation=plan)

    def _home(self, key: str, seed: int) -> Path:
        return self._out / f"seed-{seed}" / key

    def _run(self, arm: Arm, seed: int, progress: Progress, say: Say) -> None:
        path = self._home(arm.key, seed) / "answers.json"
        if path.exists():
            return
        make_directory(path.parent)
        started = time.monotonic()
        title = " / ".join(dict.fromkeys(arm.rows.values()))

        def report(done: int, total: int, text: str) -> None:
            progress(done, total, f"seed {seed}, {title}: {text}")

        answers = self._answers(arm, seed, report)
        seconds = round(time.monotonic() - started, 1)
        write_durably(path, json.dumps({"answers": answers, "seconds": seconds}).encode())
        scores = ", ".join(
            f"{model.upper()} {100 * float(np.mean(found['accuracy'])):.1f} %"
            for model, found in answers.items()
        )
        say(f"seed {seed}, {title}: {scores} ({seconds:.0f} s)")

    def _answers(self, arm: Arm, seed: int, progress: Progress) -> dict[str, dict[str, Any]]:
        from securefedcollm.federation import arms as made
        from securefedcollm.federation.cotuning import set_threads
        from securefedcollm.federation.dealing import deal

        study, home = self._study_of(arm, seed), self._home(arm.key, seed)
        place: dict[str, Any] = {"data": self._plan.data, "device": self._plan.device}
        set_threads(self._cores)
        dealt = deal(study, self._plan.data)
        if arm.kind == "standalone":
            return {"slm": self._standalone(study, dealt, home, progress)}
        if arm.kind == "centralized":
            answers = made.centralized(study, dealt, progress=progress, **place)
            return dict.fromkeys(arm.rows, answers)
        if arm.kind == "teacher":
            tuned = self._home("fedavg", seed) / "adapters"
            said = made.teacher_answers(
                study, dealt.test, adapters=tuned, progress=progress, **place
            )
            return {"slm": said}
        adapters = None
        if arm.kind != "zero-shot":
            Simulation(
                study,
                SimulationPlan(
                    out=home,
                    resume=(home / "server" / "state.json").exists(),
                    baselines=(),
                    workers=self._workers,
                    distillation=arm.kind != "fedavg",
                    noisy=arm.noisy,
                    tested=False,
                    **place,
                ),
            ).run(progress, lambda text: None)
            adapters = home / "adapters"
        return made.answers_of(
            study, arm.rows, dealt.test, adapters=adapters, progress=progress, **place
        )

    def _standalone(self, study: Study, dealt: Any, home: Path, progress: Progress) -> Any:
        from securefedcollm.federation.arms import answers_alone, mean_answers

        silos = SiloPlan(
            study=study,
            planned={name: planned(study, q) for name, q in dealt.silos.items()},
            threads=max(1, self._cores // max(1, self._workers)),
            data=self._plan.data,
            device=self._plan.device,
        )
        job = partial(answers_alone, plan=silos, directory=home)
        context = process_context(PRELOAD) if self._workers else None
        return mean_answers(for_each(job, silo_names(study), self._workers, context, progress))

    def _table(self, seeds: list[int]) -> dict[str, Any]:
        from securefedcollm.federation.dealing import deal

        groups = [question.group for question in deal(self._study, self._plan.data).test]
        found = {(arm.key, s): _read(self._home(arm.key, s) / "answers.json") for arm in self._arms
                 for s in seeds}  # fmt: skip
        rows = sorted(
            ((model, method, arm.key) for arm in self._arms for model, method in arm.rows.items()),
            key=lambda row: (row[0] != "slm", _place(row[1])),
        )
        scores = {
            metric: np.array(
                [[found[key, s]["answers"][m][metric] for s in seeds] for m, _, key in rows]
            )
            for metric in METRICS
        }
        names = [(model, method) for model, method, _ in rows]
        return {
            "study": self._study.study,
            "digest": digest(self._study).hex(),
            "version": __version__,
            "seeds": seeds,
            "questions": len(groups),
            "level": LEVEL,
            "resamples": RESAMPLES,
            **compare(names, scores, groups),
            "seconds": round(sum(run["seconds"] for run in found.values()), 1),
            "notes": self._notes(len(seeds)),
        }

    def _notes(self, seeds: int) -> list[str]:
        study = self._study
        notes = [
            f"Brackets: {LEVEL:.0%} intervals (bootstrap over questions and seeds, Student's t for "
            "the few seeds), paired between the rows.",
            f"Centralized: the {'LLM' if study.models.llm else 'model'} tuned on all records at "
            "one place without privacy.",
        ]
        if study.models.llm and not has_labels(study):
            notes.append(
                "No public question is labelled, so there is nothing to tune on without "
                "distillation: the auxiliary controls are left out."
            )
        if study.privacy:
            notes.append(
                f"Every silo keeps ε = {study.privacy.epsilon:g} (δ = {study.privacy.delta:g}) in "
                + f"each row{' but standalone' * (study.privacy.unit == 'silo')} by itself"
                + "; publishing them all would add up."
            )
        if self._plan.noisy:
            notes.append(
                f"Noisy: {self._plan.noisy} of {study.silos.count} silos have meaningless answers."
            )
        return notes


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
    """FedCoLLM less every other row (FedAvg, where there is no LLM), noisy less clean, distillation
    alone less what it began with: (row, row to subtract, is it a main one)."""
    found = []
    both = any(method == "FedCoLLM" for _, method in names)
    best = "FedCoLLM" if both else "FedAvg"
    for a, (model, method) in enumerate(names):
        clean, _, noise = method.partition(", ")
        if noise:
            found.append((a, names.index((model, clean)), False))
        elif method == _PROMPTS:
            found.append((a, names.index((model, _MAIN_OF_PROMPTS[model])), True))
        elif method == best:
            others = [b for b, (m, other) in enumerate(names) if m == model and other != method]
            main = _MAIN[model] if both else _MAIN_OF_ONE
            found += [(a, b, names[b][1] in main) for b in others if ", " not in names[b][1]]
    return sorted(found, key=lambda pair: (names[pair[0]][0] != "slm", not pair[2]))


def _place(method: str) -> tuple[int, str]:
    clean, _, noise = method.partition(", ")
    return _ORDER.index(clean) + (len(_ORDER) if noise else 0), noise


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path}: cannot be read ({error})",
            hint="remove that file and go on with --resume; its row is run again",
        ) from None
