"""What a silo's operator agrees to: what these records have, and what the study may spend of it.

Adversary: the author of the study and the server. The silo's machine computes all of this from its
own records and ledger, before it sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from securefedcollm.errors import BudgetExceeded, ConfigError
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.parts import (
    Part,
    hold_out,
    part_of,
    sums_left,
    validation_study,
)
from securefedcollm.federation.plan import counting, joint_step, silo_unit, validates
from securefedcollm.federation.roles import Member
from securefedcollm.federation.silostore import SiloStore, SumMemory
from securefedcollm.federation.workload import PrivateRecords
from securefedcollm.privacy.events import SUM_KIND, Events, SumKind, sum_kind
from securefedcollm.privacy.identities import Records
from securefedcollm.privacy.ledger import Budget, Key, Ledger
from securefedcollm.privacy.refusal import repeated
from securefedcollm.study import Study, digest

if TYPE_CHECKING:
    from securefedcollm.federation.cotuning import SiloTuning
    from securefedcollm.tuning.question import Question


class Owner(Protocol):
    """Who owns the records: a :class:`Member`, or a silo of a simulation."""

    @property
    def study(self) -> Study: ...
    @property
    def name(self) -> str: ...
    @property
    def ledger(self) -> Path: ...


class Questioned(PrivateRecords, Protocol):
    """Records that are questions."""

    @property
    def questions(self) -> Sequence[Question]: ...


@dataclass(frozen=True)
class Terms:
    """What an operator agrees to by taking part.

    ε is that of the record (or subject) that has spent most, at the pinned δ, over all studies of
    this ledger.
    """

    study: str
    digest: str
    server: str
    silos: list[str]
    models: dict[str, str]
    base: str
    rounds: int
    records: int
    unit: str | None
    epsilon: float | None
    delta: float | None
    spent: float | None
    """Spent by other studies."""
    after: float | None
    """With all of this one, at worst."""
    median: float | None
    untouched: int | None
    """Records, or subjects, that no other study was charged for."""
    budget: float | None
    budget_delta: float | None
    left_out: int
    """Records of the file that cannot pay, and are left out."""
    unattributed: int
    """Charges of an older ledger for unknown files: they count for no record."""
    continues: list[str]
    """The earlier studies with adapters in the base, and whether this silo took part in them."""
    set_aside: float | None = None
    """Share of the records, or subjects, that are asked and not tuned on; None without a
    validation."""


def terms(
    member: Member, workload: SiloTuning, budget: Budget | None, *, left_out: int = 0
) -> Terms:
    """What taking part means for these records.

    Args:
        budget: the operator's own limit.
        left_out: records of the file that are not among the workload's.
    """
    study, privacy = member.study, member.study.privacy
    figures: dict[str, Any] = dict.fromkeys(
        ("spent", "after", "median", "untouched", "budget", "budget_delta")
    )
    unattributed = 0
    if privacy is None and (pinned := _pinned(member)) is not None:
        figures |= {"budget": pinned.epsilon, "budget_delta": pinned.delta}
    if privacy is not None:
        agreed = budget or Budget(privacy.epsilon, privacy.delta)
        with Ledger(member.ledger, member.name) as ledger:
            records = identified(ledger, study, workload)
            mine = {digest(study).hex(), validation_study(study)}
            about: Any = {"besides": mine, "unit": privacy.unit, "budget": agreed}
            before = ledger.standing(records, [workload.dataset], **about)
            # A record is in one part. We do not say which, so we show the worse of both.
            after = max(
                ledger.standing(records, [workload.dataset], plus=whole, **about).worst
                for whole in _whole(study, workload, _kind(ledger, study))
            )
        unattributed = before.unattributed
        figures = {
            "spent": float(before.worst),
            "after": float(after),
            "median": float(before.median),
            "untouched": before.untouched,
            "budget": min(before.budget.epsilon, agreed.epsilon if budget else float("inf")),
            "budget_delta": before.budget.delta,
        }
    return Terms(
        study=study.study,
        digest=digest(study).hex(),
        server=next(p.name for p in study.roster if p.role == "server"),
        silos=list(member.roster.names),
        models={
            name: model.source
            for name, model in (("llm", study.models.llm), ("slm", study.models.slm))
            if model is not None
        },
        base=workload.base_digest.hex(),
        rounds=study.rounds,
        records=workload.records,
        unit=privacy.unit if privacy else None,
        epsilon=privacy.epsilon if privacy else None,
        delta=privacy.delta if privacy else None,
        left_out=left_out,
        unattributed=unattributed,
        continues=_continues(member),
        set_aside=study.validation.share if study.validation else None,
        **figures,
    )


def _continues(member: Member) -> list[str]:
    """Adversary: the study's author, who may name a run that these participants never had."""
    chain = member.study.continues.earlier if member.study.continues else []
    own = [path.name for path in (member.home / "studies").glob("*")]
    return [
        f"{link.study[:16]}… "
        + (
            "(this silo was in it)"
            if any(name.endswith(f"-{link.study[:12]}") for name in own)
            else "(this silo was not in it)"
        )
        for link in chain
    ]


def require_protection(member: Member, without_privacy: bool) -> None:
    """Refuse a study without differential privacy, if this silo's records have a budget.

    A budget is pinned by its owner, or by the first charge to any record.

    Adversary: the author of a study, who leaves ``privacy`` out to have the records themselves.

    Args:
        without_privacy: the operator knows, and agrees.

    Raises:
        ConfigError: says what is pinned.
    """
    pinned = _pinned(member)
    if member.study.privacy is None and pinned is not None and not without_privacy:
        raise ConfigError(
            f"the budget of these records is pinned at ε = {pinned.epsilon:g}, δ = "
            f"{pinned.delta:g}, and this study has no differential privacy: no budget bounds what "
            "its updates and its model tell of them",
            where="privacy",
            hint="agree on a study with a privacy section; --without-privacy takes part all the "
            "same",
        )


def _pinned(member: Member) -> Budget | None:
    with Ledger(member.ledger, member.name) as ledger:
        return ledger.pinned


def require_budget(member: Member, workload: PrivateRecords, budget: Budget | None) -> None:
    """Refuse a study that these records cannot pay for, before anybody waits for anything.

    If the study has begun, its next sum must fit. Unless this silo did not see the newest sum
    opened: then it may be asked for that again, which costs nothing more.

    Raises:
        BudgetExceeded: says what is left and what would fit.
    """
    study = member.study
    if study.privacy is None:
        return
    with Ledger(member.ledger, member.name) as ledger:
        parts = _parts(ledger, study, workload)
        mine = {part.study for part in parts}
        charged = [e.key for e in ledger.entries() if e.about.study in mine]
        newest = max(charged, key=lambda key: key.round, default=None)
        if newest is None:
            for part in parts:
                _foresee(ledger, study, workload, part, sums_left(study, 0, held=part.held), budget)
        elif _may_begin_another(member, newest):
            (next_,) = (p for p in parts if p.held == validates(study, newest.round + 1))
            _foresee(ledger, study, workload, next_, 1, budget, begun=True)


def require_whole(owner: Owner, workload: PrivateRecords) -> None:
    """Refuse a study that these records cannot pay for from its beginning to its end.

    Raises:
        BudgetExceeded: says what is left and what would fit.
    """
    study = owner.study
    if study.privacy is None:
        return
    with Ledger(owner.ledger, owner.name) as ledger:
        for part in _parts(ledger, study, workload):
            _foresee(ledger, study, workload, part, sums_left(study, 0, held=part.held), None)


def _parts(ledger: Ledger, study: Study, workload: PrivateRecords) -> list[Part]:
    """What the study charges: its records, or those of either part where it sets some aside."""
    records = identified(ledger, study, workload)
    hold_out(study, workload, ledger)
    tuned = part_of(study, workload, ledger, held=False)
    if study.validation is None:
        return [tuned._replace(records=records)]
    return [tuned, part_of(study, workload, ledger, held=True)]


def _foresee(
    ledger: Ledger,
    study: Study,
    workload: PrivateRecords,
    part: Part,
    sums: int,
    budget: Budget | None,
    *,
    begun: bool = False,
) -> None:
    """``begun``: then the study keeps the records that it began with."""
    privacy = study.privacy
    assert privacy is not None
    kind = _kind(ledger, study)
    ledger.foresee(
        part.dataset,
        privacy.unit,
        counting(study, kind).events() if part.held else charge(study, workload, kind),
        sums,
        (privacy.epsilon, privacy.delta),
        "steps" if study.joint and not part.held else "rounds",
        records=part.records,
        study=part.study,
        limit=budget,
        may_skip=study.validation is None and not begun,
    )


def _may_begin_another(member: Member, newest: Key) -> bool:
    """Whether the sum of the newest charge is over for this silo, and not the last."""
    store = SiloStore(make_directory(member.run / "silos" / member.name))
    opened = SumMemory(store, bytes.fromhex(newest.run), newest.round).survivors() is not None
    store.close()
    return opened and newest.round + 1 < member.study.sums


def without_spent(
    member: Member,
    workload: SiloTuning,
    budget: Budget | None,
    build: Callable[[Sequence[Question]], SiloTuning],
) -> SiloTuning:
    """The workload of :func:`able_to_pay` alone.

    Args:
        build: makes a workload of fewer questions.

    Raises:
        BudgetExceeded, ConfigError: as :func:`able_to_pay`.
    """
    kept = able_to_pay(member, workload, budget)
    return workload if len(kept) == len(workload.questions) else build(kept)


def refuse_skipping(sets_aside: bool) -> None:
    """Raises: ConfigError if the study sets records aside: then none can be left out."""
    if sets_aside:
        raise ConfigError(
            "records that cannot pay are not left out of a study that sets records aside: what is "
            "left would have to be drawn again",
            where="--records",
            hint="--records refuse; or agree on a study without validation",
        )


def able_to_pay(
    owner: Owner, workload: Questioned, budget: Budget | None = None
) -> Sequence[Question]:
    """The questions that can pay for this study, in file order.

    They are what the study is about: its sampling rate, its noise and its records. A study that has
    begun keeps the records that it began with.

    Raises:
        BudgetExceeded: no record can pay, or the study asks for more than the pinned budget.
        ConfigError: too few records are left for the study; or those that it began with are not
            in the file; or it sets records aside.
    """
    study = owner.study
    refuse_skipping(study.validation is not None)
    if study.privacy is None:
        return workload.questions
    with Ledger(owner.ledger, owner.name) as ledger:
        records = identified(ledger, study, workload)
        begun = ledger.set_of(digest(study).hex())
        if begun is not None:
            return _begun_with(ledger, study, workload, records, begun)
        return _payers(ledger, study, workload, budget)


def _begun_with(
    ledger: Ledger, study: Study, workload: Questioned, records: Records, begun: Records
) -> Sequence[Question]:
    """The questions that the study began with, told apart by every identity that they have.

    A report with the same words may be another record: of a row that could not pay, or of another
    subject. With that one the run could not go on, and its budget would be lost.
    """
    from securefedcollm.federation.cotuning import contents_of

    kept = _only(workload.questions, records.exactly_in(begun))
    found = ledger.identify(contents_of(kept), column=study.subject)
    if begun.digest not in found.digests:
        raise ConfigError(
            f"these are not the records that the study began with: it had {len(begun):,} different "
            f"ones, of which {int(begun.exactly_in(records).sum()):,} are in this file",
            where="data",
            hint="put the file back as it was; nothing was spent on it since",
        )
    return kept


def _payers(
    ledger: Ledger, study: Study, workload: Questioned, budget: Budget | None
) -> Sequence[Question]:
    """Fewer records are sampled more often, under more noise, so repeat until all can pay."""
    from securefedcollm.federation.cotuning import contents_of, planned_event
    from securefedcollm.tuning.splits import dataset_fingerprint

    privacy = study.privacy
    assert privacy is not None
    kept: Sequence[Question] = workload.questions
    events = charge(study, workload)
    while True:
        records = ledger.identify(contents_of(kept), column=study.subject)
        paying = ledger.payers(
            dataset_fingerprint(kept),
            privacy.unit,
            events,
            study.sums,
            (privacy.epsilon, privacy.delta),
            records=records,
            study=digest(study).hex(),
            limit=budget,
        )
        if paying.all():
            return kept
        if not paying.any():
            standing = ledger.standing(records, unit=privacy.unit)
            raise BudgetExceeded(
                f"none of {len(kept):,} records can pay for this study: half of them or more have "
                f"spent ε = {standing.median:.3f} of {standing.budget.epsilon:g}; the worst has "
                f"{standing.left:.3f} left",
                hint="use other data, or agree on a study with a smaller privacy.epsilon",
            )
        kept = _only(kept, paying)
        if workload.events():  # its own noise, which depends on the number of records
            events = (planned_event(study, kept),)


def _only(questions: Sequence[Question], wanted: Any) -> Sequence[Question]:
    return [question for question, use in zip(questions, wanted, strict=True) if use]


def taking_part(whole: Sequence[Question], kept: Sequence[Question]) -> list[bool]:
    """Which of a file's questions :func:`without_spent` kept.

    By object: two records of the same words are two records, and only one may be able to pay.
    """
    kept_ones = {id(question) for question in kept}
    return [id(question) in kept_ones for question in whole]


def _kind(ledger: Ledger, study: Study) -> SumKind:
    """As what the study's run charges its noised sums: as it began, if it has."""
    mine = {digest(study).hex(), validation_study(study)}
    charged = (e.reserved for e in ledger.entries() if e.about.study in mine)
    return sum_kind(chain.from_iterable(charged)) or SUM_KIND


def _whole(study: Study, workload: PrivateRecords, kind: SumKind) -> Iterator[Events]:
    """What the whole study charges a record that it tunes on, and one that it sets aside."""
    yield tuple(repeated(charge(study, workload, kind), sums_left(study, 0, held=False)))
    if study.validation is not None:
        yield counting(study, kind).events(study.rounds)


def charge(study: Study, workload: PrivateRecords, kind: SumKind = SUM_KIND) -> Events:
    """What one sum of tuning charges these records, at worst."""
    if study.joint:
        step = joint_step(study, workload.update_size(0), kind)
        assert step is not None
        return (step.event(),)
    unit = silo_unit(study, workload.update_size, 0, kind=kind)
    return (unit.event(),) if unit else tuple(workload.events())


def identified(ledger: Ledger, study: Study, workload: PrivateRecords) -> Records:
    """The workload's records; from now on the ledger knows which they are.

    So older charges, which name a file but not its records, become charges of these records.
    """
    records = ledger.identify(workload.contents(), column=study.subject, also=workload.also)
    ledger.recognise(records, [workload.dataset, *workload.also])
    return records
