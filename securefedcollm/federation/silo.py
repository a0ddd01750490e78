"""A silo's side: train on request, protect the update, answer the aggregation protocol.

Adversary: the server, which chooses every frame that arrives here. The silo believes only its own
study, roster and keys. It derives the round header itself, from the adapter that it was sent; it
reserves privacy budget before it trains and marks it released before a first byte can leave; it
keeps a finished update, so that a crash costs neither the work nor the budget a second time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from securefedcollm.aggregation import Roster, SiloSide, Step, silo_side
from securefedcollm.errors import (
    ConfigError,
    RemoteProtocolError,
    SecureFedCoLLMError,
    StateError,
    TrainingError,
)
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
    Deliver,
    Delivered,
    Ended,
    EndRun,
    MakeKey,
    Refused,
    Reply,
    Trained,
    Witness,
    decode_request,
    encode,
    model_digest,
)
from securefedcollm.federation.plan import (
    adaptive_clip,
    authority_of,
    ends_round,
    joint_step,
    quantiser,
    round_header,
    round_of,
    run_scope,
    silo_unit,
    sum_name,
)
from securefedcollm.federation.records import SiloRecord
from securefedcollm.federation.samedata import pin_data, require_same_data
from securefedcollm.federation.silostore import Mark, OneRun, SiloStore, SumMemory
from securefedcollm.federation.workload import (
    Keep,
    Progress,
    SiloWorkload,
    Vector,
    keep_nothing,
    silent,
)
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.ledger import Budget, Key, Ledger, Reservation
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.quantise import Integers
from securefedcollm.privacy.silo_unit import SiloUnit, with_survivors
from securefedcollm.study import Study

log = logging.getLogger(__name__)


class SiloSession:
    """One silo in one study. Implements :class:`securefedcollm.federation.engines.SiloPort`."""

    def __init__(
        self,
        *,
        study: Study,
        name: str,
        roster: Roster,
        key: SigningKey,
        workload: SiloWorkload,
        store: SiloStore,
        evidence: SiloRecord,
        ledger: Ledger,
        progress: Progress = silent,
        keep: Keep = keep_nothing,
        threads: int = 1,
        explain: bool = False,
        budget: Budget | None = None,
        authority: bytes = b"",
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            roster: the silos; that of the study, if the study has one.
            budget: this silo's own limit for its records, all studies together; by default what
                its ledger has pinned, or else the study's.
            keep: takes every adapter that a round ended with, once the evidence vouches for it.
            explain: tell the server *why* this silo cannot go on. Only for a simulation, in which
                the two are the same person: reasons depend on private data and other studies.
            authority: public key of the party that holds the decryption key, where the study has
                one and names no participants.
            now: the clock of ``local.reply_slot``, in seconds, and ``wait``: how to let it pass.

        Raises:
            ConfigError: the roster is not the study's, or the authority is not known, or the run
                began with other records.
        """
        listed = {p.name: bytes.fromhex(p.key) for p in study.roster if p.role == "silo"}
        if listed and Roster(listed).root != roster.root:
            raise ConfigError(
                "the silos of this run are not those of the signed study",
                where="roster",
                hint="build the roster from the study",
            )
        self._explain = explain
        self._budget = budget
        self._evidence = evidence
        self._authority = authority_of(study, authority)
        self._study = study
        self._name = name
        self._roster = roster
        self._key = key
        self._workload = workload
        self._store = store
        self._run = OneRun(store, study)
        self._ledger = ledger
        self._progress = progress
        self._keep = keep
        self._threads = threads
        self._now, self._wait = now, wait
        require_same_data(*self._data)
        self._side: SiloSide | None = None
        self._at: tuple[bytes, int, int] = (b"", -1, -1)

    @property
    def _data(self) -> tuple[SiloStore, Ledger, Study, str, str]:
        return self._store, self._ledger, self._study, self._name, self._workload.dataset

    @property
    def over(self) -> bool:
        """Whether the server has ended the run that this silo took part in."""
        return self._run.over

    def step(self, frame: bytes) -> bytes:
        """Answer one request. Never raises for what the server sent or the data hold."""
        reply: Reply
        asked, training = self._now(), False
        try:
            match decode_request(frame):
                case BeginRound() as begin:
                    training = True
                    reply = self._begin(begin)
                case Aggregate(frame=inner):
                    reply = Aggregated(self._aggregate(inner))
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
            self._side = None
            reply = self._refusal(error)
        if training:
            self._fill_slot(self._now() - asked)
        return encode(reply)

    def _fill_slot(self, taken: float) -> None:
        """Let the rest of the study's slot pass.

        Adversary: a server that measures how long training took: that depends on how many records
        were sampled, and how long they are. Which slot an answer falls into still does.
        """
        slot = self._study.local.reply_slot
        if slot is not None:
            self._wait(slot - taken % slot)

    def _refusal(self, error: SecureFedCoLLMError) -> Refused:
        # Adversary: a server that learns from refusals. What follows from its own frame it may
        # read; ε spent elsewhere, record counts, paths and failures on records stay here.
        if self._explain or isinstance(error, RemoteProtocolError):
            return Refused(type(error).__name__, error.message, error.hint)
        return Refused("Refused", "this silo cannot take part", "its own log says why")

    def _begin(self, begin: BeginRound) -> Trained:
        self._side = None
        self._check_order(begin)
        self._evidence.check_base(self._workload.base_digest)
        adapter = self._read_adapter(begin, begin.round)
        unit = self._mechanism(begin.round, self._read_clip_norm(begin))
        base, mechanism = self._workload.base_digest, unit.identity if unit else b""
        model = model_digest(base, begin.layout, begin.adapter, mechanism)
        header = round_header(
            self._study,
            roster=self._roster,
            run_id=begin.run_id,
            round_=begin.round,
            attempt=begin.attempt,
            model=model,
            values=unit.values if unit else self._values(begin.round),
        )
        scope = self._enter(begin, model)
        self._settle_before(scope, begin.round)
        adapted = unit.adapted if isinstance(unit, SiloUnit) else None
        self._evidence.round(header, base, begin.layout, begin.adapter, mechanism, adapted)
        integers = self._update(scope, begin.round, adapter, unit)
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
        return Trained()

    def _mechanism(self, sum_: int, clip_norm: float | None) -> SiloUnit | JointStep | None:
        """How this sum is noised; None if it is a plain sum of updates that need no more noise."""
        if self._study.joint:
            return joint_step(self._study, self._values(sum_))
        return silo_unit(self._study, self._workload.update_size, sum_, clip_norm)

    def _values(self, sum_: int) -> int:
        return self._workload.update_size(round_of(self._study, sum_))

    def _aggregate(self, frame: bytes) -> bytes:
        side = self._side
        if side is None:
            raise RemoteProtocolError("asked to aggregate before a round began", peer="server")
        step = side.step
        self._check_journal()
        reply = side.handle(frame)
        # Durable before the reply leaves: what the settlement of this round will rest on, and the
        # evidence.
        run_id, round_, attempt = self._at
        memory = SumMemory(self._store, run_scope(self._study, run_id), round_)
        # What is uploaded under CKKS opens only with this silo's own share, which it gives for one
        # set of members a round, or by the authority, which opens one set a round; masked words
        # open without it.
        if step is Step.UPLOAD and self._study.scheme == "masking":
            memory.uploaded(attempt)
        elif step in {Step.UNMASK, Step.NOTE}:
            memory.opened(attempt, len(side.transcript.survivors))
        self._evidence.said(side)
        self._check_journal()  # put back meanwhile: no answer
        return reply

    def _check_journal(self) -> None:
        self._evidence.check_journal(self._store, self._study.scheme)

    def _end(self, end: EndRun) -> Ended:
        """No further attempt at this run, durably; so its last sum can be settled too.

        Adversary: a server that ends a run early loses this silo's further rounds, and no more.
        """
        self._side = None
        scope = self._run.end(end.run_id)
        self._check_journal()  # the settlement rests on it
        self._settle_before(scope, self._study.sums)
        return Ended()

    def _take(self, deliver: Deliver) -> Delivered:
        """Keep what a round ended with, if the evidence vouches for it.

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
        """Durable rules about what may be trained at all, whatever becomes of the process.

        Returns the run's scope.
        """
        marks = [*self._evidence.marks, *self._charged(run_scope(self._study, begin.run_id))]
        self._check_journal()
        scope = self._run.enter(begin.run_id, begin.round, *marks)
        pin_data(*self._data)
        # Adversary: a server that has one round trained on many models.
        pin = b"model:" + scope[:16] + begin.round.to_bytes(4, "big")
        if self._store.record(pin, model) != model:
            raise RemoteProtocolError(
                f"sent a second global model for {sum_name(self._study, begin.round)}",
                peer="server",
            )
        if begin.round and ends_round(self._study, begin.round - 1):
            self._pin_end(scope, begin.round - 1, begin.adapter)
        return scope

    def _charged(self, scope: bytes) -> list[Mark]:
        """The newest sum of this run in the privacy ledger, which is of all studies."""
        sums = [e.key.round for e in self._ledger.entries() if e.key.run == scope.hex()]
        return [Mark("privacy ledger", max(sums), 1)] if sums else []

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
        if not bool((np.abs(adapter) <= most).all()):  # nor if a value is no number
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
                f"sent clip norm {begin.clip_norm:g}, round {begin.round + 1} has one within "
                f"{least:.6g}..{most:.6g}",
                peer="server",
                hint="compare privacy.clip_norm and privacy.adaptive of the two studies",
            )
        return begin.clip_norm

    def _update(
        self, scope: bytes, round_: int, adapter: Vector, unit: SiloUnit | JointStep | None
    ) -> Integers:
        """This round's integers, [values]: from disk if finished, else trained now.

        The stored update was charged when it was first released, and releasing the same value
        again costs nothing. It is bound to its charge by its hash, so that no other value goes out
        under it: not that of a second process, nor of a training that was never charged.

        Raises:
            BudgetExceeded: the round, or at a run's first the run, does not fit; nothing was
                trained.
            StateError: the update that was released is lost; this silo sits the round out.
        """
        training = self._store.failed_trainings(scope, round_)
        finished = self._store.load_update(scope, round_, training)
        events = (unit.event(),) if unit else tuple(self._workload.events())
        if not events:
            if finished is None:
                finished = self._train(scope, round_, training, adapter, unit)
            return finished
        released = self._store.recorded(_release_key(scope, round_, training))
        state = self._state(scope, round_, training)
        if released is None and state not in {None, "reserved"}:  # charged, then it failed
            training = self._store.count_failed_training(scope, round_)
            finished = state = None
        if state in {None, "reserved"}:
            reservation = self._reserve(scope, round_, training, events)
            if finished is None:
                finished = self._train_charged(reservation, events, scope, round_, adapter, unit)
            released = self._store.record(
                _release_key(scope, round_, training), sha256(finished.data)
            )
            self._ledger.release(reservation)
            if unit is None:  # else what it cost depends on the sum: _settle_before
                self._ledger.settle(reservation, events)
        if finished is None or released != sha256(finished.data):
            raise StateError(
                f"the update of {sum_name(self._study, round_)}, which was released, is lost",
                hint="this silo sits the round out; it takes part again in the next",
            )
        return finished

    def _train_charged(
        self,
        reservation: Reservation,
        events: Sequence[Event],
        scope: bytes,
        round_: int,
        adapter: Vector,
        unit: SiloUnit | JointStep | None,
    ) -> Integers:
        """Train; a failure is charged before it is answered.

        Adversary: a server whose adapter makes training fail on certain records only. That it
        failed is then a release; uncharged, it could be asked for again and again.
        """
        try:
            return self._train(scope, round_, reservation.key.attempt, adapter, unit)
        except Exception as error:
            self._ledger.release(reservation)
            self._ledger.settle(reservation, events)
            self._store.count_failed_training(scope, round_)
            if isinstance(error, SecureFedCoLLMError):
                raise
            # A process that dies is an answer too: this one gets the constant text.
            log.exception("%s: training failed", self._name)
            raise TrainingError(f"training failed ({type(error).__name__})") from error

    def _train(
        self,
        scope: bytes,
        round_: int,
        training: int,
        adapter: Vector,
        unit: SiloUnit | JointStep | None,
    ) -> Integers:
        if isinstance(unit, JointStep):
            at = round_of(self._study, round_)
            gradients = self._workload.gradients(adapter, at, unit.sampling_rate)
            noised = unit.protect(gradients, NoiseSource())
            self._store.save_update(scope, round_, training, noised)
            return noised
        update = self._fit(adapter, round_, unit)
        expected = self._workload.update_size(round_)
        if update.shape != (expected,) or not np.isfinite(update).all():
            raise TrainingError(
                f"round {round_ + 1} made an update that is not finite",
                hint="lower local.learning_rate",
            )
        integers: Integers
        if unit is None:
            self._compare_with_clip(update, round_)
        if unit is None and self._study.scheme == "masking":
            integers = quantiser(self._study, expected).encode_narrow(update)
        elif unit is None:
            integers = quantiser(self._study, expected).encode(update).integers
        else:  # noised once: an attempt that is repeated repeats the noise
            integers = unit.protect(update, NoiseSource())
        self._store.save_update(scope, round_, training, integers)
        return integers

    def _fit(self, adapter: Vector, round_: int, unit: SiloUnit | None) -> Vector:
        """The update; under ``unit: silo`` one that cannot be made is zero.

        Adversary: a server whose adapter makes training fail on certain records only. Where the
        whole update is the unit, nothing in the training is noised: whether it failed would be an
        answer without noise. So the silo contributes zero and its noise, and tells its operator.
        """
        try:
            update = self._workload.fit(adapter, round_, self._progress)
            if unit is None or np.isfinite(update).all():
                return update
            why = "the update is not finite"
        except Exception as error:  # whatever a record made fail
            if unit is None:
                raise
            why = str(error)
        log.error("%s: round %d: %s; it contributes noise only", self._name, round_ + 1, why)
        return np.zeros(self._workload.update_size(round_), dtype=np.float32)

    def _compare_with_clip(self, update: Vector, round_: int) -> None:
        """Tell this silo's operator, and nobody else, what the clip takes away."""
        norm, most = float(np.linalg.norm(update)), self._study.aggregation.clip_norm
        if norm > most:
            log.warning(
                "%s: round %d: the update is scaled down to %.0f %% (its norm is %.3g, "
                "aggregation.clip_norm %g): agree on a larger clip norm, or on less tuning; "
                "`securefedcollm study check CONFIG --propose-clip` proposes one from public rows",
                *(self._name, round_ + 1, 100 * most / norm, norm, most),
            )

    def _settle_before(self, scope: bytes, round_: int) -> None:
        """Settle the sums of rounds before ``round_``, which can no longer be opened otherwise.

        Adversary: a server that opens a sum of few survivors, with as few noise shares, after it
        had this silo agree to many. A round is settled with the survivors that this silo opened if
        its update went into one attempt only, and into no later one: it has entered ``round_``.
        Otherwise the worst case stays charged.
        """
        for entry in self._ledger.entries():
            if entry.key.run != scope.hex() or entry.key.round >= round_:
                continue
            released = _release_key(scope, entry.key.round, entry.key.attempt)
            if entry.state != "released" or self._store.recorded(released) is None:
                continue  # settled, or a training that failed and gave no vector
            survivors = SumMemory(self._store, scope, entry.key.round).survivors()
            if survivors is not None:
                settled = [with_survivors(event, survivors) for event in entry.reserved]
                self._ledger.settle(Reservation(entry.key, entry.reserved, entry.row), settled)

    def _entry(self, scope: bytes, round_: int, training: int) -> Key:
        unit = self._study.privacy.unit if self._study.privacy else ""
        return Key(self._workload.dataset, unit, scope.hex(), round_, training)

    def _state(self, scope: bytes, round_: int, training: int) -> str | None:
        """What the ledger says about a training; None if it has no entry."""
        key = self._entry(scope, round_, training)
        return next((e.state for e in self._ledger.entries() if e.key == key), None)

    def _reserve(
        self, scope: bytes, round_: int, training: int, events: Sequence[Event]
    ) -> Reservation:
        privacy = self._study.privacy
        assert privacy is not None  # only a study with privacy has events
        key = self._entry(scope, round_, training)
        claim = (privacy.epsilon, privacy.delta)
        whose: Any = {
            "records": self._records,
            "study": self._study.digest.hex(),
            "limit": self._budget,
        }
        if all(entry.key.run != key.run for entry in self._ledger.entries()):
            # A run that the budget cannot see through to its end is not begun.
            rounds = self._study.sums - round_
            what = "steps" if self._study.joint else "rounds"
            self._ledger.foresee(key.dataset, key.unit, events, rounds, claim, what, **whose)
        return self._ledger.reserve(*key, events, claim, **whose)

    @cached_property
    def _records(self) -> Records:
        """The records that this silo's budget is about."""
        work = self._workload
        return self._ledger.identify(work.contents(), column=self._study.subject, also=work.also)


def _release_key(scope: bytes, round_: int, training: int) -> bytes:
    return b"released:" + scope[:16] + round_.to_bytes(4, "big") + training.to_bytes(4, "big")
