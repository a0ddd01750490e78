"""Releases as data: the events that accountants interpret and the ledger keeps.

An event says everything an accountant needs and nothing about the data. Every event is charged
under the add/remove ("zero-out") relation: two data sets are neighbours if one unit (record,
subject or silo) contributes a zero vector in one of them. Sensitivities are derived from the clip
that was enforced, never stated by a caller as an opinion.

An event also carries its ``slack``: a bound on the total variation distance between what the code
drew and the ideal mechanism that the accountant analyses (sampler residual, capped batch, sum of
discrete Gaussians). A slack of η costs (1 + e^ε)·η of δ; :mod:`.accounting` books it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, Literal

import msgspec

from securefedcollm.errors import ConfigError, EvidenceError

CAP_SLACK: Final = 2.0**-100
"""Total variation of one Poisson batch of :class:`~.noise.NoiseSource` to an uncapped one."""

SAMPLER_SLACK: Final = 2.0**-100
"""Total variation of one draw of the discrete Gaussian sampler to the exact distribution."""

STEP_SLACK: Final = 2.0**-70
"""Total variation of one Gaussian release of up to 180 million values by
:class:`~.noise.NoiseSource` to the continuous mechanism: 180·10^6·(2^-97.6 + 2^-115), where 2^-115
bounds what :mod:`.discrete_gaussian` says of its draws, and CAP_SLACK where it samples."""

SMALLEST_SHARE: Final = 4.0
"""Below this σ of one share, a sum of discrete Gaussians is not close enough to one."""

ROUNDING: Final = 1.5
"""s: the part of discrete noise that counts as a randomised rounding, in integers."""

ROUNDING_GAP: Final = 3.0 * math.exp(
    -2.0 * (math.pi * ROUNDING) ** 2 * (2.0 - (ROUNDING / SMALLEST_SHARE) ** 2)
)
"""κ, below 2^-117: max-divergence, in one coordinate, of a discrete Gaussian of σ >= SMALLEST_SHARE
from the randomised rounding of a continuous one of variance σ² - s². docs/privacy.md proves it."""


SumKind = Literal["rounded-gaussian", "discrete-gaussian"]
"""The kind of event that a run's noised sums are charged as. It decides how much noise they get. A
run keeps the kind that it began with."""

SUM_KIND: Final[SumKind] = "rounded-gaussian"
"""That of runs which begin now."""

EARLIER_KIND: Final[SumKind] = "discrete-gaussian"
"""That of runs which began before there was another."""

_LARGEST_INTEGER: Final = 2**62
_MOST_SHARES: Final = 100_000
_LEAST_RATE: Final = 1e-30


class Gaussian(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gaussian", tag_field="kind"
):
    """``count`` releases of a sum with L2 sensitivity C plus N(0, (noise_multiplier·C)²).

    The whole data set takes part in each (no amplification). Any batch loader that this project did
    not build and drive itself is charged like this, too.
    """

    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        _positive("noise_multiplier", self.noise_multiplier)
        _at_least("count", self.count, 1)
        _at_most("count", self.count, _LARGEST_INTEGER)

    @property
    def slack(self) -> float:
        return self.count * STEP_SLACK


class PoissonGaussian(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="poisson-gaussian",
    tag_field="kind",
):
    """``steps`` steps of DP-SGD: Poisson sample at rate ``q``, clip to C, sum, add noise.

    Amplification holds against everyone, the server included, because only the silo knows its
    sample; it may be claimed only for batches of :meth:`~.noise.NoiseSource.poisson_batch`.
    """

    q: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _probability(self.q)
        _positive("noise_multiplier", self.noise_multiplier)
        _at_least("steps", self.steps, 1)
        _at_most("steps", self.steps, _LARGEST_INTEGER)

    @property
    def slack(self) -> float:
        return self.steps * STEP_SLACK


class DiscreteGaussian(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag="discrete-gaussian",
    tag_field="kind",
):
    """``count`` secure sums of integer vectors, each silo adding a discrete Gaussian share.

    Args:
        share_sigma: the parameter σᵢ of each silo's share, in integer units; at least 4.
        sensitivity: Δ, an integer: Σq² of one unit's contribution is at most Δ², which
            :mod:`.quantise` checks in integers for every vector before it leaves.
        values: length d of the vector.
        shares: noise shares in the sum: the threshold when reserved, the survivors when settled.
        colluders: shares whose noise the adversary knows.
        count: how many such sums.
        q: Poisson rate at which a unit takes part in each sum (1: always). Below 1 only if the
            unit's own silo draws the sample and nobody else learns it (joint DP-SGD).
    """

    share_sigma: float
    sensitivity: int
    values: int
    shares: int
    colluders: int = 0
    count: int = 1
    q: float = 1.0

    def __post_init__(self) -> None:
        _positive("share_sigma", self.share_sigma)
        if self.share_sigma < SMALLEST_SHARE:
            raise ConfigError(
                f"a noise share of σ = {self.share_sigma:g} integers is too coarse for its sum to "
                "be a discrete Gaussian",
                where="share_sigma",
                hint=f"raise the quantisation bound until the share has σ >= {SMALLEST_SHARE:g}",
            )
        # Adversary: whoever edits a ledger or makes up a bundle: numbers that no float holds, or
        # over which the sums below would run for hours.
        _at_most("share_sigma", self.share_sigma, _LARGEST_INTEGER)
        _at_least("sensitivity", self.sensitivity, 1)
        _at_most("sensitivity", self.sensitivity, _LARGEST_INTEGER)
        _at_least("values", self.values, 1)
        _at_most("values", self.values, _LARGEST_INTEGER)
        _at_least("colluders", self.colluders, 0)
        _at_least("shares", self.shares, self.colluders + 1)
        _at_most("shares", self.shares, _MOST_SHARES)
        _at_least("count", self.count, 1)
        _at_most("count", self.count, _LARGEST_INTEGER)
        _probability(self.q)

    @property
    def honest(self) -> int:
        """Shares whose noise hides a unit from the adversary."""
        return self.shares - self.colluders

    @property
    def noise_multiplier(self) -> float:
        """√honest·σᵢ/Δ: the effective noise multiplier against this adversary."""
        return self.share_sigma * math.sqrt(self.honest) / self.sensitivity

    @property
    def sum_gap(self) -> float:
        """τ·d: max-divergence of the honest shares' sum from one discrete Gaussian.

        τ = 10 Σ_{k<h} exp(-2π²σᵢ² k/(k+1)) (Kairouz, Liu and Steinke 2021, Theorem 1).
        """
        gaps = (
            math.exp(-2.0 * (math.pi * self.share_sigma) ** 2 * k / (k + 1))
            for k in range(1, self.honest)
        )
        return 10.0 * math.fsum(gaps) * self.values

    @property
    def slack(self) -> float:
        return self._slack(self.sum_gap)

    def _slack(self, gap: float) -> float:
        """``gap``: max-divergence of the sum's noise from the ideal one."""
        batches = CAP_SLACK if self.q < 1.0 else 0.0
        return self.count * (self._draws * SAMPLER_SLACK + batches + math.expm1(gap))

    @property
    def _draws(self) -> int:
        return self.values * self.honest


class RoundedGaussian(
    DiscreteGaussian,
    frozen=True,
    forbid_unknown_fields=True,
    tag="rounded-gaussian",
    tag_field="kind",
):
    """The sums of a :class:`DiscreteGaussian`, charged as rounded sums with continuous noise.

    One discrete Gaussian of parameter σ around an integer vector is the randomised rounding of a
    continuous one of variance σ² - s² around it, up to κ a coordinate. So PLD applies. Versions
    that know only the other kind refuse this one, and charges of that kind keep their ε.
    """

    @property
    def continuous(self) -> Gaussian | PoissonGaussian:
        """The mechanism that, rounded, is this one up to :attr:`slack`."""
        shares = self.honest - (ROUNDING / self.share_sigma) ** 2
        noise = self.share_sigma * math.sqrt(shares) / self.sensitivity
        if self.q == 1.0:
            return Gaussian(noise, self.count)
        return PoissonGaussian(self.q, noise, self.count)

    @property
    def slack(self) -> float:
        return self._slack(self.sum_gap + self.values * ROUNDING_GAP)


class LayeredGaussian(
    RoundedGaussian,
    frozen=True,
    forbid_unknown_fields=True,
    tag="layered-gaussian",
    tag_field="kind",
):
    """The sums of a :class:`RoundedGaussian`, from which surplus noise has been removed.

    Each share is a sum of layers (:func:`layer_sigmas`). Those that the survivors of a sum make
    superfluous are opened and subtracted, so ``shares`` - ``design`` honest shares hold together
    what ``least`` - ``design`` would hold with all their layers. More survivors mean no less ε.

    Args:
        design: colluders that the layers are made for.
        least, most: fewest and most silos in a sum.
    """

    design: int = 0
    least: int = 1
    most: int = 1

    def __post_init__(self) -> None:
        RoundedGaussian.__post_init__(self)
        _at_least("design", self.design, 0)
        _at_least("least", self.least, max(self.design, self.colluders) + 1)
        _at_least("shares", self.shares, self.least)
        _at_least("most", self.most, self.shares)
        _at_most("most", self.most, _MOST_SHARES)
        finest = self._finest
        if finest < SMALLEST_SHARE:
            raise ConfigError(
                f"a layer of noise of σ = {finest:g} integers is too coarse for the sum to be a "
                "discrete Gaussian",
                where="share_sigma",
                hint="raise the quantisation bound, or keep the excess noise",
            )

    @property
    def honest(self) -> int:
        """Whole shares that the noise against the study's colluders amounts to."""
        return self.least - self.design

    @property
    def _finest(self) -> float:
        return min(layer_sigmas(self.share_sigma, self.least, self.most, self.design))

    @property
    def _whole(self) -> float:
        """Honest noise, in variances of a whole share, at least: with any number of survivors."""
        # (s - k)/(s - design) falls with s for adversaries with k < design shares, else it rises.
        s = self.most if self.colluders <= self.design else self.least
        return (self.least - self.design) * (s - self.colluders) / (s - self.design)

    @property
    def noise_multiplier(self) -> float:
        return self.share_sigma * math.sqrt(self._whole) / self.sensitivity

    @property
    def sum_gap(self) -> float:
        # One more discrete Gaussian in a sum costs at most 5·exp(-2π²/(1/a² + 1/b²)) a coordinate
        # (Kairouz, Liu and Steinke 2021); every a and b is at least the finest layer.
        terms = self.most * (self.most - self.least + 1)
        return 10.0 * terms * math.exp(-((math.pi * self._finest) ** 2)) * self.values

    @property
    def continuous(self) -> Gaussian | PoissonGaussian:
        shares = self._whole - (ROUNDING / self.share_sigma) ** 2
        noise = self.share_sigma * math.sqrt(shares) / self.sensitivity
        if self.q == 1.0:
            return Gaussian(noise, self.count)
        return PoissonGaussian(self.q, noise, self.count)

    @property
    def _draws(self) -> int:
        return self.values * self.most * (self.most - self.least + 1)


def layer_sigmas(share_sigma: float, least: int, most: int, colluders: int) -> tuple[float, ...]:
    """The layers of one noise share, σ of each.

    With s survivors in a sum the first ``most`` - s + 1 layers stay. Their variances add up to
    share_sigma² · (least - c)/(s - c), so s - c honest shares always hold share_sigma² ·
    (least - c): what is promised, and no more.

    Args:
        share_sigma: σ of a share with all its layers, which ``least`` survivors need.
        least, most: fewest and most survivors.
        colluders: c.
    """
    needed = [(least - colluders) / (s - colluders) for s in range(most, least - 1, -1)]
    parts = [needed[0], *(more - less for less, more in pairwise(needed))]
    # A little more than that, whatever the square roots round to.
    return tuple(share_sigma * math.sqrt(part) * (1.0 + 2.0**-40) for part in parts)


Event = Gaussian | PoissonGaussian | DiscreteGaussian | RoundedGaussian | LayeredGaussian
Events = tuple[Event, ...]

SUMS: Final[dict[SumKind, type[DiscreteGaussian]]] = {
    "rounded-gaussian": RoundedGaussian,
    "discrete-gaussian": DiscreteGaussian,
}


def sum_kind(events: Iterable[Event]) -> SumKind | None:
    """As what the first noised sum among ``events`` is charged; None if there is none."""
    for event in events:
        if isinstance(event, DiscreteGaussian):
            return SUM_KIND if isinstance(event, RoundedGaussian) else EARLIER_KIND
    return None


def encode_events(events: Sequence[Event]) -> list[dict[str, object]]:
    """Plain JSON values, for the ledger and the bundle."""
    plain: list[dict[str, object]] = msgspec.to_builtins(list(events))
    return plain


def decode_events(plain: object) -> Events:
    """Inverse of :func:`encode_events`.

    Raises:
        EvidenceError: an event of unknown kind, a missing or surplus type, an impossible value.
            Events that this version does not understand are refused, not skipped.
    """
    try:
        return msgspec.convert(plain, Events)
    except (msgspec.ValidationError, ConfigError) as error:
        raise EvidenceError(
            f"a privacy event cannot be read: {error}",
            hint="it was written by a newer version or changed by hand; do not release on it",
        ) from error


def merge(events: Iterable[Event]) -> Events:
    """The same releases with equal mechanisms counted together, in a canonical order."""
    counts: dict[Event, int] = {}
    for event in events:
        base = repeat(event, 1)
        counts[base] = counts.get(base, 0) + times(event)
    merged = []
    for base, count in counts.items():
        while count > 0:  # once, but for what somebody made up
            merged.append(repeat(base, min(count, _LARGEST_INTEGER)))
            count -= _LARGEST_INTEGER
    return tuple(sorted(merged, key=lambda event: msgspec.json.encode(event)))


def times(event: Event) -> int:
    """How many times the mechanism of ``event`` ran."""
    return event.steps if isinstance(event, PoissonGaussian) else event.count


def rate(event: Event) -> float:
    """Poisson rate at which a unit takes part; 1 without sampling."""
    return 1.0 if isinstance(event, Gaussian) else event.q


def continuous(event: Event) -> Gaussian | PoissonGaussian | None:
    """The mechanism with continuous noise of which ``event`` is a function, up to its slack.

    None for a :class:`DiscreteGaussian`, which is charged by other means.
    """
    if isinstance(event, RoundedGaussian):
        return event.continuous
    return None if isinstance(event, DiscreteGaussian) else event


def repeat(event: Event, count: int) -> Event:
    """The mechanism of ``event``, run ``count`` times."""
    if isinstance(event, PoissonGaussian):
        return msgspec.structs.replace(event, steps=count)
    return msgspec.structs.replace(event, count=count)


def louder(event: Event, factor: float) -> Event:
    """The same mechanism with ``factor`` times the noise."""
    if isinstance(event, DiscreteGaussian):
        return msgspec.structs.replace(event, share_sigma=event.share_sigma * factor)
    return msgspec.structs.replace(event, noise_multiplier=event.noise_multiplier * factor)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ConfigError(
            f"must be a positive number, not {value}",
            where=name,
            hint="a release without noise has no ε; run the study without privacy instead",
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"must be at least {least}, not {value}", where=name)


def _at_most(name: str, value: float, most: int) -> None:
    if value > most:
        raise ConfigError(f"must be at most {most:.0e}", where=name)


def _probability(q: float) -> None:
    if not _LEAST_RATE <= q <= 1.0:
        raise ConfigError(
            f"a sampling probability lies in (0, 1], not {q}",
            where="q",
            hint="use expected batch / records of the silo",
        )
