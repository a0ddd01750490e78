"""The cost of a target ε, before anyone trains: noise against signal for every way to add noise.

The measure is the noise-to-signal ratio of the mean that the server gets: the L2 norm of its noise,
divided by the *largest possible* signal, C (every contribution clipped and all in the same
direction). Real signal is smaller, so a ratio above 1 is certainly hopeless, while a small one
promises nothing. Over a run, signal adds up and independent noise adds in squares: the ratio falls
by √releases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accounting import (
    TIGHT_SHARE,
    calibrate,
    calibrate_events,
    claim_name,
)
from securefedcollm.privacy.adaptive_clip import split
from securefedcollm.privacy.distributed import DistributedGaussian, mean_noise
from securefedcollm.privacy.events import Event, PoissonGaussian
from securefedcollm.privacy.gap import gap_of
from securefedcollm.privacy.noise import batch_cap

Verdict = Literal["workable", "poor", "hopeless"]

_WORKABLE: Final = 0.25
_HOPELESS: Final = 1.0
_ROOMY_FIELD: Final = 2**31 - 1
"""A field in which quantisation does not matter, for planning before the field is known."""


class Federation(msgspec.Struct, frozen=True):
    """The inputs of a plan.

    Args:
        values: d, numbers in an update.
        silos: n.
        least_survivors: fewest silos with which a sum is opened.
        colluders: c.
        records: records (or subjects) of the smallest silo.
        unit: ``record`` or ``subject``: the unit that the options other than the silo protect.
        count_noise: noise on the count of an adaptive clip over that of the sum; None: fixed clip.
        rounds: rounds of the study.
        steps: optimiser steps of a silo in a round.
        batch_size: expected batch of a step in one silo.
        removes: whether noise that a sum does not need is removed from it.
    """

    values: int
    silos: int
    least_survivors: int
    colluders: int
    records: int
    rounds: int
    steps: int
    batch_size: int
    unit: Literal["record", "subject"] = "record"
    count_noise: float | None = None
    removes: bool = False

    @property
    def honest(self) -> int:
        return self.least_survivors - self.colluders

    @property
    def hiding(self) -> int:
        """Honest shares that the noise of a sum of all silos is made for."""
        return self.silos - self.colluders if self.removes else self.honest


class Option(msgspec.Struct, frozen=True):
    """One unit and placement of the noise, calibrated to the target."""

    unit: str
    noise: str
    protects: str
    epsilon: float
    """Charged: at worst, whoever chose the survivors."""
    hoped: float
    """By the same accountant with all of δ, if all silos are in every sum and nobody chose."""
    accountant: str
    noise_multiplier: float
    releases: int
    sampling_rate: float
    noise_to_signal: float
    """Of the mean of one release."""
    run_noise_to_signal: float
    """Of all releases together."""
    verdict: Verdict
    remark: str
    offered: bool = True
    """Whether a study can ask for it."""

    @property
    def name(self) -> str:
        return f"{self.unit}/{self.noise}"


class Plan(msgspec.Struct, frozen=True):
    """Every option for one (ε, δ), and the advised one."""

    epsilon: float
    delta: float
    federation: Federation
    options: tuple[Option, ...]
    advice: str


def plan(
    federation: Federation,
    epsilon: float,
    delta: float,
    offered: Callable[[str, str], bool] = lambda unit, noise: True,
) -> Plan:
    """Calibrate and compare the three pairs of unit and placement.

    Args:
        offered: whether the study format at hand can ask for ``(unit, noise)``; the others are
            shown for comparison and never advised.

    Raises:
        ConfigError: a batch larger than the silo, no honest share, or an ε that no noise reaches.
    """
    _check(federation)
    options = (
        _record_local(federation, epsilon, delta),
        _record_distributed(federation, epsilon, delta),
        _silo_distributed(federation, epsilon, delta),
    )
    marked = tuple(
        msgspec.structs.replace(option, offered=offered(option.unit, option.noise))
        for option in options
    )
    return Plan(epsilon, delta, federation, marked, _advice(marked))


class JointChoice(msgspec.Struct, frozen=True):
    """One way to spend the same number of gradients in joint DP-SGD."""

    steps: int
    """Secure sums in the whole run."""
    batch_size: int
    """Expected batch of all silos together."""
    sampling_rate: float
    noise_multiplier: float
    run_noise_to_signal: float
    megabytes: float
    """Sent by one silo in the whole run."""


def joint_choices(
    federation: Federation, epsilon: float, delta: float, bytes_per_value: float
) -> tuple[JointChoice, ...]:
    """Compare fewer, larger steps with more, smaller ones, for the same gradients and the same ε.

    Fewer steps mean less noise and less communication. But they also mean fewer corrections, which
    no noise-to-signal ratio shows.

    Args:
        bytes_per_value: of a masked vector.
    """
    fed = federation
    runs = fed.steps * fed.rounds
    found = []
    for factor in (4, 2, 1, 0.5, 0.25):
        steps, batch = round(runs / factor), round(fed.batch_size * factor)
        if steps < 1 or not 1 <= batch <= fed.records:
            continue
        shaped = msgspec.structs.replace(fed, rounds=1, steps=steps, batch_size=batch)
        option = _record_distributed(shaped, epsilon, delta)
        found.append(
            JointChoice(
                steps=steps,
                batch_size=batch * fed.silos,
                sampling_rate=batch / fed.records,
                noise_multiplier=option.noise_multiplier,
                run_noise_to_signal=option.run_noise_to_signal,
                megabytes=steps * fed.values * bytes_per_value / 1e6,
            )
        )
    return tuple(found)


def _record_local(fed: Federation, target: float, delta: float) -> Option:
    rate, steps = fed.batch_size / fed.records, fed.steps * fed.rounds
    z = calibrate(target, delta, rate, steps)
    alone = mean_noise(fed.values, z, 1, 1, fed.batch_size)
    return _option(
        fed.unit,
        "local",
        f"a {fed.unit}, against everybody",
        (PoissonGaussian(rate, z, steps),),
        target,
        delta,
        z,
        silos=fed.silos,
        ratio=alone / math.sqrt(fed.silos),
        # A silo's own steps are what has to find the way; averaging comes only after them.
        run_ratio=alone / math.sqrt(steps),
        remark=f"noise/signal of a silo's own step: {alone:.2g}; trusts no other silo",
    )


def _record_distributed(fed: Federation, target: float, delta: float) -> Option:
    rate, steps = fed.batch_size / fed.records, fed.steps * fed.rounds
    cap = batch_cap(fed.records, rate)

    def at(z: float) -> tuple[Event, ...]:
        made = _mechanism(fed, z, contributions=cap)
        return (made.event(fed.least_survivors, count=steps, q=rate),)

    z = calibrate_events(at, target, TIGHT_SHARE * delta)
    ratio = mean_noise(fed.values, z, fed.silos, fed.hiding, fed.batch_size * fed.silos)
    return _option(
        fed.unit,
        "distributed",
        f"a {fed.unit}, against the server and {fed.colluders} silo(s)",
        at(z),
        target,
        delta,
        z,
        silos=fed.silos,
        ratio=ratio,
        run_ratio=ratio / math.sqrt(steps),
        remark=f"joint DP-SGD: one secure sum per step, {steps} in all",
    )


def _silo_distributed(fed: Federation, target: float, delta: float) -> Option:
    def at(z: float) -> tuple[Event, ...]:
        return (_mechanism(fed, z).event(fed.least_survivors, count=fed.rounds),)

    z = calibrate_events(at, target, TIGHT_SHARE * delta)
    remark = ""
    on_update = z
    if fed.count_noise is not None:
        on_update = split(z, fed.count_noise * z)
        off = mean_noise(1, fed.count_noise * z, fed.silos, fed.hiding, fed.silos) / 2.0
        remark = f"; its clip norm adapts to a share of silos that is known to ±{off:.1g}"
    ratio = mean_noise(fed.values, on_update, fed.silos, fed.hiding, fed.silos)
    needed = math.ceil(ratio * fed.silos / math.sqrt(fed.rounds) / _WORKABLE)
    return _option(
        "silo",
        "distributed",
        f"a whole silo, against the server and {fed.colluders} other silo(s)",
        at(z),
        target,
        delta,
        z,
        silos=fed.silos,
        ratio=ratio,
        run_ratio=ratio / math.sqrt(fed.rounds),
        remark=f"pays from about {_round_up(needed)} silos on, or for a far smaller adapter"
        + remark,
    )


def _option(
    unit: str,
    noise: str,
    protects: str,
    events: tuple[Event, ...],
    target: float,
    delta: float,
    z: float,
    *,
    silos: int,
    ratio: float,
    run_ratio: float,
    remark: str,
) -> Option:
    (event,) = events
    spent = gap_of(event, silos, delta, target)
    return Option(
        unit=unit,
        noise=noise,
        protects=protects,
        epsilon=spent.charged,
        hoped=spent.hoped,
        accountant=claim_name(events),
        noise_multiplier=z,
        releases=event.steps if isinstance(event, PoissonGaussian) else event.count,
        sampling_rate=getattr(event, "q", 1.0),
        noise_to_signal=ratio,
        run_noise_to_signal=run_ratio,
        verdict=_verdict(run_ratio),
        remark=remark,
    )


def _mechanism(fed: Federation, z: float, contributions: int = 1) -> DistributedGaussian:
    return DistributedGaussian(
        values=fed.values,
        clip_norm=1.0,
        field_bound=_ROOMY_FIELD * contributions,
        noise_multiplier=z,
        least_survivors=fed.least_survivors,
        colluders=fed.colluders,
        contributions=contributions,
        silos=fed.silos if fed.removes else 0,
    )


def _verdict(ratio: float) -> Verdict:
    if ratio <= _WORKABLE:
        return "workable"
    return "poor" if ratio <= _HOPELESS else "hopeless"


def _advice(options: tuple[Option, ...]) -> str:
    ranked = sorted(options, key=lambda option: option.run_noise_to_signal)
    usable = [option for option in ranked if option.offered and option.verdict != "hopeless"]
    dead = " and ".join(option.name for option in options if option.verdict == "hopeless")
    if not usable:
        return (
            "no option leaves a signal at this ε: train on more records, with a smaller adapter, "
            "or agree on a larger ε"
        )
    best = usable[0]
    advice = f"take {best.name}: {best.verdict}"
    if dead:
        advice += f"; {dead} would release noise, not a model"
    if ranked[0] is not best:
        advice += f"; {ranked[0].name} would keep more signal, but this study cannot ask for it"
    return advice


def _check(fed: Federation) -> None:
    if fed.batch_size > fed.records:
        raise ConfigError(
            f"an expected batch of {fed.batch_size} needs as many {fed.unit}s, "
            f"there are {fed.records}",
            where="local.batch_size",
            hint=f"at most {fed.records}; a tenth of it amplifies privacy well",
        )
    if fed.honest < 1:
        raise ConfigError(
            "a sum may have no honest silo",
            where="silos.minimum",
            hint=f"at least colluders + 2 = {fed.colluders + 2}",
        )


def _round_up(count: int) -> str:
    """Two significant digits, upwards: it is an estimate and should look like one."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{math.ceil(count / step) * step:,}"
