"""A silo's side: train on request, protect the update, answer the aggregation protocol.

Adversary: the server, which chooses every frame that arrives here. The silo believes only its own
study, roster and keys. It derives the round header itself, from the adapter that it was sent; it
reserves privacy budget before it trains and marks it released before a first byte can leave; it
keeps a finished update, so that a crash costs neither the work nor the budget a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from securefedcollm.aggregation import Roster, SiloSide, silo_side
from securefedcollm.errors import (
    ConfigError,
    RemoteProtocolError,
    SecureFedCoLLMError,
    TrainingError,
)
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    BeginRound,
    Refused,
    Reply,
    Trained,
    decode_request,
    encode,
    model_digest,
)
from securefedcollm.federation.plan import quantiser, round_header
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import Progress, SiloWorkload, Vector, silent
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.ledger import Key, Ledger, Reservation
from securefedcollm.study import Study, digest

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
        ledger: Ledger,
        progress: Progress = silent,
        threads: int = 1,
    ) -> None:
        self._study = study
        self._name = name
        self._roster = roster
        self._key = key
        self._workload = workload
        self._store = store
        self._ledger = ledger
        self._progress = progress
        self._threads = threads
        self._side: SiloSide | None = None
        self._at: tuple[bytes, int, int] = (b"", -1, -1)

    def step(self, frame: bytes) -> bytes:
        """Answer one request. Never raises for what the server sent or the data hold."""
        reply: Reply
        try:
            match decode_request(frame):
                case BeginRound() as begin:
                    reply = self._begin(begin)
                case Aggregate(frame=inner):
                    if self._side is None:
                        raise RemoteProtocolError(
                            "asked to aggregate before a round began", peer="server"
                        )
                    reply = Aggregated(self._side.handle(inner))
        except SecureFedCoLLMError as error:
            log.warning("%s: %s", self._name, error)
            self._side = None
            reply = Refused(type(error).__name__, error.message, error.hint)
        return encode(reply)

    def _begin(self, begin: BeginRound) -> Trained:
        self._side = None
        self._check_order(begin)
        adapter = self._read_adapter(begin)
        model = model_digest(self._workload.base_digest, begin.layout, begin.adapter)
        update = self._update(begin.run_id, begin.round, model, adapter)
        header = round_header(
            self._study,
            roster=self._roster,
            run_id=begin.run_id,
            round_=begin.round,
            attempt=begin.attempt,
            model=model,
            values=len(update),
        )
        quantised = quantiser(self._study, len(update)).encode(update).integers
        self._side = silo_side(
            self._study.aggregation.scheme,
            header=header,
            roster=self._roster,
            name=self._name,
            signing_key=self._key,
            vector=quantised,
            vector_id=sha256(b"securefedcollm/vector/v1\0", update.tobytes()),
            journal=self._store,
            threads=self._threads,
        )
        self._at = (begin.run_id, begin.round, begin.attempt)
        return Trained()

    def _check_order(self, begin: BeginRound) -> None:
        """Rounds and attempts of a run only ever go up, within the study's horizon."""
        if len(begin.run_id) != 16 or begin.attempt < 0:
            raise RemoteProtocolError("a malformed request to begin a round", peer="server")
        if not 0 <= begin.round < self._study.rounds:
            raise RemoteProtocolError(
                f"asked for round {begin.round + 1} of a study of {self._study.rounds}",
                peer="server",
            )
        # Adversary: a server that starts the study again under another run id, to have the same
        # updates summed over other survivors; the difference would be one silo's own.
        if self._store.record(b"run:" + digest(self._study), begin.run_id) != begin.run_id:
            raise RemoteProtocolError(
                "asked for a second run of a study that this silo takes part in",
                peer="server",
                hint="resume the run; for another one agree on a new study, e.g. with another seed",
            )
        run, *last = self._at
        if run == begin.run_id and last >= [begin.round, begin.attempt]:
            raise RemoteProtocolError(
                f"asked for round {begin.round + 1}, attempt {begin.attempt} again", peer="server"
            )

    def _read_adapter(self, begin: BeginRound) -> Vector:
        """The broadcast adapter, if it is one for this silo's own model and study."""
        expected = self._workload.layout(begin.round)
        if begin.layout != expected:
            raise ConfigError(
                f"the server's adapter layout {begin.layout.hex()[:12]}… is not this silo's "
                f"{expected.hex()[:12]}…",
                where="adapter",
                hint="compare models.slm and adapter of the two studies",
            )
        size = self._workload.size(begin.round)
        if len(begin.adapter) != 4 * size:
            raise RemoteProtocolError(
                f"an adapter of {len(begin.adapter)} bytes, this layout has {4 * size}",
                peer="server",
            )
        adapter = np.frombuffer(begin.adapter, dtype="<f4").astype(np.float32)
        if not np.isfinite(adapter).all():
            raise RemoteProtocolError("the global adapter is not finite", peer="server")
        return adapter

    def _update(self, run: bytes, round_: int, model: bytes, adapter: Vector) -> Vector:
        """This round's update for this global model: from disk if finished, else trained now.

        With local DP the stored update was already charged, and releasing the same value again
        costs nothing. A second global model for the same round is a second release: it is trained,
        and reserved, as a further one. So is a training whose update was lost after its release.
        """
        training = self._store.training(run, round_, model)
        finished = self._store.load_update(run, round_, training)
        events = tuple(self._workload.events())
        state = self._state(run, round_, training)
        if finished is None and state not in {None, "reserved"}:
            training = self._store.new_training(run, round_, model)
            state = None
        if events and state in {None, "reserved"}:
            reservation = self._reserve(run, round_, training, events)
            if finished is None:
                finished = self._train(run, round_, training, adapter)
            self._ledger.release(reservation)
            self._ledger.settle(reservation, events)
        if finished is None:
            finished = self._train(run, round_, training, adapter)
        return finished

    def _train(self, run: bytes, round_: int, training: int, adapter: Vector) -> Vector:
        update = self._workload.fit(adapter, round_, self._progress)
        expected = self._workload.update_size(round_)
        if update.shape != (expected,) or not np.isfinite(update).all():
            raise TrainingError(
                f"round {round_ + 1} made an update that is not finite",
                hint="lower local.learning_rate",
            )
        self._store.save_update(run, round_, training, update)
        return update

    def _entry(self, run: bytes, round_: int, training: int) -> Key:
        unit = self._study.privacy.unit if self._study.privacy else ""
        return Key(self._workload.dataset, unit, run.hex(), round_, training)

    def _state(self, run: bytes, round_: int, training: int) -> str | None:
        """What the ledger says about a training; None if it has no entry."""
        key = self._entry(run, round_, training)
        return next((e.state for e in self._ledger.entries() if e.key == key), None)

    def _reserve(
        self, run: bytes, round_: int, training: int, events: Sequence[Event]
    ) -> Reservation:
        privacy = self._study.privacy
        assert privacy is not None  # only a study with privacy has events
        key = self._entry(run, round_, training)
        return self._ledger.reserve(*key, events, (privacy.epsilon, privacy.delta))
