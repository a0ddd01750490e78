"""The meaning of the report's figures and short names, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from securefedcollm.privacy.shown import up

STRONG: Final = 1.0
"""ε up to which the bound by itself is strong."""
NOT_STRONG: Final = 4.0
"""ε above which it is not: 50 % can become 98 %. The usual ε = 8 is far above."""

_WHOSE: Final = {
    "record": "one record",
    "subject": "all records of one subject",
    "silo": "one silo's data",
}

ACCOUNTANTS: Final = {
    "pld": "privacy loss distributions: a tight upper bound, computed numerically",
    "rdp": "Rényi differential privacy: an upper bound for every mechanism used here",
    "zcdp": "zero-concentrated differential privacy: an upper bound in closed form",
    "prv": "privacy loss random variables, by a second, independent program",
    "prv-accountant": "an independent program that brackets ε from both sides",
    "closed form": "two published formulas, one below ε and one above",
    "prv-accountant and closed form": "below, an independent program; above, a published formula",
    "nothing was released": "no noisy result has left this silo",
}

_NOISED_SUM: Final = (
    "a secure sum of integers. Each silo adds a share of the noise, of size share_sigma. The "
    "parameter sensitivity is the largest influence of one unit, in the same integers. shares is "
    "the number of noise shares in the sum, of which colluders are known to the adversary. q is "
    "the probability with which a unit takes part in a sum (1: always)."
)

MECHANISMS: Final = {
    "poisson-gaussian": "DP-SGD inside the silo. In each of the steps every record takes part by "
    "chance, with probability q, which only the silo knows. Each record's influence is cut to a "
    "fixed size, and Gaussian noise of noise_multiplier times that size is added.",
    "gaussian": "every unit takes part in each release; its influence is cut to a fixed size, and "
    "Gaussian noise of noise_multiplier times that size is added.",
    "rounded-gaussian": _NOISED_SUM,
    "layered-gaussian": f"{_NOISED_SUM} Noise that a sum of so many silos does not need was opened "
    "and subtracted: design is the number of colluders, least and most the numbers of silos, that "
    "this is made for.",
    "discrete-gaussian": f"{_NOISED_SUM} Earlier versions charged sums by this name, at more ε.",
}

GLOSSARY: Final = (
    ("ε (epsilon)", "How much one unit's data can change what anybody may conclude: each odds "
     "ratio by a factor of at most e^ε. Smaller is better; 0 would be no influence at all."),
    ("δ (delta)", "A small probability for which the bound of ε is not promised."),
    ("unit", "The thing whose presence is protected: one record of a silo, or a silo's whole "
             "data set."),
    ("add or remove", "Two data sets are neighbours if one has a unit that the other lacks."),
    ("noise multiplier (z)", "Size of the noise divided by the largest influence of one unit."),
    ("silo", "An organisation that tunes the small model on records that never leave it."),
    ("server", "The party that adds up the silos' updates, which it cannot read one by one."),
    ("secure sum", "Updates are masked so that only their sum over enough silos can be opened."),
    ("survivors", "The silos whose updates are in a round's sum."),
    ("reserved, settled", "The worst case is charged before training and corrected afterwards to "
     "what happened, never upwards."),
    ("head, cosignature", "A signed fingerprint of a whole log; other participants' signatures "
     "under it show that all saw the same log."),
    ("accountant", "A program that computes ε from the list of noisy releases."),
    ("canary", "A made-up record that an audit puts in or leaves out by a coin, to see whether an "
     "attacker can tell."),
    ("auc", "Chance that an attack ranks a record that was in above one that was not: 0.5 is "
     "guessing, 1 certainty."),
    ("tpr at 1 % fpr", "Share of members that an attack finds if it mistakes one in a hundred "
                       "of the others for a member."),
    ("raw update, masked upload, opened sum, noised sum", "Where an audit tried to read words "
                                                          "back, and the share that it "
                                                          "recovered; “by chance” is the share "
                                                          "by guessing."),
)  # fmt: skip


def meaning(unit: str, epsilon: float, delta: float, agreed: float) -> list[str]:
    """The conclusions about one unit that (ε, δ) allows an attacker, and how strong the bound is.

    Args:
        agreed: ε of the budget, which other studies may use up.
    """
    whose, odds = _WHOSE.get(unit, "one unit"), _odds(epsilon)
    said = [
        f"ε = {up(epsilon)} bounds what anybody can conclude about {whose}. Take an attacker who "
        f"knows everything else, and for whom it is as likely as not that {whose} was used "
        f"(odds 1 to 1, 50 %). Whatever was released, the odds become at most {odds} to 1, that "
        f"is {_sure(epsilon)}.",
        f"δ = {delta:g} is one in {_in(delta)}: with at most about that probability the bound may "
        "fail. It should be far smaller than one divided by the number of protected units.",
        _strength(epsilon),
    ]
    if agreed > epsilon:
        said.append(
            f"The agreed budget is ε = {agreed:g}. If other studies use it up, the odds become at "
            f"most {_odds(agreed)} to 1, {_sure(agreed)}: {_grade(agreed)}."
        )
    return said


def _grade(epsilon: float) -> str:
    if epsilon <= STRONG:
        return "strong"
    return "moderate" if epsilon <= NOT_STRONG else "not strong"


def _strength(epsilon: float) -> str:
    if epsilon <= NOT_STRONG:
        return (
            f"How strong: {_grade(epsilon)}. Up to ε = {STRONG:g} a bound is called strong here, "
            f"up to {NOT_STRONG:g} moderate, above it not strong."
        )
    return (
        f"How strong: {_grade(epsilon)}. At this ε the bound alone excludes little against so well "
        "informed an attacker; the usual ε = 8 allows odds of 2,981 to 1. Real attackers know less "
        "and find less; audits measure that (section 6), and no accountant promises it."
    )


def _odds(epsilon: float) -> str:
    if epsilon > math.log(1e9):
        return "more than a thousand million"
    odds = math.exp(epsilon)
    return f"{odds:,.0f}" if odds >= 10 else f"{odds:.2f}"


def _sure(epsilon: float) -> str:
    """The probability at odds of e^ε, never rounded in our favour, never to certainty."""
    percent = 100.0 / (1.0 + math.exp(-epsilon))
    shown = f"{math.ceil(percent * 100) / 100:.2f}"
    return "more than 99.99 %" if percent > 99.99 else f"{shown} %"


def _in(delta: float) -> str:
    return f"{1.0 / delta:,.0f}" if delta > 1e-15 else f"{1.0 / delta:.0e}"


def accountants(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, what it is) of those accountants that are known by these names."""
    return [(name, ACCOUNTANTS[name]) for name in sorted(set(names)) if name in ACCOUNTANTS]


def mechanisms(shown: Iterable[str]) -> list[tuple[str, str]]:
    """(kind, what it is) of mechanisms that are shown as ``kind: parameters``."""
    kinds = sorted({text.partition(":")[0] for text in shown})
    return [(kind, MECHANISMS[kind]) for kind in kinds if kind in MECHANISMS]
