"""A whole study on one machine: every role is real, only the network is missing.

Each silo runs in a worker process with its own directory (identity, ledger, log, journal, updates)
and exchanges the same frames as over a network. Identities are made for the run; their keys lie in
the participants' directories, unencrypted.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.federation.consent import refuse_skipping
from securefedcollm.federation.continuing import beside
from securefedcollm.federation.engines.dropouts import Drop
from securefedcollm.federation.engines.embedded import process_context
from securefedcollm.federation.files import alone, copy_tree, make_directory, write_durably
from securefedcollm.federation.keeping import BEST, best_round
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.results import (
    best_method,
    method_of,
    remembered,
    rows,
    write_results,
)
from securefedcollm.federation.runstore import RunStore, check_directory
from securefedcollm.federation.status import round_sentence
from securefedcollm.federation.tracking import Follow, require_tracker, tracking
from securefedcollm.federation.workload import Progress, ServerWorkload, silent, usable_threads
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.simulation.cohort import Cohort, same_ledger
from securefedcollm.simulation.plan import SiloPlan, SimulationPlan
from securefedcollm.study import Study, digest, dump_study

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from securefedcollm.federation.cotuning import ServerTuning, SiloTuning
    from securefedcollm.federation.dealing import Dealt
    from securefedcollm.tuning.question import Question

Say = Callable[[str], None]
T = TypeVar("T")

PRELOAD = ("securefedcollm.federation.cotuning", "peft")  # seconds to import


class Simulation:
    """Runs a study, and its baselines, into one directory."""

    def __init__(self, study: Study, plan: SimulationPlan) -> None:
        """
        Raises:
            ConfigError: a drop names no silo or step; the tracking tool is not installed.
        """
        require_tracker(plan.track)
        if plan.records == "skip":
            refuse_skipping(study.validation is not None)
        self._study, self._plan, self._out = study, plan, plan.out
        self._method = method_of(study) if plan.distillation else "FedAvg"
        left_out = ("fedavg", "FedAvg")  # the run itself is FedAvg
        self._baselines = tuple(b for b in plan.baselines if (b, self._method) != left_out)
        self._names = silo_names(study) if plan.files is None else list(plan.files.silos)
        self._drops = [Drop.parse(spec, self._names, study.scheme) for spec in plan.drops]
        cores = len(os.sched_getaffinity(0))
        self._workers = min(cores, study.silos.count) if plan.workers is None else plan.workers
        self._server_threads = usable_threads()  # silos and server never work at the same time
        self._threads = max(1, min(self._server_threads, cores // max(1, self._workers)))

    def run(self, progress: Progress, say: Say) -> dict[str, Any]:
        """Run what is left to do and return the content of ``results.json``.

        Faults of study, data or models show before anything is written or removed.

        Raises:
            SecureFedCoLLMError: the run is in a state that ``resume`` continues, or has not begun.
        """
        with beside(self._out), ExitStack() as held:
            if self._out.is_dir():
                held.enter_context(_held(self._out))
            return self._run(progress, say, held)

    def _run(self, progress: Progress, say: Say, held: ExitStack) -> dict[str, Any]:
        started, plan = time.monotonic(), self._plan
        check_directory(self._study, self._out, resume=plan.resume, overwrite=plan.overwrite)
        for name in self._names if plan.resume else ():
            same_ledger(self._out / "silos" / name, name, plan.ledgers)
        self._context = process_context(PRELOAD) if self._workers else None

        from securefedcollm.federation.dealing import deal

        dealt = deal(self._study, plan.data, plan.noisy, plan.files)
        self._prepare_models(progress)
        server = self._server(dealt, progress)
        dealt = self._able_to_pay(dealt, server, say)
        if plan.overwrite:
            for place in plan.replaced or (self._out,):
                shutil.rmtree(place, ignore_errors=not place.exists())
        fresh = not self._out.exists()
        make_directory(self._out)
        if fresh:
            held.enter_context(_held(self._out))
        store = RunStore(self._out, digest(self._study), resume=plan.resume)
        write_durably(self._out / "study.yaml", dump_study(self._study).encode())
        zero_shot = self._once("zero-shot", server.evaluate)
        try:
            with tracking(plan.track, self._study, self._out, store.state.run_id) as follow:
                follow(store.state.history)
                self._federate(store, server, self._out, progress, say, follow, self._plan.ledgers)
        except SecureFedCoLLMError:  # e.g. a silo would not even start
            if fresh and not store.begun:
                shutil.rmtree(self._out)
            raise
        table = rows("zero-shot", zero_shot) + self._keep(store)
        del server
        if "standalone" in self._baselines:
            table += rows("standalone", self._standalone(progress))
        if "fedavg" in self._baselines:
            table += rows("FedAvg", self._fedavg(dealt, progress))
        records = {name: len(questions) for name, questions in dealt.silos.items()}
        return write_results(
            store, self._study, table, records, _notes(self._study, self._baselines), started
        )

    def _able_to_pay(self, dealt: Dealt, server: ServerTuning, say: Say) -> Dealt:
        """``dealt`` with the records that take part; sets the plan of the silos' processes.

        Raises:
            BudgetExceeded: the study is refused.
        """
        from securefedcollm.simulation.paying import able, places

        study, plan = self._study, self._plan
        silos = able(study, dealt.silos, plan, server.update_size)
        kept = places(dealt.silos, silos)
        for name, own in kept.items():
            whole = len(dealt.silos[name])
            say(f"{name} leaves out {whole - len(own)} of {whole} records, which cannot pay")
        self._silos = SiloPlan(
            study=study,
            planned={name: planned(study, questions) for name, questions in silos.items()},
            threads=self._threads,
            run=self._out,
            data=plan.data,
            device=plan.device,
            noisy=plan.noisy,
            files=plan.files,
            kept=kept,
        )
        return dealt.among(silos)

    def _server(self, dealt: Dealt, progress: Progress) -> ServerTuning:
        """Raises: ConfigError for an adapter that the study does not pin."""
        from securefedcollm.federation import cotuning

        cotuning.set_threads(self._server_threads)
        server = cotuning.ServerTuning(
            self._study,
            public=dealt.public,
            test=dealt.test if self._plan.tested else (),
            distillation=self._plan.distillation,
            data=self._plan.data,
            device=self._plan.device,
            progress=progress,
        )
        server.layout(0)
        return server

    def _keep(self, store: RunStore) -> list[dict[str, Any]]:
        """The adapters of the last round, and of the best one, beside the run; their rows."""
        for name in ("slm", "llm") if self._method == "FedCoLLM" else ("slm",):
            copy_tree(store.adapters / name, self._out / "adapters" / name)
        history = store.state.history
        table = rows(self._method, history[-1]["evaluation"])
        best = best_round(self._study, history)
        if best is not None:
            copy_tree(store.best_adapters(best), self._out / BEST)
            table += rows(best_method(self._method, best), history[best - 1]["evaluation"])
        return table

    def _prepare_models(self, progress: Progress) -> None:
        """Make the built-in models on first use, both at once."""
        models = (self._study.models.llm, self._study.models.slm)
        sources = [model.source for model in models if model]
        if any(source.startswith("builtin:hospital-") for source in sources):
            from securefedcollm.tuning.builtin import prepare
            from securefedcollm.tuning.models import default_cache

            prepare(default_cache(), progress, context=self._context)
        for pair in ("digits", "wards"):
            if any(source.startswith(f"builtin:{pair}-") for source in sources):
                from securefedcollm.tuning import class_builtin
                from securefedcollm.tuning.models import default_cache

                class_builtin.prepare(pair, default_cache(), progress, context=self._context)

    def _federate(
        self,
        store: RunStore,
        server: ServerWorkload,
        directory: Path,
        progress: Progress,
        say: Say,
        follow: Follow = lambda history: None,
        ledgers: Path | None = None,
    ) -> None:
        """Run all rounds of one federation that ``store`` has not finished."""

        def on_round(record: dict[str, Any]) -> None:
            store.write_metrics()
            follow(store.state.history)
            say(round_sentence(record, self._study.rounds))

        Cohort(
            self._study,
            self._names,
            directory,
            workers=self._workers,
            threads=self._threads,
            drops=self._drops,
            context=self._context,
            ledgers=ledgers,
        ).run(store, server, partial(silo_tuning, plan=self._silos), progress, on_round)

    def _fedavg(self, dealt: Dealt, progress: Progress) -> dict[str, float]:
        """The same federation without the server's phase."""
        from securefedcollm.federation import cotuning

        directory = make_directory(self._out / "baselines" / "fedavg")
        resume = (directory / "server" / "state.json").exists()
        store = RunStore(directory, digest(self._study), resume=resume)
        server = cotuning.ServerTuning(
            self._study,
            public=(),
            test=dealt.test,
            distillation=False,
            data=self._plan.data,
            device=self._plan.device,
        )
        self._federate(store, server, directory, _prefixed(progress, "FedAvg"), lambda text: None)
        evaluation: dict[str, float] = store.state.history[-1]["evaluation"]
        return evaluation

    def _standalone(self, progress: Progress) -> dict[str, float]:
        """Every silo tunes for as long by itself; returns the mean of their accuracies."""
        job = partial(
            tune_alone,
            plan=replace(self._silos, noisy=0),
            directory=make_directory(self._out / "baselines" / "standalone"),
        )
        scores = for_each(job, self._names, self._workers, self._context, progress)
        return {group: sum(s[group] for s in scores) / len(scores) for group in scores[0]}

    def _once(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        return remembered(self._out / "server" / f"{name}.json", make)


def _held(directory: Path) -> AbstractContextManager[None]:
    """Another simulation, or a question, would write to the same logs."""
    return alone(
        directory,
        "another process works in this directory at this moment",
        "wait until it is done, or choose another --out",
    )


def silo_tuning(name: str, progress: Progress, *, plan: SiloPlan) -> SiloTuning:
    """The tuning of one silo, in the process that will run it."""
    from securefedcollm.federation import cotuning
    from securefedcollm.simulation.sharing import SharingSilo

    cotuning.set_threads(plan.threads)
    with beside(plan.run):
        return SharingSilo(plan, name, _own(_dealt(plan), name, plan), progress)


def tune_alone(name: str, *, plan: SiloPlan, directory: Path) -> dict[str, float]:
    """One silo without a federation: the same steps, noise and rounds, but nothing leaves it."""

    def tune() -> dict[str, float]:
        alone, test = tuned_alone(name, plan)
        return {f"slm/{g}": a for g, a in alone.evaluate(test).items()}

    return remembered(directory / f"{name}.json", tune)


def tuned_alone(name: str, plan: SiloPlan) -> tuple[SiloTuning, Sequence[Question]]:
    """A silo after :func:`tune_alone`'s training, and the test questions."""
    from securefedcollm.federation import cotuning

    cotuning.set_threads(plan.threads)
    dealt = _dealt(plan)
    with beside(plan.run):
        workload = cotuning.SiloTuning(
            plan.study,
            name,
            _own(dealt, name, plan),
            data=plan.data,
            device=plan.device,
            planned=plan.planned[name],
            alone=True,
        )
    adapter = workload.adapter()
    for round_ in range(plan.study.rounds):
        workload.fit(adapter, round_, silent)
        adapter = workload.adapter()
    return workload, dealt.test


def _dealt(plan: SiloPlan) -> Dealt:
    from securefedcollm.federation.dealing import deal

    return plan.once("dealt", lambda: deal(plan.study, plan.data, plan.noisy, plan.files))


def _own(dealt: Dealt, name: str, plan: SiloPlan) -> Sequence[Question]:
    """The questions of a silo that take part."""
    questions, kept = dealt.silos[name], plan.kept.get(name)
    return questions if kept is None else [questions[at] for at in kept]


def for_each(
    job: Callable[[str], T],
    names: Sequence[str],
    workers: int,
    context: BaseContext | None,
    progress: Progress,
) -> list[T]:
    """``job`` for every silo, in ``workers`` processes (0: in this one)."""
    if workers == 0:
        return [job(name) for name in names]
    found = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done, result in enumerate(pool.map(job, names), start=1):
            found.append(result)
            progress(done, len(names), "standalone silos")
    return found


def planned(study: Study, questions: Sequence[Question]) -> PoissonGaussian | None:
    """What a round of the silo's own DP-SGD releases; None without it."""
    from securefedcollm.federation.cotuning import planned_event

    if study.privacy is None or study.privacy.unit == "silo":
        return None
    return planned_event(study, questions)


class _Told(NamedTuple):
    """What a table's notes say about an embedded world."""

    groups: str
    public: str
    share: str


_TOLD: Final = {
    "hospitals": _Told(
        "general: knowledge that {}; private: rules that only silos' records hold.",
        "",
        "1/{} of the private rules",
    ),
    "digits": _Told(
        "general: digits as {} seen them; private: digits through the silos' faulty scanners.",
        "The server's pictures include faulty ones without their labels.",
        "one of the scanners",
    ),
    "wards": _Told(
        "general: words of ordinary speakers as {} heard them; private: words in the silos' own "
        "voices.",
        "The server's recordings include those voices without labels.",
        "one kind of voice",
    ),
}


def _notes(study: Study, baselines: tuple[str, ...]) -> list[str]:
    notes = []
    if study.task.data.builtin:
        known = "the LLM had" if study.models.llm else "the model had"
        told = _TOLD[study.task.data.builtin]
        notes.append(told.groups.format(known))
        if study.models.llm and study.task.kind == "multiple_choice":
            notes.append("The public prompts include unanswered ones on the private topics.")
        if study.models.llm and told.public:
            notes.append(told.public)
    if study.task.data.builtin and study.task.data.partition is None:
        share = _TOLD[study.task.data.builtin].share.format(study.silos.count)
        notes.append(f"A standalone silo sees {share}, which caps it.")
    if study.generative:
        notes.append("Accuracy: the share of the answers' tokens that are the most probable one.")
    if baselines and study.privacy:
        notes.append(
            "Each row is a run of its own with the same ε; publishing them all would add up."
        )
    if study.privacy and study.privacy.unit == "silo" and "standalone" in baselines:
        notes.append("A standalone silo shows its model to nobody: it trains without noise.")
    if study.scheme == "ckks-authority":
        notes.append("The authority ran on this machine; its worth is that it runs elsewhere.")
    notes.append("Identities were throw-away; a real study is signed by its participants.")
    return notes


def _prefixed(progress: Progress, prefix: str) -> Progress:
    def report(done: int, total: int, text: str) -> None:
        progress(done, total, f"{prefix}: {text}")

    return report
