"""What a person needs to hear when a release does not fit the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from securefedcollm.privacy.events import Event, Events, louder, merge, repeat, times
from securefedcollm.privacy.filters import Terms, filter_epsilon, filter_within
from securefedcollm.privacy.shown import down, up

_MOST_STEPS = 4096


def explain(
    counted: Events, asked: Events, limit: float, delta: float, terms: Terms
) -> tuple[str, str]:
    """(message, hint): what is spent, what is left, what was asked, and what would fit."""
    spent = filter_epsilon(counted, delta, terms).epsilon
    total = filter_epsilon(merge(counted + asked), delta, terms).epsilon
    message = (
        f"ε = {up(spent)} of {limit:g} is spent at δ = {delta:g}, {down(limit - spent)} is left, "
        f"and this release would bring it to {up(total)}; nothing was released"
    )

    def fits(events: list[Event]) -> bool:
        return filter_within(merge([*counted, *events]), delta, limit, terms) <= limit

    return message, _what_fits(asked, fits)


def explain_run(
    counted: Events,
    asked: Events,
    rounds: int,
    limit: float,
    delta: float,
    terms: Terms,
    what: str = "rounds",
) -> tuple[str, str]:
    """As :func:`explain`, for a run of ``rounds`` rounds that each release ``asked``.

    Args:
        what: what the operator calls them.
    """
    spent = filter_epsilon(counted, delta, terms).epsilon
    total = filter_epsilon(merge(counted + repeated(asked, rounds)), delta, terms).epsilon
    message = (
        f"ε = {up(spent)} of {limit:g} is spent at δ = {delta:g}, {down(limit - spent)} is left, "
        f"and the {rounds} {what} of this run would bring it to {up(total)}; nothing was trained"
    )

    def fits(events: Sequence[Event]) -> bool:
        return filter_within(merge([*counted, *events]), delta, limit, terms) <= limit

    offers = []
    count = _largest(rounds - 1, lambda n: fits(repeated(asked, n)))
    if count:
        offers.append(f"{count} of its {rounds} {what} at this noise")
    factor = _smallest_factor(lambda f: fits([louder(e, f) for e in repeated(asked, rounds)]))
    if factor is not None:
        quieter = merge(louder(event, factor) for event in repeated(asked, rounds))
        alone = filter_epsilon(quieter, delta, Terms(repeat(quieter[0], 1), limit)).epsilon
        offers.append(f"all of them with privacy.epsilon: {down(alone)} ({_noise(asked, factor)})")
    return message, _offered(offers)


def repeated(asked: Sequence[Event], rounds: int) -> Events:
    """What ``rounds`` rounds release that each release ``asked``."""
    return tuple(repeat(event, times(event) * rounds) for event in asked)


def _what_fits(asked: Events, fits: Callable[[list[Event]], bool]) -> str:
    offers = []
    runs = times(asked[0])
    if len(asked) == 1 and 1 < runs <= _MOST_STEPS:
        count = _largest(runs - 1, lambda n: fits([repeat(asked[0], n)]))
        if count:
            offers.append(f"{count} of its {runs} steps")
    factor = _smallest_factor(lambda f: fits([louder(event, f) for event in asked]))
    if factor is not None:
        offers.append(_noise(asked, factor))
    return _offered(offers)


def _noise(asked: Events, factor: float) -> str:
    return f"a noise multiplier of {math.ceil(asked[0].noise_multiplier * factor * 1e3) / 1e3:g}"


def _offered(offers: list[str]) -> str:
    if not offers:
        return "no release of this kind fits any more; use other data or agree on a larger budget"
    return "what would fit: " + ", or ".join(offers)


def _largest(top: int, fits: Callable[[int], bool]) -> int:
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _smallest_factor(fits: Callable[[float], bool]) -> float | None:
    high = next((2.0**k for k in range(1, 8) if fits(2.0**k)), None)
    if high is None:
        return None
    low = high / 2.0
    while high - low > 0.01 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
