"""One line of the budget ledger: whom it charges, for what, and under which budget."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    Events,
    Gaussian,
    PoissonGaussian,
    repeat,
)
from securefedcollm.privacy.filters import Terms

State = Literal["reserved", "released", "settled", "void"]


class Key(NamedTuple):
    """The data set, unit and training that one entry is about."""

    dataset: str
    """Fingerprint of the data set."""
    unit: str
    """``record``, ``silo`` or ``subject``."""
    run: str
    round: int
    attempt: int


class Budget(msgspec.Struct, frozen=True):
    """(ε, δ) that releases must stay within together."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0.0 and math.isfinite(self.epsilon)):
            raise ConfigError(
                f"must be above 0 and finite, not {self.epsilon}", where="privacy.epsilon"
            )
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"lies in (0, 1), not {self.delta}", where="privacy.delta")


class Unit(NamedTuple):
    """The unit that a release protects."""

    name: str
    """``record``, ``silo`` or ``subject``."""
    column: str = ""
    """Of a subject: the column that names the subject of a record."""
    most: int = 1
    """Of a subject: the largest number of records that one subject has."""


class About(msgspec.Struct, frozen=True):
    """The content of a charge, apart from its key. Empty in a ledger without records."""

    records: str = ""
    """SHA-256 (hex) of the set of record identities that it charges."""
    also: tuple[str, ...] = ()
    """Other fingerprints of the same file."""
    study: str = ""
    """Digest (hex) of the study; charges of one study together stay within ``claim``."""
    column: str = ""
    most: int = 1
    claim: Budget | None = None
    made_with: str = ""
    """Which key made the identities of the records."""
    rows: int = 0
    """How many records, repetitions included; 0 where an older version did not say it."""
    individually: bool = False
    """Whether ``claim`` bounds each record's charges by itself, as for answers."""


class Entry(msgspec.Struct, frozen=True):
    """The current state of one reservation."""

    key: Key
    state: State
    reserved: Events
    settled: Events | None
    budget: Budget
    """Of all releases about one record, as it was pinned when this was reserved."""
    row: int
    time: str
    about: About = About()

    @property
    def counted(self) -> Events:
        """The events that the budget is charged for."""
        if self.state == "void":
            return ()
        return self.reserved if self.settled is None else self.settled

    @property
    def terms(self) -> Terms:
        """The filter terms of an account that this entry opens."""
        return Terms(repeat(self.reserved[0], 1), self.budget.epsilon)

    @property
    def unit(self) -> Unit:
        return Unit(self.key.unit, self.about.column, self.about.most)

    @property
    def fingerprints(self) -> frozenset[str]:
        """Of the file that was charged."""
        return frozenset((self.key.dataset, *self.about.also))


def halved(event: Event) -> Event:
    """A release that clips a *group* of records to C, as one record of the group sees it.

    With and without the record the group gives two vectors of norm C at most, which lie up to 2C
    apart; the release was charged for C and zero. So its noise counts half.
    """
    return grouped(event, 2, 1)


def grouped(event: Event, factor: int, draws: int) -> Event:
    """A release of units that are clipped one by one, for an owner of several units.

    The unit's contribution is at most ``factor`` times as large, and is sampled if one of its
    ``draws`` own draws is. Whoever has k units is in a batch with probability 1 - (1 - q)^k, and
    then moves the sum by k·C at most; a mixture of smaller moves is dominated by that.
    """
    if isinstance(event, DiscreteGaussian):
        q = _any_of(event.q, draws)
        return msgspec.structs.replace(event, sensitivity=event.sensitivity * factor, q=q)
    noise = event.noise_multiplier / factor
    if isinstance(event, Gaussian):
        return msgspec.structs.replace(event, noise_multiplier=noise)
    assert isinstance(event, PoissonGaussian)
    return msgspec.structs.replace(event, noise_multiplier=noise, q=_any_of(event.q, draws))


def _any_of(q: float, draws: int) -> float:
    return q if draws == 1 or q == 1.0 else min(1.0, -math.expm1(draws * math.log1p(-q)))
