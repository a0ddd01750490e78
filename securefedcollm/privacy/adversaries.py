"""ε against each adversary: the same releases, as different parties see them.

* *server*: sees every released sum, knows the cohort of every round (so sampling of silos earns
  nothing against it), and none of the honest silos' noise.
* *server + c silos*: subtracts the noise shares of c colluding silos as well. The ledger charges
  this one.
* *another silo*: sees every global model, and knows its own noise share.
* *outsider*: sees what is published. Charged like the server: the final model alone may reveal
  less, but this project claims no reduction for it.

Noise that a silo adds by itself (DP-SGD in the silo) protects equally against all of them, and so
does Poisson sampling of records, because nobody else learns the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from securefedcollm.privacy.accounting import Claim, claim
from securefedcollm.privacy.events import DiscreteGaussian, Event
from securefedcollm.privacy.filters import Terms, filter_epsilon


class AdversaryRow(msgspec.Struct, frozen=True):
    """ε of one adversary at several δ."""

    adversary: str
    epsilons: tuple[Claim, ...]


def per_adversary(
    events: Sequence[Event],
    deltas: Sequence[float],
    colluders: int,
    *,
    terms: Terms | None = None,
) -> list[AdversaryRow]:
    """ε for every adversary, each δ of ``deltas`` in turn.

    Args:
        colluders: c, silos that may collude with the server.
        terms: None for the tightest bound of parameters that were fixed beforehand; else what was
            agreed before the first release, and the answer is what the ledger shows as spent: a
            bound under the same condition (:func:`~.filters.filter_epsilon`).

    Raises:
        ConfigError: fewer shares than the adversary knows.
    """
    chairs = [("outsider", 0), ("server", 0), ("another silo", 1)]
    if colluders:
        chairs.append((f"server+{colluders} silo{'s' * (colluders > 1)}", colluders))

    def at(known: int, delta: float) -> Claim:
        seen = seen_by(events, known)
        if terms is None:
            return claim(seen, delta)
        (first,) = seen_by([terms.first], known)
        return filter_epsilon(seen, delta, terms._replace(first=first))

    return [
        AdversaryRow(name, tuple(at(known, delta) for delta in deltas)) for name, known in chairs
    ]


def seen_by(events: Sequence[Event], known_shares: int) -> list[Event]:
    """The events for an adversary who knows the noise of ``known_shares`` silos.

    A single share is the silo's own, which nobody else knows.
    """
    return [
        msgspec.structs.replace(event, colluders=known_shares)
        if isinstance(event, DiscreteGaussian) and event.shares > 1
        else event
        for event in events
    ]
