"""Which records of simulated silos can pay, where their ledgers go on from study to study.

Adversary: the authors of one study after another about the same records. A real silo looks at its
own ledger on its own machine (``client --records``); here one person plays all of them. The silos
are asked before the run's directory is made, or an older one removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from securefedcollm.errors import BudgetExceeded, ConfigError
from securefedcollm.federation.consent import (
    able_to_pay,
    identified,
    require_whole,
    taking_part,
)
from securefedcollm.federation.cotuning import Holdings, planned_event
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.study import Study, digest
from securefedcollm.tuning.question import Question

Silos = Mapping[str, tuple[Question, ...]]


@dataclass(frozen=True)
class _Owner:
    """A simulated silo, as :mod:`securefedcollm.federation.consent` knows owners of records."""

    study: Study
    name: str
    ledger: Path


class _Records(Holdings):
    """A silo's records, and what the study charges them, before its model is loaded."""

    def __init__(
        self, study: Study, questions: Sequence[Question], update_size: Callable[[int], int]
    ) -> None:
        super().__init__(study, questions)
        self._update_size = update_size

    def update_size(self, round_: int) -> int:
        return self._update_size(round_)

    def events(self) -> tuple[Event, ...]:
        privacy = self._study.privacy
        if privacy is None or privacy.noise != "local":
            return ()
        return (planned_event(self._study, self._questions),)


def able(
    study: Study, silos: Silos, plan: SimulationPlan, update_size: Callable[[int], int]
) -> dict[str, tuple[Question, ...]]:
    """The questions of every silo that take part, in the order of its file.

    A run that goes on is not asked again whether it can be paid: its ledgers decide sum by sum.

    Args:
        update_size: length of the update that enters the sum of a round.

    Raises:
        BudgetExceeded: records of a silo cannot pay, and the plan does not skip them; or none can.
        ConfigError: too few records can, or the run began without some that now take part.
    """
    found = dict(silos)
    for name, questions in silos.items():
        book = plan.ledger_of(name)
        if book is None and plan.resume and plan.records == "skip":
            book = plan.out / "silos" / name / "ledger.sqlite"
        if study.privacy is None or book is None or not book.exists():
            continue
        owner, records = _Owner(study, name, book), _Records(study, questions, update_size)
        try:
            if plan.records == "skip":
                found[name] = tuple(able_to_pay(owner, records))
                records = _Records(study, found[name], update_size)
            elif plan.resume:
                _require_all(owner, records)
            if not plan.resume:
                require_whole(owner, records)
        except BudgetExceeded as error:
            raise BudgetExceeded(f"{name}: {error.message}", hint=error.hint) from None
        except ConfigError as error:
            said = f"{name}: {error.problem}"
            raise type(error)(said, where=error.where, hint=error.hint) from None
    return found


def places(whole: Silos, kept: Silos) -> dict[str, tuple[int, ...]]:
    """Where the kept questions are among all of each silo, if that has lost any."""
    return {
        name: tuple(at for at, kept in enumerate(taking_part(whole[name], own)) if kept)
        for name, own in kept.items()
        if len(own) < len(whole[name])
    }


def _require_all(owner: _Owner, records: _Records) -> None:
    """Raises: ConfigError if the run began without some of these records."""
    if owner.study.validation is not None:  # it began with all, and they are in two parts
        return
    with Ledger(owner.ledger, owner.name) as ledger:
        begun = ledger.set_of(digest(owner.study).hex())
        mine = identified(ledger, owner.study, records)
        if begun is not None and not mine.exactly_in(begun).all():
            raise ConfigError(
                "the run began without some of these records",
                where="--records",
                hint="go on with --records skip if it began so; else put the file back as it was",
            )
