"""The result of a verification: one row a check, with the evidence or the wrong entries.

A check is a function of the case and of a :class:`Faults` to which it reports; it returns one
sentence of evidence. It raises :class:`NotCovered` if the bundle lacks what the check examines.
That counts neither for nor against the run, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from securefedcollm.evidence.entries import Entry
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_audits.verification.case import Case, NotCovered

MOST_FAULTS = 20
"""Faults that a check keeps: a forged log can hold one in every entry."""


class Faults:
    """Collects the faults that one check finds."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.more = 0

    def __call__(self, place: Entry | str, what: str) -> None:
        """``place``: the entry, or the file in the bundle, that is wrong."""
        name = place.place if isinstance(place, Entry) else place
        if len(self.found) < MOST_FAULTS:
            self.found.append(printable(f"{name}: {what}", MOST_MESSAGE))
        else:
            self.more += 1


class Check(NamedTuple):
    """One row of the table."""

    name: str
    title: str
    run: Callable[[Case, Faults], str]


class Result(msgspec.Struct, frozen=True):
    """The result of one check. ``faults`` name the wrong entries; ``evidence`` is one sentence."""

    name: str
    title: str
    status: Literal["pass", "fail", "not covered"]
    evidence: str
    faults: list[str] = []


class Verdict(msgspec.Struct, frozen=True):
    """All results about one bundle (``sha256``: of its file).

    ``keys``: participant → Ed25519 public key (hex), as the study or the logs name them.
    ``rounds_done`` follows from the logs in the bundle; ``progress`` says whose. ``not_compared``:
    the parts that were not compared with the verifier's own knowledge.
    """

    bundle: str
    sha256: str
    results: list[Result]
    study: str = ""
    digest: str = ""
    run: str = ""
    participants: list[str] = []
    rounds_done: int = 0
    rounds: int = 0
    progress: str = ""
    keys: dict[str, str] = {}
    not_compared: list[str] = []

    @property
    def passed(self) -> int:
        """Checks that passed."""
        return sum(result.status == "pass" for result in self.results)

    @property
    def failed(self) -> list[Result]:
        """Results that refute something."""
        return [result for result in self.results if result.status == "fail"]

    @property
    def holds(self) -> bool:
        """Whether something was checked and nothing was refuted."""
        return self.passed > 0 and not self.failed


def carry_out(check: Check, case: Case) -> Result:
    """One check on one case. Whatever goes wrong inside it counts against the bundle."""
    faults = Faults()
    try:
        evidence = check.run(case, faults)
    except NotCovered as silent:
        if not faults.found:
            return Result(check.name, check.title, "not covered", printable(silent))
        evidence = str(silent)
    except Exception as error:
        # Adversary: whoever made the bundle. What cannot be checked is not believed.
        faults("bundle", f"cannot be checked ({type(error).__name__}: {str(error)[:200]})")
        evidence = ""
    if not faults.found:
        return Result(check.name, check.title, "pass", printable(evidence, MOST_MESSAGE))
    rest = f"; and {faults.more} more" if faults.more else ""
    return Result(check.name, check.title, "fail", faults.found[0] + rest, faults.found)
