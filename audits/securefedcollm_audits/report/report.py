"""The privacy report of a run as data, every number with its evidence entry.

Only what the bundle holds: no metrics, no utility, nothing about a silo's records beyond what its
log says. ``place`` fields name entries as ``silo-1#12 (settled)``.
"""

from __future__ import annotations

import math
import time
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.entries import (
    Audited,
    Counted,
    Entry,
    Failed,
    Finished,
    Lost,
    Opening,
    Refused,
    Reserved,
    Round,
    Summed,
)
from securefedcollm.evidence.note import Checkpoint
from securefedcollm.federation.plan import counting_named, round_of, sum_name
from securefedcollm.privacy.accounting import TIGHT_SHARE
from securefedcollm.privacy.adversaries import AdversaryRow, per_adversary
from securefedcollm.privacy.events import DiscreteGaussian, Event, Events, merge
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.report import ASSUMPTIONS
from securefedcollm.study import Study
from securefedcollm_audits.report.claim import claim, may_end_early
from securefedcollm_audits.report.life import life
from securefedcollm_audits.report.polls import polls_of
from securefedcollm_audits.report.rows import (
    AuditRow,
    ChargeRow,
    PollRow,
    PrivateRow,
    QuestionRow,
    RoundRow,
    SiloRow,
    StudyRow,
)
from securefedcollm_audits.report.utility import Utility, read_utility
from securefedcollm_audits.report.words import meaning
from securefedcollm_audits.verification.case import SERVER, Case, needed, of
from securefedcollm_audits.verification.charged import decode_events
from securefedcollm_audits.verification.checks.budget import (
    Training,
    by_part,
    last_claim,
    trainings,
)
from securefedcollm_audits.verification.expected import Expected
from securefedcollm_audits.verification.progress import Header, header, progress
from securefedcollm_audits.verification.second_accountant import bracket
from securefedcollm_audits.verification.verdict import Verdict
from securefedcollm_audits.verification.verify import examine

MOST_POINTS = 80
"""Number of places in all silos' ledgers at which ε so far is computed: a tenth of a second
each."""

_CURVE = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4)
"""Values of δ, in addition to the study's, for the attacker-advantage curve."""

NOT_COVERED = (
    "Accuracy and other metrics, on any data and by anybody, but for the noised counts of a "
    "validation.",
    "Runs that were made to choose learning rates, clip norms or models.",
    "Checkpoints, log files and update norms that left a silo in other ways.",
    "The timing of a silo's process, and the fact that it took part in a round.",
    "A silo's own staff, who can see its records.",
)


class Report(msgspec.Struct, frozen=True):
    """The page's content, and the verdict on which it rests."""

    verdict: Verdict
    header: Header
    made: str
    """When this report was made: day, UTC, by this machine's clock."""
    claim: str
    meaning: list[str]
    """The meaning of ε and δ in plain words; empty if nothing is claimed."""
    unit: str | None
    epsilon: float | None
    delta: float | None
    adversaries: list[AdversaryRow]
    """Of the silo that spent most, at three δ."""
    advantage: list[tuple[float, float]]
    """(share of false alarms, greatest share of members that any test can then tell)."""
    rounds: list[RoundRow]
    silos: list[SiloRow]
    audits: list[AuditRow]
    parameters: dict[str, Any]
    registry: dict[str, Any]
    utility: Utility | None = None
    private: list[PrivateRow] = []
    """Of the rounds whose validation was opened."""
    life: list[StudyRow] = []
    """The earlier studies and this one, if it continues any."""
    questions: list[QuestionRow] = []
    """To documents, where the study lets members ask for them."""
    polls: list[PollRow] = []
    """Questions to records, likewise."""
    assumptions: tuple[str, ...] = ASSUMPTIONS
    not_covered: tuple[str, ...] = NOT_COVERED


def make_report(
    path: Path,
    results: Path | None = None,
    expected: Expected = Expected(),  # noqa: B008 - immutable
) -> tuple[Report, Case]:
    """Verify the bundle at ``path`` and sum it up. A bundle that fails has a report, which says so.

    Args:
        results: the run's ``results.json``, for accuracies: its maker's word, not evidence.
        expected: the verifier's own knowledge of the participants.

    Raises:
        ConfigError: there is no such file, or the results are of another run.
        EvidenceError: it is too broken to be summed up.
    """
    look = cache(examine)  # a bundle is read once, for its verdict and for its row
    verdict, bundle = examine(path, expected, look)
    if bundle is None:
        raise EvidenceError(
            f"{path}: {verdict.results[0].evidence}",
            hint="ask whoever made it for the bundle again; `audit bundle RUN` writes one",
        )
    case = Case(bundle)
    try:
        rows = life(verdict, case, [look(before) for before in expected.earlier])
        report = msgspec.structs.replace(_summed_up(verdict, case), life=rows)
    except (ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
        which = f"{path}, or a bundle of an earlier run" if expected.earlier else str(path)
        raise EvidenceError(
            f"{which}: too broken for a report ({error})",
            hint="`audit verify` says which entries are wrong",
        ) from None
    if results is not None:
        utility = read_utility(results, case, report.silos)
        report = msgspec.structs.replace(report, utility=utility)
    return report, case


def _summed_up(verdict: Verdict, case: Case) -> Report:
    points = max(2, MOST_POINTS // max(1, len(case.silos)))
    silos = [_silo(case.study, name, log, points) for name, log in case.silos.items()]
    worst = _worst(case)
    adversaries = _adversaries(case, worst) if worst else []
    privacy = case.study.privacy
    spent = _spent(silos) if privacy and not may_end_early(case) else None
    report = Report(
        verdict=verdict,
        header=header(case, verdict.results),
        made=time.strftime("%Y-%m-%d", time.gmtime()),
        claim=claim(case, spent),
        meaning=_meaning(case, spent),
        unit=privacy.unit if privacy else None,
        epsilon=spent[0] if spent else None,
        delta=spent[1] if spent else privacy.delta if privacy else None,
        adversaries=adversaries,
        advantage=advantage(_curve(case, worst)) if worst else [],
        rounds=_rounds(case),
        silos=silos,
        audits=_audits(case),
        parameters=_parameters(case),
        registry={},
        private=_private(case),
        questions=_questions(case),
        polls=polls_of(case),
    )
    return msgspec.structs.replace(report, registry=_registry(case, report))


def _meaning(case: Case, spent: tuple[float, float] | None) -> list[str]:
    privacy = case.study.privacy
    if privacy is None:
        return []
    epsilon, delta = spent or (privacy.epsilon, privacy.delta)
    return meaning(privacy.unit, epsilon, delta, privacy.epsilon)


def advantage(claims: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Greatest power of a membership test at each false-alarm rate, by every (ε, δ) at once.

    For a test with false-alarm rate α, (ε, δ)-DP allows a power of at most e^ε·α + δ and
    1 − e^−ε·(1 − α − δ) (Kairouz, Oh and Viswanath 2015); the least over all pairs holds.
    """
    rates = [0.001, 0.005, 0.01, 0.02, 0.03, *(i / 20 for i in range(1, 21))]
    found = []
    for alpha in rates:
        bounds = [
            bound
            for eps, delta in claims
            for bound in (
                math.exp(min(eps, 700.0)) * alpha + delta,
                1.0 - math.exp(-eps) * (1.0 - alpha - delta),
            )
        ]
        found.append((alpha, min(1.0, *bounds)))
    return found


def _spent(silos: list[SiloRow]) -> tuple[float, float] | None:
    """An (ε, δ) that holds for every silo; None if none states any."""
    claims = [(silo.claimed, silo.delta) for silo in silos if silo.claimed is not None]
    known = [(epsilon, delta) for epsilon, delta in claims if delta is not None]
    if not known:
        return None
    return max(epsilon for epsilon, _ in known), max(delta for _, delta in known)


def _worst(case: Case) -> tuple[Events, Terms] | None:
    """Events and filter terms of the silo whose releases cost most."""
    found = []
    for log in case.silos.values():
        for done in by_part(case.study, trainings(log)):
            events = _counted(done)
            terms = _terms(done)
            if events and terms and case.study.privacy:
                found.append((bracket(events, case.study.privacy.delta).low, events, terms))
    return max(found, key=lambda one: one[0])[1:] if found else None


def _counted(done: list[Training]) -> Events:
    return merge(event for training in done for event in training.counted)


def _terms(done: list[Training]) -> Terms | None:
    for training in done:
        if training.reserved:
            what = training.reserved[1]
            (first, *_) = merge(decode_events(what.events))
            return Terms(merge([first])[0], what.epsilon)
    return None


def _adversaries(case: Case, worst: tuple[Events, Terms]) -> list[AdversaryRow]:
    privacy = case.study.privacy
    assert privacy is not None
    deltas = [d for d in (privacy.delta * 10.0, privacy.delta, privacy.delta / 10.0) if d < 1.0]
    events, terms = worst
    return per_adversary(events, deltas, case.study.silos.colluders, terms=terms)


def _curve(case: Case, worst: tuple[Events, Terms]) -> list[tuple[float, float]]:
    """(ε, δ) of the strongest adversary at many δ: together they bound a test more tightly."""
    assert case.study.privacy is not None
    events, terms = worst
    deltas = (*_CURVE, case.study.privacy.delta)
    strongest = per_adversary(events, deltas, case.study.silos.colluders, terms=terms)[-1]
    return [(claim.epsilon, claim.delta) for claim in strongest.epsilons]


def _audits(case: Case) -> list[AuditRow]:
    return [
        AuditRow(
            audit=what.audit,
            setting=what.setting,
            claimed=what.claimed,
            bound=what.bound,
            delta=what.delta,
            held=what.held,
            other=what.study != case.digest.hex(),
            figures=what.figures,
            place=entry.place,
        )
        for log in case.logs.values()
        for entry, what in of(log, Audited)
    ]


def _questions(case: Case) -> list[QuestionRow]:
    """Adversary: a silo that spreads one member's questions over several names: one row has all."""
    limit = case.study.retrieval.questions if case.study.retrieval else 0
    last: dict[tuple[str, str], QuestionRow] = {}
    for silo, log in case.silos.items():
        answers: dict[str, int] = {}
        for entry, what in of(log, Counted):
            asker = case.log_name(what.asker) or what.asker
            answers[asker] = answers.get(asker, 0) + 1
            before = last.get((silo, asker))
            number = max(what.number, answers[asker], before.number if before else 0)
            last[silo, asker] = QuestionRow(silo, asker, number, limit, what.index, entry.place)
    return [last[pair] for pair in sorted(last)]


def _rounds(case: Case) -> list[RoundRow]:
    rows = []
    last = max((what.round for _, what in of(case.server, Opening)), default=-1)
    entries: dict[int, list[Entry]] = {}
    for entry in case.server:
        entries.setdefault(getattr(entry.what, "round", -1), []).append(entry)
    # Adversary: whoever numbers a round 2^53. Every round that began has an entry of its own.
    for round_ in range(min(last + 1, len(case.server))):
        mine = entries.get(round_, [])
        opening = next((e for e in reversed(mine) if isinstance(e.what, Opening)), None)
        summed = next((e for e in reversed(mine) if isinstance(e.what, Summed)), None)
        finished = next((e for e in mine if isinstance(e.what, Finished)), None)
        shown = opening.what if opening and isinstance(opening.what, Opening) else None
        rows.append(
            RoundRow(
                round=round_ + 1,
                name=sum_name(case.study, round_),
                survivors=shown.survivors if shown and summed else [],
                dropouts=_absent(case, shown if summed else None),
                agreements=len(shown.agreements) if shown else 0,
                attempts=1 + sum(isinstance(e.what, Failed) for e in mine),
                lost=any(isinstance(e.what, Lost) for e in mine),
                witnesses=_witnesses(case.bundle.heads[SERVER], finished or summed),
                opening=opening.place if opening else None,
                sum=summed.place if summed else None,
                place=finished.place if finished else None,
            )
        )
    return rows


def _private(case: Case) -> list[PrivateRow]:
    """What the validations opened, as the server's log says; `step-order` compares it with sums."""
    if case.study.validation is None:
        return []
    sums = {what.round: what for _, what in of(case.server, Summed)}
    names = {what.round: what.mechanism for _, what in of(case.server, Round)}
    rows = []
    for entry, what in of(case.server, Finished):
        if what.counts is None or what.round not in sums:
            continue
        silos = len(sums[what.round].survivors)
        made = counting_named(case.study, names.get(what.round))
        found = made.read(what.counts, silos)
        rows.append(
            PrivateRow(
                round=round_of(case.study, what.round) + 1,
                silos=silos,
                right=found.right,
                wrong=found.wrong,
                sigma=found.sigma,
                accuracy=found.accuracy,
                margin=found.margin,
                place=entry.place,
            )
        )
    return rows


def _absent(case: Case, shown: Opening | None) -> list[str]:
    return [name for name in case.roster.names if not shown or name not in shown.survivors]


def _witnesses(heads: list[Checkpoint], end: Entry | None) -> int:
    """Silos that cosigned a head over this entry."""
    if end is None:
        return 0
    return max((len(head.lines) - 1 for head in heads if head.size > end.seq), default=0)


def _silo(study: Study, name: str, log: list[Entry], points: int) -> SiloRow:
    parts = by_part(study, trainings(log))
    claims = [claim for part in parts for claim in last_claim(part)]
    limit = next((what for _, what in of(log, Reserved)), None)
    tight = bracket((), 0.5)
    if limit:  # no record is in two parts, so the worse one counts
        brackets = [bracket(_counted(part), TIGHT_SHARE * limit.delta) for part in parts]
        tight = max(brackets, key=lambda one: one.high)
    worst = max(claims, key=lambda claim: claim[1].epsilon, default=None)
    spent = worst[1].epsilon if worst else None
    return SiloRow(
        name=name,
        claimed=spent,
        accountant=worst[1].accountant if worst else "",
        limit=limit.epsilon if limit else None,
        left=max(0.0, limit.epsilon - spent) if limit and spent is not None else None,
        delta=limit.delta if limit else None,
        low=tight.low,
        high=tight.high,
        method=tight.method,
        refusals=sum(isinstance(entry.what, Refused) for entry in log),
        charges=[row for part in parts for row in _charges(part, points)],
        place=worst[0].place if worst else None,
    )


def _charges(done: list[Training], points: int) -> list[ChargeRow]:
    every = max(1, math.ceil(len(done) / points))
    terms, rows = _terms(done), []
    counted: Events = ()
    for index, training in enumerate(done):
        counted = merge((*counted, *training.counted))
        wanted = terms and (index % every == 0 or index == len(done) - 1)
        found = training.settled or training.reserved
        if found is None:
            continue
        event = decode_events(found[1].events)[0]
        discrete = event if isinstance(event, DiscreteGaussian) else None
        limit = training.reserved[1] if training.reserved else None
        rows.append(
            ChargeRow(
                round=found[1].round + 1,
                state=_state(training),
                mechanism=_mechanism(event),
                noise_multiplier=event.noise_multiplier,
                sensitivity=discrete.sensitivity if discrete else None,
                honest_shares=discrete.honest if discrete else None,
                cumulative=filter_within(counted, limit.delta, 0.0, terms)
                if wanted and limit and terms
                else None,
                reserved=training.reserved[0].place if training.reserved else None,
                settled=training.settled[0].place if training.settled else None,
            )
        )
    return rows


def _state(training: Training) -> str:
    if training.voided:
        return "given back"
    return "settled" if training.settled else "at the worst case"


def _mechanism(event: Event) -> str:
    fields = msgspec.to_builtins(event)
    kind = fields.pop("kind")
    parts = [f"{k} = {v:.5g}" if isinstance(v, float) else f"{k} = {v}" for k, v in fields.items()]
    return f"{kind}: {', '.join(parts)}"


def _parameters(case: Case) -> dict[str, Any]:
    study = case.study
    return {
        "silos": study.silos.count,
        **needed(study),
        "silos that may collude with the server": study.silos.colluders,
        "rounds": study.rounds,
        **_weights(study),
        **_tuned(study),
        "small model" if study.models.llm else "model": study.models.slm.source,
        **({"large model": study.models.llm.source} if study.models.llm else {}),
    }


def _weights(study: Study) -> dict[str, str]:
    """What each silo's update counts, where they differ: public, and signed by all."""
    weights = study.aggregation.weights
    if weights is None:
        return {}
    found = ", ".join(f"{silo} {weight:g}" for silo, weight in sorted(weights.items()))
    return {"weights of the silos (public, declared by themselves)": found}


def _tuned(study: Study) -> dict[str, str]:
    """What the silos tune."""
    if study.task.kind == "own":
        return {"training": "the silos' own code"}
    found = {"adapter": study.adapter.summary}
    if study.continues is not None:
        links = ", ".join(f"{link.study[:16]}…" for link in study.continues.earlier)
        found["starts from the adapters of the studies"] = links
    return found


def _registry(case: Case, report: Report) -> dict[str, Any]:
    """The run for a public register of deployments: plain names, to be fitted to its form."""
    privacy = case.study.privacy
    charge = next((c for silo in report.silos for c in silo.charges), None)
    return {
        "deployment": case.study.study,
        "study_digest": case.digest.hex(),
        "evidence_sha256": report.verdict.sha256,
        "data_product": "values tuned by the silos' own code"
        if case.study.task.kind == "own"
        else "low-rank adapters of a language model",
        "model_of_trust": "no trusted curator: noise is added inside each silo, sums are masked",
        "privacy_unit": report.unit,
        "neighbouring_relation": "add or remove one unit (zero-out)",
        "variant": "approximate differential privacy (ε, δ)",
        "epsilon": report.epsilon,
        "delta": report.delta,
        "budget_epsilon": privacy.epsilon if privacy else None,
        "releases": progress(case).done,
        "mechanism": charge.mechanism if charge else None,
        "accountants": sorted({a for s in report.silos for a in (s.accountant, s.method) if a}),
        "not_covered": list(NOT_COVERED),
    }
