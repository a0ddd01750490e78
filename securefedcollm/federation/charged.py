"""What a silo's training is charged for, when, and to which records.

Adversary: the server, which chooses when to ask, with which adapter, and when a process dies. The
silo reserves privacy budget before it trains and marks it released before a first byte can leave;
a training that fails is charged; a finished update is kept, so that a crash costs neither the work
nor the budget a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from securefedcollm.errors import (
    RemoteProtocolError,
    SecureFedCoLLMError,
    StateError,
    TrainingError,
)
from securefedcollm.federation.excess import layered
from securefedcollm.federation.parts import (
    HoldsOut,
    Part,
    hold_out,
    part_of,
    pin_parts,
    refuse_shared,
    sums_left,
)
from securefedcollm.federation.plan import (
    counting,
    noises_sums,
    quantiser,
    round_of,
    run_key,
    sum_name,
    validates,
    weight_of,
)
from securefedcollm.federation.samedata import pin_data, require_same_data
from securefedcollm.federation.silostore import Mark, SiloStore, SumMemory
from securefedcollm.federation.workload import Progress, SiloWorkload, Vector, silent
from securefedcollm.primitives import sha256
from securefedcollm.privacy.counting import Counting
from securefedcollm.privacy.events import EARLIER_KIND, SUM_KIND, Event, SumKind, sum_kind
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.ledger import Budget, Key, Ledger, Reservation
from securefedcollm.privacy.noise import LayeredNoise, Noise, NoiseSource
from securefedcollm.privacy.quantise import Integers
from securefedcollm.privacy.silo_unit import SiloUnit, with_survivors
from securefedcollm.study import Study, digest

log = logging.getLogger(__name__)

Unit = SiloUnit | JointStep | Counting | None
"""How a sum is noised; None: it needs no more noise than its updates have."""


class ChargedTraining:
    """One silo's training in one study, its finished updates and its privacy ledger."""

    def __init__(
        self,
        study: Study,
        name: str,
        workload: SiloWorkload,
        store: SiloStore,
        ledger: Ledger,
        *,
        progress: Progress = silent,
        budget: Budget | None = None,
    ) -> None:
        """
        Args:
            budget: this silo's own limit for its records, all studies together; by default what
                its ledger has pinned, or else the study's.

        Raises:
            ConfigError: the run began with other records; or the study sets records aside, which
                is impossible with these.
            StateError: the run began with another division of them.
        """
        self._study, self._name = study, name
        self.workload, self.store = workload, store
        self._ledger = ledger
        self._progress = progress
        self._budget = budget
        self._layers: tuple[tuple[bytes, int], LayeredNoise] | None = None
        require_same_data(store, ledger, study, name, workload.dataset)
        hold_out(study, workload, ledger)
        pin_parts(study, ledger, store)
        if study.validation is not None:
            refuse_shared(self._tuned, self._held)

    def pin_data(self) -> None:
        """Bind the run to these records from now on. Raises as the class."""
        pin_data(self.store, self._ledger, self._study, self._name, self.workload.dataset)

    def values(self, sum_: int) -> int:
        """Length d of the update that enters this sum."""
        return self.workload.update_size(round_of(self._study, sum_))

    def marks(self, scope: bytes) -> list[Mark]:
        """The newest sum of this run in the privacy ledger, which is of all studies."""
        sums = [e.key.round for e in self._ledger.entries() if e.key.run == scope.hex()]
        return [Mark("privacy ledger", max(sums), 1)] if sums else []

    def kind(self, scope: bytes, said: SumKind) -> SumKind:
        """As what this run charges its noised sums: what the ledger has of it, else what the server
        ``said``.

        The noise follows from it, and so does its price, both worked out here. Adversary: a server
        that says the one to have less noise and the other to have it cost less, or that changes
        its word in the middle. It can have neither: a run keeps what was charged first. And one
        that has a first sum charged the older way, since all later ones on these records then cost
        more: the older kind is believed only of a run in which this silo took part by the older
        code, which left no note of the kind in the journal.

        Raises:
            RemoteProtocolError: the server says that earlier code began a run that this code began.
        """
        if not noises_sums(self._study):
            return said
        entries, note = self._ledger.entries(), b"sums:" + digest(self._study)
        mine = sum_kind(e for x in entries if x.key.run == scope.hex() for e in x.reserved)
        if mine is None:
            noted, took_part = self.store.recorded(note), self.store.recorded(run_key(self._study))
            by_older_code = noted is None and took_part is not None
            mine = said if by_older_code or noted == EARLIER_KIND.encode() else SUM_KIND
        self.store.record(note, mine.encode())
        if mine == SUM_KIND != said:
            raise RemoteProtocolError(
                "asks for the noise of an earlier version, in a run that this silo took no part in "
                "with one",
                peer="server",
                hint="resume the run with the server's own state.json; if an earlier version began "
                "it without this silo, agree on a new study",
            )
        return mine

    def update(
        self, scope: bytes, round_: int, adapter: Vector, unit: Unit, kind: SumKind = SUM_KIND
    ) -> Integers:
        """This round's integers, [values]: from disk if finished, else trained now.

        The stored update was charged when it was first released, and releasing the same value
        again costs nothing. Its hash binds it to its charge, so that no other value goes out under
        that: neither a second process's, nor that of a training that was never charged.

        Args:
            kind: as :meth:`kind` says, of ``unit`` too.

        Raises:
            BudgetExceeded: the round, or in the first round the run, does not fit; nothing was
                trained.
            StateError: the update that was released is lost; this silo sits the round out.
        """
        training = self.store.failed_trainings(scope, round_)
        finished = self.store.load_update(scope, round_, training)
        events = self._events(unit)
        if not events:
            if finished is None:
                finished = self._train(scope, round_, training, adapter, unit)
            return finished
        released = self.store.recorded(_release_key(scope, round_, training))
        state = self._state(scope, round_, training)
        if released is None and state not in {None, "reserved"}:  # charged, then it failed
            training = self.store.count_failed_training(scope, round_)
            finished = state = None
        if state in {None, "reserved"}:
            reservation = self._reserve(scope, round_, training, events, kind)
            if finished is None:
                finished = self._train_charged(reservation, events, scope, round_, adapter, unit)
            released = self.store.record(
                _release_key(scope, round_, training), sha256(finished.data)
            )
            self._ledger.release(reservation)
            if not self._distributed:  # else its cost depends on the sum: settle_before
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
        unit: Unit,
    ) -> Integers:
        """Train; a failure is charged before it is answered.

        Adversary: a server whose adapter makes training fail on certain records only. The
        failure is then a release; uncharged, it could be asked for again and again.
        """
        try:
            return self._train(scope, round_, reservation.key.attempt, adapter, unit)
        except Exception as error:
            self._ledger.release(reservation)
            self._ledger.settle(reservation, events)
            self.store.count_failed_training(scope, round_)
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
        unit: Unit,
    ) -> Integers:
        at = round_of(self._study, round_)
        noise = self._noise(scope, round_, unit)
        if isinstance(unit, Counting):
            assert isinstance(self.workload, HoldsOut)  # hold_out
            counts = unit.protect(self.workload.right_shares(adapter), NoiseSource())
            self.store.save_update(scope, round_, training, counts)
            return counts
        if isinstance(unit, JointStep):
            gradients = self.workload.gradients(adapter, at, unit.sampling_rate)
            noised = unit.protect(gradients, noise)
            self.store.save_update(scope, round_, training, noised)
            return noised
        update = self._fit(adapter, at, unit)
        expected = self.workload.update_size(at)
        if update.shape != (expected,) or not np.isfinite(update).all():
            raise TrainingError(
                f"round {at + 1} made an update that is not finite",
                hint="lower local.learning_rate",
            )
        integers: Integers
        if unit is None:
            self._compare_with_clip(update, at)
        update = weighted(
            update, weight_of(self._study, self._name), self._study.aggregation.clip_norm
        )
        if unit is None and self._study.masked:
            integers = quantiser(self._study, expected).encode_narrow(update)
        elif unit is None:
            integers = quantiser(self._study, expected).encode(update).integers
        else:  # noised once: a repeated attempt repeats the noise
            integers = unit.protect(update, noise)
        self.store.save_update(scope, round_, training, integers)
        return integers

    def _noise(self, scope: bytes, round_: int, unit: Unit) -> Noise:
        """Fresh noise. The keys of its layers are kept in memory, until the next sum's."""
        made = layered(unit)
        if made is None:
            return NoiseSource()
        noise = LayeredNoise.fresh(len(made.layers))
        self._layers = (scope, round_), noise
        return noise

    def surplus(self, scope: bytes, round_: int, unit: Unit, survivors: int) -> list[bytes]:
        """The keys of the layers of noise that a sum of so many silos does not need.

        None, if this process did not draw them: they are never on disk, and the noise stays.

        To be called only if no other sum of this round can be opened (:mod:`.excess`).
        """
        made, drawn = layered(unit), self._layers
        if made is None or drawn is None or drawn[0] != (scope, round_):
            return []
        return drawn[1].opened(made.surplus(survivors))

    def forget(self) -> None:
        """Drop the keys of the last sum's noise: its run is over."""
        self._layers = None

    def _fit(self, adapter: Vector, round_: int, unit: SiloUnit | None) -> Vector:
        """The update; under ``unit: silo`` it is zero if it cannot be made.

        Adversary: a server whose adapter makes training fail on certain records only. Where the
        whole update is the unit, nothing in the training is noised, so a failure would be an
        answer without noise. So the silo contributes zero and its noise, and tells its operator.
        """
        try:
            update = self.workload.fit(adapter, round_, self._progress)
            if unit is None or np.isfinite(update).all():
                return update
            why = "the update is not finite"
        except Exception as error:  # whatever a record made fail
            if unit is None:
                raise
            why = str(error)
        log.error("%s: round %d: %s; it contributes noise only", self._name, round_ + 1, why)
        return np.zeros(self.workload.update_size(round_), dtype=np.float32)

    def _compare_with_clip(self, update: Vector, round_: int) -> None:
        """Tell this silo's operator, and nobody else, how much the clip takes away."""
        norm, most = float(np.linalg.norm(update)), self._study.aggregation.clip_norm
        if norm > most:
            log.warning(
                "%s: round %d: the update is scaled down to %.0f %% (its norm is %.3g, "
                "aggregation.clip_norm %g): agree on a larger clip norm, or on less tuning; "
                "`securefedcollm study check CONFIG --propose-clip` proposes one from public rows",
                *(self._name, round_ + 1, 100 * most / norm, norm, most),
            )

    def settle_before(self, scope: bytes, round_: int) -> None:
        """Settle the sums of rounds before ``round_``: nobody can open them otherwise any more.

        Adversary: a server that opens a sum of few survivors, with as few noise shares, after it
        had this silo agree to many. A round is settled with the survivors that this silo opened if
        its update went into one attempt only, and into no later one: it has entered ``round_``.
        Otherwise, and on a graph always, it is charged for the fewest shares of any sum
        (:meth:`.Study.noise_shares`).
        """
        for entry in self._ledger.entries():
            if entry.key.run != scope.hex() or entry.key.round >= round_:
                continue
            released = _release_key(scope, entry.key.round, entry.key.attempt)
            if entry.state != "released" or self.store.recorded(released) is None:
                continue  # settled, or a training that failed and gave no vector
            survivors = SumMemory(self.store, scope, entry.key.round).survivors()
            if survivors is not None:
                settled = list(entry.reserved)
                if self._distributed:  # else each silo's own noise is all that counts
                    settled = [with_survivors(event, survivors) for event in settled]
                self._ledger.settle(Reservation(entry.key, entry.reserved, entry.row), settled)

    @property
    def _distributed(self) -> bool:
        """Whether all silos of a sum add its noise together."""
        privacy = self._study.privacy
        return privacy is not None and privacy.noise == "distributed"

    def _events(self, unit: Unit) -> tuple[Event, ...]:
        """What a sum releases at worst."""
        if isinstance(unit, Counting):
            return unit.events()
        return (unit.event(),) if unit else tuple(self.workload.events())

    def _part(self, sum_: int) -> Part:
        return self._held if validates(self._study, sum_) else self._tuned

    def _entry(self, scope: bytes, round_: int, training: int) -> Key:
        unit = self._study.privacy.unit if self._study.privacy else ""
        return Key(self._part(round_).dataset, unit, scope.hex(), round_, training)

    def _state(self, scope: bytes, round_: int, training: int) -> str | None:
        """What the ledger says about a training; None if it has no entry."""
        key = self._entry(scope, round_, training)
        return next((e.state for e in self._ledger.entries() if e.key == key), None)

    def _reserve(
        self, scope: bytes, round_: int, training: int, events: Sequence[Event], kind: SumKind
    ) -> Reservation:
        privacy = self._study.privacy
        assert privacy is not None  # only a study with privacy has events
        key = self._entry(scope, round_, training)
        claim, part = (privacy.epsilon, privacy.delta), self._part(round_)
        if all(entry.key.run != key.run for entry in self._ledger.entries()):
            # No run begins that the budget cannot pay to its end.
            what = "steps" if self._study.joint else "rounds"
            self._foresee(part, key, events, round_, what)
            if self._study.validation is not None and not part.held:
                counts = counting(self._study, kind).events()
                self._foresee(self._held, key, counts, round_, "rounds")
        return self._ledger.reserve(*key, events, claim, **self._whose(part))

    def _foresee(self, part: Part, key: Key, events: Sequence[Event], sum_: int, what: str) -> None:
        privacy = self._study.privacy
        assert privacy is not None
        left = sums_left(self._study, sum_, held=part.held)
        given = (part.dataset, key.unit, events, left, (privacy.epsilon, privacy.delta), what)
        may_skip = self._study.validation is None
        self._ledger.foresee(*given, **self._whose(part), may_skip=may_skip)

    def _whose(self, part: Part) -> dict[str, Any]:
        return {"records": part.records, "study": part.study, "limit": self._budget}

    @cached_property
    def _tuned(self) -> Part:
        """The records that pay when this silo tunes."""
        return part_of(self._study, self.workload, self._ledger, held=False)

    @cached_property
    def _held(self) -> Part:
        """The records that pay when it counts right answers."""
        return part_of(self._study, self.workload, self._ledger, held=True)


def weighted(update: Vector, weight: float, clip_norm: float) -> Vector:
    """The update, float32 [d], clipped to ``clip_norm`` and multiplied by ``weight``, in (0, 1].

    The clip comes first, or the update of a light silo would count for more the longer it is. At
    weight 1 the quantiser clips.
    """
    if weight == 1.0:
        return update
    norm = float(np.linalg.norm(update.astype(np.float64)))
    return update * np.float32(weight * min(1.0, clip_norm / norm if norm else 1.0))


def _release_key(scope: bytes, round_: int, training: int) -> bytes:
    return b"released:" + scope[:16] + round_.to_bytes(4, "big") + training.to_bytes(4, "big")
