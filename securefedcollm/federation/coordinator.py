"""The server's round loop: broadcast, let silos tune, aggregate, absorb the mean, distil, repeat.

Adversary: this code. The silos trust nothing here; it sees packed masked words, their sum, and what
follows from the sum (:mod:`~.summing`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Set
from typing import Any

import numpy as np

from securefedcollm.aggregation import (
    Authority,
    Roster,
)
from securefedcollm.errors import (
    QuorumError,
    TransportError,
)
from securefedcollm.federation.asking import Asking, Traffic
from securefedcollm.federation.engines import Engine
from securefedcollm.federation.engines.link import SLOWEST
from securefedcollm.federation.hooks import NO_HOOKS, Hooks
from securefedcollm.federation.keeping import (
    best_round,
    counted,
    counts_of,
    is_over,
    score_of,
)
from securefedcollm.federation.messages import (
    Deliver,
    EndRun,
    Request,
    Witnessed,
    adapter_bytes,
)
from securefedcollm.federation.plan import counting
from securefedcollm.federation.records import ServerRecord
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.summing import STEP_TIMEOUT, Summing
from securefedcollm.federation.workload import ServerWorkload, Vector
from securefedcollm.study import Study

log = logging.getLogger(__name__)

LAST_CALL = 60.0
"""Seconds to wait for silos that are gone when all rounds are done."""


class Coordinator:
    """Runs a study's rounds over an engine, durably."""

    def __init__(
        self,
        *,
        study: Study,
        roster: Roster,
        engine: Engine,
        workload: ServerWorkload,
        store: RunStore,
        evidence: ServerRecord,
        hooks: Hooks = NO_HOOKS,
        authority: Authority | None = None,
    ) -> None:
        """
        Args:
            authority: the key holder, where there is one; the engine knows it by its name.
        """
        self._parties = (*roster.names, *([authority.name] if authority else []))
        self._evidence = evidence
        self._study = study
        self._roster = roster
        self._asking = asking = Asking(engine)
        self._workload = workload
        self._store = store
        self._hooks = hooks
        self._progress = hooks.progress
        self._summing = Summing(
            study=study,
            roster=roster,
            authority=authority,
            asking=asking,
            workload=workload,
            store=store,
            evidence=evidence,
            hooks=hooks,
        )
        self._delivered: dict[str, int] = {}
        """Silo → rounds that were done when it got the adapter."""
        self.told: set[str] = set()
        """Silos that know that the run is over, after they got the adapter."""

    def run(self) -> None:
        """Run every round that is still to do, unless the study's patience is at its end.

        Raises:
            QuorumError: too few silos are left; the reasons are in the message. The run can be
                resumed.
            ConfigError: it began with another base model. Nothing is changed.
        """
        state, study = self._store.state, self._study
        if state.round == 0 and not state.history:
            self._store.save_adapters(self._workload, 0)
        self._store.load_adapters(self._workload, remembers=study.remembers)
        if state.round:  # a crash may have come between the two
            self._note_finished(state.round - 1)
        if state.round < self._study.rounds:
            self._evidence.check_base(self._workload.base_digest)
        while not is_over(self._study, state.history):
            self._progress(state.round, self._study.rounds, "rounds")
            self._run_round(state.round)
        self._progress(self._study.rounds, self._study.rounds, "rounds")

    def end(self) -> None:
        """Tell all parties, so that silos settle what the last sum cost them, and can leave.

        A silo that has gone is not told: the run is finished all the same. But no silo is told to
        leave while an auditor would miss its countersignature.

        Raises:
            QuorumError: too few silos vouch for the evidence log; the next call asks them again.
        """
        if self._asking.away:  # the last call: for the adapter, and to settle
            self._hooks.rejoined(self._asking.away, len(self._asking.away), LAST_CALL)
        vouching = self._evidence.vouching
        absent = [silo for silo in self._roster.names if silo not in vouching]
        if absent:
            silent = self._countersign(absent)
            needed = self._study.threshold - len(self._evidence.vouching)
            gone = self._asking.away & set(absent)
            if (
                not self._evidence.sealed
                and len(gone) >= needed
                and self._hooks.rejoined(gone, needed, math.inf)
            ):
                silent = self._countersign(absent)
            if not self._evidence.sealed:
                said = [f"{silo}: {reason}" for silo, reason in silent.items()]
                reasons = "; ".join(said) or "what they signed is not its head"
                raise QuorumError(
                    f"all rounds are done, but fewer than {self._study.threshold} silos vouch for "
                    f"the evidence log ({reasons})",
                    hint="start the same command again when they are back (`simulate`: --resume)",
                )
        self._deliver()
        try:
            self._send_home(self._parties)
        except TransportError as error:
            log.warning("nobody is there to be told that the run is over: %s", error)

    def end_for(self, late: Set[str]) -> Set[str]:
        """After :meth:`end`, perhaps of an earlier process: the same for silos that were away.

        Returns those that could not be reached this time either. A refusal counts as final.

        Raises:
            TransportError: none of them is there.
        """
        self._store.load_adapters(self._workload)
        self._countersign(sorted(late))
        self._deliver(late)
        self._send_home(sorted(late))
        return late & self._asking.away

    def _send_home(self, parties: Iterable[str]) -> None:
        requests = dict.fromkeys(parties, EndRun(self._store.run_id))
        replies = self._asking.ask(requests, STEP_TIMEOUT, Traffic(self._parties), {})
        self.told |= set(replies) & set(self._roster.names)

    def _run_round(self, round_: int) -> None:
        started = time.monotonic()
        state, study = self._store.state, self._study
        record: dict[str, Any] = {"round": round_ + 1} | state.partial
        if not state.tuned:
            self._tune(round_, record, started)
        if study.validation is not None:
            if not state.tuned:
                self._store.finish_tuning(self._workload, record)
            self._validate(round_, record)
        best = best_round(study, [*state.history, record]) == round_ + 1
        self._store.finish_round(self._workload, record, remembers=study.remembers, best=best)
        self._note_finished(round_)
        self._countersign(self._roster.names)
        self._deliver()
        self._hooks.on_round(record)

    def _tune(self, round_: int, record: dict[str, Any], started: float) -> None:
        """The sums of tuning, the server's phase, and what is measured here."""
        study, sums = self._study, self._study.tuning_sums
        first = round_ * (study.sums // study.rounds)
        for step in range(self._store.state.step, sums):
            if study.joint:
                self._progress(step, sums, "joint steps")
            self._sum(first + step, round_, record)
            if step + 1 < sums:
                self._store.finish_step(self._workload, record)
        if study.joint:
            self._progress(sums, sums, "joint steps")
        aggregated = time.monotonic()
        record["distillation"] = self._workload.distil(round_, self._progress)
        self._progress(0, 1, "evaluation")
        record |= self._workload.measure()
        self._progress(1, 1, "evaluation")
        record["seconds"] = {
            "silos_and_sum": round(aggregated - started, 3),
            "server": round(time.monotonic() - aggregated, 3),
        }

    def _validate(self, round_: int, record: dict[str, Any]) -> None:
        """The silos' noised counts of right and wrong answers by the round's model."""
        sum_ = (round_ + 1) * (self._study.sums // self._study.rounds) - 1
        found: dict[str, Any] = {key: record.get(key, {}) for key in ("bytes_up", "bytes_down")}
        if self._store.state.opened:  # a crash came after the sum: it is not asked for again
            counts: Any = self._store.load_opened()
        else:
            counts = self._summing.mean_of(sum_, found)
        record |= {key: found[key] for key in ("bytes_up", "bytes_down")}
        if counts is None:
            record["private"] = {"lost": found["lost"]}
            return
        survivors = len(self._store.state.opened)
        made = counting(self._study, self._store.state.sums)
        record["private"] = counted(made, [int(value) for value in counts], survivors)

    def _sum(self, sum_: int, round_: int, record: dict[str, Any]) -> None:
        """One secure sum, and what follows from it for the global adapter."""
        if self._store.state.opened:  # a crash came after the sum: it is not asked for again
            mean: Vector | None = self._store.load_mean()
        else:
            found = self._summing.mean_of(sum_, record)
            mean = None if found is None else found.astype(np.float32, copy=False)
        opened = self._store.state.opened
        before = record.get("survivors", opened)
        record["survivors"] = [silo for silo in before if silo in opened]
        if mean is None:
            return
        if self._study.joint:
            self._workload.descend(mean, round_)
        else:
            self._workload.absorb(mean, round_)

    def _note_finished(self, round_: int) -> None:
        adapter = adapter_bytes(self._workload.adapter())
        last = (round_ + 1) * (self._study.sums // self._study.rounds) - 1
        record = self._store.state.history[round_]
        score, counts = score_of(self._study, record), counts_of(record)
        self._evidence.finished(last, adapter, self._store.adapters, score, counts)

    def _deliver(self, among: Set[str] | None = None) -> None:
        """Give every silo that vouches for the evidence log the newest adapter, with what the log
        says of it. Absent silos do without. ``among``: these alone."""
        done, proof = self._store.state.round, self._evidence.delivery()
        if proof is None:
            return
        adapter = adapter_bytes(self._workload.adapter())
        request = Deliver(
            run_id=self._store.run_id,
            checkpoint=proof[0],
            finished=proof[1],
            layout=self._workload.layout(done - 1),
            adapter=adapter,
        )
        silos = [s for s in self._evidence.vouching if self._delivered.get(s, 0) < done]
        silos = silos if among is None else [silo for silo in silos if silo in among]
        timeout, lost = STEP_TIMEOUT + len(adapter) / SLOWEST, dict[str, str]()
        requests: dict[str, Request] = dict.fromkeys(sorted(silos), request)
        if not silos:
            return
        traffic = Traffic(self._parties)
        replies = self._asking.ask(requests, timeout, traffic, lost)
        self._delivered |= dict.fromkeys(replies, done)
        self._store.amend(traffic.add_to)
        for silo, reason in lost.items():
            log.warning("%s does not take the adapter of round %d: %s", silo, done, reason)

    def _countersign(self, names: Iterable[str]) -> dict[str, str]:
        """Have those of these silos that are there vouch for the evidence log so far.

        Returns the reasons of those that do not.
        """
        silos, lost = list(names), dict[str, str]()
        for _ in range(2):  # ask a silo again if it vouched for a head that we do not know
            asked = {silo: self._evidence.witness(silo) for silo in silos}
            requests = {silo: request for silo, request in asked.items() if request is not None}
            if not requests:
                break
            replies = self._asking.ask(requests, STEP_TIMEOUT, Traffic(self._parties), lost)
            silos = self._evidence.witnessed(
                {silo: reply for silo, reply in replies.items() if isinstance(reply, Witnessed)}
            )
        for silo, reason in lost.items():
            log.warning("%s does not vouch for the evidence log: %s", silo, reason)
        return lost
