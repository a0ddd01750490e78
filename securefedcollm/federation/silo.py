"""A silo's side: train on request, protect the update, answer the aggregation protocol.

Adversary: the server, which chooses every frame that arrives here. The silo believes only its own
study, roster and keys, and derives the round header itself, from the adapter that it was sent.
:mod:`.charged` decides what its training costs, and when that is charged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from securefedcollm.aggregation import Roster, SiloSide, Step, silo_side
from securefedcollm.errors import (
    ConfigError,
    RemoteProtocolError,
    SecureFedCoLLMError,
)
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.engines.pace import Pace
from securefedcollm.federation.excess import check_opened, layered, state_opened
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
    Deliver,
    Delivered,
    Ended,
    EndRun,
    Layers,
    MakeKey,
    Refused,
    Reply,
    Surplus,
    Trained,
    Unmasked,
    Witness,
    decode_request,
    encode,
    model_digest,
)
from securefedcollm.federation.plan import (
    adaptive_clip,
    authority_of,
    counting,
    ends_round,
    joint_step,
    round_header,
    round_of,
    run_scope,
    silo_unit,
    sum_name,
    validates,
)
from securefedcollm.federation.records import SiloRecord
from securefedcollm.federation.silostore import OneRun, SumMemory
from securefedcollm.federation.workload import (
    Keep,
    Vector,
    keep_nothing,
)
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm.privacy.counting import Counting
from securefedcollm.privacy.events import SumKind
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.silo_unit import SiloUnit
from securefedcollm.study import Study

log = logging.getLogger(__name__)

_PART: Final = 1 << 20


@dataclass(frozen=True)
class Seat:
    """A silo's place in a study.

    Args:
        roster: the silos; that of the study, if the study has one.
        authority: public key of the party that holds the decryption key, where the study has one
            and names no participants.
    """

    study: Study
    name: str
    roster: Roster
    key: SigningKey
    authority: bytes = b""


class Clock(NamedTuple):
    """``now``: seconds, never set back; ``wait``: lets that many pass."""

    now: Callable[[], float]
    wait: Callable[[float], None]


CLOCK: Final = Clock(time.monotonic, time.sleep)


class SiloSession:
    """One silo in one study. Implements :class:`securefedcollm.federation.engines.SiloPort`."""

    def __init__(
        self,
        seat: Seat,
        training: ChargedTraining,
        evidence: SiloRecord,
        *,
        keep: Keep = keep_nothing,
        threads: int = 1,
        explain: bool = False,
        clock: Clock = CLOCK,
    ) -> None:
        """
        Args:
            keep: takes every adapter that a round ended with, once the evidence vouches for it.
            threads: that the secure sum may use.
            explain: tell the server *why* this silo cannot go on. Only for a simulation, in which
                the two are the same person: reasons depend on private data and other studies.
            clock: of ``local.reply_slot``.

        Raises:
            ConfigError: the roster is not the study's, or the authority is not known.
        """
        study = self._study = seat.study
        listed = study.silo_keys
        if listed and Roster(listed).root != seat.roster.root:
            raise ConfigError(
                "the silos of this run are not those of the signed study",
                where="roster",
                hint="build the roster from the study",
            )
        self._name, self._roster, self._key = seat.name, seat.roster, seat.key
        self._authority = authority_of(study, seat.authority)
        self.training, self._evidence = training, evidence
        self._workload, self._store = training.workload, training.store
        self._run = OneRun(self._store, study)
        self._keep = keep
        self._threads = threads
        self._explain = explain
        self._clock = clock
        slot = study.local.reply_slot
        self.pace = None if slot is None else Pace(slot)
        """Of whatever calls arrive during a training."""
        self._side: SiloSide | None = None
        self._at: tuple[bytes, int, int] = (b"", -1, -1)
        self._unit: SiloUnit | JointStep | Counting | None = None
        self._opened: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Whether the server has ended the run that this silo took part in."""
        return self._run.over

    def step(self, frame: bytes) -> bytes:
        """Answer one request. Never raises for what the server sent or the data hold."""
        reply: Reply
        asked, training = self._clock.now(), False
        try:
            match decode_request(frame):
                case BeginRound() as begin:
                    training = True
                    reply = self._begin(begin)
                case Aggregate(frame=inner):
                    reply = self._aggregate(inner)
                case Surplus() as surplus:
                    reply = self._open_surplus(surplus)
                case Witness() as request:
                    reply = self._evidence.countersign(request)
                case Deliver() as deliver:
                    reply = self._take(deliver)
                case EndRun() as end:
                    reply = self._end(end)
                case MakeKey():
                    raise RemoteProtocolError("asked a silo for the authority's key", peer="server")
        except SecureFedCoLLMError as error:
            log.warning("%s: %s", self._name, error)
            self._evidence.refused(error)
            self._drop()
            reply = self._refusal(error)
        if training:
            self._fill_slot(self._clock.now() - asked)
        return encode(reply)

    def _fill_slot(self, taken: float) -> None:
        """Let the rest of the study's slot pass.

        Adversary: a server that measures how long training took: that depends on how many records
        were sampled, and how long they are. Which slot an answer falls into still does.
        """
        slot = self._study.local.reply_slot
        if slot is not None:
            self._clock.wait(slot - taken % slot)

    def _refusal(self, error: SecureFedCoLLMError) -> Refused:
        # Adversary: a server that learns from refusals. What follows from its own frame it may
        # read; ε spent elsewhere, record counts, paths and failures on records stay here.
        if self._explain or isinstance(error, RemoteProtocolError):
            return Refused(type(error).__name__, error.message, error.hint)
        return Refused("Refused", "this silo cannot take part", "its own log says why")

    def _drop(self) -> None:
        """End the attempt here: answer nothing of it any more, and keep nothing."""
        if self._side is not None:
            self._side.close()
        self._side = None
        self._opened = ()

    def _begin(self, begin: BeginRound) -> Trained:
        self._drop()
        self._check_order(begin)
        self._evidence.check_base(self._workload.base_digest)
        adapter = self._read_adapter(begin, begin.round)
        kind = self.training.kind(run_scope(self._study, begin.run_id), begin.kind)
        unit = self._mechanism(begin.round, self._read_clip_norm(begin), kind)
        base, mechanism = self._workload.base_digest, unit.identity if unit else b""
        model = model_digest(base, begin.layout, begin.adapter, mechanism)
        header = round_header(
            self._study,
            roster=self._roster,
            run_id=begin.run_id,
            round_=begin.round,
            attempt=begin.attempt,
            model=model,
            values=unit.values if unit else self.training.values(begin.round),
        )
        scope = self._enter(begin, model)
        self.training.settle_before(scope, begin.round)
        adapted = unit.adapted if isinstance(unit, SiloUnit) else None
        self._evidence.round(header, base, begin.layout, begin.adapter, mechanism, adapted)
        integers = self.training.update(scope, begin.round, adapter, unit, kind)
        self._side = silo_side(
            self._study.scheme,
            header=header,
            roster=self._roster,
            name=self._name,
            signing_key=self._key,
            vector=integers,
            vector_id=sha256(b"securefedcollm/vector/v1\0", integers.data),
            journal=self._store,
            threads=self._threads,
            authority=self._authority,
        )
        self._at = (begin.run_id, begin.round, begin.attempt)
        self._unit = unit
        return Trained()

    def _mechanism(
        self, sum_: int, clip_norm: float | None, kind: SumKind
    ) -> SiloUnit | JointStep | Counting | None:
        """How this sum is noised; None if it is a plain sum of updates that need no more noise."""
        if validates(self._study, sum_):
            return counting(self._study, kind)
        if self._study.joint:
            return joint_step(self._study, self.training.values(sum_), kind)
        return silo_unit(self._study, self._workload.update_size, sum_, clip_norm, kind)

    def _aggregate(self, frame: bytes) -> Aggregated:
        side = self._side
        if side is None:
            raise RemoteProtocolError("asked to aggregate before a round began", peer="server")
        step = side.step
        self._check_journal()
        run_id, round_, attempt = self._at
        memory = SumMemory(self._store, run_scope(self._study, run_id), round_)
        # Durable, with one write, before the evidence knows of it and the reply leaves: what the
        # protocol records, and the basis of this round's settlement.
        with self._store.together():
            reply = side.handle(frame)
            # An upload under CKKS opens only with this silo's own share, which it gives for one set
            # of members a round, or by the authority, which opens one set a round; masked words
            # open without it.
            if step is Step.UPLOAD and self._study.masked:
                memory.uploaded(attempt)
            elif step in {Step.UNMASK, Step.NOTE}:
                memory.opened(attempt, self._study.noise_shares(len(side.transcript.survivors)))
        self._evidence.said(side)
        self._check_journal()  # put back meanwhile: no answer
        if step is Step.UNMASK and layered(self._unit):
            self._opened = side.transcript.survivors
            scope = run_scope(self._study, run_id)
            statement = state_opened(self._key, scope, round_, self._opened)
            return Unmasked(memoryview(reply), statement)
        return Aggregated(memoryview(reply))

    def _open_surplus(self, asked: Surplus) -> Layers:
        """Open the layers of noise that the sum which this silo opened does not need."""
        run_id, round_, _ = self._at
        if not self._opened or (asked.run_id, asked.round) != (run_id, round_):
            raise RemoteProtocolError("asked for noise of a sum that is not open", peer="server")
        scope = run_scope(self._study, run_id)
        # Adversary: a server that has layers opened for a large sum, and a smaller one opened with
        # this silo's share in it.
        check_opened(asked, self._roster, scope, self._opened, self._study.threshold)
        return Layers(self.training.surplus(scope, round_, self._unit, len(self._opened)))

    def _check_journal(self) -> None:
        self._evidence.check_journal(self._store, self._study.scheme)

    def _end(self, end: EndRun) -> Ended:
        """No further attempt at this run, durably; so its last sum can be settled too.

        Adversary: a server that ends a run early loses this silo's further rounds, and no more.
        """
        self._drop()
        self.training.forget()
        scope = self._run.end(end.run_id)
        self._check_journal()  # the settlement rests on it
        self.training.settle_before(scope, self._study.sums)
        return Ended()

    def _take(self, deliver: Deliver) -> Delivered:
        """Keep the adapter of a round's end, if the evidence vouches for it.

        Adversary: a server that delivers a second adapter for a round, or, before or after, has
        another one trained on. And one that watches: the answer is the same, and comes as soon,
        whatever this silo's operator then makes of the adapter.
        """
        scope = self._run.scope(deliver.run_id)
        finished = self._evidence.finished(deliver, self._study.threshold)
        if not (finished.round < self._study.sums and ends_round(self._study, finished.round)):
            raise RemoteProtocolError("delivered an adapter of no round's end", peer="server")
        adapter = self._read_adapter(deliver, finished.round)
        self._pin_end(scope, finished.round, deliver.adapter)
        shown = deliver.finished
        proof = {
            "checkpoint": deliver.checkpoint,
            "index": shown.index,
            "entry": shown.entry.decode(),
            "inclusion": [node.hex() for node in shown.inclusion],
        }
        self._keep(round_of(self._study, finished.round), adapter, proof)
        return Delivered()

    def _pin_end(self, scope: bytes, sum_: int, adapter: memoryview) -> None:
        """One adapter for a round's end, for good: the one that is kept, or trained on next."""
        digest = sha256(adapter)
        if self._store.record(b"ended:" + scope[:16] + sum_.to_bytes(4, "big"), digest) != digest:
            raise RemoteProtocolError(
                f"sent a second adapter as the end of {sum_name(self._study, sum_)}", peer="server"
            )

    def _enter(self, begin: BeginRound, model: bytes) -> bytes:
        """Durable rules on what may be trained at all, even if the process dies.

        Returns the run's scope.
        """
        marks = [*self._evidence.marks, *self.training.marks(run_scope(self._study, begin.run_id))]
        self._check_journal()
        with self._store.together():
            scope = self._run.enter(begin.run_id, begin.round, *marks)
            self.training.pin_data()
            # Adversary: a server that has one round trained on many models.
            pin = b"model:" + scope[:16] + begin.round.to_bytes(4, "big")
            if self._store.record(pin, model) != model:
                raise RemoteProtocolError(
                    f"sent a second global model for {sum_name(self._study, begin.round)}",
                    peer="server",
                )
            if begin.round and ends_round(self._study, begin.round - 1):
                self._pin_end(scope, begin.round - 1, begin.adapter)
            if validates(self._study, begin.round):  # it asks about the adapter of the round's end
                self._pin_end(scope, begin.round, begin.adapter)
        return scope

    def _check_order(self, begin: BeginRound) -> None:
        """Rounds and attempts of a run only ever go up, within the study's horizon."""
        if len(begin.run_id) != 16 or not 0 <= begin.attempt < 2**32:
            raise RemoteProtocolError("a malformed request to begin a round", peer="server")
        if not 0 <= begin.round < self._study.sums:
            raise RemoteProtocolError(
                f"asked for {sum_name(self._study, begin.round)} of a study of "
                f"{self._study.rounds} rounds",
                peer="server",
            )
        run, *last = self._at
        if run == begin.run_id and last >= [begin.round, begin.attempt]:
            raise RemoteProtocolError(
                f"asked for {sum_name(self._study, begin.round)}, attempt {begin.attempt} again",
                peer="server",
            )

    def _read_adapter(self, sent: BeginRound | Deliver, sum_: int) -> Vector:
        """The adapter that was sent, if it is one for this silo's own model and study."""
        round_ = round_of(self._study, sum_)
        expected = self._workload.layout(round_)
        if sent.layout != expected:
            raise RemoteProtocolError(
                f"its adapter layout {sent.layout.hex()[:12]}… is not this silo's "
                f"{expected.hex()[:12]}…",
                peer="server",
                hint="compare models.slm and adapter of the two studies",
            )
        size = self._workload.size(round_)
        if len(sent.adapter) != 4 * size:
            raise RemoteProtocolError(
                f"an adapter of {len(sent.adapter)} bytes, this layout has {4 * size}",
                peer="server",
            )
        adapter = np.frombuffer(sent.adapter, dtype="<f4").astype(np.float32, copy=False)
        # Adversary: a server that sends what no training makes, to read the last bits of sums. This
        # is before any record is touched; the proof rests on independent gradients, not on it.
        most = self._study.adapter.max_abs
        if not _within(adapter, most):  # nor if a value is no number
            raise RemoteProtocolError(
                f"the global adapter has values that are not finite or above adapter.max_abs "
                f"({most:g})",
                peer="server",
                hint="tuning makes values of about 1; if it diverged, lower the learning rates",
            )
        return adapter

    def _read_clip_norm(self, begin: BeginRound) -> float | None:
        """The clip norm of this round, if the study lets it adapt.

        Adversary: a server that invents C. Privacy does not rest on it (:class:`SiloUnit`), and all
        silos of a sum have the same, which the round header binds. One that the noised counts could
        not have led to would only spoil the updates.
        """
        clip = adaptive_clip(self._study)
        if clip is None:
            if begin.clip_norm:
                raise RemoteProtocolError("sent a clip norm, which the study fixes", peer="server")
            return None
        least, most = clip.reach(begin.round)
        if not least <= begin.clip_norm <= most:  # nor if it is no number
            raise RemoteProtocolError(
                f"sent clip norm {begin.clip_norm:g}, but round {begin.round + 1} allows "
                f"{least:.6g}..{most:.6g}",
                peer="server",
                hint="compare privacy.clip_norm and privacy.adaptive of the two studies",
            )
        return begin.clip_norm


def _within(values: Vector, most: float) -> bool:
    """Whether no absolute value is above ``most``; part by part, since there may be many."""
    parts = (values[start : start + _PART] for start in range(0, len(values), _PART))
    return all(bool((np.abs(part) <= most).all()) for part in parts)
