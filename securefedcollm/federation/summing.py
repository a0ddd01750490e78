"""One secure sum: attempt after attempt, until its mean is known or it is lost.

Adversary: this code, as in :mod:`~.coordinator`. It decodes only what the aggregation protocol
opened, which needs the consent of a threshold of silos.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

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
from securefedcollm.aggregation.masking.masks import WORD_BYTES
from securefedcollm.errors import ProtocolError, QuorumError, RemoteProtocolError
from securefedcollm.federation.asking import Asking, Traffic
from securefedcollm.federation.excess import layered, stated
from securefedcollm.federation.hooks import Hooks
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginEarlier,
    BeginRound,
    Layers,
    MakeKey,
    Ready,
    Request,
    Surplus,
    Trained,
    Unmasked,
    adapter_bytes,
    model_digest,
)
from securefedcollm.federation.plan import (
    adaptive_clip,
    counting,
    joint_step,
    noises_sums,
    quantiser,
    round_header,
    round_of,
    run_scope,
    silo_unit,
    sum_name,
    validates,
    weight_of_all,
)
from securefedcollm.federation.records import ServerRecord
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.workload import Opened, ServerWorkload
from securefedcollm.privacy.adaptive_clip import AdaptiveClip
from securefedcollm.privacy.counting import Counting
from securefedcollm.privacy.events import SUM_KIND
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.silo_unit import SiloUnit
from securefedcollm.study import Study

log = logging.getLogger(__name__)

TRAIN_TIMEOUT = 24 * 3600.0
STEP_TIMEOUT = 600.0
MAX_ATTEMPTS = 3
MAX_REJOINS = 16
"""Per sum. Adversary: a silo that comes and goes; the others allow 64 attempts."""


UPLOADS: Final = 1 << 28
"""Bytes of masked vectors in memory at a time, 256 MiB; but at least one vector."""


class Summing:
    """Has one sum after another trained for, summed and opened, durably."""

    def __init__(
        self,
        *,
        study: Study,
        roster: Roster,
        authority: Authority | None,
        asking: Asking,
        workload: ServerWorkload,
        store: RunStore,
        evidence: ServerRecord,
        hooks: Hooks,
    ) -> None:
        """
        Args:
            authority: the key holder, where there is one; the engine knows it by its name.
        """
        self._study = study
        self._roster = roster
        self._authority = authority
        self._parties = (*roster.names, *([authority.name] if authority else []))
        self._asking = asking
        self._workload = workload
        self._store = store
        self._evidence = evidence
        self._hooks = hooks
        self._statements: dict[str, bytes] = {}

    def mean_of(self, sum_: int, record: dict[str, Any]) -> Opened | None:
        """One opened mean; a failed attempt is repeated with whoever is still there.

        For a validation it is the opened counts, float64 [2] of whole numbers.

        None if the sum was being opened when it failed and can no longer be: silos unmask one
        survivor set per round, for good, and on a graph they do so in one attempt. The run goes on
        without this round's updates.

        Raises:
            QuorumError: too few silos; nothing was opened, and the round can be resumed.
        """
        problems = self._broken_off(sum_)
        hopeless = False
        absent: dict[str, str] = {}
        failures = rejoins = 0
        while failures < MAX_ATTEMPTS and not hopeless and not self._bound():
            failures += 1
            attempt = self._store.begin_attempt()
            try:
                return self._attempt(sum_, attempt, record, absent)
            except _MissingError as error:
                self._evidence.failed(sum_, attempt, error)
                problems.append(error.message)
                # A silo that refuses would refuse again, in this round and the next.
                returns = self._asking.away & set(error.among)
                hopeless = len(returns) < error.count or rejoins >= MAX_REJOINS
                hopeless = hopeless or not self._hooks.rejoined(returns, error.count, math.inf)
                rejoins += 1
                failures -= 1
            except AbandonedError as error:
                # The key needs all its shares, so the others go on without the lost; once an
                # opening has begun, only that sum's very members can finish it.
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

    def _bound(self) -> bool:
        """Whether silos have bound themselves to an attempt that is over: on a graph, when they
        agreed to its survivors. They would train and upload again, and then refuse."""
        return self._study.graph is not None and self._store.state.opening

    def _broken_off(self, sum_: int) -> list[str]:
        """What became of an attempt to which silos were bound when this server stopped."""
        if not self._bound():
            return []
        stopped = ProtocolError("the server stopped after silos had agreed to the survivors")
        self._evidence.failed(sum_, self._store.state.attempt - 1, stopped)
        return [stopped.message]

    def _attempt(
        self, sum_: int, attempt: int, record: dict[str, Any], absent: dict[str, str]
    ) -> Opened:
        """One attempt at a sum: its mean, saved. ``absent``: silos that are not asked, and why."""
        begun, request = self._begin(sum_, attempt)
        traffic, lost = Traffic(self._parties), self._store.state.barred | absent
        self._have_trained(begun, request, traffic, lost)
        del request  # the global adapter may be as long as a model
        side = coordinator_side(
            self._study.scheme,
            header=begun.header,
            roster=self._roster,
            authority=self._authority,
            narrow=True,
        )
        for silo, reason in lost.items():
            side.lost(silo, reason)
        self._statements = {}
        self._drive(side, begun.header, traffic)
        result = side.result
        self._evidence.summed(begun.header, result)
        keys = self._surplus(begun, result, traffic, record)
        traffic.add_to(record)
        gone = record.get("dropouts", {}) | lost | dict(result.excluded)
        record["dropouts"] = dict(sorted(gone.items()))
        return self._decoded(begun, result, record, keys)

    def _surplus(
        self, begun: _Begun, result: RoundResult, traffic: Traffic, record: dict[str, Any]
    ) -> list[list[bytes]]:
        """Keys of the noise that this sum does not need, of every silo that opens its own."""
        made = layered(begun.unit)
        needed = len(made.layers[made.surplus(len(result.survivors))]) if made else 0
        if not needed:
            return []
        round_, survivors = begun.header.round, result.survivors
        scope = run_scope(self._study, self._store.run_id)
        statements = stated(self._statements, self._roster, scope, round_, survivors)
        request = Surplus(self._store.run_id, round_, list(survivors), statements)
        lost: dict[str, str] = {}
        found: dict[str, list[bytes]] = {}
        # With fewer statements every silo would refuse, and note that of this server.
        if len(statements) >= self._study.threshold:
            asked = dict.fromkeys(statements, request)
            for silo, reply in self._asking.ask(asked, STEP_TIMEOUT, traffic, lost).items():
                # Adversary: a silo. Other keys than its own spoil the sum as another vector would.
                if isinstance(reply, Layers) and len(reply.keys) == needed:
                    found[silo] = reply.keys
        kept = {*survivors} - {*found}
        if kept:
            record["excess_kept"] = sorted(kept.union(record.get("excess_kept", ())))
            why = "; ".join(f"{silo}: {lost.get(silo, 'no keys')}" for silo in sorted(kept))
            log.warning("excess noise stays in %s (%s)", sum_name(self._study, round_), why)
        return list(found.values())

    def _begin(self, sum_: int, attempt: int) -> tuple[_Begun, BeginRound]:
        """The message to every party of this attempt, in the evidence before it is sent."""
        adapter = adapter_bytes(self._workload.adapter())
        round_ = round_of(self._study, sum_)
        layout = self._workload.layout(round_)
        base, size = self._workload.base_digest, self._workload.update_size(round_)
        clip = self._clip()
        clip_norm = clip.clip_norm if clip else None
        unit = self._unit(sum_, size, clip_norm)
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
        earlier = noises_sums(self._study) and self._store.state.sums != SUM_KIND
        request = (BeginEarlier if earlier else BeginRound)(
            run_id=self._store.run_id,
            round=sum_,
            attempt=attempt,
            layout=layout,
            adapter=adapter,
            clip_norm=clip_norm or 0.0,
        )
        return _Begun(header, unit, clip), request

    def _unit(
        self, sum_: int, size: int, clip_norm: float | None
    ) -> SiloUnit | JointStep | Counting | None:
        """How the sum is noised; None if it needs no more noise than its updates have."""
        kind = self._store.state.sums
        if validates(self._study, sum_):
            return counting(self._study, kind)
        return joint_step(self._study, size, kind) or silo_unit(
            self._study, self._workload.update_size, round_of(self._study, sum_), clip_norm, kind
        )

    def _have_trained(
        self, begun: _Begun, request: BeginRound, traffic: Traffic, lost: dict[str, str]
    ) -> None:
        """Make everybody except the ``lost`` train, and the authority make a key.

        Raises:
            _MissingError: too few of them did; ``lost`` has the reasons of the others.
        """
        invited = [silo for silo in self._roster.names if silo not in lost]
        requests: dict[str, Request] = dict.fromkeys(invited, request)
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

    def _decoded(
        self,
        begun: _Begun,
        result: RoundResult,
        record: dict[str, Any],
        keys: list[list[bytes]],
    ) -> Opened:
        """The mean that an opened sum holds, saved: the sum is not asked for again.

        ``keys``: of noise to subtract first.
        """
        count, unit, clip = len(result.survivors), begun.unit, begun.clip
        clip_norm = clip.clip_norm if clip else None
        weight = weight_of_all(self._study, result.survivors)
        if isinstance(unit, Counting):
            counts = result.sum.astype(np.float64)  # exact: a sum of silos is far below 2^53
            self._store.save_mean(counts, list(result.survivors), self._store.state.clip_norm)
            return counts
        total, made = result.sum, layered(unit)
        if made and keys:
            total = made.without_surplus(total, count, keys)
        if isinstance(unit, JointStep):
            mean = unit.decode(total)
        elif unit is None:
            size = begun.header.parameters.values
            mean = quantiser(self._study, size).decode(total, weight)
        else:
            mean, indicator_sum = unit.decode(total, weight)
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
            self._hooks.progress(step, steps, "secure aggregation")
            if side.step is Step.UNMASK:
                self._evidence.opening(header, side.transcript)
            # On a graph a silo binds itself to the survivors when it agrees to them.
            if side.step is (Step.AGREE if header.on_graph else Step.UNMASK):
                self._store.begin_opening()
            requests = side.requests()
            for some in self._together(side.step, header, list(requests)):
                asked = {silo: Aggregate(requests[silo]) for silo in some}
                self._collect(side, asked, traffic)
            step += 1
            try:
                more = side.advance()
            except RemoteProtocolError as error:
                # A dealer whose shares fit no secret spoils the opening for all; not twice.
                self._store.bar(error.peer, error.message)
                raise
            if not more:
                self._hooks.progress(steps, steps, "secure aggregation")
                return

    def _together(self, step: Step, header: RoundHeader, silos: list[str]) -> Iterator[list[str]]:
        """The silos to ask at a time: as many as have room in memory with their uploads."""
        count = len(silos)
        if step is Step.UPLOAD and self._study.masked:
            upload = WORD_BYTES * header.parameters.words
            count = max(1, UPLOADS // upload)
        for start in range(0, len(silos), count):
            yield silos[start : start + count]

    def _collect(
        self, side: CoordinatorSide, asked: Mapping[str, Request], traffic: Traffic
    ) -> None:
        """Bring requests of the aggregation protocol to silos, and their replies to ``side``."""
        lost: dict[str, str] = {}
        replies = self._asking.ask(asked, STEP_TIMEOUT, traffic, lost)
        for silo, reason in lost.items():
            side.lost(silo, reason)
        for silo in list(replies):
            reply = replies.pop(silo)
            if not isinstance(reply, Aggregated):
                side.lost(silo, "answered out of turn")
                continue
            if isinstance(reply, Unmasked):
                self._statements[silo] = reply.statement
            try:
                side.receive(silo, reply.frame)
            except RemoteProtocolError as error:
                log.warning("%s", error)  # the silo is out of this round and named in it


class _Begun(NamedTuple):
    """An attempt at a sum."""

    header: RoundHeader
    unit: SiloUnit | JointStep | Counting | None
    clip: AdaptiveClip | None


class _MissingError(ProtocolError):
    """Parties failed or refused before the aggregation began.

    Args:
        among: ``count`` more of these are needed.
    """

    def __init__(self, message: str, among: Iterable[str], count: int) -> None:
        super().__init__(message)
        self.among, self.count = tuple(among), count


class _TooFewUpdatesError(_MissingError):
    """Too many silos did."""


class _NoAuthorityError(_MissingError):
    """The key holder did."""
