"""The report's rows: one for a sum, a training, a silo, an audit."""

from __future__ import annotations

import msgspec


class RoundRow(msgspec.Struct, frozen=True):
    """One secure sum as the server's log tells it; ``name``: its round, and step if it is one.
    ``place``: the entry that ends its round."""

    round: int
    name: str
    survivors: list[str]
    dropouts: list[str]
    agreements: int
    attempts: int
    lost: bool
    witnesses: int
    opening: str | None
    sum: str | None
    place: str | None


class PrivateRow(msgspec.Struct, frozen=True):
    """The validation of one round. ``right``, ``wrong``: noised counts of records or subjects, with
    noise of ``sigma`` on each. ``accuracy`` in [0, 1] and ``margin``, half its 95 % interval by the
    noise alone; None where the noise drowns it. ``place``: the entry that ends the round."""

    round: int
    silos: int
    right: float
    wrong: float
    sigma: float
    accuracy: float | None
    margin: float | None
    place: str


class ChargeRow(msgspec.Struct, frozen=True):
    """One training of one silo in its ledger. ``cumulative``: upper bound on ε so far, or None."""

    round: int
    state: str
    mechanism: str
    noise_multiplier: float
    sensitivity: int | None
    honest_shares: int | None
    cumulative: float | None
    reserved: str | None
    settled: str | None


class SiloRow(msgspec.Struct, frozen=True):
    """One silo's budget. ``low``, ``high``: the second accountant's bracket of its releases.

    ``claimed`` is all that its ledger counts on these records, ``limit`` what it agreed to for all
    studies together; ``left``: of that, as far as the log says.
    """

    name: str
    claimed: float | None
    accountant: str
    limit: float | None
    left: float | None
    delta: float | None
    low: float
    high: float
    method: str
    refusals: int
    charges: list[ChargeRow]
    place: str | None


class StudyRow(msgspec.Struct, frozen=True):
    """One study of the chain that ends with this report's. ``silos``: how many the study has.

    ``agreed``: its ε. ``spent``, ``delta``: the most that a silo's ledger counted at its end, in
    all studies, for the record that spent most; None where no privacy is claimed or no silo's log
    shows it. ``sound``: whether its own bundle holds, the runs before it left aside; None if no
    bundle of that run was given, and then ``name`` is empty.
    """

    name: str
    study: str
    run: str | None
    rounds: str
    silos: int
    agreed: float | None
    spent: float | None
    delta: float | None
    sound: bool | None


class AuditRow(msgspec.Struct, frozen=True):
    """A privacy audit that a participant wrote down. ``other``: at other settings than the run's;
    ``claimed``, ``bound``: ε of what was attacked, by the accountant and at least."""

    audit: str
    setting: str
    claimed: float | None
    bound: float | None
    delta: float
    held: bool
    other: bool
    figures: dict[str, float]
    place: str


class QuestionRow(msgspec.Struct, frozen=True):
    """One member's questions to one silo, as the silo's log counts them. ``number``: of the last,
    or how many there are, if that is more; ``limit``: the study's. ``index``: the shelf's
    fingerprint at the last."""

    silo: str
    asker: str
    number: int
    limit: int
    index: str
    place: str


class PollRow(msgspec.Struct, frozen=True):
    """One member's questions to one silo's records, as the silo's log has them. ``opened``: those
    whose sum the silo opened; the others are charged all the same. ``place``: of the last."""

    silo: str
    asker: str
    asked: int
    opened: int
    place: str
