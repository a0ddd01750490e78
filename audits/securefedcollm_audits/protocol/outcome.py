"""The outcome of an attack on the protocols."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from securefedcollm_audits.protocol.cohort import Puppet


@dataclass(frozen=True)
class Outcome:
    """One attack played against the real state machines.

    Args:
        attack: what the adversary did, in a few words.
        learnt: what the adversary learnt or achieved beyond one sum over a quorum, or beyond k
            scores and blocks a question; must be empty.
        defence: the refusing side and its reason, in its own words.
        held: nothing was learnt *and* the attack was refused where it should be.
    """

    attack: str
    learnt: tuple[str, ...]
    defence: str
    held: bool


def judge(attack: str, puppet: Puppet, refusers: Iterable[str], reason: str) -> Outcome:
    """Ask the spy, and check that each of ``refusers`` refused in words containing ``reason``."""
    learnt = tuple(puppet.spy.leaks())
    words = {name: puppet.refused.get(name, "") for name in refusers}
    refused = bool(words) and all(why and reason in why for why in words.values())
    defence = next(iter(words.values()), "") or "nobody refused"
    return Outcome(attack, learnt, defence, held=refused and not learnt)


def both(first: Outcome, second: Outcome) -> Outcome:
    """Two variants of one attack."""
    return Outcome(
        first.attack,
        first.learnt + second.learnt,
        first.defence if not first.held or second.held else second.defence,
        first.held and second.held,
    )


def observed(attack: str, fault: str, defence: str, *, held: bool) -> Outcome:
    """An outcome that is computed rather than refused; ``fault`` says what it means if not held."""
    return Outcome(attack, () if held else (fault,), defence, held)


def respelled(public: bytes) -> bytes:
    """The same X25519 key with the top bit set, which RFC 7748 ignores."""
    return public[:-1] + bytes([public[-1] | 0x80])
