"""A cohort in memory for audits of the aggregation protocol: real silos, a scripted server, a spy.

The silos are the library's own :class:`SiloRound`; only their surroundings are played. The *spy* is
the server's notebook. It keeps every frame that passes and the secrets of colluding silos, and
computes which sums of vectors follow from all that. An attack has failed if the spy can open only
one sum of one agreed survivor set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import inmemory
from securefedcollm.aggregation.header import SUITE, RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.inmemory import Hook as Hook
from securefedcollm.aggregation.inmemory import MemoryJournal as MemoryJournal
from securefedcollm.aggregation.inmemory import unaltered
from securefedcollm.aggregation.masking.messages import (
    Advertise,
    Agreement,
    Deal,
    Delivery,
    Opening,
    Roll,
    Survey,
    Unmask,
)
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.aggregation.messages import Ask, Message, decode
from securefedcollm.aggregation.roles import CoordinatorSide, RoundResult, SiloSide
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import Keystream, RandomSource, SigningKey, sha256
from securefedcollm_audits.protocol.spy import Spy

Vector = npt.NDArray[np.int64]
M = TypeVar("M", bound=Message)
T = TypeVar("T", bound=msgspec.Struct)


def recorded(label: str) -> RandomSource:
    """A reproducible random source: the AES-256-CTR keystream keyed with SHA-256(label)."""
    stream = Keystream(sha256(label.encode()))

    def read(count: int) -> bytes:
        buffer = bytearray(count)
        stream.into(memoryview(buffer))
        return bytes(buffer)

    return read


class Confidant(Protocol):
    """Whoever colluders tell their secrets."""

    def collude(self, index: int, header: RoundHeader, random: RandomSource) -> None: ...


@dataclass
class Cohort:
    """n silos with identities, vectors and journals, and the header of one round.

    Args:
        silos: n.
        colluders: c; the last c silos tell the server everything.
        values, bound: d and the bound of a vector's entries.
        label: makes another cohort with other vectors and secrets.
    """

    silos: int = 5
    colluders: int = 1
    values: int = 23
    bound: int = 1000
    threshold: int | None = None
    field_bits: int | None = None
    label: str = "cohort"
    keys: dict[str, SigningKey] = field(init=False)
    vectors: dict[str, Vector] = field(init=False)
    journals: dict[str, MemoryJournal] = field(init=False)
    roster: Roster = field(init=False)
    header: RoundHeader = field(init=False)

    def __post_init__(self) -> None:
        n, c = self.silos, self.colluders
        names = [f"silo-{i:03d}" for i in range(1, n + 1)]
        self.keys = {
            name: SigningKey.generate(recorded(f"{self.label} {name} identity")) for name in names
        }
        self.journals = {name: MemoryJournal() for name in names}
        self.roster = Roster({name: key.public for name, key in self.keys.items()})
        least = (2 * self.bound * n).bit_length()
        threshold = self.threshold or (n + c) // 2 + 1
        self.header = RoundHeader(
            study_digest=sha256(b"study"),
            run_id=bytes(16),
            round=3,
            attempt=0,
            model_digest=sha256(b"model"),
            parameters=RingParameters(
                values=self.values,
                bound=self.bound,
                field_bits=self.field_bits or least,
                silos=n,
                min_silos=self._minimum(),
                threshold=threshold,
                colluders=c,
            ),
            roster_root=self.roster.root,
            suite=self._suite(),
        )
        noise = Keystream(sha256(self.label.encode() + b" vectors"))
        self.vectors = {
            name: (noise.words(self.values) % np.uint64(2 * self.bound + 1)).astype(np.int64)
            - self.bound
            for name in names
        }

    def _minimum(self) -> int:
        return self.colluders + 2

    def _suite(self) -> str:
        return SUITE

    @property
    def names(self) -> tuple[str, ...]:
        return self.roster.names

    @property
    def honest(self) -> tuple[str, ...]:
        return self.names[: self.silos - self.colluders]

    def silo(
        self,
        name: str,
        *,
        header: RoundHeader | None = None,
        incarnation: str = "",
        random: RandomSource | None = None,
    ) -> SiloRound:
        """A silo at the start of the attempt; the same ``incarnation`` has the same secrets.

        Two silos of one incarnation are like a process and its restored snapshot.
        """
        header = header or self.header
        return SiloRound(
            header=header,
            roster=self.roster,
            name=name,
            signing_key=self.keys[name],
            vector=self.vectors[name],
            vector_id=sha256(self.vectors[name].tobytes()),
            journal=self.journals[name],
            random=random or self.randomness(name, header, incarnation),
        )

    def randomness(self, name: str, header: RoundHeader, incarnation: str = "") -> RandomSource:
        """The source from which :meth:`silo` draws its secrets."""
        return recorded(f"{self.label} {name} {header.digest.hex()} {incarnation}")

    def plain_sum(self, names: Iterable[str]) -> Vector:
        total = np.zeros(self.values, dtype=np.int64)
        for name in names:
            total += self.vectors[name]
        return total

    def spy(self) -> Spy:
        """A notebook that knows the colluders' secrets of this attempt."""
        spy = Spy(self.roster)
        self.betray(spy, self.header)
        return spy

    def betray(self, spy: Confidant, header: RoundHeader) -> None:
        """The colluders hand the spy their secrets of one attempt."""
        for name in self.names[self.silos - self.colluders :]:
            spy.collude(self.roster.index(name), header, self.randomness(name, header))


def play(
    silos: Mapping[str, SiloSide],
    coordinator: CoordinatorSide,
    *,
    request: Hook = unaltered,
    reply: Hook = unaltered,
    spy: Spy | None = None,
) -> RoundResult:
    """:func:`.inmemory.play`, while the spy takes notes of every frame that arrives."""

    def noted(hook: Hook) -> Hook:
        def passing(step: Step, name: str, frame: bytes) -> bytes | None:
            arrived = hook(step, name, frame)
            if arrived is not None and spy is not None:
                spy.note(arrived)
            return arrived

        return passing

    return inmemory.play(silos, coordinator, request=noted(request), reply=noted(reply))


class Puppet:
    """A server that sends what a script tells it and keeps every reply.

    Every method sends one step's request to the named silos and returns the decoded replies of
    those that answered; refusals are in ``refused``.
    """

    def __init__(
        self, cohort: Cohort, silos: dict[str, SiloRound] | None = None, spy: Spy | None = None
    ) -> None:
        self.cohort = cohort
        self.silos = silos or {name: cohort.silo(name) for name in cohort.names}
        self.refused: dict[str, str] = {}
        self.spy = spy or cohort.spy()

    def call(self, name: str, message: Message) -> bytes | None:
        frame = message.encode()
        self.spy.note(frame)
        try:
            answer = self.silos[name].handle(frame)
        except RemoteProtocolError as error:
            self.refused[name] = error.message
            return None
        self.spy.note(answer)
        return answer

    def _all(self, names: Iterable[str], message: Message, kind: type[M]) -> dict[str, M]:
        answers = {name: self.call(name, message) for name in names}
        return {name: decode(kind, answer, name) for name, answer in answers.items() if answer}

    def ask(
        self, names: Iterable[str] | None = None, header: RoundHeader | None = None
    ) -> dict[str, Advertise]:
        message = Ask(header or self.cohort.header)
        return self._all(names or self.cohort.names, message, Advertise)

    def roll(self, names: Iterable[str], entries: Iterable[Advertise]) -> dict[str, Deal]:
        ordered = tuple(sorted(entries, key=lambda entry: entry.index))
        return self._all(names, Roll(ordered), Deal)

    def delivery(self, name: str, deals: dict[str, Deal]) -> Delivery:
        """The honest delivery of these deals to ``name``."""
        index = self.cohort.roster.index(name)
        ordered = sorted(deals.values(), key=lambda deal: deal.statement.index)
        return Delivery(
            statements=tuple(deal.statement for deal in ordered),
            parcels=tuple(
                parcel
                for deal in ordered
                for parcel in deal.parcels
                if parcel.holder == index and parcel.dealer != index
            ),
        )

    def deliver(self, names: Iterable[str], deals: dict[str, Deal]) -> dict[str, bytes]:
        answers = {name: self.call(name, self.delivery(name, deals)) for name in names}
        return {name: answer for name, answer in answers.items() if answer}

    def survey(
        self, names: Iterable[str], survivors: Sequence[str], dropouts: Sequence[str] = ()
    ) -> dict[str, Agreement]:
        message = Survey(self.indices(survivors), self.indices(dropouts))
        return self._all(names, message, Agreement)

    def open(
        self,
        names: Iterable[str],
        survivors: Sequence[str],
        dropouts: Sequence[str],
        agreements: Iterable[Agreement],
    ) -> dict[str, Unmask]:
        ordered = tuple(sorted(agreements, key=lambda agreement: agreement.index))
        message = Opening(self.indices(survivors), self.indices(dropouts), ordered)
        return self._all(names, message, Unmask)

    def indices(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted(self.cohort.roster.index(name) for name in names))

    def through_upload(self, names: Sequence[str] | None = None) -> dict[str, bytes]:
        """R0 to R2 as an honest server would, with these silos."""
        names = names or self.cohort.names
        deals = self.roll(names, self.ask(names).values())
        return self.deliver(names, deals)


def altered(message: T, **changes: object) -> T:
    """``message`` with some fields replaced."""
    return msgspec.structs.replace(message, **changes)
