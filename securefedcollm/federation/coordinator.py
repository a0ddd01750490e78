"""The server's round loop: broadcast, let silos tune, aggregate, absorb the mean, distil, repeat.

Adversary: this code. Nothing here is trusted by the silos; it sees packed masked words, their sum,
and what follows from the sum. It decodes only what the aggregation protocol opened, which needs the
consent of a threshold of silos.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Set
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

from securefedcollm.aggregation import (
    STEPS,
    AbandonedError,
    Authority,
    CoordinatorSide,
    Roster,
    RoundHeader,
    RoundResult,
    Step,
    coordinator_side,
)
from securefedcollm.errors import (
    ProtocolError,
    QuorumError,
    RemoteProtocolError,
    TransportError,
)
from securefedcollm.federation.asking import Asking, Traffic
from securefedcollm.federation.engines import Engine
from securefedcollm.federation.engines.link import SLOWEST
from securefedcollm.federation.keeping import best_round, is_over, score_of
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
    Deliver,
    EndRun,
    MakeKey,
    Ready,
    Request,
    Trained,
    Witnessed,
    adapter_bytes,
    model_digest,
)
from securefedcollm.federation.plan import (
    adaptive_clip,
    joint_step,
    quantiser,
    round_header,
    round_of,
    silo_unit,
    sum_name,
)
from securefedcollm.federation.records import ServerRecord
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import Progress, ServerWorkload, Vector
from securefedcollm.privacy.adaptive_clip import AdaptiveClip
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.silo_unit import SiloUnit
from securefedcollm.study import Study

log = logging.getLogger(__name__)

TRAIN_TIMEOUT = 24 * 3600.0
STEP_TIMEOUT = 600.0
MAX_ATTEMPTS = 3
MAX_REJOINS = 16
"""At one sum. Adversary: a silo that comes and goes; the others allow 64 attempts."""

LAST_CALL = 60.0
"""Seconds for which silos that are gone are waited for when all rounds are done."""

Rejoined = Callable[[Set[str], int, float], bool]
"""``rejoined(silos, count, most)``: waits until so many of these silos, which could not be reached,
are there again; returns whether they are, after ``most`` seconds or its own limit at last."""

Arrived = Callable[[Set[str], float], Set[str]]
"""``arrived(silos, most)``, when all rounds are done: waits until one of these silos is there;
returns those that are, or none after ``most`` seconds."""


def nobody_rejoins(silos: Set[str], count: int, most: float) -> bool:
    """For an engine whose silos do not come back."""
    return False


def nobody_arrives(silos: Set[str], most: float) -> Set[str]:
    """Likewise."""
    return frozenset()


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
        progress: Progress,
        on_round: Callable[[dict[str, Any]], None] = lambda record: None,
        authority: Authority | None = None,
        rejoined: Rejoined = nobody_rejoins,
    ) -> None:
        """
        Args:
            rejoined: waits for silos that could not be reached.
            on_round: called with each finished round's record, after it is durable.
            authority: who holds the key, where one party does; the engine knows it by its name.
        """
        self._authority = authority
        self._parties = (*roster.names, *([authority.name] if authority else []))
        self._evidence = evidence
        self._study = study
        self._roster = roster
        self._asking = Asking(engine)
        self._workload = workload
        self._store = store
        self._progress = progress
        self._on_round = on_round
        self._rejoined = rejoined
        self._delivered: dict[str, int] = {}
        """Silo → rounds that were done when it was given the adapter."""
        self.told: set[str] = set()
        """Silos that were told that the run is over, after they were given the adapter."""

    def run(self) -> None:
        """Run every round that is still to do, unless the study's patience is at its end.

        Raises:
            QuorumError: too few silos are left; the reasons are in the message. The run can be
                resumed.
            ConfigError: it was begun with another base model. Nothing is changed.
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

        Whoever is not there any more is not told: the run is finished all the same. But nobody is
        told to leave while an auditor would miss its countersignature.

        Raises:
            QuorumError: too few silos vouch for the evidence log; the next call asks them again.
        """
        if self._asking.away:  # the last call: for the adapter, and to settle
            self._rejoined(self._asking.away, len(self._asking.away), LAST_CALL)
        absent = [silo for silo in self._roster.names if silo not in self._evidence.vouching]
        if absent:
            silent = self._countersign(absent)
            needed = self._study.threshold - len(self._evidence.vouching)
            gone = self._asking.away & set(absent)
            if (
                not self._evidence.sealed
                and len(gone) >= needed
                and self._rejoined(gone, needed, math.inf)
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

        Returns those that could not be reached this time either. Who refuses would refuse again.

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
        sums = study.sums // study.rounds
        for step in range(state.step, sums):
            if study.joint:
                self._progress(step, sums, "joint steps")
            self._sum(round_ * sums + step, round_, record)
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
        best = best_round(study, [*state.history, record]) == round_ + 1
        self._store.finish_round(self._workload, record, remembers=study.remembers, best=best)
        self._note_finished(round_)
        self._countersign(self._roster.names)
        self._deliver()
        self._on_round(record)

    def _sum(self, sum_: int, round_: int, record: dict[str, Any]) -> None:
        """One secure sum, and what follows from it for the global adapter."""
        if self._store.state.opened:  # a crash came after the sum: it is not asked for again
            mean: Vector | None = self._store.load_mean()
        else:
            mean = self._aggregate_round(sum_, record)
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
        score = score_of(self._study, self._store.state.history[round_])
        self._evidence.finished(last, adapter, self._store.adapters, score)

    def _deliver(self, among: Set[str] | None = None) -> None:
        """Give every silo that vouches for the evidence log the newest adapter, with what the log
        says of it. Who is not there does without. ``among``: these alone."""
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
        """Have these silos, as far as they are there, vouch for the evidence log so far.

        Returns the reasons of those that do not.
        """
        silos, lost = list(names), dict[str, str]()
        for _ in range(2):  # a silo that vouched for another head than we know of is asked again
            asked = {silo: self._evidence.witness(silo) for silo in silos}
            requests = {silo: request for silo, request in asked.items() if request is not None}
            if not requests:
                break
            replies = self._asking.ask(requests, STEP_TIMEOUT, Traffic(self._parties), lost)
            silos = [
                silo
                for silo, reply in replies.items()
                if isinstance(reply, Witnessed) and not self._evidence.witnessed(silo, reply)
            ]
        for silo, reason in lost.items():
            log.warning("%s does not vouch for the evidence log: %s", silo, reason)
        return lost

    def _aggregate_round(self, sum_: int, record: dict[str, Any]) -> Vector | None:
        """One opened mean, repeating a failed attempt with whoever is still there.

        None if the sum was being opened when it failed and can no longer be: silos unmask one
        survivor set per round, for good. The run goes on without this round's updates.

        Raises:
            QuorumError: too few silos; nothing was opened, and the round can be resumed.
        """
        problems: list[str] = []
        hopeless = False
        absent: dict[str, str] = {}
        failures = rejoins = 0
        while failures < MAX_ATTEMPTS and not hopeless:
            failures += 1
            attempt = self._store.begin_attempt()
            try:
                return self._attempt(sum_, attempt, record, absent)
            except _MissingError as error:
                self._evidence.failed(sum_, attempt, error)
                problems.append(error.message)
                # Who refuses would refuse again, in this round and the next.
                returns = self._asking.away & set(error.among)
                hopeless = len(returns) < error.count or rejoins >= MAX_REJOINS
                hopeless = hopeless or not self._rejoined(returns, error.count, math.inf)
                rejoins += 1
                failures -= 1
            except AbandonedError as error:
                # The key needs all its shares, so the others go on without the lost; once a sum was
                # being opened, only its very members can open it.
                self._evidence.failed(sum_, attempt, error)
                log.warning("%s attempt %d: %s", sum_name(self._study, sum_), attempt, error)
                problems.append(error.message)
                if not self._store.state.opening:
                    absent |= error.lost
                    failures -= 1  # one silo fewer each time, down to the quorum
            except ProtocolError as error:
                self._evidence.failed(sum_, attempt, error)
                log.warning("%s attempt %d: %s", sum_name(self._study, sum_), attempt, error)
                problems.append(error.message)
                if problems.count(error.message) > 1:
                    break
        reasons = "; ".join(dict.fromkeys(problems))
        name = sum_name(self._study, sum_)
        if self._store.state.opening and not hopeless:
            log.warning("%s is lost: its sum was being opened and cannot be", name)
            record["lost"] = reasons
            self._evidence.lost(sum_)
            return None
        raise QuorumError(
            f"{name} failed: {reasons}",
            hint="mend the silos named, then start the same command again (`simulate`: --resume)",
        )

    def _attempt(
        self, sum_: int, attempt: int, record: dict[str, Any], absent: dict[str, str]
    ) -> Vector:
        """One attempt at a sum: its mean, saved. ``absent``: silos that are not asked, and why."""
        begun = self._begin(sum_, attempt)
        traffic, lost = Traffic(self._parties), self._store.state.barred | absent
        self._have_trained(begun, traffic, lost)
        side = coordinator_side(
            self._study.scheme,
            header=begun.header,
            roster=self._roster,
            authority=self._authority,
        )
        for silo, reason in lost.items():
            side.lost(silo, reason)
        self._drive(side, begun.header, traffic)
        result = side.result
        self._evidence.summed(begun.header, result)
        traffic.add_to(record)
        gone = record.get("dropouts", {}) | lost | dict(result.excluded)
        record["dropouts"] = dict(sorted(gone.items()))
        return self._decoded(begun, result, record)

    def _begin(self, sum_: int, attempt: int) -> _Begun:
        """What every party of this attempt is told, in the evidence before it is sent."""
        adapter = adapter_bytes(self._workload.adapter())
        round_ = round_of(self._study, sum_)
        layout = self._workload.layout(round_)
        base, size = self._workload.base_digest, self._workload.update_size(round_)
        clip = self._clip()
        clip_norm = clip.clip_norm if clip else None
        unit = joint_step(self._study, size) or silo_unit(
            self._study, self._workload.update_size, round_, clip_norm
        )
        mechanism = unit.identity if unit else b""
        header = round_header(
            self._study,
            roster=self._roster,
            run_id=self._store.run_id,
            round_=sum_,
            attempt=attempt,
            model=model_digest(base, layout, adapter, mechanism),
            values=unit.values if unit else size,
        )
        adapted = unit.adapted if isinstance(unit, SiloUnit) else None
        self._evidence.round(header, base, layout, adapter, mechanism, adapted)
        request = BeginRound(
            run_id=self._store.run_id,
            round=sum_,
            attempt=attempt,
            layout=layout,
            adapter=adapter,
            clip_norm=clip_norm or 0.0,
        )
        return _Begun(header, request, unit, clip)

    def _have_trained(self, begun: _Begun, traffic: Traffic, lost: dict[str, str]) -> None:
        """Have everybody but the ``lost`` train, and the authority make a key.

        Raises:
            _MissingError: too few of them did; ``lost`` has the reasons of the others.
        """
        invited = [silo for silo in self._roster.names if silo not in lost]
        requests: dict[str, Request] = dict.fromkeys(invited, begun.request)
        office, header = self._authority, begun.header
        if office:
            requests[office.name] = MakeKey(
                self._store.run_id,
                header.round,
                header.attempt,
                header.model_digest,
                header.parameters.values,
            )
        replies = self._asking.ask(requests, TRAIN_TIMEOUT, traffic, lost)
        if office and not isinstance(replies.get(office.name), Ready):
            raise _NoAuthorityError(
                f"the authority {office.name} is not there: {lost.get(office.name, '')}",
                (office.name,),
                1,
            )
        trained = [silo for silo, reply in replies.items() if isinstance(reply, Trained)]
        if len(trained) < self._study.minimum:
            raise _TooFewUpdatesError(
                f"{len(trained)} of {self._study.silos.count} silos delivered an update, "
                f"{self._study.minimum} are needed"
                + "".join(f"; {silo}: {reason}" for silo, reason in sorted(lost.items())),
                invited,
                self._study.minimum - len(trained),
            )

    def _decoded(self, begun: _Begun, result: RoundResult, record: dict[str, Any]) -> Vector:
        """The mean that an opened sum holds, saved: the sum is not asked for again."""
        count, unit, clip = len(result.survivors), begun.unit, begun.clip
        clip_norm = clip.clip_norm if clip else None
        if isinstance(unit, JointStep):
            mean = unit.decode(result.sum)
        elif unit is None:
            size = begun.header.parameters.values
            mean = quantiser(self._study, size).decode(result.sum, count)
        else:
            mean, indicator_sum = unit.decode(result.sum, count)
            if clip is not None and indicator_sum is not None:
                record["clip_norm"] = clip.clip_norm
                clip_norm = clip.next(indicator_sum, count).clip_norm
        mean = np.asarray(mean, dtype=np.float32)
        self._store.save_mean(mean, list(result.survivors), clip_norm)
        return mean

    def _clip(self) -> AdaptiveClip | None:
        """The clip norm of the coming round, if it is one that adapts."""
        start, now = adaptive_clip(self._study), self._store.state.clip_norm
        return start if start is None or now is None else structs.replace(start, clip_norm=now)

    def _drive(self, side: CoordinatorSide, header: RoundHeader, traffic: Traffic) -> None:
        """Play the aggregation protocol to its end."""
        step, steps = 0, len(STEPS[self._study.scheme])
        while True:
            self._progress(step, steps, "secure aggregation")
            if side.step is Step.UNMASK:
                self._evidence.opening(header, side.transcript)
                self._store.begin_opening()
            requests = {silo: Aggregate(frame) for silo, frame in side.requests().items()}
            lost: dict[str, str] = {}
            replies = self._asking.ask(requests, STEP_TIMEOUT, traffic, lost)
            for silo, reason in lost.items():
                side.lost(silo, reason)
            for silo, reply in replies.items():
                if not isinstance(reply, Aggregated):
                    side.lost(silo, "answered out of turn")
                    continue
                try:
                    side.receive(silo, reply.frame)
                except RemoteProtocolError as error:
                    log.warning("%s", error)  # the silo is out of this round and named in it
            step += 1
            try:
                more = side.advance()
            except RemoteProtocolError as error:
                # A dealer whose shares fit no secret spoils the opening for all; not twice.
                self._store.bar(error.peer, error.message)
                raise
            if not more:
                self._progress(steps, steps, "secure aggregation")
                return


class _Begun(NamedTuple):
    """An attempt at a sum."""

    header: RoundHeader
    request: BeginRound
    unit: SiloUnit | JointStep | None
    clip: AdaptiveClip | None


class _MissingError(ProtocolError):
    """Parties failed or refused before the aggregation began.

    Args:
        among: of these ``count`` more are needed.
    """

    def __init__(self, message: str, among: Iterable[str], count: int) -> None:
        super().__init__(message)
        self.among, self.count = tuple(among), count


class _TooFewUpdatesError(_MissingError):
    """Too many silos did."""


class _NoAuthorityError(_MissingError):
    """The key holder did."""
