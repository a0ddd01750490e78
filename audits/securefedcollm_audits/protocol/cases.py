"""Protocol audit: malicious servers, silos and askers against the real state machines.

Every case plays one attack. It reports which side refused it, and *what the attacker learnt*:
:class:`~.spy.Spy` judges that from everything the attacker saw. The server cases up to
``late_upload`` are weaknesses that released public secure-aggregation code had. Those called
``authority_…`` are about CKKS under an authority's key, ``threshold_…`` about CKKS with a joint
one, ``graph_…`` about masking on a random graph, those of :data:`RETRIEVAL` about private
questions, all others about masking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm_audits.protocol import (
    asker_attacks,
    authority_attacks,
    graph_attacks,
    key_attacks,
    poll_attacks,
    server_attacks,
    shelf_attacks,
    silo_attacks,
    threshold_attacks,
)
from securefedcollm_audits.protocol.outcome import Outcome

Case = Callable[[], Outcome]

SERVER_CASES: Final[tuple[Case, ...]] = (
    key_attacks.narrow_seed,
    server_attacks.both_lists,
    server_attacks.both_lists_at_opening,
    server_attacks.downgrade,
    server_attacks.victim_alone,
    key_attacks.middleman,
    key_attacks.invented_peers,
    key_attacks.small_order_mask_key,
    key_attacks.small_order_share_key,
    server_attacks.side_channels,
    server_attacks.overflow,
    server_attacks.small_values,
    server_attacks.late_upload,
    server_attacks.inconsistent_models,
    server_attacks.split_survivors,
    server_attacks.mixed_agreements,
    server_attacks.split_deliveries,
    server_attacks.altered_boxes,
    server_attacks.crash_and_restart,
    server_attacks.snapshots,
    server_attacks.second_attempt,
    server_attacks.second_vector,
    server_attacks.replays,
    server_attacks.out_of_order,
    key_attacks.repeated_keys,
    key_attacks.stolen_identity,
    key_attacks.split_rolls,
    server_attacks.repeated_signers,
    *authority_attacks.CASES,
    *threshold_attacks.CASES,
    *graph_attacks.CASES,
    *shelf_attacks.SERVER_CASES,
    *poll_attacks.SERVER_CASES,
)

SILO_CASES: Final[tuple[Case, ...]] = (
    silo_attacks.bad_signatures,
    silo_attacks.malformed,
    silo_attacks.impersonation,
    silo_attacks.copied_keys,
    silo_attacks.small_order_keys,
    silo_attacks.unfitting_dealing,
    silo_attacks.bad_boxes,
    silo_attacks.false_commitment,
    silo_attacks.false_mask_secret,
    silo_attacks.false_refusal,
    silo_attacks.other_delivery,
    silo_attacks.other_lists,
    silo_attacks.wrong_shares,
    silo_attacks.out_of_bounds,
    *shelf_attacks.SILO_CASES,
)

ASKER_CASES: Final[tuple[Case, ...]] = (*asker_attacks.CASES, *poll_attacks.ASKER_CASES)

RETRIEVAL: Final = (
    *(*shelf_attacks.SERVER_CASES, *shelf_attacks.SILO_CASES, *asker_attacks.CASES),
    *(*poll_attacks.SERVER_CASES, *poll_attacks.ASKER_CASES),
)
"""Attacks on private questions, to documents and to records."""

CASES: Final = SERVER_CASES + SILO_CASES + ASKER_CASES


def run(
    cases: Sequence[Case] = CASES, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Outcome]:
    """Play ``cases``; outcome by case name. ``progress``: cases done, and in all."""
    outcomes = {}
    for done, case in enumerate(cases):
        progress(done, len(cases))
        outcomes[case.__name__] = case()
    progress(len(cases), len(cases))
    return outcomes


def named(names: Sequence[str]) -> list[Case]:
    """The cases of these names; all for none.

    Raises:
        ConfigError: there is no such case.
    """
    known = {case.__name__: case for case in CASES}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no attack {name!r}", where="--case", hint=f"one of {', '.join(known)}"
            )
    return [known[name] for name in names] or list(CASES)


def adversary(name: str) -> str:
    """``server``, ``silo`` or ``asker``: who attacks in a case."""
    who = {"server": SERVER_CASES, "silo": SILO_CASES, "asker": ASKER_CASES}
    return next(role for role, cases in who.items() if name in {case.__name__ for case in cases})
