"""Every row of the co-tuning comparison, over several seeds, with paired intervals.

A row's run under one seed lies in a directory of its own and is never repeated once its answers are
there; a federation that was killed continues in the middle. :mod:`~.rows` says which rows.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.experiment.intervals import LEVEL, RESAMPLES
from securefedcollm.experiment.rows import Arm, arms, chosen, compare, has_labels, place_of
from securefedcollm.federation.engines.embedded import process_context
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.workload import Progress, usable_threads
from securefedcollm.primitives import sha256
from securefedcollm.simulation.plan import ExperimentPlan, SiloPlan, SimulationPlan
from securefedcollm.simulation.simulate import PRELOAD, Say, Simulation, for_each, planned
from securefedcollm.study import Study, digest, dump_study
from securefedcollm.study.checks import check
from securefedcollm.study.config import Distillation
from securefedcollm.version import __version__

if TYPE_CHECKING:
    from securefedcollm.federation.dealing import Dealt, Files

METRICS: Final = ("accuracy", "gold_log_prob")


class Experiment:
    """Runs all arms of a study under several seeds into one directory."""

    def __init__(self, study: Study, plan: ExperimentPlan) -> None:
        """
        Raises:
            ConfigError: nearly all silos would be noisy, or silos with files of their own; or
                there is no such row.
            DataError: a participant's own file is missing or has a bad row.
        """
        if not 0 <= plan.noisy <= study.silos.count // 2:
            raise ConfigError(
                f"{plan.noisy} of {study.silos.count} silos cannot be noisy",
                where="--noisy-silos",
                hint=f"from 0 to {study.silos.count // 2}",
            )
        if plan.noisy and plan.files:
            raise ConfigError(
                "the silos' own files are tuned on as they are",
                where="--noisy-silos",
                hint="leave it out, or let the study deal out one file",
            )
        study = msgspec.structs.replace(study, keep=None)  # all rows run all rounds
        self._study, self._plan, self._out = study, plan, plan.out
        self._seeds = [study.seed + i for i in range(plan.seeds)]
        self._workers = study.silos.count if plan.workers is None else plan.workers
        self._threads, self._cores = usable_threads(), len(os.sched_getaffinity(0))
        self._public = self._deal(study).public if plan.files else None
        self._arms = chosen(arms(study, plan.noisy, self._public), plan.only)
        for arm in self._arms:
            check(self._study_of(arm, study.seed))

    def run(self, progress: Progress, say: Say) -> dict[str, Any]:
        """Run what is left to do; writes and returns the content of ``table.json``.

        The table is written after every seed, from the seeds that are done.

        Raises:
            SecureFedCoLLMError: all finished runs are kept for ``resume``.
        """
        from securefedcollm.experiment.page import markdown, plot
        from securefedcollm.federation.tuned import remembering

        self._deal(self._study)  # nothing is replaced for the sake of files that cannot be read
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
        mine = {"study": digest(self._study).hex(), **_contents(self._plan.files)}
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
                "the experiment in this directory belongs to another study, or to other files",
                where=str(self._out),
                hint="resume with the study.yaml that lies in it and the same files, or choose "
                "another --out",
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
            plan = msgspec.structs.replace(
                plan, loss=arm.loss, top_k=None, change=Distillation().change
            )
        if not arm.labels:
            plan = msgspec.structs.replace(plan, batch_labelled=0)
        server = self._study.server
        if server is not None and not arm.central:
            server = msgspec.structs.replace(server, central=None)
        aggregation = self._study.aggregation
        if not arm.weighted:
            aggregation = msgspec.structs.replace(aggregation, weights=None)
        return msgspec.structs.replace(
            self._study, seed=seed, server=server, distillation=plan, aggregation=aggregation
        )

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
        from securefedcollm.experiment import answers as made
        from securefedcollm.federation.cotuning import set_threads

        study, home = self._study_of(arm, seed), self._home(arm.key, seed)
        place: dict[str, Any] = {"data": self._plan.data, "device": self._plan.device}
        set_threads(self._threads)
        dealt = self._deal(study)
        if arm.kind == "standalone":
            return {"slm": self._standalone(study, dealt, home, progress)}
        if arm.kind == "centralized":
            answers = made.centralized(study, dealt, progress=progress, **place)
            return dict.fromkeys(arm.rows, answers)
        if arm.kind == "central":
            return {"slm": made.central_only(study, dealt, progress=progress, **place)}
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
                    files=self._plan.files,
                    tested=False,
                    **place,
                ),
            ).run(progress, lambda text: None)
            adapters = home / "adapters"
        return made.answers_of(
            study, arm.rows, dealt.test, adapters=adapters, progress=progress, **place
        )

    def _deal(self, study: Study) -> Dealt:
        from securefedcollm.federation.dealing import deal

        return deal(study, self._plan.data, files=self._plan.files)

    def _standalone(self, study: Study, dealt: Dealt, home: Path, progress: Progress) -> Any:
        from securefedcollm.experiment.answers import answers_alone, mean_answers

        silos = SiloPlan(
            study=study,
            planned={name: planned(study, q) for name, q in dealt.silos.items()},
            threads=max(1, min(self._threads, self._cores // max(1, self._workers))),
            run=home,
            data=self._plan.data,
            device=self._plan.device,
            files=self._plan.files,
        )
        job = partial(answers_alone, plan=silos, directory=home)
        context = process_context(PRELOAD) if self._workers else None
        return mean_answers(for_each(job, list(dealt.silos), self._workers, context, progress))

    def _table(self, seeds: list[int]) -> dict[str, Any]:
        groups = [question.group for question in self._deal(self._study).test]
        found = {(arm.key, s): _read(self._home(arm.key, s) / "answers.json") for arm in self._arms
                 for s in seeds}  # fmt: skip
        rows = sorted(
            ((model, method, arm.key) for arm in self._arms for model, method in arm.rows.items()),
            key=lambda row: (row[0] != "slm", place_of(row[1])),
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
            "generative": self._study.generative,
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
        ]
        if any(arm.kind == "centralized" for arm in self._arms):
            notes.append(
                f"Centralized: the {'LLM' if study.models.llm else 'model'} tuned on all records "
                "at one place without privacy."
            )
        if study.generative:
            notes.append(
                "Accuracy: the share of tokens that are the most probable one. Perplexity: e to "
                "the mean negative log-probability of a token, every record weighed alike."
            )
        if study.server and study.server.central:
            notes.append(
                f"Central only: {study.rounds * study.server.central.steps} steps on public rows, "
                "as in the federation, and no silo."
            )
        if study.models.llm and not has_labels(study, self._public):
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


def _contents(files: Files | None) -> dict[str, Any]:
    """What names the participants' own files: the SHA-256 of each."""
    if files is None:
        return {}

    def content(path: Path | None) -> str | None:
        return sha256(path.read_bytes()).hex() if path else None

    silos = {name: content(path) for name, path in files.silos.items()}
    return {"silos": silos, "public": content(files.public), "test": content(files.test)}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path}: cannot be read ({error})",
            hint="remove that file and go on with --resume; its row is run again",
        ) from None
