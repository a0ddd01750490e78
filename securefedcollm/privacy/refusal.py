"""The message for a person when a release does not fit the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from securefedcollm.privacy.accounting import hopeless
from securefedcollm.privacy.accounts import Account
from securefedcollm.privacy.events import Event, Events, louder, merge, repeat, times
from securefedcollm.privacy.filters import Terms, filter_bound, filter_epsilon, filter_within
from securefedcollm.privacy.shown import down, up

_MOST_STEPS = 4096


def reading(account: Account) -> float:
    """Odometer's ε of an account's charges and a new release; see :func:`filter_epsilon`.

    Infinite where a release has no bound.
    """
    if account.unclear:
        return math.inf
    events = merge(account.counted + account.asked)
    return _reading(events, account.budget.delta, account.budget.epsilon, account.terms)


def bound(account: Account) -> float:
    """An upper bound on :func:`reading`, in milliseconds."""
    if account.unclear:
        return math.inf
    events = merge(account.counted + account.asked)
    return filter_bound(events, account.budget.delta, account.terms)


def explain(
    counted: Events,
    asked: Events,
    limit: float,
    delta: float,
    terms: Terms,
    *,
    own: Events | None = None,
) -> tuple[str, str]:
    """(message, hint): the spent and the remaining ε, the request, and what would fit.

    Args:
        own: the release as asked, where ``asked`` is the same as the account sees it.
    """
    spent = _reading(counted, delta, limit, terms)
    total = _reading(merge(counted + asked), delta, limit, terms)
    message = (
        f"ε = {up(spent)} of {limit:g} is spent at δ = {delta:g}, {down(limit - spent)} is left, "
        f"and this release would bring it to {up(total)}; nothing was released"
    )

    def fits(events: Sequence[Event]) -> bool:
        return filter_within(merge([*counted, *events]), delta, limit, terms) <= limit

    return message, _what_fits(asked, own or asked, fits)


def explain_run(
    counted: Events,
    asked: Events,
    rounds: int,
    limit: float,
    delta: float,
    terms: Terms,
    what: str = "rounds",
    *,
    own: Events | None = None,
) -> tuple[str, str]:
    """As :func:`explain`, for a run of ``rounds`` rounds.

    Args:
        asked: the releases of the whole run.
        what: the operator's word for the rounds.
        own: the releases of one round, where the account sees them otherwise.
    """
    spent = _reading(counted, delta, limit, terms)
    total = _reading(merge(counted + asked), delta, limit, terms)
    message = (
        f"ε = {up(spent)} of {limit:g} is spent at δ = {delta:g}, {down(limit - spent)} is left, "
        f"and the {rounds} {what} of this run would bring it to {up(total)}; nothing was trained"
    )
    once = tuple(repeat(event, times(event) // rounds) for event in asked)

    def fits(events: Sequence[Event]) -> bool:
        return filter_within(merge([*counted, *events]), delta, limit, terms) <= limit

    offers = []
    count = _largest(rounds - 1, lambda n: fits(repeated(once, n)))
    if count:
        offers.append(f"{count} of its {rounds} {what} at this noise")
    factor = _smallest_factor(lambda f: fits([louder(e, f) for e in asked]))
    if factor is not None:
        mine = repeated(own or once, rounds)
        quieter = merge(louder(event, factor) for event in mine)
        alone = _reading(quieter, delta, limit, Terms(repeat(quieter[0], 1), limit))
        offers.append(f"all of them with privacy.epsilon: {down(alone)} ({_noise(mine, factor)})")
    return message, _offered(offers)


def _reading(events: Events, delta: float, limit: float, terms: Terms) -> float:
    """The value of :func:`filter_epsilon`, or a larger number far beyond the limit."""
    rough = filter_within(events, delta, limit, terms)
    return rough if hopeless(rough, limit) else filter_epsilon(events, delta, terms).epsilon


def repeated(asked: Sequence[Event], rounds: int) -> Events:
    """The releases of ``rounds`` rounds, each of which releases ``asked``."""
    return tuple(repeat(event, times(event) * rounds) for event in asked)


def _what_fits(asked: Events, own: Events, fits: Callable[[list[Event]], bool]) -> str:
    offers = []
    runs = times(asked[0])
    if len(asked) == 1 and 1 < runs <= _MOST_STEPS:
        count = _largest(runs - 1, lambda n: fits([repeat(asked[0], n)]))
        if count:
            offers.append(f"{count} of its {runs} steps")
    factor = _smallest_factor(lambda f: fits([louder(event, f) for event in asked]))
    if factor is not None:
        offers.append(_noise(own, factor))
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
