"""The progress of a run, by the logs in the bundle, and the kind of run.

Only the server's log says that a round is finished. A silo's log says that it helped to open the
sum of a round, and the authority's that it opened the sum; for privacy that counts as much.

Adversary: the maker of the bundle. A silo that lies here lies only about its own part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from securefedcollm.evidence.entries import (
    Asked,
    Audited,
    Counted,
    Decrypted,
    Entry,
    Heard,
    Polled,
    Served,
    Tallied,
    Told,
    Unmasked,
    Voted,
    Voting,
)
from securefedcollm.federation.plan import AUTHORITY, ends_round, round_of
from securefedcollm.foreign import printable
from securefedcollm.study import Study
from securefedcollm_audits.verification.case import Case
from securefedcollm_audits.verification.verdict import Result

Kind = Literal["SIMULATION", "REAL RUN", "NOT ESTABLISHED"]
_AUTHENTIC = ("study-signed", "membership", "heads")


class Progress(NamedTuple):
    """``done`` of ``rounds``, as ``teller`` says: ``server``, ``authority``, or silos."""

    done: int
    rounds: int
    teller: Literal["server", "authority", "silos"]
    who: str
    """The silo, or how many of them, where their logs are all there is."""
    early: bool = False
    """Whether the study's patience ended the run, by the server's log."""

    @property
    def sentence(self) -> str:
        """For a table's head."""
        many = f"{self.done} of {self.rounds} rounds"
        match self.teller:
            case "server":
                return f"{many} finished" + ", when its patience ended the run" * self.early
            case "authority":
                return f"the sums of {many} opened, by the authority's log"
        return f"{self.who} helped to open the sums of {many}; no log of the server is here"


def progress(case: Case) -> Progress:
    """The statement of the most informative log in the bundle."""
    rounds = case.study.rounds
    if case.server:
        done = case.rounds_done()
        return Progress(done, rounds, "server", "", early=case.over and done < rounds)
    if case.authority:
        opened = _opened(case.study, case.authority)
        return Progress(len(opened), rounds, "authority", AUTHORITY)
    found = [_opened(case.study, log) for log in case.silos.values()]
    names = list(case.silos)
    who = printable(names[0]) if len(names) == 1 else f"{len(names)} silos"
    return Progress(len(set().union(*found)), rounds, "silos", who)


def _opened(study: Study, log: Iterable[Entry]) -> set[int]:
    """Rounds whose last sum this log's keeper opened, or gave its share to open."""
    sums = {e.what.round for e in log if isinstance(e.what, Unmasked | Told | Decrypted)}
    # Adversary: whoever numbers a sum 2^53. The study says how many there are.
    return {round_of(study, sum_) for sum_ in sums if sum_ < study.sums and ends_round(study, sum_)}


class Header(msgspec.Struct, frozen=True):
    """The head of a report. Names are those of the study, or of its logs."""

    kind: Kind
    why: str
    began: str
    """UTC, by the participants' own clocks; empty if no log has an entry."""
    ended: str
    progress: str
    server: str
    authority: str
    silos: list[str]
    logs: list[str]
    """Whose logs are in the bundle: ``server``, ``authority`` and silos' names."""
    whole: bool
    """Whether these are all participants'."""


def header(case: Case, results: Iterable[Result]) -> Header:
    """The run that a bundle is of. ``results``: of the checks on it."""
    kind, why = _kind(case, {result.name: result for result in results})
    # An audit or a question may come long after the run.
    later = (Audited, Asked, Heard, Counted, Served, Polled, Tallied, Voting, Voted)
    run = (e for log in case.logs.values() for e in log if not isinstance(e.what, later))
    times = sorted({entry.time for entry in run})
    offices = {case.server_name, case.authority_name}
    return Header(
        kind=kind,
        why=why,
        began=_shown(times[0]) if times else "",
        ended=_shown(times[-1]) if times else "",
        progress=progress(case).sentence,
        server=case.server_name,
        authority=case.authority_name,
        silos=[name for name in case.keys if name not in offices],
        logs=list(case.logs),
        whole=len(case.logs) == len(case.keys),
    )


def _shown(time: str) -> str:
    return f"{time[:10]} {time[11:19]}"


def _kind(case: Case, found: dict[str, Result]) -> tuple[Kind, str]:
    """Adversary: somebody who shows a rehearsal as a run of five organisations, or the reverse."""
    if not case.study.roster:
        return "SIMULATION", (
            "The study names no participants and nobody signed it. Identities were made for the "
            "run, on one machine; nothing here shows that any organisation took part."
        )
    wrong = [name for name in _AUTHENTIC if name not in found or found[name].status != "pass"]
    known = found.get("expected")
    if known is not None and known.status == "fail":
        wrong.append(known.name)
    if wrong:
        return "NOT ESTABLISHED", (
            "The study names its participants, but the evidence does not show that they took part: "
            f"see {', '.join(wrong)} in section 6."
        )
    signed = (
        "All participants named in the study signed it, and every log in this bundle is signed "
        "with the key that the study names. "
    )
    if known is not None and known.status == "pass":
        return "REAL RUN", (
            f"{signed}The maker of this report compared it with their own knowledge: "
            f"{known.evidence}."
        )
    return "REAL RUN", (
        f"{signed}To learn whose keys these are, compare them with keys from the organisations "
        "themselves (audit report --key)."
    )
