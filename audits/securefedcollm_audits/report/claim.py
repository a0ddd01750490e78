"""The claim of a run in one sentence: unit, adjacency, adversary, ε at δ, horizon."""

from __future__ import annotations

from typing import Final

from securefedcollm.privacy.shown import up
from securefedcollm_audits.verification.case import Case, fewest
from securefedcollm_audits.verification.progress import progress

_READING: Final = (
    " This figure is a bound if nobody chose a release by what earlier ones showed. The agreed "
    "budget is a bound in any case."
)


def may_end_early(case: Case) -> bool:
    """Whether the run's end is chosen on what it released. Then the budget alone is a promise."""
    keep = case.study.keep
    return keep is not None and keep.patience is not None


def claim(case: Case, spent: tuple[float, float] | None) -> str:
    """The bundle's claim. ``spent``: an (ε, δ) that holds for every silo; None if none is stated.

    δ is that of the silos' ledgers. A study may ask for a smaller one than its silos have pinned.
    """
    study, privacy = case.study, case.study.privacy
    if privacy is None:
        return (
            "This study claims no differential privacy: updates were hidden in sums of at least "
            f"{fewest(study)} silos, but the released adapters may reveal single records."
        )
    what = {
        "record": "one record of a silo",
        "subject": f"all records of one {privacy.subject} in a silo",
        "silo": "one silo's whole data set",
    }[privacy.unit]
    c = study.silos.colluders
    helpers = "" if not c else f" together with any {c} of the other silos"
    if spent is not None:
        amount = f"(ε = {up(spent[0])}, δ = {spent[1]:g})"
    else:
        amount = f"at most (ε = {privacy.epsilon:g}, δ = {privacy.delta:g})"
    return (
        f"{_released(case)} is {amount} differentially private for {what}, added or removed, "
        f"against the server{helpers}, the other silos and everybody who sees the adapters."
        + (_READING if spent is not None else _agreed(case))
    )


def _agreed(case: Case) -> str:
    if may_end_early(case):
        return (
            " The study may end early, by what its rounds showed, so the ε spent until then is "
            "no bound: this is the agreed budget."
        )
    why = "What was spent is not settled yet" if case.silos else "No silo's charges are here"
    return f" {why}: this is the agreed budget."


def _released(case: Case) -> str:
    far = progress(case)
    if far.teller == "silos":
        return f"What {far.who} gave to the secure sums of {far.done} of {far.rounds} rounds"
    verb = "finished" if far.teller == "server" else "opened"
    return f"What the {far.done} {verb} of {far.rounds} rounds released"
